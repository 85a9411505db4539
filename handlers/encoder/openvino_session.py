"""A converted model in memory, ready to compute: the only import of OpenVINO in a worker."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .converted_models import Card

MODEL, WEIGHTS = "model.xml", "weights.bin"
PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Each shape of a batch keeps some 50 KiB of prepared work; more shapes than this follow one another rarely.
SHAPES_KEPT = 512

# Importing OpenVINO reports that to its maker, unless this package is not there.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino as openvino  # noqa: E402 - others take it from here, behind the line above


class OpenVinoSession:
    """Runs batches of one model on the CPU. Not for several threads at once.

    The large matrices are mapped from the folder: every process that has the same model open shares them.
    """

    def __init__(self, folder: Path, card: Card, *, dtype: str, threads: int) -> None:
        """Takes about 0.3 s for a small model. Raises RuntimeError or OSError where the folder is broken."""
        core = openvino.Core()
        self._compiled: Any = core.compile_model(str(folder / MODEL), "CPU", _config(dtype, threads))
        self._request: Any = self._compiled.create_infer_request()
        self._mapped = _map_weights(folder, card)
        for name, matrix in self._mapped.items():
            self._request.set_tensor(name, openvino.Tensor(matrix, shared_memory=True))

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids and attention mask, shape (rows, tokens) each, to vectors of shape (rows, dim)."""
        self._request.set_tensor("input_ids", openvino.Tensor(ids, shared_memory=True))
        self._request.set_tensor("attention_mask", openvino.Tensor(mask, shared_memory=True))
        self._request.infer()
        # The request keeps its output for the next batch.
        return np.array(self._request.get_output_tensor(0).data, np.float32)


def supported() -> frozenset[str]:
    """The dtypes that this processor computes in."""
    able = set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return frozenset(dtype for dtype in PRECISION if dtype.upper() in able)


def _config(dtype: str, threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Every process would pin itself to the first cores.
        "ENABLE_CPU_PINNING": False,
        "ENABLE_MMAP": True,
        "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        "CPU_RUNTIME_CACHE_CAPACITY": SHAPES_KEPT,
    }


def _map_weights(folder: Path, card: Card) -> dict[str, NDArray[np.float32]]:
    if not card.weights:
        return {}
    # Copy on write, for OpenVINO asks for writable memory; it never writes there.
    mapped = np.memmap(folder / WEIGHTS, np.uint8, mode="c")
    found = {}
    for name, weight in card.weights.items():
        size = 4 * weight.shape[0] * weight.shape[1]
        found[name] = mapped[weight.offset : weight.offset + size].view(np.float32).reshape(weight.shape)
    return found
