"""Types whose jobs run alone: they go to empty workers, and nothing is given to a worker behind them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from jobworker.worker.ipc.channel import READY, Channel
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.dispatch import WorkerHandle, dispatch_exclusive
from jobworker.worker.reader.prefetch import PrefetchBuffer
from jobworker.worker.store.ports import Entry

LONG, QUICK = 0, 1


def job(number: int, kind: int) -> AdmittedJob:
    return AdmittedJob(0, kind, Entry(b"%d-0" % number, b"{}"), False)


def ids(arrivals: Any) -> list[bytes]:
    return [arrival.entry.id for arrival in arrivals]


def test_they_are_kept_apart_also_when_they_came_before_a_worker_said_so() -> None:
    backlog = PrefetchBuffer(["long", "quick"])
    for one in (job(1, LONG), job(2, QUICK), job(3, LONG)):
        backlog.add(one)
    backlog.set_exclusive_types(1 << LONG)
    backlog.set_exclusive_types(0)  # every worker is gone for a moment
    backlog.add(job(4, LONG))
    backlog.add(job(5, QUICK))
    assert ids(backlog.isolated) == [b"1-0", b"3-0", b"4-0"]
    assert ids(backlog.ready) == [b"2-0", b"5-0"]


def test_after_a_pause_too() -> None:
    backlog = PrefetchBuffer(["long", "quick"])
    backlog.set_exclusive_types(1 << LONG)
    backlog.set_paused_types({LONG, QUICK})
    backlog.add(job(1, LONG))
    backlog.add(job(2, QUICK))
    backlog.set_paused_types(set())
    assert (ids(backlog.isolated), ids(backlog.ready)) == ([b"1-0"], [b"2-0"])


def test_a_new_reader_gives_nothing_to_a_worker_that_runs_one() -> None:
    channel = Channel.create(1024)
    channel.exclusive_types, channel.batch_hint, channel.phase = 1 << LONG, 8, READY
    first = WorkerHandle(0, 0, channel, 0.0)
    assert first.credit == 16
    first.dispatch([job(1, LONG)])
    second = WorkerHandle(0, 0, channel, 0.0)
    assert (second.alone, second.credit) == (True, 0)
    channel.close()


@pytest.fixture
def lanes() -> Iterator[list[WorkerHandle]]:
    """Two workers that say which type is a long one."""
    made = []
    for slot in range(2):
        channel = Channel.create(1024)
        channel.exclusive_types, channel.batch_hint, channel.phase = 1 << LONG, 8, READY
        made.append(WorkerHandle(slot, 0, channel, 0.0))
    yield made
    for lane in made:
        lane.channel.close()


def test_a_busy_worker_is_set_aside_for_a_suspect_beside_a_long_job(lanes: list[WorkerHandle]) -> None:
    waiting = deque([job(1, LONG)])
    given: list[AdmittedJob] = []
    dispatch_exclusive(lanes, waiting, given.append)
    lanes[1].dispatch([job(2, QUICK)])
    waiting.extend([job(3, LONG), job(4, QUICK)])
    dispatch_exclusive(lanes, waiting, given.append)
    assert ids(given) == [b"1-0"]
    assert [lane.alone for lane in lanes] == [True, True]
    lanes[1].table.settle(range(1))
    lanes[1].table.advance()
    dispatch_exclusive(lanes, waiting, given.append)
    assert ids(given) == [b"1-0", b"4-0"], "the second long one would take the last worker"
    assert ids(waiting) == [b"3-0"]


def test_no_worker_is_set_aside_for_a_long_job_that_may_not_have_it(lanes: list[WorkerHandle]) -> None:
    waiting = deque([job(1, LONG), job(2, LONG)])
    dispatch_exclusive(lanes, waiting, lambda _: None)
    lanes[1].dispatch([job(3, QUICK)])
    dispatch_exclusive(lanes, waiting, lambda _: None)
    assert [lane.alone for lane in lanes] == [True, False]


def test_the_only_worker_takes_long_jobs_too(lanes: list[WorkerHandle]) -> None:
    waiting = deque([job(1, LONG)])
    dispatch_exclusive(lanes[:1], waiting, lambda _: None)
    assert not waiting
