"""Recall of an approximate search against exact scores, which are collected page by page (pure)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..vectors.ports import Vector

Matrix = NDArray[np.float32]

# The server and this program round differently: a row this close to the worst accepted score counts as found.
SCORE_EPSILON = 1e-4


class TrueScores:
    """The `limit` best cosines of each query among all rows added; `queries` has shape (n, dim)."""

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

    def recall(self, results: Sequence[Sequence[tuple[str, float]]]) -> float:
        """The share of the exact nearest rows in `results`, 0 to 1; rows of equal score are interchangeable.

        `results`: ids and scores for each query.
        """
        wanted = min(self._limit, self._rows)
        if not wanted or not len(self._queries):
            return 1.0
        thresholds = np.sort(self._best, axis=1)[:, -wanted] - SCORE_EPSILON
        correct = [
            len({id_ for id_, score in hits if score >= threshold})
            for hits, threshold in zip(results, thresholds, strict=True)
        ]
        return float(np.minimum(correct, wanted).mean() / wanted)


def unit(vectors: Matrix) -> Matrix:
    """Rows of length 1; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Matrix = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled
