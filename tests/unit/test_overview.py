"""Snapshots for the dashboards: rates, the newest dead letters and the ids of running jobs."""

from typing import Any

import pytest

from jobworker.worker.admin.overview import OverviewPoller, quantile
from jobworker.worker.admin.status_client import Service
from jobworker.worker.cli.top import to_json
from jobworker.worker.errors import StoreRefused, StoreUnavailable
from jobworker.worker.keys import Source
from jobworker.worker.store.operator import Pause
from jobworker.worker.store.ports import Depths, Entry
from support.fake_operator import SOURCE, FakeOperatorStore, job, letter


def service(url: str, done: float, pid: int = 1) -> Service:
    """A service that has completed a number of jobs and runs entry 5-0."""
    running = {"count": 1, "jobs": [{"stream": SOURCE.stream, "entry_id": "5-0", "type": "audit"}]}
    return Service(url, {
        "pid": pid, "types": ["audit", "idle_type"],
        "children": [{"role": "worker", "state": "busy", "running": running}],
        "metrics": {"z_novel_jobs_completed_total": [{"task_type": "audit", "value": done}]},
    })  # fmt: skip


SILENT = Service("http://b", {}, "refused")


def poller(store: Any, answers: list[list[Service]]) -> OverviewPoller:
    """A poller whose clock advances by 10 s with each snapshot."""
    clock = iter(range(0, 1000, 10))
    return OverviewPoller(
        store,
        store,
        lambda: [SOURCE],
        lambda: answers.pop(0),
        mono_s=lambda: float(next(clock)),
        wall_s=lambda: 1.0,
    )


def test_rates_are_the_difference_of_two_answers_of_one_process() -> None:
    answers = [
        [service("http://a", 100), service("http://b", 50, pid=2)],
        [service("http://a", 130), service("http://b", 7, pid=3)],
        [SILENT, service("http://b", 27, pid=3)],
    ]
    one = poller(FakeOperatorStore(), answers)
    assert one.snapshot().rates is None
    second = one.snapshot()
    assert second.rates is not None
    assert second.rates["audit"]["done"] == 3.0, "a restarted service counts from 0"
    assert second.rates["idle_type"]["done"] == 0.0
    assert second.totals["audit"]["done"] == 137
    assert one.snapshot().rate("done") == 2.0, "a service that does not answer has no rate"


def with_runs(url: str, counts: list[int], pid: int = 1) -> Service:
    """A service whose tries of one type took up to 1 s, up to 10 s, and longer."""
    samples = [{"task_type": "audit", "counts": counts}]
    histograms = {"z_novel_job_duration_seconds": {"bounds": [1.0, 10.0], "samples": samples}}
    return Service(url, {"pid": pid, "children": [], "histograms": histograms})


def test_the_p95_covers_the_jobs_of_the_last_minute() -> None:
    answers = [[with_runs("http://a", [500 + 10 * n, 0, 0])] for n in range(9)]
    answers[8] = [with_runs("http://a", [580, 100, 0])]
    one = poller(FakeOperatorStore(), answers)
    assert one.snapshot().p95_s == {}, "nothing is known about the time before"
    assert one.snapshot().p95_s == {"audit": {"run": 0.95}}
    for _ in range(6):
        one.snapshot()
    assert one.snapshot().p95_s["audit"]["run"] > 5.0, "old jobs no longer hide the slow ones"


def test_a_service_that_restarted_has_no_p95_until_the_next_snapshot() -> None:
    answers = [[with_runs("http://a", [9, 0, 0])], [with_runs("http://a", [5, 0, 0], pid=2)]]
    answers += [[with_runs("http://a", [5, 3, 0], pid=2)], [SILENT]]
    one = poller(FakeOperatorStore(), answers)
    assert [one.snapshot().p95_s for _ in range(4)] == [{}, {}, {}, {}]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([100, 0, 0], 0.95), ([0, 100, 0], 9.55), ([95, 5, 0], 1.0), ([0, 0, 1], 10.0), ([1, 0, 99], 10.0)],
)
def test_a_quantile_is_interpolated_in_its_bucket(counts: list[int], expected: float) -> None:
    assert quantile(0.95, [1.0, 10.0], counts) == pytest.approx(expected)


