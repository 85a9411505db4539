"""How long a failed job waits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.worker.outcome import RetryPolicy


def exact(**changed: float) -> RetryPolicy:
    return RetryPolicy(jitter=0.0)._replace(**changed)


def test_the_defaults_double_from_two_seconds_to_a_minute() -> None:
    """The count goes up first: the first retry waits initial * multiplier."""
    delays = [exact().delay_s(count, random.Random(0)) for count in range(1, 9)]
    assert delays == [2, 4, 8, 16, 32, 60, 60, 60]


def test_the_default_policy() -> None:
    assert RetryPolicy() == (3, 1.0, 60.0, 2.0, 0.1)


def test_a_multiplier_of_one_waits_the_same_each_time() -> None:
    assert {exact(multiplier=1.0, initial_s=5.0).delay_s(n, random.Random(0)) for n in range(1, 50)} == {5.0}


@pytest.mark.parametrize("count", [2000, 10**6, 10**30])
def test_a_count_beyond_all_reason_waits_the_longest_time(count: int) -> None:
    assert exact().delay_s(count, random.Random(0)) == 60.0


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.001, 1e4), st.floats(1, 100), st.randoms())
def test_the_spread_is_at_most_the_jitter(
    count: int, jitter: float, initial_s: float, multiplier: float, rng: random.Random
) -> None:
    policy = exact(initial_s=initial_s, multiplier=multiplier)
    middle = policy.delay_s(count, rng)
    spread = policy._replace(jitter=jitter).delay_s(count, rng)
    assert 0 <= middle <= 60
    assert middle * (1 - jitter) * 0.999999 <= spread <= middle * (1 + jitter) * 1.000001


def test_the_jitter_goes_both_ways() -> None:
    rng = random.Random(1)
    delays = [RetryPolicy().delay_s(1, rng) for _ in range(200)]
    assert 1.8 <= min(delays) < 1.85
    assert 2.15 < max(delays) <= 2.2
