"""Types whose jobs run alone: they go to empty workers, and nothing is given to a worker behind them."""

from typing import Any

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
