"""Reconnect backoff: how long reader and reaper wait for a job store that does not answer."""

import random

from jobworker.worker.store.backoff import ReconnectBackoff


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def test_the_wait_doubles_from_50_ms_to_a_second() -> None:
    backoff = ReconnectBackoff(NoJitter())
    waits = [backoff.next_wait_s() for _ in range(8)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_an_answer_of_the_store_resets_the_wait() -> None:
    backoff = ReconnectBackoff(NoJitter())
    for _ in range(1000):
        backoff.next_wait_s()
    backoff.reset()
    assert backoff.next_wait_s() == 0.05


def test_hosts_that_fail_together_reconnect_at_different_times() -> None:
    waits = {ReconnectBackoff(random.Random(seed)).next_wait_s() for seed in range(50)}
    assert len(waits) == 50
    assert all(0.025 <= wait <= 0.05 for wait in waits)
