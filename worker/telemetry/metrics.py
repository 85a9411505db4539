"""Metrics buffer: counts and timings of one process, sent to the supervisor as deltas.

Defines names, labels and buckets of the engine's metrics. It imports no metrics library, because every role
imports this file.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..extension import Metric, extension

#: Bounds from 1 s on are those that existing dashboards use; smaller ones are added.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10, 30, 60, 120, 300)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

METRICS = {
    "z_novel_jobs_queued": Metric("gauge", "Jobs in the stream that no service has read yet", ("stream",)),
    "z_novel_oldest_queued_seconds": Metric(
        "gauge", "Age of the oldest job that no service has read yet", ("stream",)
    ),
    "z_novel_jobs_pending": Metric(
        "gauge", "Jobs that a service has read and not settled: running, prefetched or parked", ("stream",)
    ),
    "z_novel_jobs_completed_total": Metric("counter", "Jobs that were acknowledged", ("task_type",)),
    "z_novel_jobs_failed_total": Metric("counter", "Tries that failed", ("task_type",)),
    "z_novel_jobs_limited_total": Metric(
        "counter", "Jobs that waited for a limit, or that a handler put back with RateLimited", ("task_type",)
    ),
    "z_novel_jobs_cancelled_total": Metric(
        "counter", "Cancelled jobs that a service had prefetched or ran", ("task_type",)
    ),
    "z_novel_jobs_cancelled_waiting": Metric(
        "gauge", "Jobs of the stream that were cancelled while they waited, ever", ("stream",)
    ),
    "z_novel_jobs_forwarded_total": Metric(
        "counter", "Jobs of a stream that were moved into its shards", ("stream",)
    ),
    "z_novel_jobs_duplicate_total": Metric(
        "counter", "Jobs that were not run because another one had their idempotency key", ("task_type",)
    ),
    "z_novel_jobs_superseded_total": Metric(
        "counter", "Jobs that were not run because a newer one had their supersede key", ("task_type",)
    ),
    "z_novel_jobs_waiting": Metric("gauge", "Jobs that wait, by place: stream, lanes", ("stream", "place")),
    "z_novel_lane_jobs": Metric(
        "gauge",
        "Jobs in lanes by type, without those of series",
        ("stream", "task_type"),
    ),
    "z_novel_work_waiting_seconds": Metric(
        "gauge",
        "Time that one worker would need for the jobs that wait",
        ("stream",),
    ),
    "z_novel_worker_busy_seconds_total": Metric(
        "counter", "Time that workers spent in handlers", ("task_type",)
    ),
    "z_novel_tenant_waiting_seconds": Metric(
        "gauge",
        "Age of the oldest job in lanes, of the ten tenants with the most jobs there",
        ("stream", "tenant_id"),
    ),
    "z_novel_jobs_retried_total": Metric("counter", "Retries that were scheduled", ("task_type",)),
    "z_novel_jobs_dead_total": Metric("counter", "Jobs that were given up", ("task_type", "reason")),
    "z_novel_job_duration_seconds": Metric("histogram", "Time a try took", ("task_type",), SECONDS),
    "z_novel_job_wait_seconds": Metric("histogram", "From created to started", ("task_type",), SECONDS),
    "z_novel_batch_jobs": Metric("histogram", "Jobs that a handler was given at once", (), BATCH_SIZES),
    "z_novel_redis_stream_lag": Metric(
        "gauge", "Entries not yet delivered to the group", ("stream", "consumer_group")
    ),
    "z_novel_dlq_length": Metric("gauge", "Dead letters", ("stream",)),
    "z_novel_retry_scheduled": Metric(
        "gauge", "Jobs that wait for a retry or were enqueued with a delay", ("stream",)
    ),
    "z_novel_read_cycles_total": Metric("counter", "Reads that the store answered, or was spared"),
    "z_novel_settlements_unreplicated_total": Metric(
        "counter", "Jobs whose settlement fewer replicas than --wait-replicas had in time", ("stream",)
    ),
    "z_novel_leases_taken_over_total": Metric(
        "counter", "Jobs taken over from a service that has fallen silent", ("stream",)
    ),
    "z_novel_leases_lost_total": Metric(
        "counter", "Jobs that another service took over from this one", ("stream",)
    ),
    "z_novel_stream_isolated": Metric(
        "gauge", "1 while the store refuses commands of the stream and the role waits", ("stream", "role")
    ),
    "z_novel_ready": Metric("gauge", "1 while every process is up and the stores answer"),
    "z_novel_workers": Metric("gauge", "Worker processes", ("state",)),
    "z_novel_worker_restarts_total": Metric("counter", "Processes started again", ("role", "cause")),
    "z_novel_log_lines_dropped_total": Metric("counter", "Log lines dropped because stderr was not read"),
    "z_novel_circuit_open": Metric("gauge", "1 while the circuit breaker of a type is open", ("task_type",)),
    "z_novel_crash_circuits_open": Metric(
        "gauge", "Tenants of a type whose jobs kill workers and are slowed down", ("task_type",)
    ),
    "z_novel_cron_enqueued_total": Metric("counter", "Jobs that a cron table enqueued", ("name",)),
    "z_novel_cron_missed_total": Metric(
        "counter", "Ticks of a cron table that got no job, because no service ran", ("name",)
    ),
    "z_novel_cron_late_seconds": Metric(
        "gauge", "Time for which a tick of a cron table has been due and not taken", ("name",)
    ),
    "z_novel_api_requests_total": Metric(
        "counter", "Requests of the HTTP API that were answered", ("path", "status")
    ),
    "z_novel_api_request_seconds": Metric(
        "histogram", "Time of a request of the HTTP API", ("path",), SECONDS
    ),
    "z_novel_api_batch_requests": Metric(
        "histogram", "Requests that were computed together", (), BATCH_SIZES
    ),
    "z_novel_api_waiting_tokens": Metric("gauge", "Tokens of requests that wait or are being computed"),
    "z_novel_batches_open": Metric("gauge", "Batches that have not finished, by home stream", ("stream",)),
    "z_novel_batches_finished_total": Metric(
        "counter", "Batches whose jobs have all ended, by home stream", ("stream",)
    ),
    "z_novel_paused": Metric("gauge", "1 while a type is paused by an operator", ("task_type",)),
}


def all_metrics() -> dict[str, Metric]:
    """The engine's metrics and those of the built-in job types."""
    return {**METRICS, **extension().metrics}


