"""A new job: its fields, their checks, and the JSON on the wire."""

# orjson writes null for NaN and infinities, which must be refused.
import json
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import orjson

from .conditions import EXPIRES_AT, NOT_BEFORE, parse_time
from .envelope import (
    MAX_METADATA_ENTRIES,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    MAX_NAME_CHARS,
    MAX_NESTING,
    nesting_of,
    read_envelope,
)
from .errors import MalformedJob
from .extension import extension
from .results import KEEP_RESULT
from .safe_text import is_unicode
from .settings import MAX_PAYLOAD_BYTES

#: Longest delay and timeout, a hundred years: the sum with the store's clock stays exact.
MAX_SECONDS = 3_155_760_000

#: Brackets from which on a job is read back to see whether it nests too deeply: far below any limit.
_NESTING_LOOKED_AT = 200

_TENANT = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
#: msgspec writes these: with Z for UTC, and with the private fields of dataclasses.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


#: A point in time as callers give it.
Time = datetime | str | float


class NewJob(NamedTuple):
    """A job to be enqueued. ``delay`` and ``timeout`` are seconds; ``stream`` and ``id`` None are chosen.

    ``run_at`` and ``expires_at`` are times: RFC 3339, unix seconds, or a `datetime` with a time zone.

    With ``keep_result``, what its handler returns is kept for `Producer.result`.
    """

    type: str
    payload: Any = None
    tenant_id: str = ""
    project_id: str = ""
    stream: str | None = None
    id: str | None = None
    metadata: Mapping[str, str] | None = None
    delay: float | None = None
    timeout: float | None = None
    run_at: Time | None = None
    expires_at: Time | None = None
    keep_result: bool = False


def new_job(item: NewJob | Mapping[str, Any]) -> NewJob:
    """The job of a mapping with its fields. Raises ValueError for a field that a job has not."""
    if isinstance(item, NewJob):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"a job is a NewJob or a mapping with its fields, not {item!r:.80}")
    if unknown := [field for field in item if field not in NewJob._fields]:
        raise ValueError(f"a job has no field {', '.join(sorted(map(repr, unknown))):.200}")
    if "type" not in item:
        raise ValueError("a job needs a type")
    return NewJob(**item)


def home_stream(type: str) -> str:
    """The stream of a job that names none: that of its type, else the first default stream."""
    return extension().stream_of_type.get(type, extension().streams[0].stream)


def encode_job(job: NewJob, wall_now_s: float) -> tuple[str, bytes]:
    """The job's id and its JSON, checked by the rules that the service reads it by. Raises ValueError."""
    id = job.id if job.id is not None else os.urandom(16).hex()
    _check_names(id, job)
    metadata = _with_times(_metadata(job), job, wall_now_s)
    if metadata is not None:
        _check_metadata(metadata)
    wire: dict[str, Any] = {"id": id, "type": job.type}
    if job.tenant_id:
        wire["tenant_id"] = job.tenant_id
    if job.project_id:
        wire["project_id"] = job.project_id
    wire["payload"] = job.payload
    if metadata is not None:
        wire["metadata"] = metadata
    wire["created_at"] = _rfc3339(wall_now_s)
    if job.timeout is not None:
        wire["timeout"] = _seconds("timeout", job.timeout)
    data = _wire_json(wire)
    # A service with the default limit would dead-letter it at once.
    if len(data) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"job {id} is {len(data)} bytes of JSON, more than {MAX_PAYLOAD_BYTES}")
    brackets = data.count(b"[") + data.count(b"{")
    if isinstance(job.payload, orjson.Fragment) or brackets > _NESTING_LOOKED_AT:
        _check_readable(id, data)
    return id, data


def _metadata(job: NewJob) -> dict[str, str] | None:
    """Metadata of the job, with the caller's span if the caller makes traces. Raises ValueError."""
    if job.metadata is not None and not isinstance(job.metadata, Mapping):
        raise ValueError(f"metadata maps text to text, it cannot be {job.metadata!r:.80}")
    metadata = None if job.metadata is None else dict(job.metadata)
    if "opentelemetry.sdk.trace" in sys.modules:
        from .telemetry.otel_context import with_traceparent  # only then: it needs the library

        metadata = with_traceparent(metadata)
    if not isinstance(job.keep_result, bool):
        raise ValueError(f"keep_result is {job.keep_result!r:.80}: True or False is needed")
    return {**(metadata or {}), KEEP_RESULT: "true"} if job.keep_result else metadata


