"""Log rate limiter: an event that floods the log is cut, counted and reported."""

import logging
from collections.abc import Callable

from jobworker.worker.telemetry.log_limit import RateLimitFilter


class Clock:
    """A clock that the test sets, and the calls that wait for it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.waiting.append((self.now + delay_s, call))


def record_of(msg: str, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "msg": msg, "levelno": level, **extra})


def test_suppressed_lines_are_counted_and_reported_at_the_end_of_the_period() -> None:
    clock: Clock = Clock()
    reported: list[logging.LogRecord] = []
    limit = RateLimitFilter(
        reported.append, max_lines=3, period_s=10, mono_s=lambda: clock.now, call_later=clock.call_later
    )
    passed = [limit.filter(record_of("retried %s", task_type="embed", args=(i,))) for i in range(50)]
    assert passed == [True] * 3 + [False] * 47
    assert limit.filter(record_of("retried %s", task_type="audit")), "another type of job"
    assert limit.filter(record_of("dead")), "another event"
    assert limit.filter(record_of("retried %s", logging.ERROR, task_type="embed")), "another level"
    assert all(limit.filter(record_of("end", logging.CRITICAL)) for _ in range(9))
    assert not reported
    ((due, call),) = clock.waiting
    assert due == 110.0
    clock.now = due
    call()
    (line,) = reported
    expected = {
        "msg": "log.suppressed",
        "event": "retried %s",
        "times": 47,
        "task_type": "embed",
        "levelno": logging.WARNING,
    }
    assert expected.items() <= vars(line).items()
    assert limit.filter(record_of("retried %s", task_type="embed")), "the count starts again"


def test_suppressed_lines_are_reported_with_the_next_line_and_when_the_log_closes() -> None:
    clock: Clock = Clock()
    reported: list[logging.LogRecord] = []
    limit = RateLimitFilter(
        reported.append, max_lines=1, period_s=10, mono_s=lambda: clock.now, call_later=lambda *_: None
    )
    for _ in range(3):
        limit.filter(record_of("a"))
    clock.now += 11
    assert limit.filter(record_of("b"))
    limit.filter(record_of("b"))
    limit.close()
    assert [(vars(line)["event"], vars(line)["times"]) for line in reported] == [("a", 2), ("b", 1)]


def test_a_limit_of_0_suppresses_nothing() -> None:
    limit = RateLimitFilter(lambda record: None, max_lines=0)
    assert all(limit.filter(record_of("a")) for _ in range(1000))
