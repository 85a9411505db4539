"""Status of the service: the line for systemd, and /status with every child and its jobs."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..settings import Settings
from ..telemetry.log import redacted
from .process import Child

#: How long an HTTP thread waits for the loop, which goes round ten times a second.
_WITHIN_S = 2.0
#: Jobs under way that are named, of one worker: a batch may have hundreds.
_JOBS_NAMED = 16
#: `PrometheusCollector.totals`: by metric the samples, each its labels and its ``value``.
Totals = Mapping[str, Sequence[Mapping[str, str | float]]]


#: Rates of shorter windows jump: the roles report their counts a few times a second.
_WINDOW_S = 2.0


class StatusLine:
    """The service in a line for `systemctl status`: ``8 workers, 312 jobs/s, 2 retrying, 0 dead``."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._done = 0.0
        self._mono_made_s = 0.0

    def due(self, mono_now_s: float) -> bool:
        """Whether the last one is old enough for another."""
        return mono_now_s - self._mono_made_s >= _WINDOW_S

    def make(self, totals: Totals, mono_now_s: float) -> str:
        """From the counters and gauges as they are now; the rate is over the time since the last one."""
        done = _sum(totals, "z_novel_jobs_completed_total")
        rate = (done - self._done) / max(_WINDOW_S, mono_now_s - self._mono_made_s)
        self._done, self._mono_made_s = done, mono_now_s
        retrying, dead = _sum(totals, "z_novel_retry_scheduled"), _sum(totals, "z_novel_dlq_length")
        workers = f"{self._workers} worker{'s' * (self._workers != 1)}"
        text = f"{workers}, {rate:.0f} jobs/s, {retrying:.0f} retrying, {dead:.0f} dead"
        waits = {"z_novel_paused": "is paused", "z_novel_circuit_open": "waits for its dependency"}
        return "; ".join([text, *(f"{kind} {what}" for name, what in waits.items()
                                  for kind in _flagged(totals, name))])  # fmt: skip


def _sum(totals: Totals, name: str) -> float:
    return sum(float(sample["value"]) for sample in totals.get(name, ()))


def _flagged(totals: Totals, name: str) -> list[str]:
    return [str(sample["task_type"]) for sample in totals.get(name, ()) if sample["value"]]


class StatusMailbox:
    """Where HTTP threads ask for the status, and the supervisor's loop, which alone may look at its children,
    makes it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = False
        self._answers = 0
        self._answer: dict[str, Any] | None = None

    def ask(self) -> dict[str, Any] | None:
        """A fresh status; None where the loop does not come round in time."""
        with self._changed:
            self._asked = True
            before = self._answers
            answered = self._changed.wait_for(lambda: self._answers > before, _WITHIN_S)
            return self._answer if answered else None

    def serve(self, make: Callable[[], dict[str, Any]]) -> None:
        """Make the status if an HTTP thread has asked for it (loop)."""
        if not self._asked:
            return
        answer = make()
        with self._changed:
            self._asked = False
            self._answer = answer
            self._answers += 1
            self._changed.notify_all()


def service_status(settings: Settings, redis_url: str) -> dict[str, Any]:
    """Which service it is, what it works on, and by which limits (seconds)."""
    return {
        "version": _version(),
        "host": settings.host,
        "instance": settings.instance,
        "pid": os.getpid(),
        "store": redacted(redis_url),
        "streams": [source._asdict() for source in settings.streams],
        "types": list(settings.handlers),
        "lease_s": settings.lease_s,
        "max_retries": settings.retry.max_retries,
    }


def _version() -> str:
    try:
        return version("jobworker")
    except PackageNotFoundError:
        return "unknown"


def child_status(child: Child, settings: Settings, mono_now_s: float) -> dict[str, Any]:
    """One child: who it is, how old and how large, and of a worker what it runs and since when."""
    said: dict[str, Any] = {
        "name": child.name, "role": child.role, "slot": child.slot, "pid": child.pid,
        "generation": child.generation, "age_s": round(mono_now_s - child.mono_started_s, 3),
        "rss_mib": child.rss_mib(), "trouble": child.trouble,
    }  # fmt: skip
    if child.channel is not None:
        said |= {"finished": child.channel.finished, "running": _running(child, settings, mono_now_s)}
    return said


def _running(child: Child, settings: Settings, mono_now_s: float) -> dict[str, Any] | None:
    assert child.channel is not None
    since_s, deadline_s = child.channel.mono_since_s, child.channel.mono_deadline_s
    if not deadline_s:
        return None
    rows = child.channel.table.started()
    kinds = tuple(settings.handlers)
    jobs = [
        {"stream": settings.streams[row.stream_no].stream, "entry_id": row.entry_id.decode(),
         "type": kinds[row.type_no], "deaths": row.deaths}
        for row in rows
    ]  # fmt: skip
    return {
        "for_s": round(mono_now_s - since_s, 3),
        "limit_in_s": round(deadline_s - mono_now_s, 3),
        "count": len(jobs),
        "jobs": jobs[:_JOBS_NAMED],
    }
