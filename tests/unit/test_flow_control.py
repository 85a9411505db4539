"""Flow control in the reader: short queues pass straight through, backlogs and limited jobs wait in lanes."""

import contextlib
from typing import Any

import pytest

from jobworker.worker.envelope import MAX_NESTING
from jobworker.worker.flow import FlowConfig, Limit
from jobworker.worker.outcome import Failure
from jobworker.worker.wakeups import EARLY_S, next_wakeup_s
from support.reader_rig import SOURCE, ReaderRig, reader_rig


def configure(rig: ReaderRig, *limits: Limit, **weights: float) -> None:
    config = rig.store.flow_config(SOURCE)
    assert rig.store.configure(SOURCE, FlowConfig(config.version, limits, weights))


def waiting(rig: ReaderRig) -> int:
    return sum(rig.store.backlog(SOURCE).waiting.values())


def flood(rig: ReaderRig, jobs: int = 500, **fields: Any) -> None:
    rig.add(*(f"flood-{number}" for number in range(jobs)), **{"tenant_id": "flood", **fields})
    rig.advance(1.1)  # the jobs are read
    rig.advance(1.1)  # the rate of the workers is known
    rig.advance(1.1)  # the backlog is noticed


def test_a_short_queue_is_not_sorted() -> None:
    with reader_rig(batch_hint=1) as rig:
        flood(rig, 50)
        assert waiting(rig) == 0
        assert rig.store.depths(SOURCE).lag > 0


def test_a_backlog_is_sorted_and_another_tenant_is_next() -> None:
    with reader_rig(batch_hint=1) as rig:
        (worker,) = rig.workers
        flood(rig)
        assert rig.store.depths(SOURCE).lag == 0
        assert waiting(rig) > 400
        rig.add("other", tenant_id="t2")
        rig.tick()
        ran: list[str] = []
        while "other" not in ran:
            taken = worker.take()
            worker.succeed(*taken)
            ran += taken
            rig.tick()
        assert len(ran) < 10


def test_all_jobs_of_a_backlog_run_once() -> None:
    with reader_rig(workers=2) as rig:
        flood(rig, 700)
        ran: list[str] = []
        while len(ran) < 700:
            for worker in rig.workers:
                taken = worker.take()
                worker.succeed(*taken)
                ran += taken
            rig.tick(2)
        rig.advance(1.1)
        assert sorted(ran) == sorted(f"flood-{number}" for number in range(700))
        assert rig.pending == waiting(rig) == 0
        rig.add("after")
        rig.tick()
        assert rig.workers[0].take() + rig.workers[1].take() == ["after"]


def test_a_paused_type_stays_in_its_lane_and_others_go_on() -> None:
    with reader_rig() as rig:
        rig.server.paused.add("a")
        rig.advance(1.0)
        flood(rig)
        before = waiting(rig)
        rig.add("other", type_name="b")
        rig.tick()
        assert rig.workers[0].take() == ["other"]
        assert waiting(rig) == before
        rig.server.paused.clear()
        rig.advance(1.0)
        assert rig.workers[0].take()


def test_a_limit_holds_and_the_next_job_starts_when_one_ends() -> None:
    with reader_rig(workers=2, batch_hint=8) as rig:
        configure(rig, Limit("one", "a", "tenant", concurrency=1))
        rig.advance(1.1)
        rig.add("1", "2", "3", tenant_id="t1")
        rig.add("4", tenant_id="t2")
        rig.add("5", type_name="b")
        rig.tick()
        taken = {id: worker for worker in rig.workers for id in worker.take()}
        assert sorted(taken) == ["1", "4", "5"]
        taken["1"].succeed("1")
        rig.tick()
        assert [id for worker in rig.workers for id in worker.take()] == ["2"]


def test_a_malformed_job_takes_no_turn_when_limits_change() -> None:
    """Its lane cannot be read: it goes to a worker, which refuses it."""
    with reader_rig() as rig:
        rig.server.paused.add("a")
        rig.advance(1.0)
        rig.add("1", "2")
        rig.server.append(SOURCE.stream, b'{"id":"3","type":"a","metadata":{"x":5}}')
        rig.tick()
        configure(rig, Limit("one", "a", "tenant", concurrency=1))
        rig.server.paused.clear()
        rig.advance(1.1)
        rig.advance(1.1)
        assert sorted(rig.workers[0].take()) == ["1", "3"]
        assert waiting(rig) == 1


