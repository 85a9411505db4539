"""The forkserver: its death loses nothing and leaves nothing, and it holds nothing heavy."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.service import STREAM, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

CHILDREN = {"reader", "reaper", "worker 0", "worker 1"}
#: Libraries that do not survive a fork, or that no child of a service without a model needs.
HEAVY = ("torch", "tokenizers", "transformers", "grpc", "pymilvus", "openvino", "numpy", "onnxruntime")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("shared"), handlers("Sleep", "Gate", "Spawner", "Noop")) as one:
        yield one


@pytest.fixture
def one(shared: Service) -> Iterator[Service]:
    """Ready and without a job, before the test and after it."""
    shared.wait_until_ready()
    yield shared
    shared.wait_until_drained()


def forkserver_deaths(one: Service) -> float:
    return one.metric("z_novel_worker_restarts_total", role="forkserver", cause="SIGKILL")


def replaced(one: Service, pids: dict[str, int]) -> bool:
    """Whether the forkserver and all its children but the guard have successors."""
    now = one.roles()
    return all(now.get(role, pids[role]) != pids[role] for role in {"forkserver", *CHILDREN})


def test_its_death_under_load_loses_nothing_and_charges_no_job(one: Service) -> None:
    deaths = forkserver_deaths(one)
    held = one.enqueue("gate", {"gate": "0"})
    jobs = one.enqueue_many({"type": "sleep", "payload": {"s": 0.005}} for _ in range(600))
    for count in range(1, 5):  # once more than a job may have deaths
        one.wait_for_start(held, count)
        pids = one.roles()
        one.kill_role("forkserver")
        eventually(lambda: replaced(one, pids), saying="new processes")  # noqa: B023
    one.open_gate("0")
    one.wait_until_drained()
    assert {held, *jobs} <= {event.id for event in one.events("end")}
    assert one.dead_letters() == []
    assert one.client.hvals(f"deaths:{STREAM}") == []
    assert forkserver_deaths(one) == deaths + 4
    assert one.roles()["guard"] == pids["guard"], "the guard outlives it"


def test_what_handlers_started_ends_with_the_forkserver(one: Service) -> None:
    one.enqueue("spawner", {"command": "exec sleep 600", "gate": "1"})
    started = eventually(lambda: [pid for pid, line in one.everyone().items() if line == "sleep 600"])
    one.kill_role("forkserver")
    eventually(lambda: not set(started) & one.everyone().keys(), saying="the subprocess is gone")
    one.open_gate("1")
    one.wait_until_drained()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_death_of_the_supervisor_leaves_nothing_whatever_the_forkserver_does(
    tmp_path: Path, number: signal.Signals
) -> None:
    with ending(Service(tmp_path, handlers("Hang"))) as one:
        one.start()
        one.wait_for_start(one.enqueue("hang", {"in": "c"}))
        one.kill_role("forkserver", number)
        one.kill()  # sees to it that all of them are gone within two seconds


def test_a_stopped_forkserver_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Noop"))) as one:
        one.start()
        one.kill_role("forkserver", signal.SIGSTOP)
        one.send(signal.SIGTERM)
        one.send(signal.SIGTERM)
        assert one.wait() == 0
        one.assert_nothing_left()


def test_it_has_one_thread_no_heavy_library_and_no_file(one: Service) -> None:
    one.wait_for_end(one.enqueue("noop"))
    proc = Path(f"/proc/{one.roles()['forkserver']}")
    assert len(list((proc / "task").iterdir())) == 1
    libraries = {line.split()[-1] for line in (proc / "maps").read_text().splitlines() if ".so" in line}
    assert not [path for path in libraries if any(f"/{name}" in path for name in HEAVY)]
    assert not list(one.tmp_dir.rglob("*")), "its socket has no name"
    assert not [line for line in one.everyone().values() if "resource_tracker" in line]


def test_its_modules_start_no_thread_and_load_nothing_heavy() -> None:
    code = f"""
import sys, threading
import jobworker.worker.preload
print(threading.active_count(), [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1 []\n"


def test_modules_in_the_working_folder_are_not_imported(one: Service) -> None:
    shadow = one.cwd / "redis.py"
    shadow.write_text("raise SystemExit")
    pids = one.roles()
    one.kill_role("forkserver")
    eventually(lambda: replaced(one, pids), saying="new processes")
    shadow.unlink()
    one.wait_for_end(one.enqueue("noop"))


def test_a_handler_can_use_multiprocessing_as_in_a_program_of_its_own(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Multiprocess")) as one:
        one.wait_for_end(one.enqueue("multiprocess"))
        assert one.dead_letters() == []


def test_children_inherit_no_descriptor_of_each_other(one: Service) -> None:
    roles = one.roles()

    def sockets(role: str) -> set[str]:
        fds = Path(f"/proc/{roles[role]}/fd")
        return {os.readlink(fd) for fd in fds.iterdir() if os.readlink(fd).startswith("socket:")}

    assert not sockets("worker 0") & sockets("worker 1")
    assert not sockets("worker 0") & sockets("reaper")