def _with_times(metadata: dict[str, str] | None, job: NewJob, wall_now_s: float) -> dict[str, str] | None:
    """Metadata with the job's times. Raises ValueError for times that no service could read."""
    times: dict[str, str] = {}
    delay_s = None if job.delay is None or job.delay == 0 else _seconds("delay", job.delay)
    if delay_s is not None and job.run_at is not None:
        raise ValueError("give delay or run_at, not both")
    if delay_s is not None:
        times[NOT_BEFORE] = _rfc3339(wall_now_s + delay_s)
    if job.run_at is not None:
        times[NOT_BEFORE] = _checked_time("run_at", job.run_at)
    if job.expires_at is not None:
        times[EXPIRES_AT] = _checked_time("expires_at", job.expires_at)
    for key in (NOT_BEFORE, EXPIRES_AT):
        if metadata and metadata.get(key):
            _checked_time(f"metadata.{key}", metadata[key])
    return {**(metadata or {}), **times} if times else metadata


def _checked_time(field: str, value: Any) -> str:
    """A time as the wire has it. Raises ValueError."""
    if isinstance(value, datetime):
        value = value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{field} is {value!r:.80}: give RFC 3339, unix seconds or a datetime")
    text = value if isinstance(value, str) else f"{value:.6f}"
    try:
        parse_time(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return text


def check_text(field: str, value: Any) -> None:
    """Any text that a service accepts: not empty, bounded, and valid in UTF-8."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is {value!r:.80}: a text that is not empty is needed")
    if len(value) > MAX_NAME_CHARS:
        raise ValueError(f"{field} {value!r:.80} has {len(value)} characters, more than {MAX_NAME_CHARS}")
    if not is_unicode(value):
        raise ValueError(f"{field} {value!r:.80} has half a surrogate pair")


def _check_names(id: str, job: NewJob) -> None:
    check_text("id", id)
    check_text("type", job.type)
    for field, value in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
        if not isinstance(value, str) or value:
            check_tenant(field, value)


def check_tenant(field: str, value: Any) -> None:
    """Raises ValueError for a tenant or project that a service refuses."""
    if not isinstance(value, str) or not _TENANT.fullmatch(value):
        raise ValueError(f"{field} {value!r:.80} does not match {_TENANT.pattern}")


def _check_metadata(metadata: Mapping[Any, Any]) -> None:
    if len(metadata) > MAX_METADATA_ENTRIES:
        raise ValueError(f"metadata has {len(metadata)} entries, more than {MAX_METADATA_ENTRIES}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata maps text to text, not {key!r:.80} to {value!r:.80}")
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            raise ValueError(
                f"metadata {key!r:.80}: a key has at most {MAX_METADATA_KEY_CHARS} characters "
                f"and a value {MAX_METADATA_VALUE_CHARS}"
            )
        if not is_unicode(key) or not is_unicode(value):
            raise ValueError(f"metadata {key!r:.80} has half a surrogate pair")


def _check_readable(id: str, data: bytes) -> None:
    try:
        read_envelope(data)
    except MalformedJob as error:
        raise ValueError(f"job {id} would be refused: {error}") from None
    if (levels := nesting_of(data)) > MAX_NESTING:
        raise ValueError(f"job {id} has {levels} levels of lists and objects, more than {MAX_NESTING}")


def _wire_json(wire: dict[str, Any]) -> bytes:
    """The JSON of a job. Raises ValueError for a payload that JSON cannot hold."""
    payload = wire["payload"]
    try:
        try:
            data = orjson.dumps(wire, _fragment, _OPTIONS)
        except orjson.JSONEncodeError:
            # It refuses integers beyond 64 bits, keys that are numbers, and 255 levels. msgspec says what
            # else may be wrong.
            data = orjson.dumps({**wire, "payload": _fragment(payload)}, option=orjson.OPT_NON_STR_KEYS)
            payload = msgspec.to_builtins(payload, enc_hook=_checked)
        if b"null" in data:
            _refuse_nan(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the payload is no JSON: {error}") from None
    return data


def _fragment(value: Any) -> orjson.Fragment:
    """What msgspec takes and orjson does not: structs, sets, bytes, `msgspec.Raw`, ..."""
    data = msgspec.json.encode(value)
    msgspec.json.decode(data)  # a `msgspec.Raw` may hold anything
    return orjson.Fragment(data)


def _builtins(value: Any) -> Any:
    return None if isinstance(value, orjson.Fragment) else msgspec.to_builtins(value, enc_hook=_checked)


def _checked(value: Any) -> None:
    """A `msgspec.Raw` in a payload: `_fragment` has seen that it holds no NaN."""


_refuse_nan = json.JSONEncoder(allow_nan=False, default=_builtins).encode


def _seconds(field: str, value: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= MAX_SECONDS:
        raise ValueError(
            f"{field} is {value!r:.80}: a number of seconds above 0 is needed, at most {MAX_SECONDS:,}"
        )
    return value


def _rfc3339(wall_s: float) -> str:
    second, ms = divmod(int(wall_s * 1000), 1000)
    return f"{_rfc3339_second(second)}.{ms:03d}Z"


@lru_cache(maxsize=1)  # thousands of jobs share a second
def _rfc3339_second(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
