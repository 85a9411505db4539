"""Inference session of a converted model; the only module of a worker that imports OpenVINO."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .converted_models import Card

MODEL, WEIGHTS = "model.xml", "weights.bin"
PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# OpenVINO caches about 50 KiB a batch shape; few workloads alternate between more shapes than this.
CACHED_SHAPES = 512

# Without this package, importing OpenVINO sends no report to its vendor.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as openvino  # noqa: E402 - imported elsewhere from here only, so that the line above comes first


class OpenVinoSession:
    """Runs batches of one model on the CPU. Not thread-safe.

    The large matrices are mapped from the folder, and shared by all processes that use the model.
    """

    def __init__(self, folder: Path, card: Card, *, dtype: str, threads: int) -> None:
        """Takes about 0.3 s for a small model. Raises RuntimeError or OSError if the folder is damaged."""
        core = openvino.Core()
        self._compiled: Any = core.compile_model(str(folder / MODEL), "CPU", _config(dtype, threads))
        self._request: Any = self._compiled.create_infer_request()
        self._mapped = _map_weights(folder, card)
        for name, matrix in self._mapped.items():
            self._request.set_tensor(name, openvino.Tensor(matrix, shared_memory=True))

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of shape (rows, dim) from token ids and attention mask, shape (rows, tokens) each."""
        self._request.set_tensor("input_ids", openvino.Tensor(ids, shared_memory=True))
        self._request.set_tensor("attention_mask", openvino.Tensor(mask, shared_memory=True))
        self._request.infer()
        return self._output(0)

    def both(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors, and the weights of tokens, shape (rows, tokens), of a model with a sparse head."""
        vectors = self(ids, mask)
        return vectors, self._output(1)

    def _output(self, number: int) -> NDArray[np.float32]:
        # Copied, because the request reuses its output buffer for the next batch.
        return np.array(self._request.get_output_tensor(number).data, np.float32)


def supported_dtypes() -> frozenset[str]:
    """The dtypes that this processor supports."""
    capabilities = set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return frozenset(dtype for dtype in PRECISION if dtype.upper() in capabilities)


def _config(dtype: str, threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # With it, every process would pin itself to the first cores.
        "ENABLE_CPU_PINNING": False,
        "ENABLE_MMAP": True,
        "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        "CPU_RUNTIME_CACHE_CAPACITY": CACHED_SHAPES,
    }


def _map_weights(folder: Path, card: Card) -> dict[str, NDArray[np.float32]]:
    if not card.weights:
        return {}
    # Copy-on-write, because OpenVINO demands writable memory, although it never writes there.
    mapped = np.memmap(folder / WEIGHTS, np.uint8, mode="c")
    matrices = {}
    for name, weight in card.weights.items():
        size = 4 * weight.shape[0] * weight.shape[1]
        matrices[name] = mapped[weight.offset : weight.offset + size].view(np.float32).reshape(weight.shape)
    return matrices
