"""Program that estimates the memory of a copy of a model, from the headers of its files.

``python -m jobworker.handlers.encoder.copy_size MODEL DEVICE`` prints a `CopySize` as JSON, or ``null``.
"""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from jobworker.worker import device_names, visible_gpus
from jobworker.worker.extension import CopySize

from .converted_models import SHARE_FROM_BYTES, was_converted
from .find_model import ModelError, default_model, model_folders

_MIB = 1024 * 1024
#: Besides the weights: libraries, tokenizer, and the forward pass of a CPU.
_TORCH_BYTES, _OPENVINO_BYTES = 448 * _MIB, 192 * _MIB
#: Besides the weights on a GPU: the driver's context and a forward pass, which is halved if it does not fit.
_CARD_BYTES = 1024 * _MIB
#: Weights are computed with 4 bytes a number, or read with these before they are rounded.
_NUMBER_BYTES = 4
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: Exports of the same weights for other programs.
_EXPORTS = {"onnx", "openvino"}
_MAX_HEADER_BYTES = 100 * _MIB
_DRIVER_WITHIN_S = 10.0


def size_of(model: str, device: str, gpus: int, card_free_bytes: int) -> CopySize | None:
    """None if the files of the model hold no weights that are known here. Raises ModelError or OSError."""
    model = model or default_model()
    weights = sum(map(weight_bytes, model_folders(model)))
    if not weights:
        return None
    if device_names(device, gpus) != ["cpu"]:
        card = _CARD_BYTES + weights if card_free_bytes else 0
        return CopySize(0, _TORCH_BYTES + weights, card, card_free_bytes)
    # Until a model is converted, torch may have to run it, and torch converts it.
    if importlib.util.find_spec("openvino") is None or not was_converted(model):
        return CopySize(0, _TORCH_BYTES + weights)
    if weights >= SHARE_FROM_BYTES:
        return CopySize(weights, _OPENVINO_BYTES)
    return CopySize(0, _OPENVINO_BYTES + weights)


def weight_bytes(folder: Path) -> int:
    """Bytes of all weights of a model in full precision."""
    if files := _files(folder, "*.safetensors"):
        return sum(map(_tensor_bytes, files))
    return sum(path.stat().st_size for path in _files(folder, "pytorch_model*.bin"))


def _files(folder: Path, pattern: str) -> list[Path]:
    found = folder.rglob(pattern)
    return [path for path in found if not _EXPORTS & set(path.relative_to(folder).parts)]


class _Tensor(msgspec.Struct):
    dtype: str = ""
    shape: tuple[int, ...] = ()


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors of a safetensors file in full precision, from its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            return 0
        header = msgspec.json.decode(file.read(length), type=dict[str, _Tensor])
    numbers = sum(math.prod(one.shape) for one in header.values() if one.dtype in _FLOATS)
    return numbers * _NUMBER_BYTES


def least_free_card_bytes(devices: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Free memory of the device (``cuda:N``) with the least, by the driver's tool; 0 if unknown."""
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    numbers = [int(name.partition(":")[2]) for name in devices if name.startswith("cuda:")]
    tool = shutil.which("nvidia-smi")
    if tool is None or not numbers or (visible and max(numbers) >= len(visible)):
        return 0
    cards = ",".join(visible[number] if visible else str(number) for number in numbers)
    command = [tool, "-i", cards, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DRIVER_WITHIN_S,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return least_mib(done.stdout.splitlines()) * _MIB if done.returncode == 0 else 0


def least_mib(lines: Iterable[str]) -> int:
    """The least of the numbers; 0 if one line is none, as for a GPU that is cut into several."""
    texts = [line.strip() for line in lines]
    return min(map(int, texts)) if texts and all(text.isdecimal() for text in texts) else 0


def main(model: str, device: str) -> None:
    """Print the size as JSON."""
    gpus = visible_gpus()
    free_bytes = least_free_card_bytes(device_names(device, gpus))
    try:
        size = size_of(model, device, gpus, free_bytes)
    except (ModelError, OSError, msgspec.MsgspecError):
        size = None  # the workers report what is wrong with the model
    sys.stdout.buffer.write(msgspec.json.encode(size))


if __name__ == "__main__":
    main(*sys.argv[1:3])
