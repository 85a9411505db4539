"""Dispatch: credit, isolated jobs, exclusive types, types that only some workers support."""

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from jobworker.worker.ipc.channel import READY, Channel, JobFrame
from jobworker.worker.ipc.control import WorkerExited
from jobworker.worker.keys import Source
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.circuit_breaker import CircuitBreakers
from jobworker.worker.reader.dispatch import Dispatcher, WorkerHandle
from jobworker.worker.reader.prefetch import PrefetchBuffer
from jobworker.worker.store.ports import Entry

LONG, QUICK = 0, 1
STREAMS = (Source("stream", "group"),)


def job(number: int, type_no: int, *, isolated: bool = False, deaths: int = 0) -> AdmittedJob:
    return AdmittedJob(0, type_no, Entry(b"%d-0" % number, b"{}", deaths=deaths), isolated)


def ids(jobs: Any) -> list[bytes]:
    return [job.entry.id for job in jobs]


def in_flight(worker: WorkerHandle) -> list[bytes]:
    return [job.entry_id for job in worker.table.unsettled()]


def settle_all(worker: WorkerHandle) -> None:
    worker.record_settled(range(worker.table.tail, worker.table.head))
    worker.table.advance()


@contextlib.contextmanager
def dispatcher_of(workers: int, *, exclusive: int = 1 << LONG) -> Iterator[Dispatcher]:
    """A dispatcher whose workers take 16 jobs each and announce these exclusive types."""
    dispatcher = Dispatcher(STREAMS, PrefetchBuffer(CircuitBreakers(2)))
    for slot in range(workers):
        channel = Channel.create(1024)
        channel.exclusive_types, channel.batch_hint, channel.phase = exclusive, 8, READY
        dispatcher.workers.append(WorkerHandle(slot, 0, channel, 0.0))
    yield dispatcher
    for worker in dispatcher.workers:
        worker.channel.close()


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    """Two workers; jobs of the type LONG are exclusive."""
    with dispatcher_of(2) as made:
        yield made


def dispatch(dispatcher: Dispatcher, *jobs: AdmittedJob) -> None:
    dispatcher.buffer.set_exclusive_types(1 << LONG)
    dispatcher.buffer.extend(jobs)
    dispatcher.dispatch(0.0)


# -- sharing


def test_ready_jobs_are_shared_evenly_and_keep_their_order() -> None:
    with dispatcher_of(2) as dispatcher:
        dispatch(dispatcher, *[job(number, QUICK) for number in range(10)])
        first, second = dispatcher.workers
        assert in_flight(first) == [b"%d-0" % number for number in range(5)]
        assert in_flight(second) == [b"%d-0" % number for number in range(5, 10)]


