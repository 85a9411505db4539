"""Disk cache of models converted for OpenVINO; of all processes, only one converts a model."""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from ..file_lock import lock_file
from .cache_folders import cache_folders
from .find_model import ModelSource
from .window_format import WindowFormat

log = logging.getLogger("jobworker.model")

# Part of the folder's name. Increase it when the files of a folder or the sentences of the precision check
# change.
FORMAT = 3
#: Packages that decide what a converted model computes, or whether a model can be converted.
CONVERTED_BY = ("openvino", "sentence-transformers", "tokenizers", "torch", "transformers")
CARD = "card.json"
# With fewer bytes of matrices, they stay inside the graph: each process then has its own copy in the
# processor's layout and is faster by 2 or 3 % (bench/engines.py). With more, memory matters more.
SHARE_FROM_BYTES = 128 * 1024 * 1024
# The supervisor gives a worker 600 s to start; a model of 2 GiB was converted within one minute.
CONVERT_WITHIN_S = 540.0
# Interval between two tries for the lock of a conversion.
_LOCK_POLL_S = 0.05
# End of the conversion's output that an error message quotes.
_OUTPUT_CHARS = 400

# Signals that a fault of the program causes, not an operator or a lack of memory.
_CRASHES = (signal.SIGFPE, signal.SIGSEGV, signal.SIGILL)


class EngineUnavailable(Exception):
    """OpenVINO cannot run the model, so torch has to. The message gives the reason."""


class Weight(msgspec.Struct, frozen=True):
    """A matrix (fp32) in the file `weights.bin`: offset in bytes, and shape."""

    offset: int
    shape: tuple[int, int]


class Card(msgspec.Struct, kw_only=True):
    """Metadata of a converted model; `error`: the reason why it could not be converted."""

    error: str = ""
    #: By purpose: `document` or `query`.
    formats: dict[str, WindowFormat] = {}
    dim: int = 0
    pad_id: int = 0
    pads_left: bool = False
    #: Whether padding would change the vectors.
    equal_lengths: bool = False
    #: Whether the graph has a second output, the weight of each token; special tokens that get none.
    has_sparse: bool = False
    dropped: list[int] = []
    #: By name of the graph's input.
    weights: dict[str, Weight] = {}
    #: Dtypes that pass the precision check, the fastest on this processor first.
    dtypes: list[str] = []

    def write(self, folder: Path) -> None:
        """Write the file that marks a conversion as complete."""
        (folder / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Raises OSError or msgspec.DecodeError."""
        return msgspec.json.decode((folder / CARD).read_bytes(), type=cls)


def folder_name(source: ModelSource) -> str:
    """Name of the folder for a revision of a model, versions of the packages and a type of processor."""
    return _name(source.name, source.revision)


def was_converted(model: str) -> bool:
    """Whether any revision of a model was converted for this processor and these packages.

    False if a revision could not be. Reads no file of the model, whose revision takes long to compute.
    """
    for card in (card for root in cache_folders() for card in root.glob(f"{_name(model, '*')}/{CARD}")):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return not Card.read(card.parent).error
    return False


def _name(model: str, revision: str) -> str:
    parts = (FORMAT, *map(_version, CONVERTED_BY), _processor())
    platform_hash = hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model)[-60:].strip("-.")
    return f"{slug}-{revision}-{platform_hash}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Vendor, model and features of the processor, which decide the fastest dtype.

    Not from /proc/cpuinfo, which systemd hides from a service with ProcSubset=pid.
    """
    try:
        return Path("/sys/devices/system/cpu/modalias").read_text()
    except OSError:  # a container without /sys
        return platform.machine()


Converter = Callable[[ModelSource, Path], None]


def find_or_convert(source: ModelSource, convert: Converter | None = None) -> tuple[Path, Card]:
    """The folder of the converted model and its card; converts the model if no process has done so yet.

    `convert` fills an empty folder and writes the card last; the default runs it in a subprocess. Raises
    EngineUnavailable if the model cannot be converted, no folder is writable, or another process takes longer
    than CONVERT_WITHIN_S.
    """
    name = folder_name(source)
    roots = cache_folders()
    for root in roots:
        if (root / name / CARD).is_file():
            return _read_card(root / name)
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{name}.lock", time.monotonic() + CONVERT_WITHIN_S):
                if not (root / name / CARD).is_file():
                    _convert_into(source, root, name, convert or _convert_in_subprocess)
            return _read_card(root / name)
        except OSError as error:
            log.warning("model.cache_unreadable", extra={"folder": str(root), "error": str(error)})
    raise EngineUnavailable(
        "no folder for converted models can be written: set XDG_CACHE_HOME to a writable one"
    )


def _read_card(folder: Path) -> tuple[Path, Card]:
    try:
        card = Card.read(folder)
    except (OSError, msgspec.MsgspecError) as error:
        raise EngineUnavailable(f"{folder / CARD} cannot be read ({error}): delete the folder") from error
    if card.error:
        raise EngineUnavailable(card.error)
    return folder, card


@contextlib.contextmanager
def _locked(path: Path, mono_give_up_s: float) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            lock_file(file.fileno(), mono_give_up_s=mono_give_up_s, poll_s=_LOCK_POLL_S)
        except TimeoutError:
            raise EngineUnavailable(f"another process still holds {path}") from None
        yield


def _convert_into(source: ModelSource, root: Path, name: str, convert: Converter) -> None:
    """Convert in a temporary folder, then rename it atomically. The caller holds the lock."""
    for stale in root.glob(f"{name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=root))
    try:
        started = time.monotonic()
        convert(source, part)
        if not (part / CARD).is_file():
            raise EngineUnavailable("the conversion wrote no files")
        # For a service that runs as another user.
        part.chmod(0o755)
        shutil.rmtree(root / name, ignore_errors=True)
        part.rename(root / name)
        fields = {"model": source.name, "seconds": round(time.monotonic() - started, 1)}
        log.info("model.converted", extra={**fields, "folder": str(root / name)})
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert_in_subprocess(source: ModelSource, part: Path) -> None:
    """Convert in a subprocess: this process does not load torch, and the memory is freed afterwards."""
    log.info("model.converting", extra={"model": source.name, "hint": "once for this machine"})
    # The wrapper kills the subprocess when this process exits, also by SIGKILL.
    wrapper = [sys.executable, "-P", "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
    program = [sys.executable, "-P", "-m", "jobworker.handlers.encoder.convert"]
    command = [*wrapper, *program, source.name, str(source.folder), source.revision, str(part)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environ.pop(pool, None)  # the worker's share; the conversion may use all processors
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=CONVERT_WITHIN_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EngineUnavailable(f"the conversion took longer than {CONVERT_WITHIN_S:.0f} s") from None
    if -done.returncode in _CRASHES:
        # OpenVINO crashes on some models, and would do so in each worker and at each start.
        reason = f"OpenVINO crashes on it ({signal.Signals(-done.returncode).name})"
        Card(error=reason).write(part)
    elif done.returncode:
        raise EngineUnavailable(
            f"the conversion exited with {done.returncode}: {done.stderr.strip()[-_OUTPUT_CHARS:]}"
        )
