"""Encoder without weights that gives sparse vectors: each character has the weight 1."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobworker.handlers.encoder.base import DummyEncoder, Purpose, Vectors


class SparseDummy(DummyEncoder):
    """As `DummyEncoder`, with a sparse head; counts the passes with sparse vectors."""

    has_sparse = True

    def __init__(self, dim: int, **more: Any) -> None:
        super().__init__(dim, **more)
        self.both_passes = 0

    def _embed_both(self, windows: Sequence[list[int]], purpose: Purpose) -> tuple[Vectors, Vectors]:
        self.both_passes += 1
        return self._embed(windows, purpose), np.ones(sum(map(len, windows)), np.float32)
