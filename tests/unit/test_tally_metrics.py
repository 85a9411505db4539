"""Metrics: the names, labels and buckets that dashboards know, and totals that add up over every role."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from jobworker.worker.telemetry.metrics import SECONDS, Histogram, MetricsBuffer, all_metrics
from jobworker.worker.telemetry.prometheus import PrometheusCollector

#: What dashboards and alert rules of other people rest on.
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
    exposition, tally = PrometheusCollector(), MetricsBuffer()
    for name, metric in all_metrics().items():
        labels = tuple(f"a {label}" for label in metric.labels)
        match metric.kind:
            case "counter":
                tally.count(name, labels)
            case "gauge":
                tally.gauge(name, labels, 5)
            case _:
                tally.histogram(name, labels).add(0.2)
    feed(exposition, tally)
    return exposition


def feed(exposition: PrometheusCollector, tally: MetricsBuffer) -> None:
    """As the supervisor does with a report."""
    delta = tally.take()
    exposition.add(delta.counts)
    exposition.put(delta.gauges)
    exposition.merge(delta.histograms)


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
def test_buckets_from_a_second_on_are_the_known_ones_and_smaller_ones_are_added(name: str) -> None:
    bounds = list(all_metrics()[name].buckets)
    assert [bound for bound in bounds if bound >= 1] == PROMISED_BUCKETS
    assert bounds == sorted(bounds)
    assert min(bounds) < 0.01
    page = one_of_each().page().decode()
    shown = re.findall(rf'{name}_bucket{{le="([^"]+)"', page)
    assert shown[-8:] == ["1.0", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "+Inf"]


def test_a_counter_that_never_moved_is_zero_and_not_absent() -> None:
    """An alert on truncated tokens must not read a missing series as fine."""
    found = samples(PrometheusCollector().page())
    assert found["z_novel_truncated_tokens_total", ()] == 0
    assert found["z_novel_embedded_tokens_total", ()] == 0


def test_totals_outlive_the_roles_that_counted() -> None:
    exposition = PrometheusCollector()
    for _ in range(3):  # three workers, one after the other
        tally = MetricsBuffer()
        tally.count("z_novel_jobs_completed_total", ("audit",), 5)
        tally.histogram("z_novel_job_duration_seconds", ("audit",)).add(2.0, 5)
        tally.gauge("z_novel_jobs_queued", ("s",), 7)
        feed(exposition, tally)
    found, audit = samples(exposition.page()), (("task_type", "audit"),)
    assert found["z_novel_jobs_completed_total", audit] == 15
    assert found["z_novel_job_duration_seconds_count", audit] == 15
    assert found["z_novel_job_duration_seconds_sum", audit] == 30.0
    assert found["z_novel_jobs_queued", (("stream", "s"),)] == 7


@given(
    st.lists(st.one_of(st.floats(0, 400), st.sampled_from([0.0, 1.0, 5.0, 10.0, 30.0, 300.0])), max_size=30)
)
def test_a_bucket_holds_what_is_at_most_its_bound(values: list[float]) -> None:
    exposition = PrometheusCollector()
    for half in (values[::2], values[1::2]):
        tally = MetricsBuffer()
        for value in half:
            tally.histogram("z_novel_job_duration_seconds", ("t",)).add(value)
        feed(exposition, tally)
    found = samples(exposition.page())
    for bound in all_metrics()["z_novel_job_duration_seconds"].buckets:
        key = ("z_novel_job_duration_seconds_bucket", (("le", f"{float(bound)}"), ("task_type", "t")))
        assert found.get(key, 0) == sum(value <= bound for value in values)


def test_nothing_is_taken_twice() -> None:
    tally = MetricsBuffer()
    histogram = tally.histogram("z_novel_batch_jobs")
    tally.count("z_novel_jobs_failed_total", ("t",))
    histogram.add(4)
    assert tally.take()
    assert not tally.take()
    histogram.add(4)  # the same one as before
    assert [(name, sum(counts)) for name, _, counts, _ in tally.take().histograms] == [
        ("z_novel_batch_jobs", 1)
    ]


def test_labels_of_any_text_are_escaped() -> None:
    exposition = PrometheusCollector()
    labels = ('a"b\\c\nd', "第")
    exposition.add([("z_novel_jobs_dead_total", labels, 1)])
    expected = (("reason", labels[1]), ("task_type", labels[0]))
    assert samples(exposition.page())["z_novel_jobs_dead_total", expected] == 1


def test_a_counter_of_a_users_handler_is_exported_and_harms_nothing() -> None:
    exposition = PrometheusCollector()
    exposition.add(
        [("z_novel_words_total", (), 3), ("z_novel_words_total", (), 4), ("z_novel_no name_total", (), 1)]
    )
    found = samples(exposition.page())
    assert found["z_novel_words_total", ()] == 7
    assert not [name for name, _ in found if "no name" in name]


@given(st.lists(st.one_of(st.sampled_from(SECONDS), st.floats(0, 400))))
def test_many_values_at_once_are_counted_as_one_by_one(values: list[float]) -> None:
    at_once, one_by_one = Histogram(SECONDS), Histogram(SECONDS)
    at_once.extend(values)
    for value in values:
        one_by_one.add(value)
    assert at_once.counts == one_by_one.counts
    assert at_once.total == pytest.approx(one_by_one.total)
