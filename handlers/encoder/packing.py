"""Batching of texts under a token budget, with little padding; batches shrink when memory runs out."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Maximum share of padding in a batch; the loss of speed is in proportion to it.
MAX_PADDING_SHARE = 0.05
# Less padding than this never splits a batch: another forward pass costs about as much as these tokens.
MIN_PADDING_TOKENS = 64
# CUDA and the system raise these classes; torch's allocator for the CPU raises a plain RuntimeError with one
# of these texts.
MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")
MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def pack(
    lengths: Sequence[int],
    budget: int,
    max_rows: int,
    *,
    equal_lengths: bool = False,
    min_padding_tokens: int = MIN_PADDING_TOKENS,
) -> list[list[int]]:
    """Group the indices of `lengths` into batches, the longest texts first.

    `lengths` are tokens, each >= 0. A batch costs its longest length times its rows, because shorter rows
    are padded. It has at most `budget` tokens (a longer text is a batch of its own) and `max_rows` rows. Its
    padding is at most `MAX_PADDING_SHARE` of its cost or `min_padding_tokens`, whichever is more; with
    `equal_lengths` it has none. Every index is in exactly one batch. Raises ValueError if `budget` or
    `max_rows` is below 1.
    """
    if budget < 1 or max_rows < 1:
        raise ValueError(f"budget {budget} and max_rows {max_rows} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    longest = tokens = 0
    for index in order:
        length = lengths[index]
        cost = longest * (len(batches[-1]) + 1) if batches else 0
        padding = cost - tokens - length
        allowed = 0.0 if equal_lengths else max(cost * MAX_PADDING_SHARE, min_padding_tokens)
        if batches and len(batches[-1]) < max_rows and cost <= budget and padding <= allowed:
            batches[-1].append(index)
            tokens += length
        else:
            batches.append([index])
            longest = tokens = length
    return batches


def pack_unpadded(lengths: Sequence[int], budget: int, max_rows: int, max_padded: int) -> list[list[int]]:
    """Group the indices of `lengths` into batches of an encoder that does not pad, the longest texts first.

    A batch has at most `budget` tokens (a longer text is a batch of its own) and `max_rows` rows. Its longest
    length times its rows is at most `max_padded`. Every index is in exactly one batch.
    """
    batches: list[list[int]] = []
    longest = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rows = len(batches[-1]) + 1 if batches else 0
        if 0 < rows <= max_rows and tokens + lengths[index] <= budget and rows * longest <= max_padded:
            batches[-1].append(index)
            tokens += lengths[index]
        else:
            batches.append([index])
            longest = tokens = lengths[index]
    return batches


class RowLimits:
    """Numbers of rows that fit into memory, learned from failed passes.

    Lengths are grouped by powers of two. A limit holds for its group and for all longer texts.
    """

    def __init__(self) -> None:
        self._max_rows: dict[int, int] = {}

    def max_rows(self, length: int) -> int | None:
        """The most rows for texts of up to `length` tokens; None if no pass has failed yet."""
        group = length.bit_length()
        return min((rows for other, rows in self._max_rows.items() if other <= group), default=None)

    def lower(self, length: int, rows: int) -> None:
        """Limit batches with texts of `length` tokens or more to `rows` rows."""
        group = length.bit_length()
        self._max_rows[group] = min(rows, self._max_rows.get(group, rows))


def run_batches(
    lengths: Sequence[int],
    batches: Sequence[list[int]],
    limits: RowLimits,
    compute: Callable[[list[int]], T],
    free_memory: Callable[[], None] = lambda: None,
) -> Iterator[tuple[list[int], T]]:
    """Compute each batch, divided if it does not fit into memory; every index is computed exactly once.

    When memory runs out, `free_memory` is called and the batch is halved, repeatedly if necessary. `limits`
    spares later batches of that length the failure. Raises every other error of `compute`, and the
    out-of-memory error of a single row.
    """
    waiting = deque(batches)
    while waiting:
        batch = waiting.popleft()
        longest = max(lengths[index] for index in batch)
        max_rows = limits.max_rows(longest) or len(batch)
        if len(batch) > max_rows:
            waiting.extendleft(
                batch[start : start + max_rows] for start in _starts_from_last(batch, max_rows)
            )
            continue
        try:
            result = compute(batch)
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield batch, result
            continue
        # Not in the except block: there, the error still holds the tensors of the failed pass.
        free_memory()
        limits.lower(longest, len(batch) // 2)
        waiting.appendleft(batch)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory, by the name of its class or by its text."""
    if any(base.__name__ in MEMORY_ERRORS for base in type(error).__mro__):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in message for text in MEMORY_TEXTS)


def _starts_from_last(batch: Sequence[int], size: int) -> range:
    return range((len(batch) - 1) // size * size, -1, -size)


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of padding in the computed tokens, 0 to 1; 0 without batches."""
    cost = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / cost if cost else 0.0
