"""Isolated streams: a key that the store refuses stops its own stream only, and nothing is lost."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import pytest

from jobworker.worker.errors import StoreRefused
from jobworker.worker.ipc.control import Ready
from jobworker.worker.keys import (
    PAUSED_KEY,
    Source,
    dead_letter_key,
    deaths_key,
    fence_key,
    ready_key,
    retry_key,
)
from jobworker.worker.outcome import Failure
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry, Settled, Settlement
from support.reader_rig import SOURCE, ReaderRig, reader_rig

OTHER = SOURCE._replace(stream="other")
STREAMS = (SOURCE, OTHER)
NAME = SOURCE.stream
DERIVED = [fence_key(NAME), deaths_key(NAME), retry_key(NAME), dead_letter_key(NAME), ready_key(NAME)]
FAILURES = {
    "failed": Failure("ValueError: no"),
    "given up": Failure("PermanentError: no", permanent=True),
}
LEASE_S = 30.0
#: Longer than an isolated stream waits for its next try.
WAIT_S = 12.0


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig(streams=STREAMS, lease_s=LEASE_S) as made:
        yield made


def add_other(rig: ReaderRig, *job_ids: str) -> None:
    for job_id in job_ids:
        rig.server.append(OTHER.stream, b'{"id": "%s", "type": "b"}' % job_id.encode())


def work(rig: ReaderRig) -> list[str]:
    """Finish all jobs that the workers have, each in the way that its id names; returns their ids."""
    done = []
    for worker in rig.workers:
        for job_id in worker.take():
            done.append(job_id)
            if job_id in FAILURES:
                worker.fail(job_id, FAILURES[job_id])
            else:
                worker.succeed(job_id)
    rig.tick()
    return done


def isolated(rig: ReaderRig) -> float:
    return rig.metric("z_novel_stream_isolated", NAME, "reader")


def repair(rig: ReaderRig) -> None:
    rig.server.broken.clear()
    rig.advance(WAIT_S)
    rig.tick(20)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == name]


@pytest.mark.parametrize("key", [NAME, *DERIVED])
def test_other_streams_go_on_and_every_job_is_finished_after_the_repair(
    rig: ReaderRig, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.add("done", "failed", "given up")
    rig.server.append(NAME, b"not a job")
    rig.tick(2)
    rig.server.broken.add(key)
    runs = work(rig)
    for number in range(20):
        add_other(rig, f"other {number}")
        rig.advance(1.0)
        runs += work(rig)
    assert [job_id for job_id in runs if job_id.startswith("other")] == [f"other {n}" for n in range(20)]
    assert rig.store.depths(OTHER).pending == 0
    assert isolated(rig) == 1
    assert (rig.trouble, [key in text for text in rig.warnings]) == (None, [True])
    (record,) = events(caplog, "stream.isolated")
    assert key in record.hint  # type: ignore[attr-defined]
    repair(rig)
    runs += work(rig)
    rig.tick(20)
    assert sorted(runs) == sorted({*runs, "done", "failed", "given up"}), "each job runs once"
    assert rig.pending == 0
    assert sorted(letter["reason"] for letter in rig.letters) == ["malformed", "permanent"]
    assert [job["id"] for job in rig.retries] == ["failed"]
    assert (isolated(rig), rig.warnings) == (0, [])
    assert rig.metric("z_novel_jobs_completed_total", "a") == 1
    assert rig.metric("z_novel_jobs_failed_total", "a") == 2
    assert rig.metric("z_novel_leases_lost_total", NAME) == 0


def test_outcomes_of_an_isolated_stream_take_no_place_from_others() -> None:
    with reader_rig(streams=STREAMS, batch_hint=1) as rig:
        rig.add("given up", "1")
        rig.tick()
        rig.server.broken.add(dead_letter_key(NAME))
        work(rig)
        add_other(rig, *map(str, range(10, 20)))
        assert [job_id for _ in range(12) for job_id in work(rig)] == list(map(str, range(10, 20)))


def test_refused_dead_letters_are_kept_once_and_not_written_twice(
    rig: ReaderRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.server.broken.add(dead_letter_key(NAME))
    for _ in range(100):
        rig.server.append(NAME, b"not a job")
    for _ in range(200):
        rig.advance(1.0)
    held = [*rig.reader._intake.rejected, *rig.reader._buffer, *rig.reader._settler._held.keys()]
    assert held == [], "the entries stay pending in the store"
    assert len(events(caplog, "job.rejected")) <= 100, "one line an entry"
    assert len(events(caplog, "stream.isolated")) == 1
    repair(rig)
    rig.tick(100)
    assert (len(rig.letters), rig.pending) == (100, 0)
    assert rig.metric("z_novel_jobs_dead_total", "unknown", "malformed") == 100


@pytest.mark.parametrize(("count", "size"), [(5000, 10), (200, 1024 * 1024)])
def test_rejected_entries_are_listed_in_bounded_parts(count: int, size: int) -> None:
    """They fill no prefetch buffer, so it does not bound them."""
    with closing(ReaderRig()) as rig:
        for _ in range(count):
            rig.server.append(NAME, b"x" * size)
        before = MemoryStore(rig.server, "one/one")
        before.acquire([SOURCE])
        before.begin_read(SOURCE, count, 0)
        assert len(before.finish_read(SOURCE)) == count
        sizes: list[list[int]] = []
        settle = rig.store.settle

        def watch(settlements: Sequence[Settlement], meanwhile: Callable[[], None]) -> list[Settled]:
            sizes.append([len(letter.data) for one in settlements for letter in one.dead])
            return settle(settlements, meanwhile)

        rig.store.settle = watch  # type: ignore[method-assign]
        rig.attach()
        rig.sync()
        rig.tick(50)
        assert (rig.pending, len(rig.letters)) == (0, count)
        assert max(map(len, sizes)) <= 1024 + 256
        assert max(map(sum, sizes)) <= 32 * 1024 * 1024


def test_a_service_starts_with_the_streams_that_work() -> None:
    with closing(ReaderRig(streams=STREAMS)) as rig:
        rig.server.broken.add(fence_key(NAME))
        rig.attach()
        rig.add("1")
        add_other(rig, "2")
        rig.sync()
        rig.tick()
        rig.receive()
        assert Ready() in rig.messages
        assert work(rig) == ["2"]
        repair(rig)
        assert work(rig) == ["1"]


def test_a_service_does_not_start_while_no_stream_works() -> None:
    with closing(ReaderRig()) as rig:
        rig.server.broken.add(fence_key(NAME))
        rig.attach()
        rig.add("1")
        rig.sync()
        rig.advance(5.0)
        rig.reader.report()
        rig.receive()
        assert Ready() not in rig.messages
        assert fence_key(NAME) in (rig.trouble or "")
        repair(rig)
        rig.receive()
        assert Ready() in rig.messages
        assert work(rig) == ["1"]
        rig.reader.report()
        rig.receive()
        assert rig.trouble is None


def test_leases_of_an_isolated_stream_are_renewed(rig: ReaderRig) -> None:
    rig.add("given up")
    rig.tick()
    rig.server.broken.add(dead_letter_key(NAME))
    work(rig)
    other = rig.other_host()
    for _ in range(10):
        rig.advance(LEASE_S / 2)
        assert other.claim(SOURCE, int(LEASE_S * 1000), 100, b"0-0")[1] == []


def test_a_held_outcome_of_a_job_that_another_host_claimed_is_dropped(rig: ReaderRig) -> None:
    rig.add("given up")
    rig.tick()
    rig.server.broken.add(dead_letter_key(NAME))
    work(rig)
    other = rig.other_host()
    assert len(other.claim(SOURCE, 0, 100, b"0-0")[1]) == 1
    rig.advance(LEASE_S)
    assert rig.metric("z_novel_leases_lost_total", NAME) == 1
    repair(rig)
    assert (rig.letters, rig.pending) == ([], 1)


def test_jobs_of_a_dead_worker_run_again_once_their_stream_works(rig: ReaderRig) -> None:
    rig.add("1", "2")
    add_other(rig, "3")
    rig.tick()
    (worker,) = rig.workers
    worker.take()
    worker.start("1", "3")
    rig.server.broken.add(deaths_key(NAME))
    rig.exit(worker)
    rig.tick()
    rig.attach()
    rig.tick()
    assert work(rig) == ["3"]
    repair(rig)
    assert sorted(work(rig)) == ["1", "2"]
    assert rig.pending == 0


def test_a_reader_drains_with_an_isolated_stream(caplog: pytest.LogCaptureFixture) -> None:
    with closing(ReaderRig(streams=STREAMS)) as rig:
        rig.attach()
        rig.sync()
        rig.add("given up", "1")
        add_other(rig, "2")
        rig.tick()
        rig.server.broken.update([NAME, dead_letter_key(NAME)])
        work(rig)
        rig.drain()
        assert rig.store.depths(OTHER).pending == 0


def test_a_stream_that_is_refused_for_no_visible_reason_is_tried_less_and_less(rig: ReaderRig) -> None:
    own_pending, tries = rig.store.own_pending, []

    def refused(source: Source, after: bytes, count: int) -> list[Entry]:
        if source == SOURCE:
            tries.append(rig.now_s)
            raise StoreRefused("NOPERM")
        return own_pending(source, after, count)

    rig.store.finish_read = refuse_read(rig)  # type: ignore[method-assign]
    rig.store.own_pending = refused  # type: ignore[method-assign]
    rig.add("1")
    for _ in range(1000):
        rig.advance(0.1)
    assert 8 <= len(tries) <= 25
    assert tries[-1] - tries[-2] > 4.0


def refuse_read(rig: ReaderRig) -> Callable[[Source], list[Entry]]:
    """`finish_read` that is refused once for the first stream."""
    finish_read, refusals = rig.store.finish_read, iter([StoreRefused("NOPERM")])

    def finish(source: Source) -> list[Entry]:
        answer = finish_read(source)
        if source == SOURCE and (error := next(refusals, None)):
            raise error
        return answer

    return finish


def test_types_stay_paused_while_the_pauses_cannot_be_read(
    rig: ReaderRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.server.paused.add("a")
    rig.advance(1.0)
    rig.server.broken.add(PAUSED_KEY)
    rig.add("1")
    add_other(rig, "2")
    for _ in range(20):
        rig.advance(1.0)
    assert work(rig) == ["2"]
    rig.reader.report()
    rig.receive()
    assert (rig.trouble, [PAUSED_KEY in text for text in rig.warnings]) == (None, [True])
    assert len(events(caplog, "pauses.damaged")) == 1
    rig.server.paused.clear()
    repair(rig)
    assert work(rig) == ["1"]
