"""Prefetch buffer: parked types, isolated jobs, limits in jobs and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.reader import prefetch as module
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.circuit_breaker import CircuitBreakers
from jobworker.worker.reader.prefetch import PrefetchBuffer
from jobworker.worker.store.ports import Entry

SLOW, QUICK = 0, 1


def job(number: int, type_no: int, stream_no: int = 0, isolated: bool = False, size: int = 10) -> AdmittedJob:
    return AdmittedJob(stream_no, type_no, Entry(b"%d-0" % number, b"x" * size), isolated)


def ready(buffer: PrefetchBuffer) -> list[bytes]:
    return [job.entry.id for job in buffer.ready]


def isolated(buffer: PrefetchBuffer) -> list[bytes]:
    return [job.entry.id for job in (*buffer.isolated, *buffer.suspects)]


def buffer_of(*jobs: AdmittedJob, types: int = 2) -> PrefetchBuffer:
    buffer = PrefetchBuffer(CircuitBreakers(types))
    for one in jobs:
        buffer.add(one)
    return buffer


# -- paused types


def test_jobs_of_a_paused_type_are_parked_and_the_other_types_stay_ready() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, QUICK), job(3, SLOW, isolated=True))
    buffer.set_paused_types({SLOW})
    buffer.add(job(4, SLOW))
    buffer.add(job(5, QUICK))
    assert ready(buffer) == [b"2-0", b"5-0"]
    assert not buffer.isolated
    assert sorted(job.entry.id for job in buffer) == [b"%d-0" % n for n in range(1, 6)], "leases are renewed"


def test_resumed_jobs_go_to_the_queues_where_they_belong() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, SLOW, isolated=True))
    buffer.set_paused_types({SLOW})
    buffer.set_paused_types(set())
    assert ready(buffer) == [b"1-0"]
    assert isolated(buffer) == [b"2-0"]
    buffer.add(job(3, SLOW))
    assert ready(buffer) == [b"1-0", b"3-0"]


def test_parked_jobs_do_not_keep_their_stream_from_being_read() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, SLOW, stream_no=1), job(3, QUICK))
    buffer.set_paused_types({SLOW})
    assert (buffer.waiting(0), buffer.waiting(1)) == (1, 1), "the quick job counts for every stream"


def test_jobs_behind_an_open_circuit_breaker_do_not_keep_their_stream_from_being_read() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, SLOW), job(3, QUICK))
    buffer.defer(job(0, SLOW), 0.0)
    buffer.add(job(4, SLOW))
    assert ready(buffer) == [b"3-0"]
    assert buffer.waiting(0) == 1


def test_a_lost_probe_is_repeated_later_than_clients_wait_for_an_answer() -> None:
    buffer = buffer_of()
    buffer.defer(job(0, SLOW), 0.0)
    buffer.add(job(1, SLOW))
    buffer.release_probes(1.0)
    assert ready(buffer) == [b"0-0"]
    buffer.release_probes(40.0)
    assert ready(buffer) == [b"0-0"], "probes may occupy one worker at a time"
    buffer.release_probes(61.0)
    assert ready(buffer) == [b"0-0", b"1-0"]


@pytest.mark.parametrize("limit", ["_PARKED_JOBS", "_PARKED_BYTES"])
def test_a_stream_with_too_many_parked_jobs_waits(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, limit, {"_PARKED_JOBS": 3, "_PARKED_BYTES": 30}[limit])
    buffer = buffer_of()
    buffer.set_paused_types({SLOW})
    for number in (1, 2):
        buffer.add(job(number, SLOW))
    assert buffer.waiting(0) == 0
    buffer.add(job(3, SLOW))
    assert (buffer.waiting(0), buffer.waiting(1)) == (3, 0)
    buffer.discard(0, {b"2-0"})
    assert buffer.waiting(0) == 0


def test_a_pause_and_a_circuit_breaker_do_not_undo_each_other() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, SLOW))
    buffer.defer(buffer.ready.popleft(), 0.0)
    buffer.set_paused_types({SLOW})
    buffer.release_probes(1e9)
    assert not buffer.ready, "no probe while an operator has paused the type"
    buffer.record_success([SLOW])
    assert not buffer.ready, "a success of an earlier job does not end the operator's pause"
    buffer.set_paused_types(set())
    assert sorted(ready(buffer)) == [b"1-0", b"2-0"]
    buffer.defer(buffer.ready.popleft(), 0.0)
    buffer.set_paused_types({SLOW})
    buffer.set_paused_types(set())
    assert not buffer.ready, "its dependency still does not answer"
    buffer.release_probes(1e9)
    assert len(buffer.ready) == 1


def test_a_cleared_buffer_is_empty_and_its_types_stay_paused() -> None:
    buffer = buffer_of(job(1, SLOW))
    buffer.set_paused_types({SLOW})
    buffer.clear()
    assert not list(buffer)
    buffer.add(job(2, SLOW))
    assert not buffer.ready


# -- exclusive types


def test_exclusive_jobs_are_separated_even_if_they_came_before_a_worker_announced_their_type() -> None:
    buffer = buffer_of(job(1, SLOW), job(2, QUICK), job(3, SLOW))
    buffer.set_exclusive_types(1 << SLOW)
    buffer.set_exclusive_types(0)  # every worker is gone for a moment
    buffer.add(job(4, SLOW))
    buffer.add(job(5, QUICK))
    assert isolated(buffer) == [b"1-0", b"3-0", b"4-0"]
    assert ready(buffer) == [b"2-0", b"5-0"]


def test_exclusive_jobs_are_separated_after_a_pause() -> None:
    buffer = buffer_of()
    buffer.set_exclusive_types(1 << SLOW)
    buffer.set_paused_types({SLOW, QUICK})
    buffer.add(job(1, SLOW))
    buffer.add(job(2, QUICK))
    buffer.set_paused_types(set())
    assert (isolated(buffer), ready(buffer)) == ([b"1-0"], [b"2-0"])


# -- order


@pytest.mark.parametrize("paused_types", [set(), {SLOW}], ids=["nothing paused", "one paused"])
@pytest.mark.parametrize("one_isolated", [False, True], ids=["ordinary", "one isolated"])
def test_many_jobs_added_at_once_go_where_each_would_go(paused_types: set[int], one_isolated: bool) -> None:
    jobs = [job(1, SLOW), job(2, QUICK, isolated=one_isolated), job(3, QUICK), job(4, SLOW)]
    at_once, one_by_one = buffer_of(), buffer_of()
    for buffer in (at_once, one_by_one):
        buffer.set_paused_types(paused_types)
    at_once.extend(jobs)
    for one in jobs:
        one_by_one.add(one)
    assert list(at_once) == list(one_by_one)
    assert (at_once.ready, at_once.isolated) == (one_by_one.ready, one_by_one.isolated)


def test_requeued_jobs_run_before_the_others_in_their_order() -> None:
    buffer = buffer_of(job(5, QUICK), job(6, QUICK, isolated=True))
    buffer.set_paused_types({SLOW})
    buffer.requeue([job(1, QUICK), job(2, SLOW), job(3, QUICK, isolated=True), job(4, QUICK)])
    assert ready(buffer) == [b"1-0", b"4-0", b"5-0"]
    assert isolated(buffer) == [b"6-0", b"3-0"]
    buffer.set_paused_types(set())
    assert ready(buffer) == [b"1-0", b"4-0", b"5-0", b"2-0"]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 15), st.integers(0, 50))
def test_the_first_supported_jobs_are_taken_and_the_order_is_kept(
    type_nos: list[int], unsupported_types: int, count: int
) -> None:
    jobs = [job(number, type_no) for number, type_no in enumerate(type_nos)]
    buffer = buffer_of(*jobs, types=4)
    supported = [job for job in jobs if not unsupported_types >> job.type_no & 1][:count]
    assert buffer.take(count, unsupported_types) == supported
    assert list(buffer.ready) == [job for job in jobs if job not in supported]


# -- size


def test_a_buffer_is_full_by_the_bytes_of_its_runnable_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RUNNABLE_BYTES", 1000)
    buffer = buffer_of()
    assert not buffer.full
    for number, size in enumerate((1, 1, 1, 400)):
        buffer.add(job(number, SLOW, size=size))
    assert not buffer.full, "four jobs of the largest one's size would fill it"
    for size in (300, 300):
        buffer.add(job(9, QUICK, size=size))
    assert buffer.full
    buffer.set_paused_types({QUICK})
    assert not buffer.full, "parked jobs have limits of their own"
    buffer.set_paused_types(set())
    assert buffer.full
    buffer.clear()
    assert not buffer.full
