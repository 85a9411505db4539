"""Packs texts into batches under a token budget, so that little of a forward pass is padding."""

from collections.abc import Sequence

# Share of a batch that may be padding: the loss is in proportion to it, and one text in twenty is not felt.
MAX_PADDING_SHARE = 0.05
# Padding below this never splits a batch: one more forward pass costs about as much as this many tokens.
MIN_PADDING_TOKENS = 64


def pack(lengths: Sequence[int], budget: int, max_rows: int) -> list[list[int]]:
    """Group the indices of `lengths` into batches, the longest texts first.

    `lengths` are tokens, each >= 0. A batch costs its longest length times its rows, because shorter rows
    are padded. It stays within `budget` tokens (a text longer than that stands alone), within `max_rows`
    rows, and its padding within `MAX_PADDING_SHARE` of its cost or `MIN_PADDING_TOKENS`, whichever is more.
    Every index stands in exactly one batch. Raises ValueError for a budget or a row limit below 1.
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


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The part of the tokens computed that is padding, 0 to 1; 0 where nothing is computed."""
    cost = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / cost if cost else 0.0


def _fits(rows: int, cost: int, padding: int, budget: int, max_rows: int) -> bool:
    allowed = max(cost * MAX_PADDING_SHARE, MIN_PADDING_TOKENS)
    return rows < max_rows and cost <= budget and padding <= allowed