@pytest.mark.parametrize(
    ("loads", "jobs", "wakes"),
    [((0, 0), 15, (8, 7)), ((4, 0), 10, (3, 7)), ((0, 15), 3, (3, 0)), ((0, 12, 0), 9, (5, 0, 4))],
)
def test_each_worker_is_woken_once_for_its_share(
    loads: tuple[int, ...], jobs: int, wakes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[Channel] = []
    with dispatcher_of(len(loads)) as dispatcher:
        for worker, load in zip(dispatcher.workers, loads, strict=True):
            worker.dispatch([job(number, QUICK) for number in range(load)])
        monkeypatch.setattr(Channel, "wake_worker", lambda channel: woken.append(channel))
        dispatch(dispatcher, *[job(number, QUICK) for number in range(100, 100 + jobs)])
        counts = [len(worker.table) - load for worker, load in zip(dispatcher.workers, loads, strict=True)]
        assert tuple(counts) == wakes
        assert len(woken) == sum(map(bool, wakes))


def test_a_worker_gets_no_more_than_its_credit() -> None:
    with dispatcher_of(1) as dispatcher:
        assert dispatcher.credit == 16
        dispatch(dispatcher, *[job(number, QUICK) for number in range(20)])
        assert (len(in_flight(dispatcher.workers[0])), dispatcher.credit) == (16, 0)
        assert ids(dispatcher.buffer.ready) == [b"%d-0" % number for number in range(16, 20)]


def test_a_fast_worker_gets_the_credit_of_a_fifth_of_a_second() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        for tick in range(1, 4):
            worker.dispatch([job(number, QUICK) for number in range(100)])
            settle_all(worker)
            worker.update_rate(tick * 0.125)
        assert worker.credit == 160


def test_a_quick_worker_gets_more_before_the_interval_of_measuring_is_over() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        worker.channel.batch_hint = 1
        settled, now_s = 0, 0.0
        while worker.credit == 2:
            worker.dispatch([job(number, QUICK) for number in range(2)])
            settle_all(worker)
            settled, now_s = settled + 2, now_s + 0.001
            worker.update_rate(now_s)
        assert (settled, worker.credit) == (8, 400)


def test_a_batch_that_ends_soon_after_a_measurement_is_no_rate() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        worker.dispatch([job(number, QUICK) for number in range(16)])
        settle_all(worker)
        worker.update_rate(0.003)
        assert worker.credit == 16, "two batches of its handler"


def test_a_worker_that_runs_dry_between_long_ticks_of_sorting_gets_more() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        worker.channel.batch_hint = 1
        dispatcher.is_sorted = True
        given, now_s = [], 0.0
        for _ in range(30):  # it finishes all that it is given, 40 ms after it was asked for
            now_s += 0.04
            dispatcher.buffer.extend([job(number, QUICK) for number in range(worker.credit)])
            dispatcher.dispatch(now_s)
            given.append(len(worker.table))
            settle_all(worker)
        assert given[-1] > 4 * given[0]


@pytest.mark.parametrize("state", ["retired", "exited"])
def test_a_worker_that_is_leaving_gets_nothing(dispatcher: Dispatcher, state: str) -> None:
    leaving, other = dispatcher.workers
    if state == "retired":
        leaving.retired = True
    else:
        leaving.exited = WorkerExited(0, 0, "exit 0", charge=False)
    dispatch(dispatcher, job(1, QUICK), job(2, QUICK))
    assert (in_flight(leaving), in_flight(other)) == ([], [b"1-0", b"2-0"])


def test_the_rows_of_a_job_hold_what_a_later_reader_needs() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        worker.dispatch([job(1, QUICK, isolated=True, deaths=300), job(2, LONG)])
        assert worker.table.unsettled() == [(0, 0, QUICK, 255, True, b"1-0"), (1, 0, LONG, 0, False, b"2-0")]


# -- exclusive and isolated jobs


def test_a_new_reader_gives_nothing_to_a_worker_with_an_exclusive_job(dispatcher: Dispatcher) -> None:
    worker = dispatcher.workers[0]
    worker.dispatch([job(1, LONG)])
    successor = WorkerHandle(0, 0, worker.channel, 0.0)
    assert (successor.reserved, successor.credit) == (True, 0)


def test_a_busy_worker_drains_for_an_isolated_job_beside_an_exclusive_one(dispatcher: Dispatcher) -> None:
    first, second = dispatcher.workers
    dispatch(dispatcher, job(1, LONG))
    second.dispatch([job(2, QUICK)])
    dispatch(dispatcher, job(3, LONG), job(4, QUICK, isolated=True))
    assert (in_flight(first), in_flight(second)) == ([b"1-0"], [b"2-0"])
    assert [worker.reserved for worker in dispatcher.workers] == [True, True]
    settle_all(second)
    dispatch(dispatcher)
    assert in_flight(second) == [b"4-0"], "the second exclusive job would take the last worker"
    assert ids(dispatcher.buffer.isolated) == [b"3-0"]


def test_no_worker_drains_for_an_exclusive_job_that_may_not_have_it(dispatcher: Dispatcher) -> None:
    dispatch(dispatcher, job(1, LONG), job(2, LONG))
    dispatcher.workers[1].dispatch([job(3, QUICK)])
    dispatch(dispatcher)
    assert [worker.reserved for worker in dispatcher.workers] == [True, False]


def test_the_only_worker_takes_exclusive_jobs_too() -> None:
    with dispatcher_of(1) as dispatcher:
        dispatch(dispatcher, job(1, LONG))
        assert in_flight(dispatcher.workers[0]) == [b"1-0"]


def test_nothing_is_queued_behind_an_isolated_job(dispatcher: Dispatcher) -> None:
    dispatch(dispatcher, job(1, QUICK, isolated=True))
    dispatch(dispatcher, *[job(number, QUICK) for number in range(2, 10)])
    assert sorted(len(in_flight(worker)) for worker in dispatcher.workers) == [1, 8]
    settle_all(dispatcher.workers[0])
    dispatch(dispatcher, *[job(number, QUICK) for number in range(10, 12)])
    assert in_flight(dispatcher.workers[0]) == [b"10-0", b"11-0"]


# -- unsupported types


def test_jobs_pass_others_that_no_worker_with_credit_supports(dispatcher: Dispatcher) -> None:
    first, second = dispatcher.workers
    for worker in dispatcher.workers:
        worker.channel.exclusive_types = 0
    second.channel.unsupported_types = 1 << LONG
    first.retired = True
    dispatcher.buffer.extend([job(1, LONG), job(2, QUICK), job(3, LONG), job(4, QUICK)])
    dispatcher.dispatch(0.0)
    assert in_flight(second) == [b"2-0", b"4-0"]
    assert ids(dispatcher.buffer.ready) == [b"1-0", b"3-0"]
    assert dispatcher.capacity(0) == 14, "the two jobs that wait do not count: others may be behind them"


def test_frames_are_small_so_that_a_worker_starts_while_the_next_one_is_encoded() -> None:
    with dispatcher_of(1) as dispatcher:
        (worker,) = dispatcher.workers
        assert worker.dispatch([job(number, QUICK) for number in range(1200)]) == 1200
        frames = [msgspec.msgpack.decode(f, type=JobFrame) for f, _ in worker.channel.jobs.frames()]
        assert [(frame.first_row, len(frame.jobs)) for frame in frames] == [(0, 512), (512, 512), (1024, 176)]
