"""Log rate limiter: at most 100 lines per event in 10 s; the rest are summarised."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

#: Most lines of one event within a period: enough to see what it is about, and from which job.
MOST, WITHIN_S = 100, 10.0

_SUMMARY = "log.suppressed"
#: An event's name is cut to this: a handler may log a whole text as its message.
_EVENT_CHARS = 256
_Key = tuple[str, int, str, str]


def is_summary(record: logging.LogRecord) -> bool:
    """Whether it is a summary of suppressed lines, which belongs to no single job."""
    return record.msg == _SUMMARY


def _later(delay_s: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, call)
    timer.daemon = True  # whatever is left is said by `close`
    timer.start()


class RateLimitFilter(logging.Filter):
    """Lets the first lines of an event pass and says at the end of the time how many more there were.

    An event is a logger's message before its arguments are put in, at a level, of a type of job. What is
    critical always passes.
    """

    def __init__(
        self,
        say: Callable[[logging.LogRecord], None],
        *,
        most: int = MOST,
        within_s: float = WITHIN_S,
        mono_s: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] = _later,
    ) -> None:
        super().__init__()
        self._say, self._most, self._within_s = say, most, within_s
        self._mono_s, self._later = mono_s, later
        self._lock = threading.RLock()
        self._seen: Counter[_Key] = Counter()
        self._since = mono_s()
        self._awaited = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if record.levelno >= logging.CRITICAL:
            return True
        with self._lock:
            now = self._mono_s()
            if now - self._since >= self._within_s:
                self._start_period(now)
            event, task_type = str(record.msg)[:_EVENT_CHARS], str(getattr(record, "task_type", ""))
            key = (record.name, record.levelno, event, task_type)
            self._seen[key] += 1
            if self._seen[key] <= self._most:
                return True
            if not self._awaited:  # the event may be the last one for hours
                self._awaited = True
                self._later(self._since + self._within_s - now, self.close)
            return False

    def close(self) -> None:
        """Say now what was held back."""
        with self._lock:
            self._start_period(self._mono_s())

    def _start_period(self, now: float) -> None:
        """Tell of what was held back and start counting from nothing."""
        held_back = [(key, seen - self._most) for key, seen in self._seen.items() if seen > self._most]
        self._seen.clear()
        self._since, self._awaited = now, False
        for (name, level, event, task_type), times in held_back:
            fields = {"event": event, "times": times, "within_s": self._within_s}
            fields |= {"task_type": task_type} if task_type else {}
            record = logging.makeLogRecord(
                {"name": name, "levelno": level, "levelname": logging.getLevelName(level),
                 "msg": _SUMMARY, **fields}
            )  # fmt: skip
            self._say(record)
