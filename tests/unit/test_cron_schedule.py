"""Schedules: which ticks are due, daylight saving time, missed ticks, wrong texts."""

import re
from datetime import UTC, datetime
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.cron.schedule import (
    GRACE_S,
    MAX_COUNTED,
    DueTicks,
    due_ticks,
    next_tick,
    parse_schedule,
)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def ticks(schedule: str, zone: str, after: str, count: int) -> list[str]:
    found = islice(parse_schedule(schedule, zone).ticks(at(after)), count)
    return [datetime.fromtimestamp(tick, UTC).strftime("%m-%d %H:%M:%S") for tick in found]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("0 3 * * *", ["01-02 03:00:00", "01-03 03:00:00"]),
        ("@daily", ["01-03 00:00:00", "01-04 00:00:00"]),
        ("@hourly", ["01-02 03:00:00", "01-02 04:00:00"]),
        ("@every 10m", ["01-02 02:40:00", "01-02 02:50:00"]),
        ("@every 1h30m", ["01-02 03:00:00", "01-02 04:30:00"]),
        ("*/20 30 2 * * *", ["01-02 02:30:20", "01-02 02:30:40"]),
        ("0 9 * * MON-FRI", ["01-02 09:00:00", "01-05 09:00:00"]),
        ("0 0 L * *", ["01-31 00:00:00", "02-28 00:00:00"]),
    ],
)
def test_ticks_follow_in_order(schedule: str, expected: list[str]) -> None:
    assert ticks(schedule, "UTC", "2026-01-02T02:30:00", 2) == expected


def test_a_schedule_is_in_its_time_zone() -> None:
    assert ticks("0 3 * * *", "Europe/Berlin", "2026-01-02T00:00:00", 1) == ["01-02 02:00:00"]
    assert ticks("0 3 * * *", "Europe/Berlin", "2026-07-02T00:00:00", 1) == ["07-02 01:00:00"]


def test_a_tick_in_the_skipped_hour_is_due_at_the_end_of_the_gap() -> None:
    # Clocks go from 02:00 to 03:00 at 01:00 UTC on 29 March.
    found = ticks("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00", 3)
    assert found == ["03-28 01:30:00", "03-29 01:00:00", "03-30 00:30:00"]


def test_a_tick_in_the_repeated_hour_is_due_the_first_time_only() -> None:
    # Clocks go from 03:00 to 02:00 at 01:00 UTC on 25 October.
    found = ticks("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00", 2)
    assert found == ["10-25 00:30:00", "10-26 01:30:00"]
    again = ticks("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00", 1)
    assert again == ["10-26 01:30:00"], "also where a service starts between the two"


def test_a_schedule_of_every_hour_follows_real_time() -> None:
    assert ticks("30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00", 3) == [
        "10-25 00:30:00",
        "10-25 01:30:00",
        "10-25 02:30:00",
    ]


@given(
    st.sampled_from(
        ["*/7 * * * *", "30 2 * * *", "0,30 2,3 * * *", "15 */2 * * SUN", "@every 7m", "@monthly"]
    ),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.integers(at("2026-03-01T00:00:00"), at("2026-12-01T00:00:00")),
    st.integers(0, 3 * 86400),
)
def test_ticks_do_not_depend_on_when_a_service_starts(
    schedule: str, zone: str, start: int, later: int
) -> None:
    parsed = parse_schedule(schedule, zone)
    earlier = [tick for tick in islice(parsed.ticks(start), 800) if tick > start + later]
    found = next_tick(parsed, start + later)
    assert found is not None
    assert found > start + later
    assert not earlier or found == earlier[0]


@pytest.mark.parametrize(
    ("schedule", "zone", "says"),
    [
        ("61 * * * *", "UTC", "Bad minute"),
        ("* * *", "UTC", "Wrong number of fields"),
        ("0 0 31 2 *", "UTC", "Bad day-of-month"),
        ("0 0 */20 * 1L", "UTC", "never due"),
        ("@dayly", "UTC", "@daily"),
        ("@every", "UTC", "not a duration"),
        ("@every 0.5s", "UTC", "whole seconds"),
        ("@every 0", "UTC", "whole seconds"),
        ("* " * 300, "UTC", "characters"),
        ("@daily", "Mars/Olympus", "not known"),
        ("@daily", "America", "not known"),
        ("@daily", "../../etc/passwd", "not known"),
    ],
)
def test_a_wrong_schedule_says_what_is_wrong(schedule: str, zone: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_schedule(schedule, zone)


HOUR = 3600
START = at("2026-01-02T00:00:00")


def test_nothing_is_due_before_the_first_tick() -> None:
    assert due_ticks(parse_schedule("@hourly"), "once", START, START + HOUR - 0.1) == DueTicks(None, [], 0)


@pytest.mark.parametrize("missed", ["skip", "once"])
def test_each_tick_that_is_a_little_late_gets_its_job(missed: str) -> None:
    found = due_ticks(parse_schedule("@every 20s"), missed, START, START + 79.5)
    assert found == DueTicks(None, [START + 20, START + 40, START + 60], 0)


def test_missed_ticks_are_skipped_and_one_that_is_a_little_late_is_not() -> None:
    found = due_ticks(parse_schedule("@hourly"), "skip", START, START + 5 * HOUR + GRACE_S)
    assert found == DueTicks(START + 4 * HOUR, [START + 5 * HOUR], 4)
    found = due_ticks(parse_schedule("@hourly"), "skip", START, START + 5 * HOUR + GRACE_S + 0.1)
    assert found == DueTicks(START + 5 * HOUR, [], 5)


def test_missed_ticks_get_one_job_together() -> None:
    found = due_ticks(parse_schedule("@hourly"), "once", START, START + 5.5 * HOUR)
    assert found == DueTicks(None, [START + 5 * HOUR], 4)


def test_years_of_missed_seconds_are_counted_up_to_a_limit() -> None:
    found = due_ticks(parse_schedule("* * * * * *"), "once", START, START + 10 * 366 * 86400.0)
    assert found == DueTicks(None, [START + 10 * 366 * 86400], MAX_COUNTED - 1)