def test_a_short_burst_of_quick_jobs_is_not_sorted() -> None:
    """To sort a tiny job takes longer than to run it. The rate of a time without jobs does not count."""
    with reader_rig() as rig:
        rig.advance(1.1)
        rig.advance(1.1)
        for number in range(300):
            rig.add(*(f"{number}-{one}" for one in range(100)))
        (worker,) = rig.workers
        taken: list[str] = []
        for _ in range(120):
            taken += worker.take()
            worker.succeed(*taken[:200])
            del taken[:200]
            rig.advance(0.01)
        assert waiting(rig) == 0
        assert rig.store.depths(SOURCE).lag > 128


def test_a_retry_gives_its_slot_back() -> None:
    with reader_rig() as rig:
        configure(rig, Limit("one", "a", "global", concurrency=1))
        rig.advance(1.1)
        rig.add("1", "2")
        rig.tick()
        (worker,) = rig.workers
        assert worker.take() == ["1"]
        worker.fail("1", Failure("boom"))
        rig.tick()
        assert worker.take() == ["2"]


def test_a_reader_that_was_killed_leaves_its_slots_to_the_next_one() -> None:
    with contextlib.closing(ReaderRig()) as first:
        first.attach()
        configure(first, Limit("one", "a", "global", concurrency=1))
        first.sync()
        first.add("1", "2", "3")
        first.tick()
        assert first.workers[0].take() == ["1"]
        first.crash()
        with contextlib.closing(ReaderRig(first.server)) as second:
            second.attach()
            second.sync()
            assert second.workers[0].take() == ["1"]
            second.workers[0].succeed("1")
            second.tick()
            assert second.workers[0].take() == ["2"]


def test_entries_read_and_not_sorted_wait_for_slots_in_the_next_reader() -> None:
    with contextlib.closing(ReaderRig()) as first:
        configure(first, Limit("one", "a", "global", concurrency=1))
        first.store.acquire([SOURCE])
        first.add("1", "2")
        first.store.begin_read(SOURCE, 10, 0)
        assert len(first.store.finish_read(SOURCE)) == 2
        first.crash()
        with contextlib.closing(ReaderRig(first.server)) as second:
            second.attach()
            second.sync()
            second.tick()
            assert second.workers[0].take() == ["1"]


def test_a_new_limit_holds_for_jobs_that_are_prefetched() -> None:
    with reader_rig(batch_hint=1) as rig:
        (worker,) = rig.workers
        rig.add(*"123456789")
        rig.tick()
        started = worker.take()
        configure(rig, Limit("one", "a", "global", concurrency=1))
        rig.advance(1.1)
        worker.succeed(*started)
        rig.tick()
        assert len(worker.take()) == 1


@pytest.mark.parametrize("limits", [(), (Limit("one", "a", "tenant", concurrency=1),)])
def test_a_drain_leaves_waiting_jobs_in_their_lanes(limits: tuple[Limit, ...]) -> None:
    with reader_rig(batch_hint=1) as rig:
        configure(rig, *limits)
        flood(rig)
        rig.tick()  # the answer to the read that was under way is sorted, too
        before = waiting(rig)
        assert before > 400
        rig.drain()
        assert waiting(rig) == before


def test_a_burst_just_before_a_look_at_the_backlog_is_not_sorted() -> None:
    """No job has ended then: that is not the rate of the workers."""
    with reader_rig() as rig:
        rig.now_s = next_wakeup_s(rig.mono_s) - EARLY_S - 0.005 - 1000.0
        rig.add(*(str(number) for number in range(1000)))
        rig.tick()
        (worker,) = rig.workers
        most = 0
        for number in range(100):
            rig.advance(0.001)
            if number > 6:
                worker.succeed(*worker.take())
            most = max(most, waiting(rig))
        assert (most, rig.store.depths(SOURCE).lag) == (0, 0)


def test_no_depth_of_a_payload_ends_the_reader() -> None:
    """The stack is deeper where a job is sorted than where it is admitted: one depth fits only there."""
    with reader_rig() as rig:
        configure(rig, Limit("one", "a", "tenant", concurrency=1))
        rig.advance(1.1)
        rig.advance(1.1)
        for depth in range(MAX_NESTING, 1000):
            data = b'{"id":"%d","type":"a","payload":%s%s}' % (depth, b"[" * depth, b"]" * depth)
            rig.server.append(SOURCE.stream, data)
            rig.tick(2)
        assert {letter["reason"] for letter in rig.letters} == {"malformed"}
        assert waiting(rig) > 0
