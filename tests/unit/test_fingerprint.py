"""A model's revision covers every byte of its files, and unchanged files are read once."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.encoder import fingerprint as module
from jobworker.handlers.encoder.find_model import ModelError, check_unchanged, find_model

WEIGHTS = 600_000


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Files of a test are younger than real ones.
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(WEIGHTS))
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    names: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, *arguments: Any) -> Any:
        names.append(Path(file.name).name)
        return digest(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def revision(folder: Path) -> str:
    return find_model(str(folder)).revision


def overwrite(path: Path, offset: int) -> None:
    """Change one byte in place and put the times back, as a restore from an archive does."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("offset", [0, 4096, 5000, 9374, 123_456, 299_999, WEIGHTS - 1])
def test_one_byte_anywhere_changes_the_revision(model: Path, offset: int) -> None:
    first = revision(model)
    assert revision(model) == first
    overwrite(model / "model.safetensors", offset)
    assert revision(model) != first


def rename(model: Path) -> None:
    (model / "config.json").rename(model / "config2.json")
    (model / "modules.json").write_text("[]")


def swap(model: Path) -> None:
    (model / "config.json").write_text("[]")
    (model / "1_Pooling" / "config.json").write_text("{}")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a new file": lambda model: (model / "extra.txt").touch(),
    "a renamed file": rename,
    "a file in a folder": lambda model: (model / "1_Pooling" / "config.json").write_text("[]"),
    "another file of the same size": swap,
    "a removed file": lambda model: (model / "1_Pooling" / "config.json").unlink(),
    "a longer file": lambda model: (model / "model.safetensors").write_bytes(bytes(WEIGHTS + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_folder_changes_the_revision(model: Path, change: str) -> None:
    first = revision(model)
    CHANGES[change](model)
    assert revision(model) != first


def test_files_behind_links_count_and_a_loop_of_links_ends(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "blobs"
    elsewhere.mkdir()
    (elsewhere / "weights").write_bytes(bytes(100))
    (model / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(model)
    first = revision(model)
    overwrite(elsewhere / "weights", 50)
    assert revision(model) != first


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("adapter_config.json", "base_model_name_or_path"),
        ("0_Transformer/adapter_config.json", "base_model_name_or_path"),
        ("sentence_bert_config.json", "tokenizer_name_or_path"),
    ],
)
def test_files_of_another_model_that_it_uses_count(model: Path, tmp_path: Path, file: str, key: str) -> None:
    (base := tmp_path / "base").mkdir()
    (base / "weights").write_bytes(bytes(100))
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(json.dumps({key: str(base)}))
    first = revision(model)
    overwrite(base / "weights", 50)
    assert revision(model) != first
    (model / file).write_text(json.dumps({key: str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone: the folder does not exist"):
        find_model(str(model))
    (model / file).write_text("{")
    assert revision(model) != first


def test_a_copy_has_the_same_revision(model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "copy")
    assert revision(tmp_path / "copy") == revision(model)


def test_unchanged_files_are_read_once(model: Path, reads: list[str]) -> None:
    first = revision(model)
    assert sorted(reads) == ["config.json", "config.json", "model.safetensors"]
    reads.clear()
    assert revision(model) == first
    assert reads == []
    overwrite(model / "model.safetensors", 7)
    assert revision(model) != first
    assert reads == ["model.safetensors"]


def test_a_file_that_has_just_changed_is_read_again(
    model: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_S", 3600.0)
    revision(model)
    old = time.time() - 7200
    os.utime(model / "config.json", (old, old))  # its metadata changed now, though
    reads.clear()
    revision(model)
    assert len(reads) == 3


@pytest.mark.parametrize("content", ["", "{", '{"model.safetensors": 5}', "[]"])
def test_damaged_records_are_ignored(model: Path, tmp_path: Path, content: str) -> None:
    first = revision(model)
    (record,) = (tmp_path / "cache").rglob("*.files.json")
    record.write_text(content)
    assert revision(model) == first


def test_without_a_writable_cache_the_revision_is_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = revision(model)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert revision(model) == first


def test_files_that_change_while_they_are_read_or_loaded_are_told(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(model))
    overwrite(model / "model.safetensors", 1)
    with pytest.raises(ModelError, match="changed while they were loaded"):
        check_unchanged(source)
    digest = hashlib.file_digest

    def written_meanwhile(file: Any, *arguments: Any) -> Any:
        with (model / "model.safetensors").open("ab") as weights:
            weights.write(b"more")
        return digest(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", written_meanwhile)
    overwrite(model / "model.safetensors", 2)
    with pytest.raises(ModelError, match="is being written"):
        find_model(str(model))
