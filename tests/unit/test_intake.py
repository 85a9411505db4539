"""Intake: how much is read, pending entries after a restart, leases and claims, hand-back at the end."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from jobworker.worker.errors import AnswerTooLarge
from jobworker.worker.keys import Source
from jobworker.worker.reader.intake import ReadCount
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry
from support.reader_rig import SOURCE, ReaderRig, reader_rig

MIB = 1024 * 1024
LEASE_S = 30.0


def entries(*sizes: int) -> list[Entry]:
    return [Entry(b"%d-0" % number, b"x" * size) for number, size in enumerate(sizes)]


# -- read count


def test_small_entries_are_soon_requested_by_the_hundred() -> None:
    count = ReadCount()
    for _ in range(7):
        count.learn(entries(*[200] * count.entries))
    assert (count.entries, count.is_largest) == (1000, True)


def test_the_first_answer_is_bounded_whatever_comes() -> None:
    assert ReadCount().entries * 8 * MIB <= 64 * MIB


def test_after_one_large_entry_among_small_ones_one_is_requested() -> None:
    count = ReadCount()
    count.learn(entries(200, 8 * MIB, 200))
    assert count.entries == 1
    count.learn(entries(200))
    assert count.entries == 2, "then it grows again"


def test_no_more_entries_are_requested_than_fit_an_answer() -> None:
    count = ReadCount()
    for _ in range(9):
        count.learn(entries(64 * 1024))
    assert count.entries == 64


def test_an_entry_without_data_counts_as_a_small_one() -> None:
    count = ReadCount()
    count.learn([Entry(b"1-0", None)])
    assert count.entries == 16


# -- new entries


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig(lease_s=LEASE_S) as made:
        yield made


def test_no_more_is_read_than_workers_have_credit_for() -> None:
    with reader_rig(batch_hint=10) as rig:
        rig.add(*map(str, range(100)))
        rig.tick(20)
        assert rig.pending == 20


def test_entries_of_a_dropped_answer_are_read_again_one_at_a_time(rig: ReaderRig) -> None:
    finish_read, answers = rig.store.finish_read, []

    def too_large_once(source: Source) -> list[Entry]:
        answer = finish_read(source)
        answers.append(len(answer))
        if len(answer) > 1:
            raise AnswerTooLarge("64 MiB")
        return answer

    rig.store.finish_read = too_large_once  # type: ignore[method-assign]
    rig.add("1", "2", "3")
    rig.tick(20)
    assert rig.workers[0].take() == ["1", "2", "3"]
    assert max(answers) == 3


# -- pending entries


def test_a_restarted_reader_takes_up_what_was_pending_before_it_reads_new_entries() -> None:
    with closing(ReaderRig()) as first:
        first.sync()
        first.attach(2)
        first.tick()
        first.add("1", "2", "3")
        first.tick()
        assert first.pending == 3
        with closing(ReaderRig(server=first.server)) as second:
            second.add("4")
            worker = second.attach()
            second.sync()
            second.tick()
            assert worker.take() == ["1", "2", "3", "4"]


# -- leases


def lost_host(rig: ReaderRig, *job_ids: str) -> None:
    """Another host reads jobs and falls silent."""
    store = MemoryStore(rig.server, "lost/one")
    store.acquire([SOURCE])
    rig.add(*job_ids)
    store.begin_read(SOURCE, len(job_ids), 0)
    assert len(store.finish_read(SOURCE)) == len(job_ids)


def test_jobs_of_a_lost_host_are_claimed_once_their_lease_is_over() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        lost_host(rig, "1", "2")
        worker = rig.attach()
        rig.sync()
        rig.advance(LEASE_S - 1)
        assert worker.take() == []
        for _ in range(3):
            rig.advance(LEASE_S / 3 + 1)
        assert worker.take() == ["1", "2"]
        assert rig.metric("z_novel_leases_taken_over_total", SOURCE.stream) == 2


def work_off(rig: ReaderRig, ticks: int) -> list[str]:
    """Let all workers finish what they get; returns the ids in order."""
    ids: list[str] = []
    for _ in range(ticks):
        rig.tick(1)
        for worker in rig.workers:
            taken = worker.take()
            worker.start(*taken)
            worker.succeed(*taken)
            ids += taken
    return ids


def test_all_jobs_of_a_lost_host_are_taken_over_at_the_pace_of_the_workers() -> None:
    jobs = [str(number) for number in range(2000)]
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        lost_host(rig, *jobs)
        rig.attach(batch_hint=50)
        rig.sync()
        rig.advance(LEASE_S + 1)
        done = work_off(rig, 50)
        assert sorted(done, key=int) == jobs, "in one sweep, without another third of a lease"


def test_new_jobs_are_run_while_a_lost_host_is_taken_over() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        lost_host(rig, *(f"old {number}" for number in range(400)))
        rig.attach(batch_hint=5)
        rig.sync()
        rig.now_s += LEASE_S + 1
        rig.add(*(f"new {number}" for number in range(400)))
        done = work_off(rig, 40)
        new = sum(job_id.startswith("new") for job_id in done)
        assert min(new, len(done) - new) >= len(done) // 4, "both share the workers"


def test_a_sorted_backlog_does_not_delay_a_take_over_and_is_not_delayed_by_it() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        lost_host(rig, *(f"old {number}" for number in range(200)))
        rig.attach(batch_hint=1)
        rig.sync()
        rig.add(*(f"new {number}" for number in range(2000)))
        rig.advance(LEASE_S + 1)
        done = work_off(rig, 300)
        new = sum(job_id.startswith("new") for job_id in done)
        assert min(new, len(done) - new) >= len(done) // 4, "both share the worker"


def test_a_stopped_service_is_noticed_long_before_the_next_sweep() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        worker = rig.attach()
        rig.sync()
        rig.advance(1.0)
        store = MemoryStore(rig.server, "lost/one")
        store.acquire([SOURCE])
        store.abandon_reads()
        rig.reader._intake.stop_reading()
        rig.add("1")
        store.begin_read(SOURCE, 1, 0)
        (entry,) = store.finish_read(SOURCE)
        store.release(SOURCE, [entry.id])
        store.release_name([SOURCE])
        rig.advance(2.5)
        assert worker.take() == ["1"]


def test_rejected_entries_of_a_lost_host_wait_within_their_limit() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        store = MemoryStore(rig.server, "lost/one")
        store.acquire([SOURCE])
        for _ in range(5000):
            rig.server.append(SOURCE.stream, b"no job")
        store.begin_read(SOURCE, 5000, 0)
        store.finish_read(SOURCE)
        rig.attach(batch_hint=256)
        rig.sync()
        rig.now_s += LEASE_S + 1
        most = 0
        for _ in range(60):
            rig.reader.run_once(0.0)
            most = max(most, len(rig.reader._intake.rejected))
        assert 0 < most <= 1024 + 512
        assert len(rig.letters) == 5000


def test_a_draining_reader_claims_nothing() -> None:
    with closing(ReaderRig(lease_s=LEASE_S)) as rig:
        lost_host(rig, "1")
        rig.attach()
        rig.sync()
        rig.reader._intake.draining = True
        rig.advance(3 * LEASE_S)
        assert rig.metric("z_novel_leases_taken_over_total", SOURCE.stream) == 0


def test_a_full_service_claims_nothing(rig: ReaderRig) -> None:
    rig.add(*map(str, range(16)))
    rig.tick()
    lost_host(rig, "other")
    rig.advance(3 * LEASE_S)
    assert "other" not in rig.workers[0].take()
    assert rig.metric("z_novel_leases_taken_over_total", SOURCE.stream) == 0


def test_leases_of_running_and_prefetched_jobs_are_renewed(rig: ReaderRig) -> None:
    rig.add(*map(str, range(16)))
    rig.tick()
    other = rig.other_host()
    for _ in range(6):
        rig.advance(LEASE_S / 2)
        assert other.claim(SOURCE, int(LEASE_S * 1000), 100, b"0-0")[1] == []


def test_a_prefetched_job_that_another_host_claimed_is_not_run(rig: ReaderRig) -> None:
    rig.server.paused.add("b")
    rig.advance(1.0)
    rig.add("1", type_name="b")
    rig.tick()
    other = rig.other_host()
    assert len(other.claim(SOURCE, 0, 100, b"0-0")[1]) == 1
    rig.advance(LEASE_S / 2)
    rig.server.paused.clear()
    rig.advance(1.0)
    assert rig.workers[0].take() == []
    assert rig.metric("z_novel_leases_lost_total", SOURCE.stream) == 1


def test_jobs_that_another_host_claimed_while_their_keys_were_claimed_are_not_run() -> None:
    with reader_rig(batch_hint=200, lease_s=LEASE_S) as rig:
        other, begin_claim = rig.other_host(), rig.store.begin_claim
        lost: set[str] = set()

        def slow(source: Source, keys: Sequence[tuple[bytes, str]], window_s: float) -> None:
            begin_claim(source, keys, window_s)
            if len(keys) >= 64:  # many are claimed while the reader does other things
                found = {entry.id: entry.data or b"" for entry in other.claim(source, 0, 1000, b"0-0")[1]}
                lost.update(json.loads(found[id])["id"] for id, _ in keys)

        rig.store.begin_claim = slow  # type: ignore[method-assign]
        for number in range(200):
            rig.add(str(number), metadata={"idempotency_key": str(number)})
        for _ in range(20):
            rig.now_s += LEASE_S / 2  # each tick renews the leases
            rig.tick(1)
        assert len(lost) >= 64, "their keys were claimed beside other work"
        assert not lost.intersection(rig.workers[0].take())


def test_a_drained_reader_hands_back_what_was_not_started_at_once() -> None:
    rig = ReaderRig(lease_s=LEASE_S)
    worker = rig.attach()
    rig.sync()
    rig.add("1", "2", "3")
    rig.tick()
    worker.take()
    worker.succeed("1")
    rig.drain()
    other = rig.other_host()
    claimed = other.claim(SOURCE, int(LEASE_S * 1000), 100, b"0-0")[1]
    assert [json.loads(entry.data or b"")["id"] for entry in claimed] == ["2", "3"]
    assert [entry.deliveries for entry in claimed] == [1, 1], "the first delivery does not count"
    rig.close()


# -- sleep


def test_a_reader_without_a_job_sleeps_until_the_store_has_to_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with reader_rig() as rig:
        rig.advance(1.8)
        waits_s: list[float] = []
        monkeypatch.setattr(rig.reader, "_wait", waits_s.append)
        for _ in range(6):
            rig.now_s += 0.25  # it reports what it has counted, and is due from time to time
            rig.reader.run_once(60.0)
        assert 0.25 < max(waits_s) < 1.0, "a pause counts within a second"
        monkeypatch.undo()
        rig.add("1")
        rig.tick()
        assert rig.workers[0].take() == ["1"]
        monkeypatch.setattr(rig.reader, "_wait", waits_s.append)
        rig.reader.run_once(60.0)
        assert waits_s[-1] <= 0.25, "the supervisor hears of the job"
        monkeypatch.undo()
