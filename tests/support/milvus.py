"""Servers for tests of vector stores: the bundled Milvus Lite server and a real Milvus 2.3.5."""

import contextlib
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobworker.handlers.vectors.milvus.store import VectorStoreError, open_vectors
from jobworker.worker.supervision.pdeathsig import tied_to_us
from support.redis_servers import free_port

# Imports of the engine take a few seconds on a busy machine of two cores.
LITE_START_S = 80.0
# The first start in an environment unpacks 330 MB of binaries, below it; later ones compare checksums.
REAL_START_S = 90.0
UNPACKED = Path(sys.prefix) / "milvus-2.3.5"
STOP_S = 60.0
#: The coordinators look for work at intervals, and a new collection waits for several. By default most
#: are 1 s, some 10 s. In ms, but that of `NEXTTARGET` in seconds.
SHORT_INTERVALS = {
    "PROXY_TIMETICKINTERVAL": "50",
    "QUERYCOORD_CHECKINTERVAL": "100",
    "QUERYCOORD_CHECKSEGMENTINTERVAL": "100",
    "QUERYCOORD_CHECKCHANNELINTERVAL": "100",
    "QUERYCOORD_CHECKINDEXINTERVAL": "500",
    "QUERYCOORD_UPDATENEXTTARGETINTERVAL": "1",
    "QUERYCOORD_DISTPULLINTERVAL": "50",
    "QUERYCOORD_CHECKHANDOFFINTERVAL": "200",
    "INDEXCOORD_SCHEDULER_INTERVAL": "100",
    "DATACOORD_SEGMENT_ASSIGNMENTEXPIRATION": "500",
}
TOKEN = "root:of-these-tests-alone"


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Return once `condition` holds; AssertionError naming `what` after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)  # files and ports of another process have no event to wait on


class LiteServer:
    """One `jobworker.handlers.vectors.milvus.lite_server` process on a data directory."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        files: Path | None = None,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "jobworker.handlers.vectors.milvus.lite_server"),
        arguments: Sequence[str] = (),
    ) -> None:
        """Start it, without waiting; `files` is the stem of its port file and log, else `data_dir` is."""
        self.data_dir, stem = data_dir, files or data_dir
        self.port_file, self.log = stem.with_name(f"{stem.name}.port"), stem.with_name(f"{stem.name}.log")
        self.port_file.unlink(missing_ok=True)
        token_file = stem.with_name(f"{stem.name}.token")
        token_file.write_text(TOKEN)
        command = [*tied_to_us(), sys.executable]
        command += [*program, "--data-dir", str(data_dir), "--port-file", str(self.port_file)]
        command += ["--port", str(port), "--token-file", str(token_file), *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env={**os.environ, **(env or {})})

    def wait_ready(self) -> "LiteServer":
        """Return when it answers calls."""
        wait_until(
            lambda: self.port_file.exists() or self.ended, LITE_START_S, "port file of the Lite server"
        )
        assert not self.ended, f"the Lite server ended: {self.stderr}"
        return self

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def port(self) -> int:
        return int(self.port_file.read_text())

    @property
    def uri(self) -> str:
        """Address with the token."""
        return f"http://{TOKEN}@127.0.0.1:{self.port}"

    @property
    def open_uri(self) -> str:
        """Address without the token, as another user of the host knows it."""
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """End it by SIGTERM; returns its exit status."""
        self.process.terminate()
        return self.process.wait(STOP_S)


@contextlib.contextmanager
def lite_server(data_dir: Path, *, port: int = 0, env: dict[str, str] | None = None) -> Iterator[LiteServer]:
    """Run the Lite server on `data_dir` and yield it, ready; killed at the end if it still runs."""
    server = LiteServer(data_dir, port=port, env=env)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


@contextlib.contextmanager
def start_lite(tmp_path: Path) -> Iterator[str]:
    """Run the Lite server below `tmp_path` and yield its uri."""
    with lite_server(tmp_path / "lite") as server:
        yield server.uri


def why_no_real_milvus() -> str | None:
    """The reason why a real Milvus cannot run on this machine; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "milvus 2.3.5: its wheel is for Linux on x86_64 only"
    if importlib.util.find_spec("milvus") is None:
        return "milvus 2.3.5: the wheel is not installed (extra `dev`)"
    return None


def answers(uri: str) -> bool:
    """Return whether a Milvus server answers at `uri`."""
    store = open_vectors(uri, timeout_s=2)
    try:
        store.ping()
    except VectorStoreError:
        return False
    finally:
        store.close()
    return True


@contextlib.contextmanager
def start_real(tmp_path: Path) -> Iterator[str]:
    """Run a real Milvus 2.3.5 below `tmp_path` and yield its uri; its process group is killed."""
    port = free_port()
    UNPACKED.mkdir(exist_ok=True)
    (tmp_path / "milvus").mkdir()
    (tmp_path / "milvus" / "bin").symlink_to(UNPACKED)
    command = [sys.executable, "-c", "from milvus import main; main()", "--data", str(tmp_path / "milvus")]
    with (tmp_path / "milvus.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--proxy-port", str(port)], stdout=log, stderr=log, start_new_session=True,
            env=os.environ | SHORT_INTERVALS,
        )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(uri), REAL_START_S, "Milvus 2.3.5")
        assert process.poll() is None, (tmp_path / "milvus.log").read_text(errors="replace")[-2000:]
        yield uri
    finally:
        # The wrapper would leave its Go child behind.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)
