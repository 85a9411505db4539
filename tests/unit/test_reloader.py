"""Reloader: a changed file restarts what uses it, a file with an error restarts nothing."""

import logging
import os
import select
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobworker.worker.settings import Settings
from jobworker.worker.supervision.reloader import Reloader, Restart

HEAD = "from jobworker.worker import job\n"
SHOUT = HEAD + "import helper\n@job('shout')\ndef shout(payload: str) -> None: ...\n"
HANDLERS = {"shout": "watched:shout"}


class Watched:
    """A reloader on a folder with two modules, whose clock moves with every tick."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder = folder
        self._caplog = caplog
        self._mono_s = 0.0
        self.write("helper.py", "WORD = 1\n")
        self.write("watched.py", SHOUT)
        self.reloader = Reloader(Settings(handlers=HANDLERS, apps=("watched",)))

    def write(self, name: str, text: str, age_s: float = 0.0) -> None:
        path = self.folder / name
        path.write_text(text)
        wall_ns = time.time_ns() - int(age_s * 1e9)
        os.utime(path, ns=(wall_ns, wall_ns))

    def settle(self) -> Restart | None:
        """Tick until nothing is in progress; returns what was to be restarted."""
        for _ in range(3):  # a change needs two looks
            self._mono_s += 1.0
            if (restart := self.reloader.tick(self._mono_s)) is not None:
                return restart
            while (process := self.reloader._process) is not None:
                ended = select.poll()  # select() takes no descriptor above 1023
                ended.register(process.pidfd, select.POLLIN)
                assert ended.poll(60_000)
                if (restart := self.reloader.tick(self._mono_s)) is not None:
                    return restart
        return None

    def events(self) -> list[str]:
        """The events since the last call."""
        found = [record.message for record in self._caplog.records]
        self._caplog.clear()
        return found


@pytest.fixture
def watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Watched]:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    one = Watched(tmp_path, caplog)
    with closing(one.reloader):
        assert one.settle() is None
        yield one


def test_nothing_is_restarted_while_no_file_changes(watched: Watched) -> None:
    assert watched.settle() is None
    assert watched.events() == []


@pytest.mark.parametrize("name", ["helper.py", "watched.py"])
def test_a_changed_file_restarts_the_workers_and_one_line_names_it(
    watched: Watched, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = (watched.folder / name).read_text()
    watched.write(name, text + "# changed\n")
    assert watched.settle() is Restart.WORKERS
    (line,) = [record for record in caplog.records if record.message == "reload.changed"]
    assert vars(line)["files"] == [name]
    watched.events()
    assert watched.settle() is None


def test_an_older_file_is_a_change_too(watched: Watched) -> None:
    """A checkout may bring back a file with an earlier time."""
    watched.write("helper.py", "WORD = 2\n", age_s=1000)
    assert watched.settle() is Restart.WORKERS


def test_a_file_that_is_still_being_written_is_waited_for(watched: Watched) -> None:
    for text in ("WORD =", "WORD = 12"):
        watched.write("helper.py", text)
        watched._mono_s += 1.0
        assert watched.reloader.tick(watched._mono_s) is None
        assert watched.reloader._process is None
    assert watched.settle() is Restart.WORKERS


def test_a_syntax_error_keeps_the_workers_and_is_shown_until_it_is_repaired(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.write("watched.py", SHOUT + "def broken(:\n")
    assert watched.settle() is None
    (line,) = [record for record in caplog.records if record.message == "reload.failed"]
    assert vars(line)["error"].startswith("--app watched: cannot be imported: SyntaxError")
    assert 'watched.py", line 5' in vars(line)["exception"]
    watched.events()
    assert watched.settle() is None
    assert watched.events() == []
    watched.write("watched.py", SHOUT + "# repaired\n")
    assert watched.settle() is Restart.WORKERS


def test_a_module_that_kills_its_process_keeps_the_workers(watched: Watched) -> None:
    watched.write("helper.py", "import os\nos._exit(9)\n")
    assert watched.settle() is None
    assert watched.events() == ["reload.changed", "reload.failed"]


def test_other_types_restart_the_service_and_conflicts_nothing(watched: Watched) -> None:
    conflict = "@job('shout')\ndef again(payload: str) -> None: ...\n"
    watched.write("watched.py", SHOUT + conflict)
    assert watched.settle() is None
    assert watched.events() == ["reload.changed", "reload.failed"]
    watched.write("watched.py", SHOUT + conflict.replace("shout", "whisper"))
    assert watched.settle() is Restart.SERVICE
    assert watched.events() == ["reload.changed", "reload.types_changed"]


def test_a_file_that_changed_while_the_service_started_counts_as_changed(watched: Watched) -> None:
    watched.reloader.close()
    watched.reloader = Reloader(Settings(handlers=HANDLERS, apps=("watched",)))
    watched.write("helper.py", "WORD = 3\n", age_s=-1)
    assert watched.settle() is Restart.WORKERS


def test_modules_of_handler_are_watched_too(watched: Watched) -> None:
    watched.reloader.close()
    watched.reloader = Reloader(Settings(handlers={"loud": "watched:shout"}))
    assert watched.settle() is None
    watched.write("helper.py", "WORD = 4\n")
    assert watched.settle() is Restart.WORKERS
