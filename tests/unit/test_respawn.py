"""When a process that ended is started again."""

from jobworker.worker.supervision.process import FIRST_S, LONGEST_READY_S, LONGEST_S, RestartBackoff


def pauses(respawn: RestartBackoff, ends: int, *, was_ready: bool, lived_s: float) -> list[float]:
    """The pause after each of `count` exits, each just after the pause before it."""
    now, found = 1000.0, []
    for _ in range(ends):
        respawn.ended(now, was_ready=was_ready, lived_s=lived_s)
        found.append(round(respawn.wait_s(now), 6))
        now += found[-1]
    return found


def test_a_new_place_is_filled_at_once() -> None:
    assert RestartBackoff().wait_s(0.0) == 0.0


def test_a_worker_that_had_worked_is_replaced_at_once_however_often() -> None:
    assert pauses(RestartBackoff(), 20, was_ready=True, lived_s=60.0) == [0.0] * 20


def test_quick_ends_are_free_twice_then_cost_more_each_time() -> None:
    """A poison job has its worker killed up to three times; innocents must not wait for that."""
    assert pauses(RestartBackoff(), 6, was_ready=True, lived_s=0.2) == [
        0.0,
        0.0,
        0.1,
        0.2,
        0.4,
        LONGEST_READY_S,
    ]


def test_a_process_that_never_became_ready_waits_from_its_first_end_on() -> None:
    respawn = RestartBackoff()
    found = pauses(respawn, 12, was_ready=False, lived_s=0.2)
    assert found[:4] == [FIRST_S, 0.2, 0.4, 0.8]
    assert found[-1] == LONGEST_S == 30.0
    assert respawn.unready_ends == 12


def test_ten_thousand_ends_are_no_overflow() -> None:
    assert pauses(RestartBackoff(), 1000, was_ready=False, lived_s=0.0)[-1] == LONGEST_S


def test_a_good_life_forgives() -> None:
    respawn = RestartBackoff()
    pauses(respawn, 8, was_ready=False, lived_s=0.2)
    assert pauses(respawn, 1, was_ready=True, lived_s=60.0) == [0.0]
    assert respawn.unready_ends == 0


def test_the_pause_runs_off() -> None:
    respawn = RestartBackoff()
    respawn.ended(100.0, was_ready=False, lived_s=0.0)
    assert respawn.wait_s(100.05) > 0
    assert respawn.wait_s(100.2) == 0.0
