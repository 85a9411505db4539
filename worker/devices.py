"""Device and threads of each worker, set before any library is imported."""

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from .settings import cores

# A second copy works while the first one's batch is made or stored; more would only take memory, of a GPU and
# beyond a copy a core also of a CPU.
LEAST_COPIES = 2
# OpenMP (torch among others), Intel's and the open linear algebra, the tokenizers.
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
# The device of a worker that does not run types which need one.
NO_DEVICE = "none"
_GPU = re.compile(r"nvidia\d+")


def set_pools(threads: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have every library with threads of its own take `threads`; what the operator has set stays.

    Libraries read these names when they are imported or first used: call it before that.
    """
    for pool in POOLS:
        environ.setdefault(pool, str(threads))
    environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def visible_gpus(environ: Mapping[str, str] = os.environ, dev: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs this process may use, without asking a driver; 0 for torch's build for CPUs."""
    there = _gpus_in(dev)
    if not there or _torch_version().endswith("+cpu"):
        return 0
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return there
    # As CUDA reads it: what follows a -1 or an empty name is not seen.
    names = [name.strip() for name in named.split(",")]
    shown = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    # One GPU may be cut into several that are named by their UUIDs.
    return shown if any(name.startswith("MIG") for name in names) else min(shown, there)


def device_for_slot(device: str, slot: int, gpus: int, copies: int = 0) -> str:
    """The device of the worker in `slot`: `cpu`, `cuda:N`, or `none` where there are copies enough.

    `device` is `auto`, `cpu`, `cuda`, `none` or names joined by commas; `copies` are those of each GPU, or of
    the CPU, with 0 for as many as help. A GPU that is named but not visible stays: its first use reports
    what is missing.
    """
    names = device_names(device, gpus)
    most = max(LEAST_COPIES, cores()) if names == ["cpu"] else LEAST_COPIES
    return names[slot % len(names)] if slot < (copies or most) * len(names) else NO_DEVICE


def device_names(device: str, gpus: int) -> list[str]:
    """The devices that ``device`` names where ``gpus`` are visible: `cpu`, `cuda:N`, or `none` alone."""
    everything = ",".join(f"cuda:{number}" for number in range(max(1, gpus)))
    named = "cpu" if device == "auto" and not gpus else device
    return (everything if named in ("auto", "cuda") else named).split(",")


def _gpus_in(folder: Path) -> int:
    try:
        # One name at a time: a list of all names would copy shared pages of each worker (0.1 MB).
        with os.scandir(folder) as entries:
            return sum(bool(_GPU.fullmatch(entry.name)) for entry in entries)
    except OSError:
        return 0


def _torch_version() -> str:
    from importlib import metadata  # a third of what a worker's start costs, and few have a GPU

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "+cpu"
