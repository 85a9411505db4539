"""The cron tables of a stream in the job store: the port, its values, and the fields of the hash.

The hash has ``version``, and by the name of a table ``table/``, ``rule/``, ``last/``, ``ran/`` and
``paused/``; by the consumer name of a service ``host/``.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import orjson

#: Age (seconds) at which the record of a service that fell silent is deleted.
FORGET_AFTER_S = 7 * 24 * 3600
#: A cursor that is further ahead of the clock (seconds) is left over from a clock that was wrong.
WRONG_CLOCK_S = 24 * 3600


class StoredTable(NamedTuple):
    """A table for publication: its name, what determines its ticks, and its JSON."""

    name: str
    rule: str
    data: bytes


class TickJob(NamedTuple):
    """The job of one tick. ``data`` empty: the tick is dropped."""

    name: str
    tick_s: int
    job_id: str = ""
    data: bytes = b""


class Taken(IntEnum):
    """What became of a tick."""

    DONE = 1
    #: Another host took it, or a later one.
    LATE = 2
    #: The table has changed since it was read.
    OUTDATED = 3
    PAUSED = 4
    #: By the store's clock it is not due.
    EARLY = 5


class TakenTick(NamedTuple):
    """Result of one call, and the table's last tick after it."""

    outcome: Taken
    cursor_s: int


class LastRun(NamedTuple):
    """The last tick that was enqueued: the entry and the id of its job."""

    tick_s: int
    entry_id: str
    job_id: str


class CronPause(NamedTuple):
    """A table that an operator paused: since when (unix seconds, the store's clock) and why."""

    wall_since_s: float
    note: str


class CronHost(NamedTuple):
    """What a service has in its file: fingerprint, and when it last said so (unix seconds)."""

    digest: str
    wall_seen_s: float


class CronHash(NamedTuple):
    """Everything that is kept for one stream. ``version`` is empty where nothing was ever published;
    ``digest`` is the fingerprint of the published tables. The rest is by name."""

    version: bytes
    digest: str
    tables: dict[str, bytes]
    cursors_s: dict[str, int]
    runs: dict[str, LastRun]
    pauses: dict[str, CronPause]
    hosts: dict[str, CronHost]


class CronStore(Protocol):
    """Cron tables as the reaper uses them. Every call raises as those of the other ports."""

    def cron_publish(self, stream: str, service: str, digest: str, tables: Sequence[StoredTable]) -> bool:
        """Record what a service has in its file and, if that has changed since the service last said so,
        make it the tables of the stream. True if they changed.

        A service that has no tables and never had any changes nothing. The first tick of a new or changed
        rule is the first after now.
        """

    def cron_clock(self, stream: str) -> tuple[bytes, float]:
        """Version of the tables (empty: there are none), and then the store's clock (unix seconds)."""

    def cron_hash(self, stream: str) -> CronHash:
        """Everything that is kept for the stream."""

    def cron_take(self, stream: str, version: bytes, tick: TickJob) -> TakenTick:
        """Take a tick and append its job, in one atomic step; each tick is taken at most once."""

    def cron_pause(self, stream: str, name: str, note: str) -> None:
        """Drop the ticks of a table until `cron_resume`."""

    def cron_resume(self, stream: str, name: str) -> bool:
        """End a pause: the next tick is the first after now. False where the table was not paused."""


def parse_cron_hash(fields: Mapping[bytes, bytes]) -> CronHash:
    """The fields of the hash. What has another form is left out: other programs can write to it."""
    found = CronHash(fields.get(b"version", b""), _text(fields.get(b"digest", b"")), {}, {}, {}, {}, {})
    for field, value in fields.items():
        kind, _, raw_name = field.partition(b"/")
        name = _text(raw_name)
        match kind:
            case b"table":
                found.tables[name] = value
            case b"last" if _is_time(value):
                found.cursors_s[name] = int(value)
            case b"ran" if (parts := _text(value).split(" ", 2)) and len(parts) == 3 and parts[0].isdecimal():
                found.runs[name] = LastRun(int(parts[0][:15]), parts[1], parts[2])
            case b"paused":
                found.pauses[name] = _pause(value)
            case b"host" if (pair := _text(value).split(" ")) and len(pair) == 2 and pair[1].isdecimal():
                found.hosts[name] = CronHost(pair[0], float(pair[1][:15]))
    return found


def encode_pause(wall_now_s: float, note: str) -> bytes:
    """The value of a pause."""
    # A terminal may pass bytes that are no UTF-8.
    return orjson.dumps({"since": wall_now_s, "note": note.encode("utf-8", "replace").decode()})


def _pause(value: bytes) -> CronPause:
    """Any value pauses the table, also one that was written with another tool."""
    try:
        pause = orjson.loads(value)
        return CronPause(float(pause["since"]), str(pause.get("note", "")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return CronPause(0.0, _text(value))


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _is_time(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 15
