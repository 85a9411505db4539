"""Restart backoff: when the supervisor starts a process again after an exit."""

from jobworker.worker.supervision.process import (
    FIRST_PAUSE_S,
    MAX_PAUSE_AFTER_READY_S,
    MAX_PAUSE_S,
    RestartBackoff,
)


def pauses(backoff: RestartBackoff, exits: int, *, was_ready: bool, lived_s: float) -> list[float]:
    """The pause after each of `exits` exits; each exit follows directly on the pause before it."""
    now, pauses_s = 1000.0, []
    for _ in range(exits):
        backoff.record_exit(now, was_ready=was_ready, lived_s=lived_s)
        pauses_s.append(round(backoff.wait_s(now), 6))
        now += pauses_s[-1]
    return pauses_s


def test_the_first_start_does_not_wait() -> None:
    assert RestartBackoff().wait_s(0.0) == 0.0


def test_a_worker_that_ran_long_restarts_at_once_however_often_it_exits() -> None:
    assert pauses(RestartBackoff(), 20, was_ready=True, lived_s=60.0) == [0.0] * 20


def test_two_quick_exits_are_free_then_the_pause_doubles_up_to_a_limit() -> None:
    """A poison job kills its worker up to three times; other jobs must not wait for that."""
    expected = [0.0, 0.0, 0.1, 0.2, 0.4, MAX_PAUSE_AFTER_READY_S]
    assert pauses(RestartBackoff(), 6, was_ready=True, lived_s=0.2) == expected


def test_a_process_that_never_became_ready_waits_after_its_first_exit() -> None:
    backoff = RestartBackoff()
    pauses_s = pauses(backoff, 12, was_ready=False, lived_s=0.2)
    assert pauses_s[:4] == [FIRST_PAUSE_S, 0.2, 0.4, 0.8]
    assert pauses_s[-1] == MAX_PAUSE_S == 30.0
    assert backoff.exits_before_ready == 12


def test_a_thousand_exits_do_not_overflow() -> None:
    assert pauses(RestartBackoff(), 1000, was_ready=False, lived_s=0.0)[-1] == MAX_PAUSE_S


def test_a_long_healthy_run_resets_the_backoff() -> None:
    backoff = RestartBackoff()
    pauses(backoff, 8, was_ready=False, lived_s=0.2)
    assert pauses(backoff, 1, was_ready=True, lived_s=60.0) == [0.0]
    assert backoff.exits_before_ready == 0


def test_the_pause_ends() -> None:
    backoff = RestartBackoff()
    backoff.record_exit(100.0, was_ready=False, lived_s=0.0)
    assert backoff.wait_s(100.05) > 0
    assert backoff.wait_s(100.2) == 0.0
