"""Where converted models lie, and that each is converted once, however many processes want it at once."""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec

from .find_model import ModelSource

log = logging.getLogger("jobworker.model")

# Part of the folder's name: a change of what a folder holds, or of the sentences of the self-check.
FORMAT = 1
CARD = "card.json"
# The supervisor gives a worker 600 s to start; a model of 2 GiB was converted within one minute.
CONVERT_WITHIN_S = 540.0
# How often a worker that waits for another's conversion looks again: a kernel lock offers no deadline.
_LOOK_EVERY_S = 0.05
# The last lines of what the conversion said go into one line of the log.
_SAID_CHARS = 400


class NoEngine(Exception):
    """The converted model cannot be had; another engine has to do. The message says why."""


class Weight(msgspec.Struct, frozen=True):
    """A matrix in the file `weights.bin`, fp32: where it begins (bytes) and its shape."""

    offset: int
    shape: tuple[int, int]


class Card(msgspec.Struct, kw_only=True):
    """What a worker has to know of a converted model; `error` says why there is none."""

    error: str = ""
    max_tokens: int = 0
    pad_id: int = 0
    pads_left: bool = False
    prefix: list[int] = []
    suffix: list[int] = []
    normalises: bool = False
    prompts: dict[str, str] = {}
    #: By the name of the graph's input.
    weights: dict[str, Weight] = {}
    #: Exact enough kinds of arithmetic, the fastest on this processor first.
    dtypes: list[str] = []

    def write(self, folder: Path) -> None:
        """The last step of a conversion."""
        (folder / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Raises OSError or msgspec.DecodeError."""
        return msgspec.json.decode((folder / CARD).read_bytes(), type=cls)


def roots() -> list[Path]:
    """Folders that may hold converted models, the first choice first: a service's own, then the user's."""
    named = [os.environ.get("CACHE_DIRECTORY", "").split(":")[0]]
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not home:
        with contextlib.suppress(RuntimeError):  # no HOME and no entry in the user table
            home = str(Path.home() / ".cache")
    named.append(f"{home}/jobworker" if home else "")
    named.append(os.environ.get("STATE_DIRECTORY", "").split(":")[0])
    return [Path(name) / "models" for name in named if name]


def folder_name(source: ModelSource) -> str:
    """One folder for each revision of a model, version of the engine, and kind of processor."""
    parts = (FORMAT, metadata.version("openvino"), _processor())
    made_for = hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", source.name)[-60:].strip("-.")
    return f"{slug}-{source.revision}-{made_for}"


def _processor() -> str:
    """What decides which arithmetic is the fastest: vendor, model, features. /proc/cpuinfo says it too, but
    is not there for a service that systemd shows processes only."""
    try:
        return Path("/sys/devices/system/cpu/modalias").read_text()
    except OSError:  # a container without /sys
        return platform.machine()


Convert = Callable[[ModelSource, Path], None]


def converted(source: ModelSource, convert: Convert | None = None) -> tuple[Path, Card]:
    """The folder of the converted model and its card; converts it if needed.

    `convert` fills an empty folder, its card last; by default a process of its own does. Raises NoEngine
    where the model cannot be converted, or no folder can be written, or others take longer than the limit.
    """
    name = folder_name(source)
    tried = roots()
    for root in tried:
        if (root / name / CARD).is_file():
            return _open(root / name)
    for root in tried:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{name}.lock", time.monotonic() + CONVERT_WITHIN_S):
                if not (root / name / CARD).is_file():
                    _make(source, root, name, convert or _in_a_process)
            return _open(root / name)
        except OSError as error:
            log.warning("model.cache_unreadable", extra={"folder": str(root), "error": str(error)})
    raise NoEngine("no folder for converted models can be written; XDG_CACHE_HOME may name one")


def _open(folder: Path) -> tuple[Path, Card]:
    try:
        card = Card.read(folder)
    except (OSError, msgspec.MsgspecError) as error:
        raise NoEngine(f"{folder / CARD} cannot be read ({error}): delete the folder") from error
    if card.error:
        raise NoEngine(card.error)
    return folder, card


@contextlib.contextmanager
def _locked(path: Path, mono_give_up_s: float) -> Iterator[None]:
    """Held by one process at a time, and given back by the kernel when that process ends in any way."""
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > mono_give_up_s:
                    raise NoEngine(f"another process still holds {path}") from None
                time.sleep(_LOOK_EVERY_S)
        yield


def _make(source: ModelSource, root: Path, name: str, convert: Convert) -> None:
    """Convert beside the final place, then move there in one step. The lock is held."""
    for stale in root.glob(f"{name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=root))
    try:
        started = time.monotonic()
        convert(source, part)
        if not (part / CARD).is_file():
            raise NoEngine("the conversion left nothing")
        # Readable for a service that runs as another user.
        part.chmod(0o755)
        shutil.rmtree(root / name, ignore_errors=True)
        part.rename(root / name)
        fields = {"model": source.name, "seconds": round(time.monotonic() - started, 1)}
        log.info("model.converted", extra={**fields, "folder": str(root / name)})
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _in_a_process(source: ModelSource, part: Path) -> None:
    """Torch stays out of this process; it is also gone with its memory when the conversion is done."""
    log.info("model.converting", extra={"model": source.name, "hint": "once for this machine"})
    # It ends with this process, however this one ends.
    tied = [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
    program = [sys.executable, "-m", "jobworker.handlers.encoder.convert"]
    command = [*tied, *program, source.name, str(source.folder), source.revision, str(part)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environ.pop(pool, None)  # the worker's share; the conversion may use all processors
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=CONVERT_WITHIN_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoEngine(f"the conversion took longer than {CONVERT_WITHIN_S:.0f} s") from None
    if done.returncode:
        raise NoEngine(f"the conversion ended with {done.returncode}: {done.stderr.strip()[-_SAID_CHARS:]}")
