"""Subprocesses that a handler leaves behind: they end with their worker, however it ends."""

import contextlib
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from support.service import Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

#: Would run for an hour.
SLEEP = "sleep 3601"
#: An orphan, a shell that ignores SIGTERM, and its subprocess, which ignores SIGTERM as well.
COMMAND = f"({SLEEP} &); trap '' TERM; {SLEEP}"


def left(one: Service) -> list[int]:
    """Process ids of the subprocesses."""
    return [pid for pid, command in one.everyone().items() if SLEEP in command]


def groups(one: Service) -> set[int]:
    """Process groups of the subprocesses."""
    found = set()
    for pid in left(one):
        with contextlib.suppress(ProcessLookupError):  # ended since
            found.add(os.getpgid(pid))
    return found


def hold(one: Service, **fields: object) -> int:
    """Run a job that starts subprocesses and waits; returns the worker's process id."""
    job = one.enqueue("spawner", {"command": COMMAND, "gate": "0"}, **fields)
    worker = one.wait_for_start(job).pid
    eventually(lambda: len(left(one)) == 3)
    return worker


@pytest.mark.parametrize("end", ["timeout", "SIGKILL", "HUP"])
def test_they_end_with_their_worker(tmp_path: Path, end: str) -> None:
    with service(tmp_path, handlers("Spawner"), procs=1, max_retries=0) as one:
        worker = hold(one, **({"timeout": 3.0} if end == "timeout" else {}))
        if end == "SIGKILL":
            os.kill(worker, signal.SIGKILL)
        elif end == "HUP":
            one.send(signal.SIGHUP)
            one.open_gate("0")
        eventually(lambda: worker not in one.everyone())
        eventually(lambda: worker not in groups(one))
        one.open_gate("0")  # for the job that runs again


def test_they_end_when_the_service_stops(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Spawner"), procs=1) as one:
        hold(one)
        one.open_gate("0")
        assert one.terminate() == 0
        one.assert_nothing_left()


def test_they_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Spawner"), procs=1)) as one:
        one.start()
        hold(one)
        guard = one.kill_role("guard")
        one.wait_for_successor("guard", guard)
        (exited,) = eventually(lambda: one.logged("child.exited", child="guard"))
        assert (exited["process_id"], exited["cause"]) == (guard, "SIGKILL")
        eventually(lambda: one.metric("z_novel_worker_restarts_total", role="guard", cause="SIGKILL") == 1)
        one.kill()
        eventually(lambda: not one.everyone())


def test_one_with_a_session_of_its_own_lives_on(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Spawner"), procs=1)) as one:
        one.start()
        job = one.enqueue("spawner", {"command": f"exec {SLEEP}", "session": True})
        worker = one.wait_for_end(job).pid
        (pid,) = eventually(lambda: left(one))
        os.kill(worker, signal.SIGKILL)
        one.wait_for_successor("worker 0", worker)
        assert one.terminate() == 0
        assert left(one) == [pid]
        os.kill(pid, signal.SIGKILL)


def test_orphans_are_reaped(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Spawner"), procs=1) as one:
        for _ in range(3):
            one.wait_for_end(one.enqueue("spawner", {"command": "sh -c 'sleep 0.2 & exit' & exit"}))
            one.wait_for_end(one.enqueue("spawner", {"command": "sleep 0.2 &", "session": True}))
        eventually(lambda: not adopted(one))


def adopted(one: Service) -> list[int]:
    """Children of the supervisor that are no process of the service, zombies included."""
    known = set(one.roles().values())
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == one.pid and int(entry.name) not in known:
                found.append(int(entry.name))
    return found
