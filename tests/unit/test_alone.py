"""Types whose jobs run alone: they go to empty workers, and nothing is given to a worker behind them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from jobworker.worker.alone import hand_out_alone
from jobworker.worker.backlog import Backlog
from jobworker.worker.channel import READY, Channel
from jobworker.worker.lane import Lane
from jobworker.worker.store import Entry
from jobworker.worker.triage import Arrival

LONG, QUICK = 0, 1


def job(number: int, kind: int) -> Arrival:
    return Arrival(0, kind, Entry(b"%d-0" % number, b"{}"), False)


def ids(arrivals: Any) -> list[bytes]:
    return [arrival.entry.id for arrival in arrivals]


def test_they_are_kept_apart_also_when_they_came_before_a_worker_said_so() -> None:
    backlog = Backlog(["long", "quick"])
    for one in (job(1, LONG), job(2, QUICK), job(3, LONG)):
        backlog.add(one)
    backlog.single_out(1 << LONG)
    backlog.single_out(0)  # every worker is gone for a moment
    backlog.add(job(4, LONG))
    backlog.add(job(5, QUICK))
    assert ids(backlog.suspects) == [b"1-0", b"3-0", b"4-0"]
    assert ids(backlog.ready) == [b"2-0", b"5-0"]


def test_after_a_pause_too() -> None:
    backlog = Backlog(["long", "quick"])
    backlog.single_out(1 << LONG)
    backlog.halt({LONG, QUICK})
    backlog.add(job(1, LONG))
    backlog.add(job(2, QUICK))
    backlog.halt(set())
    assert (ids(backlog.suspects), ids(backlog.ready)) == ([b"1-0"], [b"2-0"])


def test_a_new_reader_gives_nothing_to_a_worker_that_runs_one() -> None:
    channel = Channel.create(1024)
    channel.loners, channel.appetite, channel.phase = 1 << LONG, 8, READY
    first = Lane(0, 0, channel, 0.0)
    assert first.credit == 16
    first.hand([job(1, LONG)])
    second = Lane(0, 0, channel, 0.0)
    assert (second.alone, second.credit) == (True, 0)
    channel.close()


@pytest.fixture
def lanes() -> Iterator[list[Lane]]:
    """Two workers that say which type is a long one."""
    made = []
    for slot in range(2):
        channel = Channel.create(1024)
        channel.loners, channel.appetite, channel.phase = 1 << LONG, 8, READY
        made.append(Lane(slot, 0, channel, 0.0))
    yield made
    for lane in made:
        lane.channel.close()


def test_a_busy_worker_is_set_aside_for_a_suspect_beside_a_long_job(lanes: list[Lane]) -> None:
    waiting = deque([job(1, LONG)])
    given: list[Arrival] = []
    hand_out_alone(lanes, waiting, given.append)
    lanes[1].hand([job(2, QUICK)])
    waiting.extend([job(3, LONG), job(4, QUICK)])
    hand_out_alone(lanes, waiting, given.append)
    assert ids(given) == [b"1-0"]
    assert [lane.alone for lane in lanes] == [True, True]
    lanes[1].table.settle(range(1))
    lanes[1].table.advance()
    hand_out_alone(lanes, waiting, given.append)
    assert ids(given) == [b"1-0", b"4-0"], "the second long one would take the last worker"
    assert ids(waiting) == [b"3-0"]


def test_no_worker_is_set_aside_for_a_long_job_that_may_not_have_it(lanes: list[Lane]) -> None:
    waiting = deque([job(1, LONG), job(2, LONG)])
    hand_out_alone(lanes, waiting, lambda _: None)
    lanes[1].hand([job(3, QUICK)])
    hand_out_alone(lanes, waiting, lambda _: None)
    assert [lane.alone for lane in lanes] == [True, False]


def test_the_only_worker_takes_long_jobs_too(lanes: list[Lane]) -> None:
    waiting = deque([job(1, LONG)])
    hand_out_alone(lanes[:1], waiting, lambda _: None)
    assert not waiting
