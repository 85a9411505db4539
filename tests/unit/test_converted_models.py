"""Cache of converted models: one conversion a model, under concurrency, kills, full disks and bad folders."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.encoder import converted_models
from jobworker.handlers.encoder.converted_models import CARD, Card, EngineUnavailable, find_or_convert
from jobworker.handlers.encoder.find_model import ModelSource

if importlib.util.find_spec("openvino") is None:
    pytest.skip("OpenVINO: not installed (extra `openvino`)", allow_module_level=True)


def source(name: str = "some/model") -> ModelSource:
    return ModelSource(name, Path("/nowhere"), "0123456789abcdef")


def leave_card(_: ModelSource, part: Path) -> None:
    Card(dim=9, dtypes=["fp32"]).write(part)


# Slow enough for the other processes to start meanwhile.
CONVERTS_SLOWLY = """
import os, time
from pathlib import Path
from jobworker.handlers.encoder.converted_models import Card, find_or_convert
from jobworker.handlers.encoder.find_model import ModelSource

def convert(_, part):
    (part.parent / f"tried-{os.getpid()}").touch()
    time.sleep(0.5)
    Card(dim=9).write(part)

print(find_or_convert(ModelSource("some/model", Path("/nowhere"), "0123456789abcdef"), convert)[1].dim)
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_of_several_processes_one_converts_and_the_others_wait(empty_cache: Path) -> None:
    command = [sys.executable, "-c", CONVERTS_SLOWLY]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in started] == ["9\n"] * 4
    assert len(list(empty_cache.glob("jobworker/models/tried-*"))) == 1


def test_the_leftovers_of_a_killed_conversion_are_removed(empty_cache: Path) -> None:
    def die(_: ModelSource, part: Path) -> None:
        (part / "model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_or_convert(source(), die)
    models = empty_cache / "jobworker/models"
    stale = models / f"{converted_models.folder_name(source())}.part-old"
    stale.mkdir()
    folder, _ = find_or_convert(source(), leave_card)
    assert sorted(path.name for path in models.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_model_that_cannot_be_converted_is_tried_once(empty_cache: Path) -> None:
    tried = []

    def refuse(_: ModelSource, part: Path) -> None:
        tried.append(part)
        Card(error="of an odd kind").write(part)

    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="of an odd kind"):
            find_or_convert(source(), refuse)
    assert len(tried) == 1


@pytest.mark.parametrize(("ends_by", "tries"), [("SEGV", 1), ("FPE", 1), ("KILL", 2), ("TERM", 2)])
def test_a_model_on_which_openvino_crashes_is_tried_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str, tries: int
) -> None:
    run = subprocess.run
    tried = []

    def crash(command: list[str], **options: Any) -> Any:
        tried.append(command)
        return run(["sh", "-c", f"kill -{ends_by} $$"], **options)

    monkeypatch.setattr(subprocess, "run", crash)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="crashes on it" if tries == 1 else "exited with -"):
            find_or_convert(source())
    assert len(tried) == tries


def test_a_failure_of_the_machine_is_retried(empty_cache: Path) -> None:
    def full(_: ModelSource, part: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EngineUnavailable, match="can be written"):
        find_or_convert(source(), full)
    assert find_or_convert(source(), leave_card)[1].dim == 9


def test_the_next_folder_is_used_if_one_is_not_writable(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("CACHE_DIRECTORY", str(empty_cache / "file" / "below"))
    folder, _ = find_or_convert(source(), leave_card)
    assert folder.is_relative_to(empty_cache / "jobworker")
    folders = [vars(record).get("folder", "") for record in caplog.records]
    assert any(folder.startswith(str(empty_cache / "file")) for folder in folders)
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    with pytest.raises(EngineUnavailable, match="XDG_CACHE_HOME"):
        find_or_convert(source("another"), leave_card)


def test_the_wait_for_the_lock_has_a_deadline(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(converted_models, "CONVERT_WITHIN_S", 0.2)
    models = empty_cache / "jobworker/models"
    models.mkdir(parents=True)
    with (models / f"{converted_models.folder_name(source())}.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EngineUnavailable, match="another process still holds"):
            find_or_convert(source(), leave_card)


def test_the_processor_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Path) -> str:
        assert not self.is_relative_to("/proc"), "systemd's ProcSubset=pid leaves processes there only"
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", read)
    assert converted_models._processor(), "also where there is no /sys"


def test_another_revision_or_processor_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = converted_models.folder_name(source())
    assert converted_models.folder_name(source()._replace(revision="f" * 16)) != first
    monkeypatch.setattr(converted_models, "_processor", lambda: "another")
    assert converted_models.folder_name(source()) != first
    assert "/" not in first


@pytest.mark.parametrize("package", converted_models.CONVERTED_BY)
def test_another_version_of_a_package_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    first = converted_models.folder_name(source())
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99" if name == package else version(name))
    assert converted_models.folder_name(source()) != first


def test_a_card_that_cannot_be_read_says_which_folder_to_delete(empty_cache: Path) -> None:
    folder, _ = find_or_convert(source(), leave_card)
    (folder / CARD).write_text(json.dumps({"dim": "nine"}))
    with pytest.raises(EngineUnavailable, match="delete the folder"):
        find_or_convert(source())
