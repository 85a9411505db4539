"""Reciprocal rank fusion of several rankings (Cormack, Clarke, Buettcher 2009)."""

from collections.abc import Sequence

#: Constant of the formula, as in the paper and as Milvus's default.
RRF_K = 60
#: Rows of each ranking that take part, at least.
CANDIDATES = 100


def fuse(rankings: Sequence[Sequence[str]], limit: int) -> list[str]:
    """Ids by the sum of 1 / (RRF_K + rank), rank from 1, the largest first."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, id_ in enumerate(ranking, 1):
            scores[id_] = scores.get(id_, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores, key=lambda id_: -scores[id_])[:limit]


def candidates(limit: int) -> int:
    """Rows of each ranking for a search with this limit."""
    return max(CANDIDATES, limit)
