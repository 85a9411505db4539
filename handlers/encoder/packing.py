"""Packs texts into batches under a token budget, so that little of a forward pass is padding.

And makes batches smaller where memory turns out not to hold them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Share of a batch that may be padding: the loss is in proportion to it, and one text in twenty is not felt.
MAX_PADDING_SHARE = 0.05
# Padding below this never splits a batch: one more forward pass costs about as much as this many tokens.
MIN_PADDING_TOKENS = 64
# How the lack of memory is told: by CUDA's and the system's errors, and by torch's allocator for the CPU,
# which raises a plain RuntimeError.
MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")
MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def pack(lengths: Sequence[int], budget: int, max_rows: int) -> list[list[int]]:
    """Group the indices of `lengths` into batches, the longest texts first.

    `lengths` are tokens, each >= 0. A batch costs its longest length times its rows, because shorter rows
    are padded. It stays within `budget` tokens (a text longer than that stands alone), within `max_rows`
    rows, and its padding within `MAX_PADDING_SHARE` of its cost or `MIN_PADDING_TOKENS`, whichever is more.
    Every index is in exactly one batch. Raises ValueError for a budget or a row limit below 1.
    """
    if budget < 1 or max_rows < 1:
        raise ValueError(f"budget {budget} and max_rows {max_rows} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    longest = tokens = 0
    for index in order:
        length = lengths[index]
        cost = longest * (len(batches[-1]) + 1) if batches else 0
        if batches and _fits(len(batches[-1]), cost, cost - tokens - length, budget, max_rows):
            batches[-1].append(index)
            tokens += length
        else:
            batches.append([index])
            longest = tokens = length
    return batches


class Ceilings:
    """How many rows of a length memory was found to hold; nothing is known at first.

    Lengths go by powers of two: what did not fit once does not for a length that is nearly the same, nor
    for a longer one.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def rows(self, length: int) -> int | None:
        """The most rows for texts of up to `length` tokens; None where no limit is known."""
        bucket = length.bit_length()
        return min((rows for found, rows in self._rows.items() if found <= bucket), default=None)

    def lower(self, length: int, rows: int) -> None:
        """Remember that more than `rows` rows of `length` tokens are too many."""
        bucket = length.bit_length()
        self._rows[bucket] = min(rows, self._rows.get(bucket, rows))


def run_batches(
    lengths: Sequence[int],
    batches: Sequence[list[int]],
    ceilings: Ceilings,
    compute: Callable[[list[int]], T],
    release: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[int], T]]:
    """Compute each batch, in smaller ones where memory does not hold it; every index comes exactly once.

    After a lack of memory `release` is called, to give back what the failed try left, and the batch is cut
    in half, as often as needed; `ceilings` spares the next ones of that length the failure. Raises what
    `compute` raises for other reasons, and the lack of memory for a single row.
    """
    waiting = deque(batches)
    while waiting:
        batch = waiting.popleft()
        longest = max(lengths[index] for index in batch)
        most = ceilings.rows(longest) or len(batch)
        if len(batch) > most:
            waiting.extendleft(batch[start : start + most] for start in _starts_from_last(batch, most))
            continue
        try:
            found = compute(batch)
        except Exception as error:
            if len(batch) == 1 or not lacks_memory(error):
                raise
        else:
            yield batch, found
            continue
        # Only here, behind the handler: the error held the failed try's tensors.
        release()
        ceilings.lower(longest, len(batch) // 2)
        waiting.appendleft(batch)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small, by its class's name or its words."""
    if any(kind.__name__ in MEMORY_ERRORS for kind in type(error).__mro__):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in words for said in MEMORY_WORDS)


def _starts_from_last(batch: Sequence[int], size: int) -> range:
    return range((len(batch) - 1) // size * size, -1, -size)


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The part of the tokens computed that is padding, 0 to 1; 0 where nothing is computed."""
    cost = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / cost if cost else 0.0


def _fits(rows: int, cost: int, padding: int, budget: int, max_rows: int) -> bool:
    allowed = max(cost * MAX_PADDING_SHARE, MIN_PADDING_TOKENS)
    return rows < max_rows and cost <= budget and padding <= allowed
