"""The lock of a data directory names its holder."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobworker.supervisor import _describe_holder, _open_data_dir
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.host.data_dir import DataDir
from jobworker.worker.settings import Settings


@pytest.fixture
def held(tmp_path: Path) -> Iterator[DataDir]:
    with closing(DataDir(str(tmp_path))) as data:
        assert data.lock()
        yield data


def test_a_second_service_is_told_the_pid_before_the_first_has_announced_anything(held: DataDir) -> None:
    assert held.endpoints() == {}
    with pytest.raises(ConfigurationError, match=rf"held by another service \(pid {os.getpid()}\)"):
        _open_data_dir(Settings(data_dir=str(held.path)))


def test_the_pid_is_that_of_the_holder_and_not_of_the_last_run(held: DataDir) -> None:
    held.announce({"pid": 1})
    with closing(DataDir(str(held.path))) as second:
        assert not second.lock()
        assert second.holder_pid() == os.getpid()


@pytest.mark.parametrize("text", ["", "0", "-5", "text", "9" * 50])
def test_a_file_without_a_pid_gives_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    with closing(DataDir(str(tmp_path))) as data:
        pid = data.holder_pid()
    assert "pid 0" not in _describe_holder(pid)
    assert "another service" in _describe_holder(pid)