Labels = tuple[str, ...]


#: A gauge. None deletes every series of the name whose labels begin with these.
Gauge = tuple[str, Labels, float | None]


class Delta(NamedTuple):
    """Changes since the last delta.

    A histogram has one count per bucket, a last one for values above all bounds, and the sum.
    """

    counts: list[tuple[str, Labels, float]]
    gauges: list[Gauge]
    histograms: list[tuple[str, Labels, list[int], float]]

    def __bool__(self) -> bool:
        return bool(self.counts or self.gauges or self.histograms)


class Histogram:
    """Histogram of the values since the last `MetricsBuffer.take`."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count one value, or the same value several times."""
        self.counts[bisect_left(self._buckets, value)] += times
        self.total += value * times

    def extend(self, values: Sequence[float]) -> None:
        """Count many values, with one search per bucket instead of one per value."""
        ordered = sorted(values)
        below = 0
        for bucket, bound in enumerate(self._buckets):
            upto = bisect_right(ordered, bound, below)
            self.counts[bucket] += upto - below
            below = upto
            if below == len(ordered):
                break
        self.counts[-1] += len(ordered) - below
        self.total += sum(ordered)

    def merge(self, counts: list[int], total: float) -> None:
        """Add the counts and the sum of another histogram."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total

    def take(self) -> tuple[list[int], float]:
        """Return the counts and the sum, and reset them."""
        taken = self.counts, self.total
        self.counts, self.total = [0] * len(self.counts), 0.0
        return taken


class MetricsBuffer:
    """Metrics of one process between two reports. Its size is bounded by the number of names and labels.

    A gauge is reported when its value changes, so that an idle process has nothing to report.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], float | None] = {}
        self._histograms: dict[tuple[str, Labels], Histogram] = {}
        #: Gauges as they were reported; None for a prefix that was replaced.
        self._reported: dict[tuple[str, Labels], float | None] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to report."""
        return bool(self._counts or self._gauges or any(any(one.counts) for one in self._histograms.values()))

    def count(self, name: str, labels: Labels = (), by: float = 1) -> None:
        """Add to a counter."""
        key = (name, labels)
        self._counts[key] = self._counts.get(key, 0) + by

    def gauge(self, name: str, labels: Labels, value: float) -> None:
        """Set a gauge. The name must not be one of `replace`."""
        key = (name, labels)
        if key in self._gauges or self._reported.get(key) != value:
            self._gauges[key] = value

    def replace(self, name: str, prefix: Labels, values: Mapping[str, float]) -> None:
        """Set the gauges whose labels are ``prefix`` and one more; those of other values are deleted."""
        key, new = (name, prefix), {(name, (*prefix, label)): value for label, value in values.items()}
        if key not in self._gauges and key in self._reported and _below(self._reported, key) == new:
            return
        for old in _below(self._gauges, key):
            del self._gauges[old]
        self._gauges[key] = None
        self._gauges |= new

    def histogram(self, name: str, labels: Labels = ()) -> Histogram:
        """The histogram to add to. The same object stays valid after `take`."""
        return self._histograms.setdefault((name, labels), Histogram(METRICS[name].buckets))

    def take(self) -> Delta:
        """Return everything since the last call, and reset it."""
        histograms = [(*key, *histogram.take()) for key, histogram in self._histograms.items()]
        delta = Delta(
            [(*key, value) for key, value in self._counts.items()],
            [(*key, value) for key, value in self._gauges.items()],
            [taken for taken in histograms if any(taken[2])],
        )
        self._forget(delta)
        self._reported |= self._gauges
        self._counts.clear()
        self._gauges.clear()
        return delta

    def put_back(self, delta: Delta) -> None:
        """Undo `take` for a delta that could not be sent; the next one includes it."""
        self._forget(delta)
        for name, labels, by in delta.counts:
            self.count(name, labels, by)
        for name, labels, value in delta.gauges:
            self._reported.pop((name, labels), None)
            self._gauges.setdefault((name, labels), value)
        for name, labels, counts, total in delta.histograms:
            self.histogram(name, labels).merge(counts, total)

    def _forget(self, delta: Delta) -> None:
        """Forget the reported gauges that a delta deletes."""
        for name, prefix, value in delta.gauges:
            if value is None:
                for old in _below(self._reported, (name, prefix)):
                    del self._reported[old]


def _below(
    gauges: Mapping[tuple[str, Labels], float | None], key: tuple[str, Labels]
) -> dict[tuple[str, Labels], float | None]:
    """The gauges of a name whose labels are a prefix and one more."""
    name, prefix = key
    return {
        one: value
        for one, value in gauges.items()
        if one[0] == name and len(one[1]) == len(prefix) + 1 and one[1][:-1] == prefix
    }
