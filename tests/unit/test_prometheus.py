"""Prometheus collector: the names, labels and buckets of dashboards, and totals over all processes."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jobworker.worker.telemetry.metrics import MetricsBuffer, all_metrics
from jobworker.worker.telemetry.prometheus import MAX_HANDLER_COUNTERS, PrometheusCollector

#: Names and labels that the dashboards and alert rules of users depend on.
PROMISED = {
    "z_novel_jobs_queued": ("gauge", ("stream",)),
    "z_novel_jobs_completed_total": ("counter", ("task_type",)),
    "z_novel_jobs_failed_total": ("counter", ("task_type",)),
    "z_novel_job_duration_seconds": ("histogram", ("task_type",)),
    "z_novel_redis_stream_lag": ("gauge", ("stream", "consumer_group")),
    "z_novel_jobs_retried_total": ("counter", ("task_type",)),
    "z_novel_jobs_dead_total": ("counter", ("task_type", "reason")),
    "z_novel_dlq_length": ("gauge", ("stream",)),
    "z_novel_retry_scheduled": ("gauge", ("stream",)),
    "z_novel_job_wait_seconds": ("histogram", ("task_type",)),
    "z_novel_workers": ("gauge", ("state",)),
    "z_novel_worker_restarts_total": ("counter", ("role", "cause")),
    "z_novel_embedded_tokens_total": ("counter", ()),
    "z_novel_truncated_tokens_total": ("counter", ()),
    "z_novel_batch_jobs": ("histogram", ()),
}
PROMISED_BUCKETS = [1, 5, 10, 30, 60, 120, 300]


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The page as Prometheus reads it."""
    families = text_string_to_metric_families(page.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def one_of_each() -> PrometheusCollector:
    """Every metric with one value."""
    collector, buffer = PrometheusCollector(), MetricsBuffer()
    for name, metric in all_metrics().items():
        labels = tuple(f"a {label}" for label in metric.labels)
        match metric.kind:
            case "counter":
                buffer.count(name, labels)
            case "gauge":
                buffer.gauge(name, labels, 5)
            case _:
                buffer.histogram(name, labels).add(0.2)
    feed(collector, buffer)
    return collector


def feed(collector: PrometheusCollector, buffer: MetricsBuffer) -> None:
    """Add a report as the supervisor does."""
    delta = buffer.take()
    collector.add(delta.counts)
    collector.put(delta.gauges)
    collector.merge(delta.histograms)


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_and_labels(name: str) -> None:
    kind, labels = PROMISED[name]
    assert (all_metrics()[name].kind, all_metrics()[name].labels) == (kind, labels)
    shown = {"counter": name, "gauge": name, "histogram": f"{name}_count"}[kind]
    values = {label: f"a {label}" for label in labels}
    assert (shown, tuple(sorted(values.items()))) in samples(one_of_each().page())


def test_every_metric_has_the_prefix_and_a_help_text() -> None:
    page = one_of_each().page().decode()
    for name, metric in all_metrics().items():
        assert name.startswith("z_novel_")
        assert metric.help
        assert name.endswith("_total") == (metric.kind == "counter")
    assert not re.findall(r"^(?!#|z_novel_)\S+", page, re.MULTILINE)
    assert "_created" not in page


@pytest.mark.parametrize("name", ["z_novel_job_duration_seconds", "z_novel_job_wait_seconds"])
def test_buckets_from_a_second_on_are_those_of_dashboards_and_smaller_ones_are_added(name: str) -> None:
    bounds = list(all_metrics()[name].buckets)
    assert [bound for bound in bounds if bound >= 1] == PROMISED_BUCKETS
    assert bounds == sorted(bounds)
    assert min(bounds) < 0.01
    page = one_of_each().page().decode()
    shown = re.findall(rf'{name}_bucket{{le="([^"]+)"', page)
    assert shown[-8:] == ["1.0", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "+Inf"]


def test_a_counter_that_never_increased_is_zero_and_not_absent() -> None:
    """An alert on truncated tokens must not take a missing series for healthy."""
    found = samples(PrometheusCollector().page())
    assert found["z_novel_truncated_tokens_total", ()] == 0
    assert found["z_novel_embedded_tokens_total", ()] == 0


def test_totals_survive_the_processes_that_counted() -> None:
    collector = PrometheusCollector()
    for _ in range(3):  # three workers, one after the other
        buffer = MetricsBuffer()
        buffer.count("z_novel_jobs_completed_total", ("audit",), 5)
        buffer.histogram("z_novel_job_duration_seconds", ("audit",)).add(2.0, 5)
        buffer.gauge("z_novel_jobs_queued", ("s",), 7)
        feed(collector, buffer)
    found, audit = samples(collector.page()), (("task_type", "audit"),)
    assert found["z_novel_jobs_completed_total", audit] == 15
    assert found["z_novel_job_duration_seconds_count", audit] == 15
    assert found["z_novel_job_duration_seconds_sum", audit] == 30.0
    assert found["z_novel_jobs_queued", (("stream", "s"),)] == 7


@given(
    st.lists(st.one_of(st.floats(0, 400), st.sampled_from([0.0, 1.0, 5.0, 10.0, 30.0, 300.0])), max_size=30)
)
def test_a_bucket_counts_the_values_up_to_its_bound(values: list[float]) -> None:
    collector = PrometheusCollector()
    for half in (values[::2], values[1::2]):
        buffer = MetricsBuffer()
        for value in half:
            buffer.histogram("z_novel_job_duration_seconds", ("t",)).add(value)
        feed(collector, buffer)
    found = samples(collector.page())
    for bound in all_metrics()["z_novel_job_duration_seconds"].buckets:
        key = ("z_novel_job_duration_seconds_bucket", (("le", f"{float(bound)}"), ("task_type", "t")))
        assert found.get(key, 0) == sum(value <= bound for value in values)


def test_labels_of_any_text_are_escaped() -> None:
    collector = PrometheusCollector()
    labels = ('a"b\\c\nd', "第")
    collector.add([("z_novel_jobs_dead_total", labels, 1)])
    expected = (("reason", labels[1]), ("task_type", labels[0]))
    assert samples(collector.page())["z_novel_jobs_dead_total", expected] == 1


def test_a_counter_of_a_users_handler_is_exported_unless_its_name_is_invalid() -> None:
    collector = PrometheusCollector()
    collector.add(
        [("z_novel_words_total", (), 3), ("z_novel_words_total", (), 4), ("z_novel_no name_total", (), 1)]
    )
    found = samples(collector.page())
    assert found["z_novel_words_total", ()] == 7
    assert not [name for name, _ in found if "no name" in name]


def test_what_cannot_be_shown_is_left_out() -> None:
    """A handler's counter with the name of another metric would end every scrape, and the supervisor."""
    collector = one_of_each()
    before = samples(collector.page())
    for name, metric in all_metrics().items():
        labels = (*metric.labels, "one more")
        collector.add([(name, labels, 5), (name, (), math.nan), (name, (), -1)])
        collector.put([(name, labels, 5), ("z_novel_unheard", (), 5)])
        collector.merge([(name, labels, [1] * 17, 5.0), ("z_novel_unheard", (), [1], 5.0)])
        if metric.kind == "histogram":
            collector.add([(name, metric.labels, 5)])
            collector.merge([(name, metric.labels, [1], 5.0)])
    assert samples(collector.page()) == before
    assert collector.totals()
    assert collector.histograms()


def test_handlers_that_invent_names_do_not_fill_the_memory() -> None:
    collector = PrometheusCollector()
    collector.add((f"z_novel_n{n}_total", (), 1) for n in range(2 * MAX_HANDLER_COUNTERS))
    found = samples(collector.page())
    assert sum(name.startswith("z_novel_n") for name, _ in found) == MAX_HANDLER_COUNTERS
    assert ("z_novel_n0_total", ()) in found


def test_metrics_are_in_base_units() -> None:
    other = re.compile(r"_(milliseconds|ms|minutes|hours|kib|mib|gib|kilobytes|megabytes|percent)(_|$)")
    assert not [name for name in all_metrics() if other.search(name)]
