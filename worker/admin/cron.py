"""Cron tables of a deployment: next and last tick, the last job, pauses, and services with another file."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..cron.enqueuer import cron_job
from ..cron.schedule import GRACE_S, next_tick, parse_schedule
from ..cron.table import CronTable, decode_table, digest
from ..errors import ConfigurationError, StoreRefused
from ..extension import extension
from ..keys import Source
from ..store.announcements import STOPPED_AFTER_S, Announcement, suggestion
from ..store.cron import CronHash, CronPause, LastRun
from .find_job import JobFinder
from .refusals import refusal
from .words import format_duration

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Entries, retries and dead letters of a stream that are searched for the last job of a table.
_SCAN_LIMIT = 2000
_NO_TABLES = digest([])


class CronEntry(NamedTuple):
    """An active table. ``next_s`` (unix seconds) is None while it is paused or never due again.

    ``late_s``: for how long a tick has been due and not taken.
    """

    table: CronTable
    next_s: int | None
    last: LastRun | None
    pause: CronPause | None
    late_s: float = 0.0


class CronHashes(NamedTuple):
    """What the store keeps for some streams, at a time of its clock (unix seconds).

    ``refused``: the streams whose key the store refuses, each with the key and its repair in words.
    """

    hashes: dict[str, CronHash]
    wall_now_s: float
    refused: dict[str, str]


def read_cron(store: "OperatorStore", streams: Iterable[str]) -> CronHashes:
    """The cron tables of the streams."""
    found = CronHashes({}, 0.0, {})
    for stream in streams:
        try:
            found.hashes[stream] = store.cron_hash(stream)
        except StoreRefused as error:
            found.refused[stream] = refusal(
                f"cron tables of {stream}", error, partial(store.cron_faults, stream)
            )
            continue
        if found.hashes[stream].tables:
            found = found._replace(wall_now_s=store.wall_now_s(stream))
    return found


def cron_entries(found: CronHashes) -> list[CronEntry]:
    """The tables by name. One that this version cannot read is left out."""
    entries = []
    for stored in found.hashes.values():
        for name, data in stored.tables.items():
            try:
                table = decode_table(data)
                schedule = parse_schedule(table.schedule, table.timezone)
            except ValueError:
                continue
            pause = stored.pauses.get(name)
            due_s = next_tick(schedule, stored.cursors_s.get(name, int(found.wall_now_s)))
            late_s = max(0.0, found.wall_now_s - due_s) if due_s and not pause else 0.0
            next_s = None if pause else next_tick(schedule, int(found.wall_now_s))
            entries.append(CronEntry(table, next_s, stored.runs.get(name), pause, late_s))
    return sorted(entries, key=lambda entry: entry.table.name)


def late_entries(entries: Iterable[CronEntry]) -> list[str]:
    """Tables with a tick that no service takes, in words."""
    return [
        f"{entry.table.name} is {format_duration(entry.late_s)} late: no service takes its ticks"
        for entry in entries
        if entry.late_s > GRACE_S
    ]


def differing_hosts(found: CronHashes) -> list[tuple[str, str, bool]]:
    """Running services whose file differs from the active tables.

    Each is a stream, the service's name, and whether its file has no tables for the stream at all.
    """
    return [
        (stream, service, host.digest == _NO_TABLES)
        for stream, stored in found.hashes.items()
        for service, host in sorted(stored.hosts.items())
        if host.digest != stored.digest
        and stored.tables
        and abs(found.wall_now_s - host.wall_seen_s) < STOPPED_AFTER_S
    ]


def cron_sources(given: Sequence[Source], announced: Iterable[Announcement]) -> list[Source]:
    """The streams that were given, or else the default ones and those that services read."""
    every = {source for one in announced for source in one.sources}
    return list(given) or sorted({*extension().streams, *every})


def select_entries(entries: Sequence[CronEntry], names: Iterable[str]) -> list[CronEntry]:
    """The tables with these names. Raises `ConfigurationError` for an unknown one."""
    by_name = {entry.table.name: entry for entry in entries}
    for name in names:
        if name not in by_name:
            hint = suggestion(name, by_name) if by_name else "there are none"
            raise ConfigurationError(f"no cron table is named {name!r:.80}: {hint}")
    return [by_name[name] for name in names]


def manual_job(table: CronTable, wall_now_s: float) -> tuple[str, bytes]:
    """A job of the table outside of its schedule: an id of its own, and its JSON."""
    id = f"cron:{table.name}:run:{os.urandom(8).hex()}"
    return id, cron_job(table, id, int(wall_now_s), wall_now_s)


def last_state(store: "OperatorStore", source: Source, entry: CronEntry) -> str:
    """The state of the last job, such as ``running`` or ``dead``; ``finished`` also if it is in no place any
    more, empty if there was none or not all places were searched. Raises `StoreRefused`."""
    if entry.last is None:
        return ""
    finder = JobFinder(store, [source], [], _SCAN_LIMIT)
    locations = finder.find_in(source, entry.last.job_id)
    if locations:
        return locations[0].state
    return "" if finder.incomplete else "finished"
