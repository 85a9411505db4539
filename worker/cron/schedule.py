"""Schedules of cron tables: when a tick is due, and which of the due ticks are enqueued.

Times are unix seconds; a tick is a whole second. Daylight saving time follows Debian's cron (library
``cronsim``). For a schedule with a fixed hour and minute, a tick in the skipped hour is due at the end of the
gap, and a tick in the repeated hour is due the first time only.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

from ..config.durations import MAX_DURATION_S, parse_duration

#: A tick that is later than this (seconds) was missed. Restarts of a service take less.
GRACE_S = 60
#: Missed ticks are counted up to here: a secondly schedule misses 86,400 a day.
MAX_COUNTED = 1000
#: Longest schedule and name of a time zone, in characters.
_MAX_CHARS = 256
_NICKNAMES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip
_EVERY = "@every"
#: Window in which the latest tick is looked for first (seconds), and its growth.
_FIRST_WINDOW_S, _GROWTH = 60, 16


class Schedule(Protocol):
    """When a table's job is due."""

    def ticks(self, after_s: int) -> Iterator[int]:
        """The ticks after a time, in order. It ends where none follows within 50 years."""


class _Every:
    """Ticks at whole multiples of an interval since 1970, so that all hosts compute the same ones."""

    def __init__(self, interval_s: int) -> None:
        self._interval_s = interval_s

    def ticks(self, after_s: int) -> Iterator[int]:
        tick = after_s - after_s % self._interval_s
        while True:
            tick += self._interval_s
            yield tick


class _Cron:
    """Ticks of a cron expression in a time zone."""

    def __init__(self, expression: str, zone: tzinfo) -> None:
        self._expression = expression
        self._zone = zone

    def ticks(self, after_s: int) -> Iterator[int]:
        from cronsim import CronSim  # few services have a schedule

        for tick in CronSim(self._expression, datetime.fromtimestamp(after_s, self._zone)):
            tick_s = int(tick.timestamp())
            # Started in the second pass of a repeated hour, the library begins with ticks of the first pass.
            if tick_s > after_s:
                yield tick_s


def parse_schedule(text: str, zone: str = "UTC") -> Schedule:
    """A schedule: five fields of cron, six with seconds first, ``@daily`` and the like, or ``@every 10m``.

    Raises ValueError, which says what is wrong.
    """
    from cronsim import CronSimError

    if len(text) > _MAX_CHARS:
        raise ValueError(f"schedule has {len(text)} characters, more than {_MAX_CHARS}")
    timezone = _parse_zone(zone)
    word, _, rest = text.strip().partition(" ")
    if word == _EVERY:
        return _Every(_parse_interval(rest))
    if word.startswith("@") and word not in _NICKNAMES:
        raise ValueError(f"schedule {text!r}: known are {', '.join(_NICKNAMES)} and @every 10m")
    try:
        found = _Cron(_NICKNAMES.get(text.strip(), text), timezone)
        first = next(found.ticks(0), None)
    except CronSimError as error:
        raise ValueError(f"schedule {text!r}: {error}; say for example '0 3 * * *'") from None
    if first is None:
        raise ValueError(f"schedule {text!r} is never due")
    return found


def _parse_interval(text: str) -> int:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ValueError(f"schedule @every: {error}") from None
    if seconds != int(seconds) or not 1 <= seconds <= MAX_DURATION_S:
        raise ValueError(f"schedule @every {text.strip()}: whole seconds are needed, from 1s to 366d")
    return int(seconds)


def _parse_zone(name: str) -> tzinfo:
    if name == "UTC":  # also on a machine without time zone data
        return UTC
    from zoneinfo import ZoneInfo

    try:
        if len(name) > _MAX_CHARS:
            raise ValueError(name)
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: a folder of zones, such as "America"
        raise ValueError(
            f"timezone {name[:80]!r} is not known: say an IANA name such as Europe/Berlin; "
            "a machine without time zone data needs the package tzdata"
        ) from None


def next_tick(schedule: Schedule, after_s: int) -> int | None:
    """The first tick after a time; None where there is none."""
    return next(schedule.ticks(after_s), None)


class DueTicks(NamedTuple):
    """What to do at a time. ``skip_to``: the last tick to be dropped, None if there is none; ``enqueue``: the
    ticks that get a job; ``missed``: ticks without a job of their own, counted up to `MAX_COUNTED`."""

    skip_to: int | None
    enqueue: list[int]
    missed: int


def due_ticks(schedule: Schedule, missed: str, cursor_s: int, wall_now_s: float) -> DueTicks:
    """The ticks after the cursor (the last tick that was decided) that are due.

    A tick that is at most `GRACE_S` late gets its job. Older ones were missed. With ``skip`` they are
    dropped; with ``once`` all due ticks together get one job, that of the latest.
    """
    now_s = math.floor(wall_now_s)
    first = next_tick(schedule, cursor_s)
    if first is None or first > now_s:
        return DueTicks(None, [], 0)
    if first >= wall_now_s - GRACE_S:
        return DueTicks(None, _between(schedule, cursor_s, now_s), 0)
    if missed == "once":
        latest = _latest(schedule, cursor_s, now_s)
        return DueTicks(None, [latest], _count(schedule, cursor_s, latest) - 1)
    skip_to = _latest(schedule, cursor_s, math.ceil(wall_now_s - GRACE_S) - 1)
    return DueTicks(skip_to, _between(schedule, skip_to, now_s), _count(schedule, cursor_s, skip_to))


def _between(schedule: Schedule, after_s: int, upto_s: int) -> list[int]:
    found = []
    for tick in schedule.ticks(after_s):
        if tick > upto_s:
            break
        found.append(tick)
    return found


def _count(schedule: Schedule, after_s: int, upto_s: int) -> int:
    ticks = takewhile(lambda tick: tick <= upto_s, schedule.ticks(after_s))
    return sum(1 for _ in islice(ticks, MAX_COUNTED))


def _latest(schedule: Schedule, after_s: int, upto_s: int) -> int:
    """The last tick after ``after_s`` and up to ``upto_s``; there is one.

    It looks at few ticks also where years were missed.
    """
    window_s = _FIRST_WINDOW_S
    while not (found := _between(schedule, max(after_s, upto_s - window_s), upto_s)):
        window_s *= _GROWTH
    return found[-1]
