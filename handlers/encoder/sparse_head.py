"""Sparse vectors of bge-m3 and models like it: a weight for each token of a text, by a head of one layer.

Formula of FlagEmbedding (`EncoderOnlyEmbedderM3Model`): relu of a linear layer over the last hidden states.
The largest weight of a token counts; special tokens have none.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sparse_vector import NOTHING, SparseVector

log = logging.getLogger("jobworker.model")

#: Files of a model that may hold the head, in this order.
HEAD_FILES = ("sparse_linear.pt", "sparse_linear.safetensors")
# A model in one file may hold it under these names.
WHOLE_MODEL, PREFIX = "model.safetensors", "sparse_linear."


def has_head(folder: Path) -> bool:
    """Whether a model's folder holds a sparse head. Reads no weights and imports nothing heavy."""
    if any((folder / name).is_file() for name in HEAD_FILES):
        return True
    try:
        with (folder / WHOLE_MODEL).open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), 64 * 1024 * 1024))
    except OSError:
        return False
    return f'"{PREFIX}weight"'.encode() in header


class SparseHead:
    """The layer in torch: weight of shape (1, hidden), bias of shape (1,)."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self._weight, self._bias = weight, bias

    @classmethod
    def read(cls, folder: Path, hidden: int, device: Any) -> "SparseHead | None":
        """The head of a model; None if it has none. One that cannot be used is logged, and None."""
        if not has_head(folder):
            return None
        try:
            weight, bias = _tensors(folder)
            if tuple(weight.shape) != (1, hidden) or tuple(bias.shape) != (1,):
                raise ValueError(f"shapes {tuple(weight.shape)} and {tuple(bias.shape)} for {hidden} states")
            if not (weight.isfinite().all() and bias.isfinite().all()):
                raise ValueError("it holds NaN or infinity")
        except Exception as error:
            # The file is of the user: the loader raises errors of many kinds.
            log.warning("model.sparse_rejected", extra={"folder": str(folder), "error": str(error)[:300]})
            return None
        return cls(weight.float().to(device), bias.float().to(device))

    def __call__(self, states: Any) -> Any:
        """Weights in float32 of hidden states: (..., hidden) to (...)."""
        from torch.nn.functional import linear

        kind = states.dtype
        return linear(states, self._weight.to(kind), self._bias.to(kind)).squeeze(-1).float().relu()


def _tensors(folder: Path) -> tuple[Any, Any]:
    pickled, separate = (folder / name for name in HEAD_FILES)
    if pickled.is_file():
        import torch

        # Only tensors: the file is a pickle.
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        return state["weight"], state["bias"]
    from safetensors import safe_open

    path, prefix = (separate, "") if separate.is_file() else (folder / WHOLE_MODEL, PREFIX)
    with safe_open(path, "pt") as file:
        return file.get_tensor(f"{prefix}weight"), file.get_tensor(f"{prefix}bias")


def sparse_vectors(
    windows: Sequence[Sequence[int]],
    owners: Sequence[int],
    weights: NDArray[np.float32],
    dropped: Iterable[int],
    texts: int,
) -> list[SparseVector]:
    """One vector a text. `weights`: of the tokens of all windows in order; `owners`: text of each window."""
    ids = np.concatenate([np.asarray(window, np.int64) for window in windows])
    texts_of = np.repeat(np.asarray(owners, np.int64), [len(window) for window in windows])
    kept = (weights > 0) & np.isfinite(weights) & ~np.isin(ids, list(dropped))
    ids, texts_of, weights = ids[kept], texts_of[kept], weights[kept]
    if not len(ids):
        return [NOTHING] * texts
    order = np.lexsort((ids, texts_of))
    ids, texts_of, weights = ids[order], texts_of[order], weights[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (ids[1:] != ids[:-1]) | (texts_of[1:] != texts_of[:-1])
    firsts = np.flatnonzero(is_first)
    largest = np.maximum.reduceat(weights, firsts).astype(np.float32)
    stops = np.searchsorted(texts_of[firsts], np.arange(1, texts))
    parts = zip(np.split(ids[firsts].astype(np.uint32), stops), np.split(largest, stops), strict=True)
    return [SparseVector(*part) for part in parts]
