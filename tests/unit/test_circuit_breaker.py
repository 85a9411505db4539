"""Circuit breakers: when a type is probed, and how often a job is retried for free."""

import pytest

from jobworker.worker.reader import circuit_breaker as module
from jobworker.worker.reader.circuit_breaker import CircuitBreaker, CircuitBreakers

JOB, OTHER = (0, b"1-0"), (0, b"2-0")


def test_each_failed_probe_doubles_the_wait_up_to_15_seconds() -> None:
    breaker, now, waits = CircuitBreaker(), 0.0, []
    breaker.record_failure(now)
    for _ in range(7):
        due = next(s for s in range(1, 100) if breaker.try_half_open(now + s))
        waits.append(due)
        now += due
        breaker.record_failure(now)
    assert waits == [1, 2, 4, 8, 15, 15, 15]


def test_jobs_that_were_running_when_it_opened_do_not_prolong_the_wait() -> None:
    breaker = CircuitBreaker()
    for now in (0.0, 0.5, 0.9):
        breaker.record_failure(now)
    assert breaker.try_half_open(1.0)


def test_a_success_closes_it_and_the_next_wait_is_short_again() -> None:
    breaker = CircuitBreaker()
    breaker.record_failure(0.0)
    assert breaker.try_half_open(1.0)
    breaker.record_failure(1.0)
    breaker.record_success()
    assert (breaker.open, breaker.try_half_open(1e9)) == (False, False)
    breaker.record_failure(10.0)
    assert breaker.try_half_open(11.0)


def test_a_job_is_retried_for_free_while_no_other_job_of_its_type_succeeds() -> None:
    breakers = CircuitBreakers(1)
    assert all(breakers.is_within_grace(0, JOB) for _ in range(100))


def test_a_job_is_retried_for_free_five_times_while_others_succeed() -> None:
    breakers = CircuitBreakers(1)
    free = []
    for _ in range(7):
        breakers[0].record_failure(0.0)
        breakers[0].record_success()
        free.append(breakers.is_within_grace(0, JOB))
    assert free == [True] * 5 + [False] * 2
    assert breakers.is_within_grace(0, OTHER), "each job has its own free retries"


def test_the_memory_for_free_retries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED_JOBS", 10)
    breakers = CircuitBreakers(1)
    for number in range(100):
        assert breakers.is_within_grace(0, (0, b"%d-0" % number))
        assert len(breakers._free_retries) <= 11
