"""Seconds of work that wait: what an autoscaler divides by the time in which the work has to be done."""

import pytest

from jobworker.worker.supervision.work_estimate import WorkEstimate
from jobworker.worker.telemetry.metrics import MetricsBuffer
from jobworker.worker.telemetry.prometheus import PrometheusCollector
from support.reader_rig import SOURCE, reader_rig
from support.runner_rig import Make, Single


def ran(estimate: WorkEstimate, kind: str, jobs: int, busy_s: float) -> None:
    buffer = MetricsBuffer()
    buffer.histogram("z_novel_job_duration_seconds", (kind,)).add(1.0, jobs)
    buffer.count("z_novel_worker_busy_seconds_total", (kind,), busy_s)
    delta = buffer.take()
    estimate.record(delta.counts, delta.histograms)


def waiting(unread: int, lanes: dict[str, int], lanes_all: int = 0) -> PrometheusCollector:
    metrics = PrometheusCollector()
    metrics.put([("z_novel_jobs_waiting", ("s", "stream"), unread)])
    metrics.put([("z_novel_jobs_waiting", ("s", "lanes"), lanes_all or sum(lanes.values()))])
    metrics.put([("z_novel_lane_jobs", ("s", kind), jobs) for kind, jobs in lanes.items()])
    return metrics


def work_s(estimate: WorkEstimate, metrics: PrometheusCollector) -> float:
    ((name, labels, value),) = estimate.gauges(metrics)
    assert (name, labels) == ("z_novel_work_waiting_seconds", ("s",))
    assert value is not None
    return value


def test_jobs_count_by_the_time_that_their_type_takes() -> None:
    estimate = WorkEstimate()
    assert estimate.gauges(waiting(10, {})) == [], "nothing is known before the first job"
    ran(estimate, "slow", 10, 20.0)
    ran(estimate, "quick", 10, 0.1)
    assert work_s(estimate, waiting(0, {"slow": 100})) == pytest.approx(200.0)
    assert work_s(estimate, waiting(0, {"quick": 100})) == pytest.approx(1.0)
    # Jobs of which the type is not known: unread, of a new type, or in a series.
    mean_s = 20.1 / 20
    assert work_s(estimate, waiting(10, {"new": 10}, 30)) == pytest.approx(40 * mean_s)


def test_recent_jobs_count_most() -> None:
    estimate = WorkEstimate()
    ran(estimate, "a", 1000, 1000.0)
    for _ in range(10):
        ran(estimate, "a", 1000, 10.0)
    assert estimate.seconds_per_job("a") == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("gauge", ["z_novel_paused", "z_novel_circuit_open"])
def test_types_that_more_workers_would_not_run_are_no_work(gauge: str) -> None:
    estimate, metrics = WorkEstimate(), waiting(0, {"a": 10, "b": 10})
    ran(estimate, "a", 1, 1.0)
    metrics.put([(gauge, ("a",), 1.0)])
    assert work_s(estimate, metrics) == pytest.approx(10.0), "only those of b"


def test_workers_report_their_time_and_readers_the_lanes(make_rig: Make) -> None:
    worker = make_rig(t=Single())
    worker.dispatch("t", "t")
    worker.run()
    worker.runner.report()
    counts = {name: by for report in worker.reports() for name, _, by in report.counts}
    assert counts["z_novel_worker_busy_seconds_total"] > 0
    with reader_rig(batch_hint=1) as rig:
        rig.add(*(f"job-{number}" for number in range(500)))
        for _ in range(4):
            rig.advance(1.1)
        assert rig.metric("z_novel_lane_jobs", SOURCE.stream, "a") > 400
