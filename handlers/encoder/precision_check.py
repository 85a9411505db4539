"""Whether other arithmetic than full precision may be taken: is it exact enough, and is it worth it?"""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["fp32", "bf16", "fp16"]

# Changing them makes converted models of other versions useless: see `engine_cache.FORMAT`.
SENTENCES = (
    "宝玉笑道：“这个妹妹我曾见过的。”贾母笑道：“可又是胡说，你又何曾见过她？”",
    "The petrel came back on Thursday.",
    "宝玉看罢。",
    "Nobody had seen the harbour master since the storm, and the book in which he wrote down every ship "
    "that came in, with its cargo and the name of its captain, lay open on his table, the ink still wet.",
)
# Below it the order of search results begins to differ from that of full precision.
WORST_COSINE = 0.999
# Other arithmetic has to be faster than fp32 by this to be taken on a CPU: it is less exact.
WORTH_IT = 1.1
# Passes timed, after one that prepares; the fastest counts, for other programs only ever slow one down.
TIMED_PASSES = 3


def worst_cosine(vectors: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The least cosine between rows of two arrays, shape (n, dim) each; NaN where any number is none."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((vectors * reference).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)).min())


def exact_enough(vectors: NDArray[np.float32], reference: NDArray[np.float32]) -> bool:
    """Whether every row is as near to its reference as `WORST_COSINE` asks; never where a number is NaN."""
    return worst_cosine(vectors, reference) >= WORST_COSINE


def cpu_s(run: Callable[[], object]) -> float:
    """Seconds of the processor, all threads together, that one pass takes."""
    run()
    passes = []
    for _ in range(TIMED_PASSES):
        started = time.process_time()
        run()
        passes.append(time.process_time() - started)
    return min(passes)


def ladder(dtype: str, preferred: tuple[Dtype, ...]) -> tuple[Dtype, ...]:
    """What is tried one after the other: `preferred` for `auto`, else what was asked for; fp32 comes last.

    Raises ValueError for another word than auto, fp32, bf16 and fp16.
    """
    wanted: dict[str, tuple[Dtype, ...]] = {
        "auto": preferred,
        "fp32": (),
        "bf16": ("bf16",),
        "fp16": ("fp16",),
    }
    if dtype not in wanted:
        raise ValueError(f"dtype {dtype!r}: say auto, fp32, bf16 or fp16")
    return (*(step for step in wanted[dtype] if step != "fp32"), "fp32")
