"""Rebalancing: jobs behind a long one move to other workers or hosts, and none runs twice by it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from jobworker.worker.cancel import Canceller, JobFilter
from jobworker.worker.envelope import read_header
from jobworker.worker.ipc.control import Attach
from jobworker.worker.keys import Holder, Source
from jobworker.worker.store.memory.store import MemoryStore
from support.reader_rig import SOURCE, FakeWorker, ReaderRig, reader_rig


@pytest.fixture
def rig() -> Iterator[ReaderRig]:
    with reader_rig(batch_hint=4) as made:
        yield made


def held_up(rig: ReaderRig, *job_ids: str) -> FakeWorker:
    """The first worker gets the jobs and runs the first of them for long."""
    worker = rig.workers[0]
    rig.add(*job_ids)
    rig.tick()
    assert worker.take() == list(job_ids)
    worker.run_long(job_ids[0], rig.mono_s)
    return worker


def idle_host(rig: ReaderRig) -> MemoryStore:
    """Another host, which holds its name and no job."""
    other = MemoryStore(rig.server, "idle/one", Holder("t", "pid 1", 3600.0))
    other.acquire([SOURCE])
    return other


def read_ids(store: MemoryStore) -> list[str]:
    store.begin_read(SOURCE, 100, 0)
    return [json.loads(entry.data or b"")["id"] for entry in store.finish_read(SOURCE)]


def test_jobs_behind_a_long_one_move_to_another_worker_and_run_once(rig: ReaderRig) -> None:
    busy = held_up(rig, "long", "1", "2", "3")
    other = rig.attach(4)
    rig.tick()
    assert other.take() == [], "they may start any moment"
    rig.advance(1.0)
    assert other.take() == [], "they are asked for: the worker may be about to start one"
    rig.advance(0.3)
    assert other.take() == ["1", "2", "3"]
    assert other.begin("1", "2", "3") == ["1", "2", "3"]
    other.succeed("1", "2", "3")
    busy.end_long("long")
    assert busy.begin("1", "2", "3") == [], "the first worker passes over them"
    rig.tick()
    assert rig.metric("z_novel_jobs_completed_total", "a") == 4
    assert rig.pending == 0
    assert len(busy.channel.table.asked_back()) == 0, "the rows are free"
    rig.add("5")
    rig.tick()
    assert busy.take() + other.take() == ["5"]


def test_a_held_up_worker_gets_no_more_jobs(rig: ReaderRig) -> None:
    busy = held_up(rig, "long")
    rig.advance(1.0)
    rig.add("1")
    rig.tick()
    assert busy.take() == []
    assert rig.pending == 1, "it waits in the stream, for any host"
    busy.end_long("long")
    rig.tick()
    assert busy.take() == ["1"]


def test_a_job_that_starts_while_it_is_asked_back_runs_there_or_comes_back(rig: ReaderRig) -> None:
    busy = held_up(rig, "long", "1", "2")
    other = rig.attach(4)
    rig.tick()
    rig.advance(1.0)
    busy.end_long("long")
    assert busy.begin("1") == [], "it saw that the reader asks"
    rig.advance(0.3)
    assert (busy.take() + other.take()).count("1") == 1


def test_jobs_are_handed_back_while_another_host_is_idle(rig: ReaderRig) -> None:
    other = idle_host(rig)
    busy = held_up(rig, "long", "1", "2", "3")
    for _ in range(4):
        rig.advance(1.0)
    assert read_ids(other) == ["1", "2", "3"]
    assert rig.pending == 4
    busy.end_long("long")
    assert busy.begin("1", "2", "3") == []
    rig.tick()
    assert rig.pending == 3, "those of the other host"
    assert rig.metric("z_novel_jobs_completed_total", "a") == 1


def test_a_job_with_a_key_that_is_handed_back_is_no_duplicate_of_itself(rig: ReaderRig) -> None:
    other = idle_host(rig)
    worker = rig.workers[0]
    rig.add("long")
    rig.add("keyed", metadata={"idempotency_key": "k"})
    rig.tick()
    assert worker.take() == ["long", "keyed"]
    worker.run_long("long", rig.mono_s)
    (queued,) = rig.reader._dispatcher.workers[0].table.queued()
    for _ in range(4):
        rig.advance(1.0)
    other.begin_read(SOURCE, 10, 0)
    (entry,) = other.finish_read(SOURCE)
    assert read_header(entry.data or b"").first_id == queued.entry_id.decode()


def test_a_malformed_job_is_handed_back_as_it_is(rig: ReaderRig) -> None:
    """The reader has read its route only; the worker that gets it refuses it."""
    other = idle_host(rig)
    worker = rig.workers[0]
    rig.add("long")
    data = b'{"id":"1","type":"a","project_id":5}'
    rig.server.append(SOURCE.stream, data)
    rig.tick()
    assert worker.take() == ["long", "1"]
    worker.run_long("long", rig.mono_s)
    for _ in range(4):
        rig.advance(1.0)
    other.begin_read(SOURCE, 10, 0)
    assert [entry.data for entry in other.finish_read(SOURCE)] == [data]


def test_without_an_idle_host_jobs_stay(rig: ReaderRig) -> None:
    busy = held_up(rig, "long", "1", "2")
    rig.add("theirs")
    assert read_ids(idle_host(rig)) == ["theirs"], "now it is busy, too"
    for _ in range(4):
        rig.advance(1.0)
    busy.end_long("long")
    assert busy.begin("1", "2") == ["1", "2"]


def test_a_job_that_was_taken_back_is_not_charged_with_the_death_of_its_worker(rig: ReaderRig) -> None:
    busy = held_up(rig, "long", "1", "2")
    other = rig.attach(4)
    rig.tick()
    rig.advance(1.0)
    rig.advance(0.3)
    assert other.take() == ["1", "2"]
    rig.exit(busy)
    rig.tick()
    other.begin("1", "2")
    other.succeed("1", "2")
    rig.tick()
    assert rig.metric("z_novel_jobs_completed_total", "a") == 2
    assert rig.pending == 1, "the long one runs again"


def test_a_new_reader_finds_jobs_that_the_last_one_had_just_taken_back() -> None:
    with reader_rig(batch_hint=4) as first, ExitStack() as stack:
        busy = held_up(first, "long", "1", "2")
        first.crash()
        rows = [busy._rows["1"], busy._rows["2"]]
        busy.channel.table.ask_back(rows)
        assert busy.channel.table.take_back(rows) == rows
        second = stack.enter_context(closing(ReaderRig(server=first.server)))
        second.control.send(Attach(busy.slot, busy.generation), busy.channel.fds)
        worker = second._attach(FakeWorker(4, slot=1))
        second.sync()
        second.tick()
        assert worker.take() == ["1", "2"]
        busy.end_long("long")
        assert busy.begin("1", "2") == []
        worker.begin("1", "2")
        worker.succeed("1", "2")
        second.tick()
        assert second.pending == 0
        second.crash()


def test_a_job_is_not_taken_back_sooner_because_the_store_was_slow(rig: ReaderRig) -> None:
    idle_host(rig)
    held_up(rig, "long", "1")
    idle_readers = rig.store.idle_readers

    def slow(source: Source) -> bool:
        rig.now_s += 0.3
        return bool(idle_readers(source))

    rig.store.idle_readers = slow  # type: ignore[method-assign]
    rig.advance(1.0)
    (asked,) = (table := rig.reader._dispatcher.workers[0].table).asked_back()
    assert not table.is_taken_back(asked), "it was asked for a moment ago"
    rig.advance(0.3)
    assert table.is_taken_back(asked)


@pytest.mark.parametrize("passed_over", [False, True])
def test_a_job_that_is_cancelled_while_it_comes_back_does_not_run(rig: ReaderRig, passed_over: bool) -> None:
    busy = held_up(rig, "long", "1", "2")
    other = rig.attach(4)
    rig.tick()
    rig.advance(1.0)
    list(Canceller(rig.store, [SOURCE.stream], JobFilter(frozenset(["1"])), by="me").run())
    rig.reader.refresh()
    if passed_over:
        busy.end_long("long")
        assert busy.begin("1", "2") == []
    rig.advance(0.6)
    assert busy.take() + other.take() == ["2"]
    assert [letter["reason"] for letter in rig.letters] == ["cancelled"]
