"""Dashboard snapshots of a deployment: streams, rates, workers and the newest dead letters."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import StoreRefused, StoreUnavailable
from ..keys import Source
from ..shards import logical_stream
from ..store.operator import START, LaneCounts, Pause
from ..store.ports import Depths, KeyFault, ReaperStore, sum_depths
from .cron import CronEntry, cron_entries, read_cron
from .dead_letters import Letter, read_letter
from .deployment import Deployment, StreamTable
from .identity import read_identity
from .limits import LimitState, limit_states, sum_lanes, sum_limits
from .refusals import refusal
from .status_client import Service

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Dead letters in a snapshot; as many are read of each stream to find the newest.
_MAX_LETTERS = 10
#: Running jobs whose ids are looked up in the store. The others are shown by entry id.
_MAX_JOB_IDS = 64
#: A slower store is shown as not answering: the dashboard must keep refreshing.
_TIMEOUT_S = 2.0
#: Counters with the label ``task_type``, by the name of their rate.
_RATES = {
    "done": "z_novel_jobs_completed_total", "failed": "z_novel_jobs_failed_total",
    "retried": "z_novel_jobs_retried_total", "dead": "z_novel_jobs_dead_total",
}  # fmt: skip
#: Histograms with the label ``task_type``, by the name of their percentile.
_DURATIONS = {"run": "z_novel_job_duration_seconds", "wait": "z_novel_job_wait_seconds"}
#: Percentiles cover the jobs of the last minute: one snapshot's jobs are too few.
_PERCENTILE_WINDOW_S = 60.0
#: Jobs by job type, ``run`` or ``wait``, and number of the bucket.
Buckets = Counter[tuple[str, str, int]]


@dataclass
class Overview:
    """One snapshot.

    ``totals`` and ``rates`` (per second) are by job type and then by name, such as ``done``. ``rates`` is
    None in the first snapshot. ``p95_s`` has by job type the 95th percentile of ``run`` and ``wait`` in the
    last minute, in seconds; a name is missing where no job started or finished. ``lanes`` has the streams of
    which jobs wait in lanes. ``job_ids`` are by stream and
    entry id. ``refused`` says which streams the store refused; their part of the snapshot is missing.
    ``error`` says why the store did not answer; its whole part is empty then. Shards count for their stream.
    """

    wall_s: float
    streams: list[tuple[Source, Depths]] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)
    totals: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] | None = None
    p95_s: dict[str, dict[str, float]] = field(default_factory=dict)
    lanes: dict[str, LaneCounts] = field(default_factory=dict)
    limits: list[LimitState] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    cron: list[CronEntry] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    job_ids: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    error: str = ""

    def workers(self) -> Counter[str]:
        """The number of workers of all services by state."""
        return Counter(str(worker["state"]) for service in self.services for worker in service.workers())

    def rate(self, name: str) -> float:
        """A rate per second, summed over all job types."""
        return sum(by_name.get(name, 0.0) for by_name in (self.rates or {}).values())


class OverviewPoller:
    """Takes snapshots and derives rates from the counters of two successive ones."""

    def __init__(
        self,
        depth_store: ReaperStore,
        store: "OperatorStore",
        fetch_sources: Callable[[], Sequence[Source]],
        fetch_services: Callable[[], list[Service]],
        *,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._depth_store = depth_store
        self._store = store
        self._fetch_sources = fetch_sources
        self._fetch_services = fetch_services
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._mono_last_s = 0.0
        self._last_counters: dict[tuple[str, int], Counter[tuple[str, str]]] | None = None
        # The buckets of each process at earlier snapshots, back to the start of the percentiles' window.
        self._buckets: deque[tuple[float, dict[tuple[str, int], Buckets]]] = deque()
        self._job_ids: dict[tuple[str, str], str] = {}

    def snapshot(self) -> Overview:
        """The current state. It does not raise if the store does not answer: see `Overview.error`."""
        overview = Overview(self._wall_s(), services=self._fetch_services())
        now_s = self._mono_s()
        self._add_rates(overview, now_s)
        self._add_percentiles(overview, now_s)
        try:
            self._add_queues(overview)
            overview.job_ids = self._look_up_job_ids(overview.services)
        except StoreUnavailable as error:
            overview.error = str(error)
        return overview

    def _add_queues(self, overview: Overview) -> None:
        """Depths, pauses and dead letters, except those whose keys the store refuses."""
        sources = self._fetch_sources()
        overview.wall_s = self._store.wall_now_s(sources[0].stream)
        letters: list[Letter] = []
        found: dict[Source, list[Depths]] = {}
        for source in sources:
            with _note_refusal(overview, f"stream {source.stream}", partial(self._store.key_faults, source)):
                depths = self._depth_store.depths(source)
                found.setdefault(Source(logical_stream(source.stream), source.group), []).append(depths)
                self._add_lanes(overview, source.stream, depths.waiting)
                letters += self._newest_letters(source.stream)
        overview.streams = [(source, sum_depths(parts)) for source, parts in found.items()]
        overview.limits = sum_limits(overview.limits)
        overview.letters = sorted(letters, key=lambda letter: letter.wall_s, reverse=True)[:_MAX_LETTERS]
        with _note_refusal(overview, "paused types", self._store.pause_faults):
            overview.pauses = self._store.pauses()
        cron = read_cron(self._store, [source.stream for source in sources])
        overview.cron = cron_entries(cron)
        overview.refused += cron.refused.values()

    def _add_lanes(self, overview: Overview, stream: str, waiting: int) -> None:
        config = self._store.flow_config(stream)
        if waiting or config.limits:
            counts = self._store.lane_counts(stream)
            name = logical_stream(stream)
            overview.limits += limit_states(name, config, counts)
            if waiting:
                before = overview.lanes.get(name)
                overview.lanes[name] = counts if before is None else sum_lanes(before, counts)

    def _add_rates(self, overview: Overview, now_s: float) -> None:
        """Totals over all services, and rates since the last snapshot. A restarted service counts from 0, so
        a rate is the difference of two answers of one process."""
        counters = _by_process(overview.services, _counters)
        overview.totals = _sum_by_type(counters.values())
        if self._last_counters is not None:
            in_both = counters.keys() & self._last_counters.keys()
            increase = sum(
                (counters[key] - self._last_counters[key] for key in in_both), Counter[tuple[str, str]]()
            )
            elapsed_s = max(0.001, now_s - self._mono_last_s)
            overview.rates = {
                job_type: {name: increase[job_type, name] / elapsed_s for name in _RATES}
                for job_type in overview.totals
            }
        self._last_counters, self._mono_last_s = counters, now_s

    def _add_percentiles(self, overview: Overview, now_s: float) -> None:
        buckets = _by_process(overview.services, _duration_buckets)
        self._buckets.append((now_s, buckets))
        while now_s - self._buckets[0][0] > _PERCENTILE_WINDOW_S and len(self._buckets) > 2:
            self._buckets.popleft()
        earlier = self._buckets[0][1]
        # A process that the first snapshot of the window lacks has started since, or did not answer then.
        increase = sum((buckets[key] - earlier[key] for key in buckets.keys() & earlier.keys()), Buckets())
        bounds = _duration_bounds(overview.services)
        for job_type, name in {(job_type, name) for job_type, name, _ in increase}:
            counts = [increase[job_type, name, number] for number in range(len(bounds[name]) + 1)]
            overview.p95_s.setdefault(job_type, {})[name] = quantile(0.95, bounds[name], counts)

    def _newest_letters(self, stream: str) -> list[Letter]:
        return [read_letter(stream, entry) for entry in self._store.dead_before(stream, START, _MAX_LETTERS)]

    def _look_up_job_ids(self, services: Sequence[Service]) -> dict[tuple[str, str], str]:
        """Ids of the running jobs. Ids from the last snapshot are reused."""
        running = [
            (job["stream"], job["entry_id"]) for service in services for _, _, job in service.running()
        ][:_MAX_JOB_IDS]
        self._job_ids = {key: self._job_ids.get(key) or self._read_job_id(*key) for key in running}
        return self._job_ids

    def _read_job_id(self, stream: str, entry_id: str) -> str:
        try:
            entry = self._store.entry(stream, entry_id.encode())
        except StoreRefused:
            return ""
        return read_identity(entry.data).id if entry else ""


def quantile(fraction: float, bounds: Sequence[float], counts: Sequence[int]) -> float:
    """A quantile of a histogram, by linear interpolation in its bucket as `histogram_quantile` of Prometheus.

    ``counts`` are the values per bucket, at least one in all; the last one is above all bounds, and a
    quantile in it is the highest bound.
    """
    rank = fraction * sum(counts)
    below = 0
    for lower, upper, count in zip((0.0, *bounds), bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below += count
    return float(bounds[-1])


def _by_process(
    services: Iterable[Service], read: Callable[[dict[str, Any]], Counter[Any]]
) -> dict[tuple[str, int], Counter[Any]]:
    """What `read` finds in the status of each service that answers, by url and process id."""
    return {
        (service.url, int(service.status["pid"])): read(service.status)
        for service in services
        if service.status
    }


def _histogram(status: dict[str, Any], name: str) -> dict[str, Any]:
    """A histogram of a status page; empty in the page of an older version."""
    return dict(status.get("histograms", {}).get(name, {}))


def _duration_buckets(status: dict[str, Any]) -> Buckets:
    return Buckets({
        (str(sample["task_type"]), name, number): count
        for name, metric in _DURATIONS.items()
        for sample in _histogram(status, metric).get("samples", ())
        for number, count in enumerate(sample["counts"])
    })  # fmt: skip


def _duration_bounds(services: Iterable[Service]) -> Mapping[str, list[float]]:
    """Upper bounds of the buckets by name; services of one version have the same."""
    return {
        name: _histogram(service.status, metric).get("bounds", [])
        for service in services
        if service.status.get("histograms")
        for name, metric in _DURATIONS.items()
    }


@contextmanager
def _note_refusal(overview: Overview, what: str, read_faults: Callable[[], list[KeyFault]]) -> Iterator[None]:
    """Note that the store refuses ``what`` if it does; the rest of the block is left out."""
    try:
        yield
    except StoreRefused as error:
        overview.refused.append(refusal(what, error, read_faults))


def _counters(status: dict[str, Any]) -> Counter[tuple[str, str]]:
    """The counters of one service by job type and name. Idle types are included with 0."""
    counters: Counter[tuple[str, str]] = Counter()
    for name, metric in _RATES.items():
        for sample in status.get("metrics", {}).get(metric, ()):
            counters[str(sample["task_type"]), name] += sample["value"]
    for job_type in status.get("types", ()):
        counters[job_type, "done"] += 0
    return counters


def _sum_by_type(counters: Iterable[Counter[tuple[str, str]]]) -> dict[str, dict[str, float]]:
    totals: dict[str, dict[str, float]] = {}
    for (job_type, name), value in (item for one in counters for item in one.items()):
        totals.setdefault(job_type, dict.fromkeys(_RATES, 0.0))[name] += value
    return totals


def open_poller(deployment: Deployment, table: StreamTable) -> OverviewPoller:
    """A poller of the deployment's store and services."""
    from ..store.redis.operator import OperatorStore
    from ..store.redis.reaper import RedisReaperStore

    store = OperatorStore(deployment.url, timeout_s=_TIMEOUT_S)
    return OverviewPoller(
        RedisReaperStore(deployment.url, timeout_s=_TIMEOUT_S),
        store,
        partial(table.sources, store),
        deployment.services,
    )
