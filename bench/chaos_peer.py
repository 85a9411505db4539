"""Another job system under test: its virtual environment, worker processes and client."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from chaos_events import FOLDER_VARIABLE
from chaos_load import GROUP, ONE, STREAM, Planned
from chaos_world import LIMIT_S, POLL_S, is_alive, pdeathsig_command

_FOLDER = Path(__file__).resolve().parent
#: Delay of a restart, like that of a service manager.
_RESTART_AFTER_S = 0.1
_INSTALL_WITHIN_S = 600.0
#: Timeout of a burst, in which the client may retry by itself.
_FEED_WITHIN_S = 120.0

Environment = dict[str, str]


@dataclass(frozen=True)
class Peer:
    """Job system; ``commands`` returns command lines for a number of workers and a URL, run from the venv."""

    name: str
    packages: tuple[str, ...]
    distribution: str
    commands: Callable[[int, str], list[list[str]]]
    settings: str
    #: Whether the main process of a worker and its job process are killed alternately.
    forks: bool = False

    @property
    def home(self) -> Path:
        """Its virtual environment; this one for jobworker."""
        if not self.packages:
            return Path(sys.prefix)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "jobworker-bench" / self.name

    def install(self) -> None:
        """Create the environment if it is missing. Raises CalledProcessError."""
        if not self.packages or (self.home / "installed").exists():
            return
        commands = [[sys.executable, "-m", "venv", "--clear", str(self.home)],
                    [str(self.home / "bin" / "pip"), "install", "--quiet", *self.packages]]  # fmt: skip
        for command in commands:
            subprocess.run(command, check=True, timeout=_INSTALL_WITHIN_S, stdout=sys.stderr)
        (self.home / "installed").touch()

    def version(self) -> str:
        """The installed version."""
        code = f"import importlib.metadata as m; print(m.version({self.distribution!r}))"
        python = [str(self.home / "bin" / "python"), "-c", code]
        return subprocess.run(
            python, check=True, timeout=LIMIT_S, capture_output=True, text=True
        ).stdout.strip()


def _jobworker(procs: int, url: str) -> list[list[str]]:
    return [["jobworker-supervise", f"--procs={procs}", "--no-builtin-handlers", f"--stream={STREAM}={GROUP}",
             f"--handler={ONE}=chaos_handlers:One", "--metrics-addr=127.0.0.1:0", "--lease=10",
             "--retry-initial=0.1", "--retry-max=2", f"--redis-url={url}"]]  # fmt: skip


PEERS = {
    peer.name: peer
    for peer in (
        Peer("jobworker", (), "jobworker", _jobworker, "one service; retries from 0.1 s"),
        Peer(
            "dramatiq", ("dramatiq[redis]",), "dramatiq",
            lambda procs, url: [["dramatiq", "dramatiq_app", "-p", "1", "-t", "1"]] * procs,
            "one program for each worker, since a dying one kills the others; heartbeat_timeout 5 s "
            "instead of 60, maintenance_chance 10 % instead of 0.1 %, prefetch 1; retries from 0.1 s",
        ),
        Peer(
            "rq", ("rq",), "rq",
            lambda procs, url: [["rq", "worker", "-q", "--maintenance-interval", "5",
                                 "--job-monitoring-interval", "1", "--worker-ttl", "20",
                                 "-u", url, "chaos"]] * procs,
            "Retry(max=3); maintenance every 5 s instead of 10 min, monitoring every 1 s instead of 30, "
            "worker-ttl 20 s instead of 420; the "
            "process that runs the job and the whole worker are killed alternately", True,
        ),
        Peer(
            "taskiq-redis", ("taskiq-redis",), "taskiq-redis",
            lambda procs, url: [["taskiq", "worker", "taskiq_app:broker", "--workers", str(procs),
                                 "--ack-type", "when_executed", "--max-async-tasks", "1"]],
            "RedisStreamBroker; idle_timeout 5 s instead of 10 min, unacknowledged_lock_timeout 5 s, "
            "xread_count 1, unacknowledged_batch_size 1; acknowledged when executed; SimpleRetryMiddleware",
        ),
    )
}  # fmt: skip


def environment_of(folder: Path, url: str) -> Environment:
    """Environment of the peer's processes: the oracle's folder, the server, and the modules of the bench."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_")}
    paths = [str(_FOLDER), str(_FOLDER / "peers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), FOLDER_VARIABLE: str(folder), "PEER_REDIS_URL": url}
    # Dramatiq has no option for it: a prefetched job waits as long as the running one takes.
    return clean | ours | {"dramatiq_queue_prefetch": "1"}


class Consumers:
    """Worker programs, each restarted when it ends."""

    def __init__(self, peer: Peer, procs: int, url: str, environment: Environment, folder: Path) -> None:
        self._peer = peer
        self._environment = environment
        self._folder = folder
        self._stopping = threading.Event()
        self._turn = 0
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._threads = [
            threading.Thread(target=self._restart_loop, args=(number, command), daemon=True)
            for number, command in enumerate(peer.commands(procs, url))
        ]
        for thread in self._threads:
            thread.start()

    def _restart_loop(self, number: int, command: list[str]) -> None:
        whole = [*pdeathsig_command(), str(self._peer.home / "bin" / command[0]), *command[1:]]
        while not self._stopping.is_set():
            with (self._folder / f"worker-{number}.log").open("ab") as log:
                process = subprocess.Popen(
                    whole, env=self._environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log,
                )  # fmt: skip
            self._running[number] = process
            process.wait()
            self._stopping.wait(_RESTART_AFTER_S)

    def kill_one(self, running: Mapping[int, set[str]], rng: random.Random) -> list[int]:
        """SIGKILL a process that runs a job; returns the killed processes, none if no job is running."""
        busy = [pid for pid in running if is_alive(pid)]
        if not busy:
            return []
        victim = rng.choice(busy)
        self._turn += 1
        whole_worker = self._peer.forks and self._turn % 2
        return self._kill([_parent(victim), victim] if whole_worker else [victim])

    def _kill(self, pids: Iterable[int]) -> list[int]:
        killed = [pid for pid in pids if pid > 1]
        for pid in killed:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue  # it ended meanwhile
        give_up_at = time.monotonic() + LIMIT_S
        while any(map(is_alive, killed)) and time.monotonic() < give_up_at:
            time.sleep(0.001)  # not a child of this process: no event
        return killed

    def stop(self) -> None:
        """Kill everything."""
        self._stopping.set()
        for process in list(self._running.values()):
            process.kill()
        for thread in self._threads:
            thread.join(LIMIT_S)
        for pid in _of_folder(self._folder):
            self._kill([pid])


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _of_folder(folder: Path) -> list[int]:
    """Processes that a peer left behind, recognised by the oracle's folder in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # another user's, or it ended meanwhile
        if f"{FOLDER_VARIABLE}={folder}\0".encode() in environment:
            found.append(int(entry.name))
    return found


class Feed:
    """The peer's own client in a process of its own; ``confirmed`` are the ids that it enqueued."""

    def __init__(self, peer: Peer, environment: Environment, folder: Path) -> None:
        module = f"{peer.name.partition('-')[0]}_app"
        command = [str(peer.home / "bin" / "python"), str(_FOLDER / "peers" / "feed.py"), module]
        self._log = (folder / "feed.log").open("ab")
        self._process = subprocess.Popen(
            [*pdeathsig_command(), *command], env=environment, cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.confirmed: set[str] = set()
        self.unknown: set[str] = set()
        self._sent = 0
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the client of {peer.name} does not start: see {folder}/feed.log")
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, id = line.split()
            (self.confirmed if word == "ok" else self.unknown).add(id)

    def send(self, jobs: Iterable[Planned]) -> None:
        """Send jobs to the client, which enqueues them while faults happen."""
        assert self._process.stdin is not None
        for job in jobs:
            tenant_id, _, text = job.effect.partition(".") if job.effect else ("t00", "", "")
            wire = {"id": job.id, "fate": job.fate, "tenant_id": tenant_id, "text": text}
            self._process.stdin.write(orjson.dumps(wire).decode() + "\n")
            self._sent += 1
        self._process.stdin.flush()

    def finish(self) -> None:
        """Wait for an answer to each job. Raises TimeoutError."""
        give_up_at = time.monotonic() + _FEED_WITHIN_S
        while len(self.confirmed) + len(self.unknown) < self._sent:
            if time.monotonic() > give_up_at or self._process.poll() is not None:
                raise TimeoutError(f"{self._sent} jobs sent, {len(self.confirmed)} confirmed")
            time.sleep(POLL_S)  # a thread fills the sets

    def stop(self) -> None:
        """Kill the client."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait(LIMIT_S)
        self._process.stdin.close()
        self._log.close()
