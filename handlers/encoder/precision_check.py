"""Precision check: whether half precision is close enough to fp32, and enough faster."""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["fp32", "bf16", "fp16"]

# A change requires a new `converted_models.FORMAT`: the reference vectors of these are stored with a model.
SENTENCES = (
    "宝玉笑道：“这个妹妹我曾见过的。”贾母笑道：“可又是胡说，你又何曾见过她？”",
    "The petrel came back on Thursday.",
    "宝玉看罢。",
    "Nobody had seen the harbour master since the storm, and the book in which he wrote down every ship "
    "that came in, with its cargo and the name of its captain, lay open on his table, the ink still wet.",
)
# Below it, the order of search results begins to differ from that of full precision.
MIN_COSINE = 0.999
# Least gain over fp32 for which half precision is used on a CPU, because it is less exact.
MIN_SPEEDUP = 1.1
# Timed passes after a warm-up. The fastest counts, because other programs can only slow a pass down.
TIMED_PASSES = 3


def min_cosine(vectors: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Smallest cosine between the rows of two arrays of shape (n, dim); NaN if any number is NaN."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((vectors * reference).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)).min())


def is_exact(vectors: NDArray[np.float32], reference: NDArray[np.float32]) -> bool:
    """Whether the cosine of every row to its reference is at least `MIN_COSINE`; False with any NaN."""
    return min_cosine(vectors, reference) >= MIN_COSINE


def fastest_s(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one pass by `clock`; that of the default counts the CPU time of all threads."""
    run()
    passes = []
    for _ in range(TIMED_PASSES):
        started = clock()
        run()
        passes.append(clock() - started)
    return min(passes)


def dtypes_to_try(dtype: str, preferred: tuple[Dtype, ...]) -> tuple[Dtype, ...]:
    """Dtypes in the order of trial: `preferred` for `auto`, else the requested one; fp32 is the last.

    Raises ValueError if `dtype` is not auto, fp32, bf16 or fp16.
    """
    candidates: dict[str, tuple[Dtype, ...]] = {
        "auto": preferred,
        "fp32": (),
        "bf16": ("bf16",),
        "fp16": ("fp16",),
    }
    if dtype not in candidates:
        raise ValueError(f"dtype {dtype!r}: use auto, fp32, bf16 or fp16")
    return (*(one for one in candidates[dtype] if one != "fp32"), "fp32")
