"""How many of the truly nearest rows a search finds (pure): true scores are gathered page by page."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..vectors.ports import Vector

Matrix = NDArray[np.float32]

# Scores of one pair differ by rounding between a server and here; a row this near to the last is as good.
SCORE_EPSILON = 1e-4


class TrueScores:
    """The best cosines of each query among all rows that were added; `queries` has shape (n, dim)."""

    def __init__(self, queries: Sequence[Vector], limit: int) -> None:
        self._queries = unit(np.asarray(queries, dtype=np.float32))
        self._limit = limit
        self._best = np.full((len(queries), limit), -np.inf, dtype=np.float32)
        self._rows = 0

    def add(self, vectors: Sequence[Vector]) -> None:
        """Compare every query with these rows, shape (rows, dim)."""
        scores = self._queries @ unit(np.asarray(vectors, dtype=np.float32)).T
        both = np.concatenate([self._best, scores], axis=1)
        self._best = np.partition(both, both.shape[1] - self._limit, axis=1)[:, -self._limit :]
        self._rows += len(vectors)

    def recall(self, found: Sequence[Sequence[tuple[str, float]]]) -> float:
        """The share of the truly nearest that was found, 0 to 1; rows of equal score are as good.

        `found`: for each query ids and scores.
        """
        wanted = min(self._limit, self._rows)
        if not wanted or not len(self._queries):
            return 1.0
        least = np.sort(self._best, axis=1)[:, -wanted] - SCORE_EPSILON
        good = [
            len({id_ for id_, score in hits if score >= low}) for hits, low in zip(found, least, strict=True)
        ]
        return float(np.minimum(good, wanted).mean() / wanted)


def unit(vectors: Matrix) -> Matrix:
    """Rows of length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Matrix = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled
