"""Modules of each process of a running service: none is imported where it only takes memory."""

import os
import signal
from pathlib import Path

import pytest

from support.service import TESTS, Service, eventually, handlers, service

pytestmark = pytest.mark.process

#: In its folder, every Python process writes the names of its modules to a file when it gets SIGUSR1.
SITECUSTOMIZE = """
import os, signal, sys

def write(*_):
    path = os.path.join(os.environ["MODULES_FOLDER"], str(os.getpid()))
    with open(path + ".part", "w") as file:
        file.write("\\n".join(sys.modules))
    os.rename(path + ".part", path)

signal.signal(signal.SIGUSR1, write)
"""
#: What the supervisor does not need: it knows processes, not jobs.
_LIBRARIES = ("redis", "hiredis", "asyncio", "importlib.metadata", "zipfile", "encodings.idna")
_ROLES = ("boot", "handler", "producer", "reaper", "runner", "reader.reader")
NOT_IN_SUPERVISOR = {*_LIBRARIES, *(f"jobworker.worker.{name}" for name in _ROLES)}


def modules(one: Service, folder: Path) -> dict[str, set[str]]:
    """Names of the imported modules by role."""
    pids = {role: pid for role, pid in one.roles().items() if role != "valkey"}
    for pid in pids.values():
        os.kill(pid, signal.SIGUSR1)
    files = {role: folder / str(pid) for role, pid in pids.items()}
    eventually(lambda: all(file.exists() for file in files.values()), saying="the files of all roles")
    return {role: set(file.read_text().splitlines()) for role, file in files.items()}


def test_processes_import_only_what_they_need(tmp_path: Path) -> None:
    """An import in a child copies shared pages in every child; one in the supervisor is shared with none."""
    site, folder = tmp_path / "site", tmp_path / "modules"
    site.mkdir()
    folder.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {"PYTHONPATH": os.pathsep.join([str(site), str(TESTS)]), "MODULES_FOLDER": str(folder)}
    (tmp_path / "service").mkdir()
    with service(tmp_path / "service", handlers("Noop"), environment=environment) as one:
        one.wait_for_end(one.enqueue("noop"))
        found = modules(one, folder)
    assert NOT_IN_SUPERVISOR & found["supervisor"] == set()
    shared = found["forkserver"]
    for role in ("guard", "reader", "reaper"):
        assert found[role] - shared == set(), role
    of_handler = {name for name in found["worker 0"] - shared if name.partition(".")[0] == "support"}
    assert "support.toys" in of_handler
    of_engine = {name for name in found["worker 0"] - shared if name.partition(".")[0] == "jobworker"}
    assert of_engine == set()
