"""The service as PID 1 of a container: it forwards signals, and reaps orphans that nothing else collects."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobworker.worker import Producer
from support.service import eventually, handlers
from support.toys import FOLDER_VARIABLE

pytestmark = pytest.mark.process

TESTS = Path(__file__).resolve().parents[1]
UNSHARE = ["unshare", "--fork", "--kill-child=KILL", "--pid", "--mount-proc"]


def require_namespaces() -> None:
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], check=False).returncode:
        pytest.skip("this user may not make a PID namespace")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_zombie(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_as_pid_1_it_reaps_orphans_and_stops_when_asked(tmp_path: Path) -> None:
    require_namespaces()
    log, data, mark = tmp_path / "log", tmp_path / "data", tmp_path / "mark"
    command = [
        *UNSHARE, str(Path(sys.executable).with_name("jobworker-supervise")), "--no-builtin-handlers",
        f"--handler=spawner={handlers('Spawner')['spawner']}", "--procs=1", f"--data-dir={data}",
        "--metrics-addr=127.0.0.1:0", "--stream=jobs=workers",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TESTS), FOLDER_VARIABLE: str(tmp_path)}
    with log.open("wb") as lines:
        outer = subprocess.Popen(command, stderr=lines, env=environment, cwd=tmp_path)
    try:
        eventually(lambda: b"service.ready" in log.read_bytes())
        (init,) = children(outer.pid)
        assert Path(f"/proc/{init}/status").read_text().partition("NSpid:")[2].split()[1] == "1"
        # The shell ends at once; its child becomes one of PID 1, in a session that no guard knows.
        shell = f"setsid sh -c 'echo $$ > {mark}.new; mv {mark}.new {mark}; exit 7' & exit 0"
        with Producer(json.loads((data / "endpoints.json").read_text())["redis_url"]) as producer:
            producer.enqueue("spawner", {"command": shell, "session": True}, stream="jobs")
        eventually(mark.exists)
        eventually(lambda: not any(map(is_zombie, children(init))))
        os.kill(init, signal.SIGTERM)
        assert outer.wait(30) == 0, log.read_text()
        assert b"drain.begun" in log.read_bytes()
    finally:
        outer.kill()
        outer.wait(30)
