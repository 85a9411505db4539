"""Memory of a copy of the model, found in a process of its own: the supervisor imports no model library."""

import os
import subprocess
import sys

import msgspec

from jobworker.worker import NO_DEVICE, Settings
from jobworker.worker.extension import CopySize

from . import NEEDS_VECTORS
from .settings import HandlerSettings

#: Only headers of files are read. The service waits for the answer before it starts a worker.
_WITHIN_S = 20.0


def copy_size(settings: Settings) -> CopySize | None:
    """None if no worker loads a model, or if its size cannot be found: then loading it gives the reason."""
    assert isinstance(settings, HandlerSettings)
    loads = any(target in NEEDS_VECTORS for target in settings.handlers.values())
    if not loads or settings.device == NO_DEVICE or settings.model.startswith("dummy:"):
        return None
    program = [sys.executable, "-P", "-m", "jobworker.handlers.encoder.copy_size"]
    # The wrapper kills the program when the supervisor exits, also by SIGKILL.
    wrapper = [sys.executable, "-P", "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
    try:
        done = subprocess.run(
            [*wrapper, *program, settings.model, settings.device], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=_WITHIN_S, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return msgspec.json.decode(done.stdout, type=CopySize | None)
    except (OSError, subprocess.TimeoutExpired, msgspec.MsgspecError):
        return None