def test_the_newest_dead_letters_of_all_streams_are_shown() -> None:
    store: Any = FakeOperatorStore({"a": [letter(f"{n}-0") for n in range(1, 30)], "b": [letter("25-1")]})
    one = OverviewPoller(store, store, lambda: [Source("a", "g"), Source("b", "g")], list)
    ids = [x.id for x in one.snapshot().letters]
    assert ids[:6] == [b"29-0", b"28-0", b"27-0", b"26-0", b"25-0", b"25-1"]
    assert len(ids) == 10


def test_ids_of_running_jobs_are_looked_up_once() -> None:
    store = FakeOperatorStore()
    store.streams[SOURCE.stream] = [Entry(b"5-0", job("job-1"))]
    one = poller(store, [[service("http://a", 1)], [service("http://a", 2)], []])
    assert one.snapshot().job_ids == {(SOURCE.stream, "5-0"): "job-1"}
    store.streams.clear()  # trimmed: it is not asked for again
    assert one.snapshot().job_ids == {(SOURCE.stream, "5-0"): "job-1"}
    assert one.snapshot().job_ids == {}


def test_a_store_that_does_not_answer_leaves_its_part_empty() -> None:
    class Down(FakeOperatorStore):
        def pauses(self) -> list[Pause]:
            raise StoreUnavailable("the store did not answer")

    overview = poller(Down(), [[service("http://a", 1)]]).snapshot()
    assert (overview.error, overview.pauses, len(overview.services)) == ("the store did not answer", [], 1)


def test_a_refused_key_leaves_out_its_own_part() -> None:
    class Refusing(FakeOperatorStore):
        def depths(self, source: Source) -> Depths:
            if source.stream == "a":
                raise StoreRefused("WRONGTYPE")
            return super().depths(source)

        def pauses(self) -> list[Pause]:
            raise StoreRefused("WRONGTYPE")

    store: Any = Refusing({"a": [letter("1-0")], "b": [letter("2-0")]})
    sources = [Source("a", "g"), Source("b", "g")]
    overview = OverviewPoller(store, store, lambda: sources, lambda: [service("http://a", 1)]).snapshot()
    assert [source.stream for source, _ in overview.streams] == ["b"]
    assert [one.id for one in overview.letters] == [b"2-0"]
    assert [text.partition(":")[0] for text in overview.refused] == ["stream a", "paused types"]
    assert (overview.error, len(overview.totals)) == ("", 2)


def test_the_names_of_a_snapshot_in_json_are_stable() -> None:
    """Scripts depend on them."""
    store = FakeOperatorStore({SOURCE.stream: [letter("9-0")]})
    store.paused = [Pause("audit", 5.0, "disk full")]
    one = to_json(poller(store, [[service("http://a", 1), SILENT]]).snapshot())
    assert list(one) == [
        "streams", "services", "totals", "rates", "p95_s", "paused", "failures", "lanes", "limits", "refused",
        "trouble", "cron",
    ]  # fmt: skip
    assert list(one["streams"][0]) == [
        "stream", "group", "queued", "pending", "retrying", "dead", "oldest_age_s", "lag", "waiting",
        "other_groups", "tenant_ages_s",
    ]  # fmt: skip
    assert one["paused"] == [{"kind": "audit", "wall_since_s": 5.0, "note": "disk full"}]
    assert one["services"][1] == {"url": "http://b", "trouble": "refused"}
    assert "metrics" not in one["services"][0]
    assert list(one["failures"][0]) == [
        "stream", "id", "job_id", "type", "tenant_id", "project_id", "reason", "error", "failed_at",
        "original_id", "worker", "retry_count", "deaths",
    ]  # fmt: skip
