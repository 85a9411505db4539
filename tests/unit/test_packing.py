"""Every text is embedded exactly once, and little of the work is padding."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder.packing import (
    MAX_PADDING_SHARE,
    MIN_PADDING_TOKENS,
    RowLimits,
    is_out_of_memory,
    pack,
    pack_unpadded,
    padding_share,
    run_batches,
)

LENGTHS = st.lists(st.integers(0, 600), max_size=200)
LIMITS = st.tuples(st.integers(1, 4000), st.integers(1, 64))


@given(LENGTHS, LIMITS)
def test_every_text_is_in_exactly_one_batch(lengths: list[int], limits: tuple[int, int]) -> None:
    batches = pack(lengths, *limits)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, LIMITS)
def test_batches_respect_budget_row_limit_and_padding(lengths: list[int], limits: tuple[int, int]) -> None:
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


@given(LENGTHS, LIMITS, st.integers(1, 8))
def test_unpadded_batches_respect_tokens_rows_and_the_padded_size(
    lengths: list[int], limits: tuple[int, int], times: int
) -> None:
    budget, max_rows = limits
    batches = pack_unpadded(lengths, budget, max_rows, times * budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[index] for index in batch]
        assert len(batch) == 1 or (
            len(batch) <= max_rows and sum(own) <= budget and len(batch) * max(own) <= times * budget
        )


def test_unpadded_batches_mix_lengths() -> None:
    assert pack_unpadded([512, 16, 16, 480], 1024, 64, 4096) == [[0, 3, 1, 2]]


def test_more_padding_is_allowed_where_a_pass_costs_more() -> None:
    lengths = [100, 60, 40]
    assert pack(lengths, 1000, 8) == [[0, 1], [2]]
    assert pack(lengths, 1000, 8, min_padding_tokens=100) == [[0, 1, 2]]


def test_nothing_to_pack() -> None:
    assert pack([], 100, 1) == pack_unpadded([], 100, 1, 100) == []
    assert padding_share([], []) == 0


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_a_limit_of_zero_is_rejected(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack([1], *limits)


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which is no MemoryError."""


class Memory:
    """Holds `tokens` padded tokens and notes every try."""

    def __init__(self, lengths: list[int], tokens: int) -> None:
        self.lengths, self.tokens = lengths, tokens
        self.tries: list[int] = []
        self.failed = self.released = 0

    def compute(self, batch: list[int]) -> list[int]:
        cost = len(batch) * max(self.lengths[index] for index in batch)
        self.tries.append(cost)
        if cost > self.tokens:
            self.failed += 1
            raise OutOfMemoryError("CUDA: tried to allocate 2.00 GiB")
        return [self.lengths[index] for index in batch]

    def release(self) -> None:
        self.released += 1


@given(st.lists(st.integers(0, 600), min_size=1, max_size=100), st.integers(600, 5000))
def test_however_little_memory_there_is_every_text_is_computed_once(lengths: list[int], tokens: int) -> None:
    memory = Memory(lengths, tokens)
    batches = pack(lengths, 16_384, 64)
    done = list(run_batches(lengths, batches, RowLimits(), memory.compute, memory.release))
    assert sorted(index for batch, _ in done for index in batch) == list(range(len(lengths)))
    assert all(found == [lengths[index] for index in batch] for batch, found in done)
    assert memory.released == memory.failed
    assert all(len(batch) * max(lengths[index] for index in batch) <= tokens for batch, _ in done)


def test_a_row_limit_holds_for_its_length_and_longer_ones_only() -> None:
    lengths = [100] * 64
    memory, limits = Memory(lengths, 1700), RowLimits()
    for _ in range(3):
        list(run_batches(lengths, [list(range(64))], limits, memory.compute, memory.release))
    assert memory.failed == 2, "64 and 32 rows, once"
    assert max(memory.tries[-4:]) == 1600
    assert (limits.max_rows(120), limits.max_rows(600), limits.max_rows(50)) == (16, 16, None)
    limits.lower(600, 2)
    assert (limits.max_rows(120), limits.max_rows(600)) == (16, 2)


def test_a_single_text_too_large_for_memory_raises() -> None:
    memory = Memory([100, 900], 800)
    with pytest.raises(OutOfMemoryError):
        list(run_batches(memory.lengths, [[1], [0]], RowLimits(), memory.compute, memory.release))


def test_other_failures_pass_through_at_once() -> None:
    tries = []

    def compute(batch: list[int]) -> None:
        tries.append(batch)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(run_batches([1, 1], [[0, 1]], RowLimits(), compute))
    assert tries == [[0, 1]]


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, lacks: bool) -> None:
    assert is_out_of_memory(error) == lacks
