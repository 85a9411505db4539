"""Estimate of the work that waits in each stream, in seconds of one worker: for autoscalers.

Jobs that wait, by type, times the worker time that a job of the type took lately. The result does not depend
on the number of workers, so an autoscaler can divide it by the time in which the work has to be done.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

from ..telemetry.metrics import Gauge, Labels
from ..telemetry.prometheus import PrometheusCollector

#: Jobs after which an older measurement counts half. A pause without jobs changes nothing.
_HALF_LIFE_JOBS = 1000.0
#: Gauges that say of a type that more workers would not run its jobs.
_BLOCKED = ("z_novel_paused", "z_novel_circuit_open")
_BUSY, _DURATION = "z_novel_worker_busy_seconds_total", "z_novel_job_duration_seconds"


class WorkEstimate:
    """Measures worker seconds per job by type, and applies them to the jobs that wait."""

    def __init__(self) -> None:
        # By type: seconds in handlers and jobs that were run, both decayed.
        self._busy_s: defaultdict[str, float] = defaultdict(float)
        self._jobs: defaultdict[str, float] = defaultdict(float)

    def record(
        self,
        counts: Iterable[tuple[str, Labels, float]],
        histograms: Iterable[tuple[str, Labels, list[int], float]],
    ) -> None:
        """Add what a worker reports."""
        for name, labels, numbers, _ in histograms:
            if name == _DURATION and len(labels) == 1:
                jobs, (task_type,) = sum(numbers), labels
                kept = 0.5 ** (jobs / _HALF_LIFE_JOBS)
                self._jobs[task_type] = self._jobs[task_type] * kept + jobs
                self._busy_s[task_type] *= kept
        for name, labels, by in counts:
            if name == _BUSY and len(labels) == 1 and 0 <= by < math.inf:
                self._busy_s[labels[0]] += by

    def seconds_per_job(self, task_type: str = "") -> float | None:
        """Worker time of a job of a type, or of one of the recent mix; None before any job was run."""
        if self._jobs.get(task_type):
            return self._busy_s[task_type] / self._jobs[task_type]
        jobs = sum(self._jobs.values())
        return sum(self._busy_s.values()) / jobs if jobs else None

    def gauges(self, metrics: PrometheusCollector) -> list[Gauge]:
        """The estimate of each stream; empty before any job was run."""
        if self.seconds_per_job() is None:
            return []
        found = metrics.totals("z_novel_jobs_waiting", "z_novel_lane_jobs", *_BLOCKED)
        blocked = {str(one["task_type"]) for name in _BLOCKED for one in found[name] if one["value"]}
        work_s: defaultdict[str, float] = defaultdict(float)
        # Jobs in lanes whose type is counted: the rest of the lanes, and the stream, are of the recent mix.
        by_type: defaultdict[str, float] = defaultdict(float)
        for one in found["z_novel_lane_jobs"]:
            stream, task_type, jobs = str(one["stream"]), str(one["task_type"]), float(one["value"])
            by_type[stream] += jobs
            if task_type not in blocked:
                work_s[stream] += jobs * (self.seconds_per_job(task_type) or 0.0)
        waiting: defaultdict[str, float] = defaultdict(float)
        for one in found["z_novel_jobs_waiting"]:
            waiting[str(one["stream"])] += float(one["value"])
        mean_s = self.seconds_per_job() or 0.0
        for stream, jobs in waiting.items():
            work_s[stream] += max(0.0, jobs - by_type[stream]) * mean_s
        return [("z_novel_work_waiting_seconds", (stream,), work_s[stream]) for stream in waiting]
