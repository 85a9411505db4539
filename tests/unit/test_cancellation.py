"""Cancellation of jobs that a reader has: what it marks, settles and never runs again."""

from collections.abc import Iterator

import pytest

from jobworker.worker.cancel import Canceller, JobFilter
from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.outcome import Failure
from support.reader_rig import SOURCE, ReaderRig, reader_rig

FAILED = Failure("ValueError: no")


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig() as made:
        yield made


def cancel(rig: ReaderRig, *ids: str, discard: bool = False) -> None:
    """Cancel jobs; the reader notices."""
    search = Canceller(
        rig.store, [SOURCE.stream], JobFilter(frozenset(ids)), by="test", discard=discard,
        wall_now_s=rig.server.wall_now_s,
    )  # fmt: skip
    assert {job.id for job in search.run()} == set(ids)
    rig.advance(1.1)


def reasons(rig: ReaderRig) -> dict[str, str]:
    return {letter["task"]["id"]: letter["reason"] for letter in rig.letters}


def test_a_prefetched_job_becomes_a_dead_letter_and_is_not_dispatched() -> None:
    with reader_rig(batch_hint=1) as rig:
        (worker,) = rig.workers
        rig.add("1", "2")
        rig.tick()
        assert worker.take() == ["1", "2"]
        rig.server.paused.add("a")
        rig.advance(1.0)
        rig.add("3", "4")
        worker.succeed("1", "2")
        rig.tick()
        assert rig.pending == 2, "prefetched, and parked"
        cancel(rig, "3")
        assert (reasons(rig), rig.pending) == ({"3": "cancelled"}, 1)
        assert rig.metric("z_novel_jobs_cancelled_total", "a") == 1
        rig.server.paused.clear()
        rig.advance(1.0)
        assert worker.take() == ["4"]


def test_jobs_in_flight_are_marked_and_the_running_one_has_a_deadline(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", "2")
    rig.tick()
    worker.take()
    worker.start("1")
    cancel(rig, "1", "2")
    table, channel = worker.channel.table, worker.channel
    assert [table.is_cancelled(row) for row in (0, 1)] == [True, True]
    assert channel.has_cancels
    noticed_s = 1000.0 + rig.now_s
    assert channel.mono_cancel_by_s == pytest.approx(noticed_s + 10.0)
    rig.advance(3.0)
    assert channel.mono_cancel_by_s == pytest.approx(noticed_s + 10.0), "a deadline stays"
    assert not channel.is_cancel_overdue(noticed_s + 9.0)
    assert channel.is_cancel_overdue(noticed_s + 10.1)


def test_no_worker_is_ended_whose_other_jobs_run(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", "2")
    rig.tick()
    worker.take()
    worker.start("1", "2")
    cancel(rig, "1")
    assert not worker.channel.is_cancel_overdue(1e9)
    worker.succeed("2")
    assert worker.channel.is_cancel_overdue(1e9)


def test_a_row_that_is_used_again_is_not_cancelled(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1")
    rig.tick()
    worker.take()
    cancel(rig, "1")
    table = worker.channel.table
    table.write(b"\0", b"\0", b"\0", [False], [b"5-5"])
    assert not table.is_cancelled(table.head)


def test_a_cancelled_job_that_fails_is_not_retried(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", "2")
    rig.tick()
    worker.take()
    cancel(rig, "1")
    worker.fail("1", FAILED)
    worker.fail("2", FAILED)
    rig.tick()
    assert reasons(rig) == {"1": "cancelled"}
    assert [job["id"] for job in rig.retries] == ["2"]


def test_a_job_that_is_cancelled_while_its_failure_is_settled_is_not_retried(rig: ReaderRig) -> None:
    """The reader has not noticed yet: the store says it."""
    (worker,) = rig.workers
    rig.add("1", "2")
    rig.tick()
    worker.take()
    for id, discard in (("1", False), ("2", True)):
        list(Canceller(rig.store, ["stream"], JobFilter(frozenset(id)), by="test", discard=discard).run())
        worker.fail(id, FAILED)
    rig.tick()
    assert (reasons(rig), rig.retries, rig.pending) == ({"1": "cancelled"}, [], 0)
    assert rig.store.cancels(SOURCE) == {}


def test_a_cancelled_job_whose_worker_dies_is_not_run_again(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", "2", "3")
    rig.tick()
    worker.take()
    worker.start("1", "2")
    cancel(rig, "1", "3")
    rig.exit(worker, charge=True)
    rig.tick()
    assert reasons(rig) == {"1": "cancelled", "3": "cancelled"}
    successor = rig.restart(worker)
    rig.tick()
    assert successor.take() == ["2"]


def test_a_store_that_does_not_forget_a_request_settles_nothing_twice(rig: ReaderRig) -> None:
    def unavailable(*_: object) -> None:
        raise StoreUnavailable("no answer")

    (worker,) = rig.workers
    rig.add("1")
    rig.tick()
    worker.take()
    cancel(rig, "1")
    rig.store.end_cancels = unavailable  # type: ignore[method-assign]
    worker.fail("1", FAILED)
    rig.tick()
    assert (reasons(rig), rig.pending) == ({"1": "cancelled"}, 0)
    assert rig.metric("z_novel_leases_lost_total", "stream") == 0
    assert rig.metric("z_novel_jobs_cancelled_total", "a") == 1


def test_a_new_reader_knows_what_was_cancelled(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1")
    rig.tick()
    worker.take()
    list(Canceller(rig.store, ["stream"], JobFilter(frozenset("1")), by="test").run())
    rig.crash()
    with_new = ReaderRig(rig.server)
    with_new.now_s = rig.now_s
    try:
        with_new.attach()
        with_new.sync()
        with_new.tick()
        assert reasons(with_new) == {"1": "cancelled"}
    finally:
        with_new.close()


def test_a_dropped_job_leaves_no_dead_letter_but_the_result_that_it_asked_for(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", "2", metadata={"keep_result": "true"})
    rig.add("3")
    rig.tick()
    worker.take()
    cancel(rig, "1", "3", discard=True)
    for id in "123":
        worker.fail(id, FAILED)
    rig.tick()
    assert (rig.letters, rig.pending, len(rig.retries)) == ([], 0, 1)
    assert rig.store.result("stream", "1") is not None
    assert rig.store.result("stream", "2") is None, "it is retried"


def test_a_job_that_ends_in_a_dead_letter_keeps_a_result_with_its_reason(rig: ReaderRig) -> None:
    (worker,) = rig.workers
    rig.add("1", metadata={"keep_result": "true"})
    rig.tick()
    worker.take()
    worker.fail("1", Failure("PermanentError: no", permanent=True))
    rig.tick()
    record = rig.store.result("stream", "1")
    assert record is not None
    assert b'"state":"dead"' in record
    assert b'"reason":"permanent"' in record


def test_waiting_jobs_that_were_cancelled_are_counted(rig: ReaderRig) -> None:
    rig.server.schedule("stream", b'{"id":"1","type":"a"}', 600.0)
    cancel(rig, "1")
    assert rig.metric("z_novel_jobs_cancelled_waiting", "stream") == 1
