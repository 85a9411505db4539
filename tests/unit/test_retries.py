"""Waiting retries: pages that a filter selects, and retries made due now."""

from typing import Any

from jobworker.worker.admin.retries import RetrySet
from jobworker.worker.store.operator import Scheduled
from support.fake_operator import NOW_S, SOURCE, FakeOperatorStore, job

STREAMS = [SOURCE.stream, "stream:other"]


def store_with(count: int) -> Any:
    """Retries in turn of two types, due one second apart, in each of the streams."""
    store = FakeOperatorStore()
    for stream in STREAMS:
        store.scheduled[stream] = [
            Scheduled(NOW_S + n, job(f"{stream[-5:]}-{n}", "audit" if n % 2 else "embedding_batch"))
            for n in range(1, count + 1)
        ]
    return store


def test_pages_show_every_matching_job_once_soonest_first() -> None:
    retries = RetrySet(store_with(250), STREAMS, types=frozenset({"audit"}))
    shown, offset = [], 0
    for _ in range(100):
        page = retries.page(40, 70, offset)
        assert len(page.jobs) <= 40
        shown += page.jobs
        if page.next_offset is None:
            break
        offset = page.next_offset
    assert [one.job.id for one in shown] == [one.job.id for one in retries.soonest_first()]
    assert len(shown) == 250
    assert {one.job.type for one in shown} == {"audit"}


def test_one_job_is_made_due_and_the_others_keep_their_backoff() -> None:
    store = store_with(3)
    retries = RetrySet(store, STREAMS).with_id("other-2")
    assert retries.make_due_now(dry_run=True) == 1
    assert min(one.due_wall_s for one in store.scheduled["stream:other"]) > NOW_S
    assert retries.make_due_now() == 1
    due = [one.data for stream in STREAMS for one in store.scheduled[stream] if one.due_wall_s <= NOW_S]
    assert due == [job("other-2", "embedding_batch")]
    assert retries.make_due_now() == 0, "it is due already"


def test_all_retries_are_made_due_although_the_ranks_shift_meanwhile() -> None:
    store = store_with(350)
    assert RetrySet(store, STREAMS).make_due_now() == 700
    assert all(one.due_wall_s == NOW_S for stream in STREAMS for one in store.scheduled[stream])


def test_a_filter_needs_every_condition() -> None:
    retries = RetrySet(
        store_with(4), STREAMS, frozenset({"other-1", "other-2"}), frozenset({"audit"}), frozenset({"t1"})
    )
    assert [one.job.id for one in retries.soonest_first()] == ["other-1"]
