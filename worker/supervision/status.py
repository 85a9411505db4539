"""Status of the service: the status line for systemd, and /status with every child and its jobs."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..settings import Settings
from ..telemetry.log import redacted
from .process import Child

#: How long an HTTP thread waits for the supervisor's loop, which it wakes.
_ANSWER_TIMEOUT_S = 2.0
#: Running jobs that are listed for one worker: a batch may have hundreds.
_MAX_JOBS_LISTED = 16
#: `PrometheusCollector.totals`: the samples of each metric, each with its labels and its ``value``.
Totals = Mapping[str, Sequence[Mapping[str, str | float]]]
#: Shorter windows give jumping rates: the roles report their counts a few times a second.
_RATE_WINDOW_S = 2.0


class StatusLine:
    """Status line for `systemctl status`: ``8 workers, 312 jobs/s, 2 retrying, 0 dead``."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._completed = 0.0
        self._mono_rendered_s = 0.0

    def due(self, mono_now_s: float) -> bool:
        """Whether the last line is old enough for a new one."""
        return mono_now_s - self._mono_rendered_s >= _RATE_WINDOW_S

    def render(self, totals: Totals, mono_now_s: float) -> str:
        """The line for the current counters and gauges; the rate covers the time since the last line."""
        completed = _sum(totals, "z_novel_jobs_completed_total")
        window_s = max(_RATE_WINDOW_S, mono_now_s - self._mono_rendered_s)
        rate = (completed - self._completed) / window_s
        self._completed, self._mono_rendered_s = completed, mono_now_s
        retrying, dead = _sum(totals, "z_novel_retry_scheduled"), _sum(totals, "z_novel_dlq_length")
        workers = f"{self._workers} worker{'s' * (self._workers != 1)}"
        text = f"{workers}, {rate:.0f} jobs/s, {retrying:.0f} retrying, {dead:.0f} dead"
        flags = {
            "z_novel_paused": "is paused",
            "z_novel_circuit_open": "waits for its dependency",
            "z_novel_crash_circuits_open": "kills workers and is slowed down",
        }
        return "; ".join([text, *(f"{task_type} {condition}" for name, condition in flags.items()
                                  for task_type in flagged_types(totals, name))])  # fmt: skip


def _sum(totals: Totals, name: str) -> float:
    return sum(float(sample["value"]) for sample in totals.get(name, ()))


def flagged_types(totals: Totals, name: str) -> list[str]:
    """The types for which a gauge is not 0."""
    return [str(sample["task_type"]) for sample in totals.get(name, ()) if sample["value"]]


class StatusMailbox:
    """Hand-over of the status from the supervisor's loop to HTTP threads.

    A thread requests the status and the loop makes it, because only the loop knows which channels are open.
    """

    def __init__(self) -> None:
        #: Wakes the loop, once it runs.
        self.wake: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._requested = False
        self._answers = 0
        self._status: dict[str, Any] | None = None

    def request(self) -> dict[str, Any] | None:
        """Wait for a fresh status (HTTP thread). Returns None if the loop does not answer in time."""
        with self._changed:
            self._requested = True
            before = self._answers
            self.wake()
            answered = self._changed.wait_for(lambda: self._answers > before, _ANSWER_TIMEOUT_S)
            return self._status if answered else None

    def answer(self, make_status: Callable[[], dict[str, Any]]) -> None:
        """Make the status if an HTTP thread has requested it (loop)."""
        if not self._requested:
            return
        status = make_status()
        with self._changed:
            self._requested = False
            self._status = status
            self._answers += 1
            self._changed.notify_all()


def service_status(settings: Settings, redis_url: str) -> dict[str, Any]:
    """Identity of the service, its streams and types, and its limits (seconds)."""
    return {
        "version": _version(),
        "host": settings.host,
        "instance": settings.instance,
        "pid": os.getpid(),
        "store": redacted(redis_url),
        "streams": [source._asdict() for source in settings.streams],
        "types": list(settings.handlers),
        "cron": [
            {
                "name": table.name,
                "schedule": table.schedule,
                "timezone": table.timezone,
                "type": table.type,
                "stream": table.stream,
                "missed": table.missed,
            }
            for table in settings.cron
        ],
        "lease_s": settings.lease_s,
        "max_retries": settings.retry.max_retries,
    }


def _version() -> str:
    from importlib import metadata  # a tenth of the modules of a supervisor, which few ask for its status

    try:
        return metadata.version("jobworker")
    except metadata.PackageNotFoundError:
        return "unknown"


def child_status(child: Child, settings: Settings, mono_now_s: float) -> dict[str, Any]:
    """One child: identity, age and memory; for a worker also its running jobs."""
    status: dict[str, Any] = {
        "name": child.name, "role": child.role, "slot": child.slot_no, "pid": child.pid,
        "generation": child.generation, "age_s": round(mono_now_s - child.mono_started_s, 3),
        "rss_mib": child.rss_mib(), "trouble": child.trouble,
    }  # fmt: skip
    if child.channel is not None:
        status |= {"finished": child.channel.finished, "running": _running(child, settings, mono_now_s)}
    return status


def _running(child: Child, settings: Settings, mono_now_s: float) -> dict[str, Any] | None:
    assert child.channel is not None
    since_s, deadline_s = child.channel.mono_since_s, child.channel.mono_deadline_s
    if not deadline_s:
        return None
    rows = child.channel.table.started()
    task_types = tuple(settings.handlers)
    jobs = [
        {"stream": settings.streams[row.stream_no].stream, "entry_id": row.entry_id.decode(),
         "type": task_types[row.type_no], "deaths": row.deaths}
        for row in rows
    ]  # fmt: skip
    return {
        "for_s": round(mono_now_s - since_s, 3),
        "limit_in_s": round(deadline_s - mono_now_s, 3) + 0.0,  # not -0.0
        "count": len(jobs),
        "jobs": jobs[:_MAX_JOBS_LISTED],
    }
