"""Every text is embedded exactly once, and little of the work is padding."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.packing import MAX_PADDING_SHARE, MIN_PADDING_TOKENS, pack, padding_share

LENGTHS = st.lists(st.integers(0, 600), max_size=200)
LIMITS = st.tuples(st.integers(1, 4000), st.integers(1, 64))


@given(LENGTHS, LIMITS)
def test_every_text_stands_in_exactly_one_batch(lengths: list[int], limits: tuple[int, int]) -> None:
    batches = pack(lengths, *limits)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, LIMITS)
def test_budget_rows_and_padding_are_kept(lengths: list[int], limits: tuple[int, int]) -> None:
    budget, max_rows = limits
    for batch in pack(lengths, budget, max_rows):
        cost = len(batch) * max(lengths[index] for index in batch)
        padding = cost - sum(lengths[index] for index in batch)
        assert len(batch) <= max_rows
        assert cost <= budget or len(batch) == 1
        assert padding <= max(cost * MAX_PADDING_SHARE, MIN_PADDING_TOKENS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("low", "high"), [(3, 230), (150, 210), (5, 512)])
def test_realistic_lengths_waste_at_most_a_twentieth(seed: int, low: int, high: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(low, high) for _ in range(400)]
    assert padding_share(lengths, pack(lengths, 2048, 512)) <= 0.05


def test_equal_texts_fill_the_budget() -> None:
    assert [len(batch) for batch in pack([100] * 45, 2048, 512)] == [20, 20, 5]


def test_the_longest_texts_go_first_so_that_a_lack_of_memory_shows_at_once() -> None:
    assert pack([5, 300, 7, 299], 700, 10) == [[1, 3], [2, 0]]


def test_nothing_to_pack() -> None:
    assert pack([], 100, 1) == []
    assert padding_share([], []) == 0


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_a_limit_that_lets_nothing_through_is_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack([1], *limits)
