"""The ``[[cron]]`` tables of the configuration file: read and checked."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..envelope import read_header
from ..new_job import NewJob, encode_job, home_stream
from ..store.announcements import suggestion
from .schedule import parse_schedule
from .table import CronTable, encode_table

#: Most bytes of all tables as JSON: they are sent to the reaper in one message.
_MAX_BYTES = 64 * 1024
#: Names are part of job ids, labels and keys.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MISSED = ("skip", "once")
#: Keys of a table, and the types of their values.
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "schedule": (str,), "timezone": (str,), "type": (str,), "stream": (str,),
    "tenant_id": (str,), "project_id": (str,), "metadata": (dict,), "timeout": (int, float), "missed": (str,),
}  # fmt: skip
_REQUIRED = ("name", "schedule", "type")
#: Set for each job, so a table cannot set them.
_OWN_METADATA = ("idempotency_key", "cron_tick")


def parse_cron_tables(found: Any, streams: Sequence[str]) -> tuple[CronTable, ...]:
    """Tables as the file has them, checked. ``streams`` are those of the service.

    Raises ValueError, which names the table and says what is wrong.
    """
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError("cron is not an array of tables: write [[cron]]")
    tables: dict[str, CronTable] = {}
    for number, one in enumerate(found, 1):
        label = repr(one["name"])[:80] if isinstance(one.get("name"), str) else f"number {number}"
        try:
            table = _parse_table(one, streams)
            if table.name in tables:
                raise ValueError("this name is given twice")
        except ValueError as error:
            raise ValueError(f"[[cron]] {label}: {error}") from None
        tables[table.name] = table
    size = sum(len(encode_table(table)) for table in tables.values())
    if size > _MAX_BYTES:
        raise ValueError(f"[[cron]]: the tables have {size} bytes of JSON, more than {_MAX_BYTES}")
    return tuple(tables.values())


def _parse_table(found: Mapping[str, Any], streams: Sequence[str]) -> CronTable:
    _check_keys(found)
    if not _NAME.fullmatch(found["name"]):
        raise ValueError(f"the name does not match {_NAME.pattern}")
    parse_schedule(found["schedule"], found.get("timezone", "UTC"))
    if found.get("missed", "skip") not in _MISSED:
        raise ValueError(f"missed is {found['missed']!r:.80}: say {' or '.join(map(repr, _MISSED))}")
    stream = found.get("stream") or home_stream(found["type"])
    if stream not in streams:
        raise ValueError(
            f"its jobs go to the stream {stream!r:.80}, which this service does not read: give stream = one "
            f"of {', '.join(streams):.400}"
        )
    for key in _OWN_METADATA:
        if key in found.get("metadata", {}):
            raise ValueError(f"metadata {key!r} is set for each tick, so it cannot be given")
    values = {key: value for key, value in found.items() if key != "payload"} | {"stream": stream}
    return CronTable(**values, payload=_payload(found))


def _check_keys(found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if key == "payload":
            continue
        if key not in _KINDS:
            raise ValueError(f"no key {key!r:.80}; {suggestion(key[:64], [*_KINDS, 'payload'])}")
        if type(value) not in _KINDS[key]:  # exactly, because a boolean is an integer to Python
            raise ValueError(f"{key} is {value!r:.80}: {_KINDS[key][-1].__name__} is needed")
    if missing := [key for key in _REQUIRED if key not in found]:
        raise ValueError(f"{', '.join(missing)} is missing")


def _payload(found: Mapping[str, Any]) -> str:
    """The payload as JSON. Raises ValueError for a job that the service would refuse."""
    job = NewJob(
        found["type"], found.get("payload"), found.get("tenant_id", ""), found.get("project_id", ""),
        metadata={**found.get("metadata", {}), **dict.fromkeys(_OWN_METADATA, "")},
        timeout=found.get("timeout"),
    )  # fmt: skip
    _, data = encode_job(job, 0.0)
    return bytes(read_header(data).payload).decode()
