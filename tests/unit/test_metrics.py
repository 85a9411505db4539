"""Metrics buffer: what a process counts between two reports, once and completely."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.telemetry.metrics import SECONDS, Histogram, MetricsBuffer
from jobworker.worker.telemetry.prometheus import PrometheusCollector


def test_a_count_is_reported_once() -> None:
    buffer = MetricsBuffer()
    histogram = buffer.histogram("z_novel_batch_jobs")
    buffer.count("z_novel_jobs_failed_total", ("t",))
    histogram.add(4)
    assert buffer.take()
    assert not buffer.take()


def test_a_histogram_is_valid_after_a_report() -> None:
    buffer = MetricsBuffer()
    histogram = buffer.histogram("z_novel_batch_jobs")
    histogram.add(4)
    buffer.take()
    histogram.add(4)
    reported = [(name, sum(counts)) for name, _, counts, _ in buffer.take().histograms]
    assert reported == [("z_novel_batch_jobs", 1)]


def test_a_report_that_could_not_be_sent_goes_with_the_next() -> None:
    buffer = MetricsBuffer()
    buffer.count("z_novel_jobs_failed_total", ("t",), 2)
    buffer.gauge("z_novel_dlq_length", ("s",), 5)
    buffer.gauge("z_novel_retry_scheduled", ("s",), 1)
    buffer.histogram("z_novel_batch_jobs").add(4)
    unsent = buffer.take()
    buffer.count("z_novel_jobs_failed_total", ("t",), 3)
    buffer.gauge("z_novel_dlq_length", ("s",), 6)
    buffer.histogram("z_novel_batch_jobs").add(8)
    buffer.put_back(unsent)
    delta = buffer.take()
    assert delta.counts == [("z_novel_jobs_failed_total", ("t",), 5)]
    expected = [("z_novel_dlq_length", ("s",), 6), ("z_novel_retry_scheduled", ("s",), 1)]
    assert sorted(delta.gauges) == expected, "the newer value of a gauge wins"
    ((_, _, counts, total),) = delta.histograms
    assert (sum(counts), total) == (2, 12.0)


def test_gauges_that_are_replaced_delete_the_others_also_after_a_report_that_was_not_sent() -> None:
    buffer, collector = MetricsBuffer(), PrometheusCollector()
    name = "z_novel_tenant_waiting_seconds"
    buffer.replace(name, ("s",), {"t1": 1.0, "t2": 2.0})
    buffer.replace(name, ("other",), {"t2": 5.0})
    collector.put(buffer.take().gauges)
    buffer.replace(name, ("s",), {"t3": 3.0})
    unsent = buffer.take()
    buffer.put_back(unsent)
    buffer.replace(name, ("s",), {"t1": 4.0})
    collector.put(buffer.take().gauges)
    found = {(one["stream"], one["tenant_id"]): one["value"] for one in collector.totals(name)[name]}
    assert found == {("s", "t1"): 4.0, ("other", "t2"): 5.0}


def test_gauges_are_reported_when_they_change() -> None:
    buffer, collector = MetricsBuffer(), PrometheusCollector()
    lanes = "z_novel_lane_jobs"

    def report(depth: float, jobs: dict[str, float]) -> int:
        buffer.gauge("z_novel_dlq_length", ("s",), depth)
        buffer.replace(lanes, ("s",), jobs)
        delta = buffer.take()
        collector.put(delta.gauges)
        return len(delta.gauges)

    assert report(5, {}) == 2, "a series that an earlier process left is deleted"
    assert report(5, {}) == 0
    assert not buffer
    assert report(6, {"a": 1.0}) == 3
    buffer.replace(lanes, ("s",), {})
    unsent = buffer.take()
    buffer.put_back(unsent)
    assert report(6, {}) == 1, "what could not be sent is not known to be shown"
    assert collector.totals(lanes)[lanes] == []


@given(st.lists(st.one_of(st.sampled_from(SECONDS), st.floats(0, 400))))
def test_values_added_together_are_counted_like_values_added_one_by_one(values: list[float]) -> None:
    together, one_by_one = Histogram(SECONDS), Histogram(SECONDS)
    together.extend(values)
    for value in values:
        one_by_one.add(value)
    assert together.counts == one_by_one.counts
    assert together.total == pytest.approx(one_by_one.total)
