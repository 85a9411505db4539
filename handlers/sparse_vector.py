"""Sparse vector of a text: a weight for each token that counts."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SparseVector(NamedTuple):
    """Weights (float32, above 0) of token ids (uint32, ascending); both have the same length."""

    ids: NDArray[np.uint32]
    weights: NDArray[np.float32]

    def as_dict(self) -> dict[int, float]:
        """Id -> weight."""
        return dict(zip(self.ids.tolist(), self.weights.tolist(), strict=True))

    @classmethod
    def of(cls, weights: dict[int, float]) -> "SparseVector":
        """From id -> weight."""
        ids = np.array(sorted(weights), np.uint32)
        return cls(ids, np.array([weights[id_] for id_ in ids.tolist()], np.float32))


#: The sparse vector of a text without a token that counts.
NOTHING = SparseVector(np.zeros(0, np.uint32), np.zeros(0, np.float32))
