"""Paused types: what waits in the reader is set aside, other types of the stream go on."""

import pytest

from jobworker.worker.reader import prefetch as module
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.prefetch import PrefetchBuffer
from jobworker.worker.store.ports import Entry

SLOW, QUICK = 0, 1


def job(number: int, kind: int, source: int = 0, alone: bool = False) -> AdmittedJob:
    return AdmittedJob(source, kind, Entry(b"%d-0" % number, b"x" * 10), alone)


def ready(backlog: PrefetchBuffer) -> list[bytes]:
    return [arrival.entry.id for arrival in backlog.ready]


def full(*jobs: AdmittedJob) -> PrefetchBuffer:
    backlog = PrefetchBuffer(["slow", "quick"])
    for one in jobs:
        backlog.add(one)
    return backlog


def test_only_the_other_types_are_handed_out() -> None:
    backlog = full(job(1, SLOW), job(2, QUICK), job(3, SLOW, alone=True))
    backlog.set_paused_types({SLOW})
    backlog.add(job(4, SLOW))
    backlog.add(job(5, QUICK))
    assert ready(backlog) == [b"2-0", b"5-0"]
    assert not backlog.isolated
    assert sorted(arrival.entry.id for arrival in backlog) == [b"%d-0" % n for n in range(1, 6)], "leases"


def test_resumed_they_go_on_where_they_would_be() -> None:
    backlog = full(job(1, SLOW), job(2, SLOW, alone=True))
    backlog.set_paused_types({SLOW})
    backlog.set_paused_types(set())
    assert ready(backlog) == [b"1-0"]
    assert [arrival.entry.id for arrival in backlog.isolated] == [b"2-0"]
    backlog.add(job(3, SLOW))
    assert ready(backlog) == [b"1-0", b"3-0"]


def test_what_is_set_aside_does_not_keep_the_stream_from_being_read() -> None:
    backlog = full(job(1, SLOW), job(2, SLOW, source=1), job(3, QUICK))
    backlog.set_paused_types({SLOW})
    assert (backlog.waiting(0), backlog.waiting(1)) == (1, 1), "the quick one, which any stream waits for"


def test_nor_does_what_waits_for_a_store_that_is_away() -> None:
    backlog = full(job(1, SLOW), job(2, SLOW), job(3, QUICK))
    backlog.pause(job(0, SLOW), 0.0)
    backlog.add(job(4, SLOW))
    assert ready(backlog) == [b"3-0"]
    assert backlog.waiting(0) == 1


def test_a_try_of_unknown_fate_is_waited_for_longer_than_clients_wait() -> None:
    backlog = full()
    backlog.pause(job(0, SLOW), 0.0)
    backlog.add(job(1, SLOW))
    backlog.release_probes(1.0)
    assert ready(backlog) == [b"0-0"]
    backlog.release_probes(40.0)
    assert ready(backlog) == [b"0-0"], "one worker at a time may be held up by tries"
    backlog.release_probes(61.0)
    assert ready(backlog) == [b"0-0", b"1-0"]


@pytest.mark.parametrize("limit", ["_ASIDE_JOBS", "_ASIDE_BYTES"])
def test_but_only_so_many_are_set_aside(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, limit, {"_ASIDE_JOBS": 3, "_ASIDE_BYTES": 30}[limit])
    backlog = full()
    backlog.set_paused_types({SLOW})
    for number in (1, 2):
        backlog.add(job(number, SLOW))
    assert backlog.waiting(0) == 0
    backlog.add(job(3, SLOW))
    assert (backlog.waiting(0), backlog.waiting(1)) == (3, 0)
    backlog.drop(0, {b"2-0"})
    assert backlog.waiting(0) == 0


def test_a_pause_and_a_breaker_do_not_undo_each_other() -> None:
    backlog = full(job(1, SLOW), job(2, SLOW))
    backlog.pause(backlog.ready.popleft(), 0.0)
    backlog.set_paused_types({SLOW})
    backlog.release_probes(1e9)
    assert not backlog.ready, "no try while it is paused by hand"
    backlog.answered([SLOW])
    assert not backlog.ready, "an answer of a job from before is no reason to go on"
    backlog.set_paused_types(set())
    assert sorted(ready(backlog)) == [b"1-0", b"2-0"]
    backlog.pause(backlog.ready.popleft(), 0.0)
    backlog.set_paused_types({SLOW})
    backlog.set_paused_types(set())
    assert not backlog.ready, "its dependency still does not answer"
    backlog.release_probes(1e9)
    assert len(backlog.ready) == 1


def test_cleared_it_holds_nothing_and_stays_paused() -> None:
    backlog = full(job(1, SLOW))
    backlog.set_paused_types({SLOW})
    backlog.clear()
    assert not list(backlog)
    backlog.add(job(2, SLOW))
    assert not backlog.ready


@pytest.mark.parametrize("paused_types", [set(), {SLOW}], ids=["nothing paused", "one paused"])
@pytest.mark.parametrize("alone", [False, True], ids=["ordinary", "one suspect"])
def test_many_added_at_once_go_where_each_would_go(paused_types: set[int], alone: bool) -> None:
    jobs = [job(1, SLOW), job(2, QUICK, alone=alone), job(3, QUICK), job(4, SLOW)]
    at_once, one_by_one = full(), full()
    for backlog in (at_once, one_by_one):
        backlog.set_paused_types(paused_types)
    at_once.extend(jobs)
    for one in jobs:
        one_by_one.add(one)
    assert list(at_once) == list(one_by_one)
    assert (at_once.ready, at_once.isolated) == (one_by_one.ready, one_by_one.isolated)
