"""Log rate limiter: at most 100 lines per event in 10 s; the rest are summarised."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from ..safe_text import text_of

#: Most lines of one event within a period: enough to see what happens and to which jobs.
DEFAULT_MAX_LINES, PERIOD_S = 100, 10.0

_SUMMARY = "log.suppressed"
#: An event name is cut to this length: a handler may log a whole text as its message.
_EVENT_CHARS = 256
_Key = tuple[str, int, str, str]


def is_summary(record: logging.LogRecord) -> bool:
    """Whether it is a summary of suppressed lines, which belongs to no single job."""
    return is_event(record, _SUMMARY)


def is_event(record: logging.LogRecord, name: str) -> bool:
    """Whether it is this event. A message may be of any class, with a comparison of its own."""
    return isinstance(record.msg, str) and record.msg == name


def _call_later(delay_s: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, call)
    timer.daemon = True  # `close` emits the rest when the process exits
    timer.start()


class RateLimitFilter(logging.Filter):
    """Passes the first lines of an event and emits a summary of the rest at the end of the period.

    An event is a logger's message before its arguments are formatted, at one level and for one job type.
    Critical lines always pass. ``max_lines`` 0 means no limit.
    """

    def __init__(
        self,
        emit: Callable[[logging.LogRecord], None],
        *,
        max_lines: int = DEFAULT_MAX_LINES,
        period_s: float = PERIOD_S,
        mono_s: Callable[[], float] = time.monotonic,
        call_later: Callable[[float, Callable[[], None]], None] = _call_later,
    ) -> None:
        super().__init__()
        self._emit, self._max_lines, self._period_s = emit, max_lines, period_s
        self._mono_s, self._call_later = mono_s, call_later
        self._lock = threading.RLock()
        self._counts: Counter[_Key] = Counter()
        self._mono_period_start_s = mono_s()
        self._timer_started = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.levelno >= logging.CRITICAL or not self._max_lines:
            return True
        with self._lock:
            now = self._mono_s()
            if now - self._mono_period_start_s >= self._period_s:
                self._start_period(now)
            event = text_of(record.msg)[:_EVENT_CHARS]
            task_type = text_of(getattr(record, "task_type", ""))
            key = (record.name, record.levelno, event, task_type)
            self._counts[key] += 1
            if self._counts[key] <= self._max_lines:
                return True
            if not self._timer_started:  # the next line may arrive hours later, or never
                self._timer_started = True
                self._call_later(self._mono_period_start_s + self._period_s - now, self.close)
            return False

    def close(self) -> None:
        """Emit a log.suppressed line for each event that was suppressed so far."""
        with self._lock:
            self._start_period(self._mono_s())

    def _start_period(self, now: float) -> None:
        """Emit a log.suppressed line for each suppressed event and reset the counts."""
        suppressed = [(key, n - self._max_lines) for key, n in self._counts.items() if n > self._max_lines]
        self._counts.clear()
        self._mono_period_start_s, self._timer_started = now, False
        for (name, level, event, task_type), times in suppressed:
            fields = {"event": event, "times": times, "within_s": self._period_s}
            fields |= {"task_type": task_type} if task_type else {}
            record = logging.makeLogRecord(
                {"name": name, "levelno": level, "levelname": logging.getLevelName(level),
                 "msg": _SUMMARY, **fields}
            )  # fmt: skip
            self._emit(record)
