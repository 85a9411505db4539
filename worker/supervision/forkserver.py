"""Forkserver of the service: a small process that has the engine imported and forks every child.

It is that of `multiprocessing`, with four differences. It never starts a resource tracker: the service has no
named resource. Its socket has no name in the file system, so nothing is left behind by SIGKILL. It does not
import the main module of the supervisor. A request never waits for it.

Each child is killed by the kernel when the forkserver exits, and the forkserver when the supervisor exits.
"""

import contextlib
import fcntl
import io
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import context, forkserver, popen_forkserver, reduction, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from ..extension import imported

#: The module that the forkserver imports. It is named, not imported: the supervisor does not need it.
_PRELOAD = "jobworker.worker.preload"
#: For the preloaded module: process id of the supervisor, log level, process title, separated by spaces.
FORKSERVER_VARIABLE = "_JOBWORKER_FORKSERVER"
#: Keeps the working folder out of the forkserver's module path. The value marks the setting as ours.
SAFE_PATH_VARIABLE, SAFE_PATH = "PYTHONSAFEPATH", "jobworker"
#: Signals that a terminal or a service manager sends to all processes of the service.
GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Longest folder (bytes) in which the path of a Unix socket can be, with two random names below it.
_LONGEST_FOLDER_BYTES = 64

# multiprocessing marks these attributes as private.
_tracker: Any = resource_tracker._resource_tracker
_inherited: Any = forkserver._forkserver


class PassedFd:
    """A descriptor as an argument of a child, which gets its own number of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self.fd),)


def _detach(passed: Any) -> int:
    return int(passed.detach())


class ForkServer(forkserver.ForkServer):
    """The forkserver process. The first request starts it, and the first one after `collect` its successor.

    Create it once: it takes the place of the resource tracker in this process.
    """

    _forkserver_pid: int | None
    _forkserver_alive_fd: int | None
    _forkserver_address: str | None

    def __init__(self, title: str, uncollected: set[int], *, log_level: str = "info") -> None:
        super().__init__()
        self._title = title
        self._log_level = log_level
        self._uncollected = uncollected
        self._address_fd = -1
        self.set_forkserver_preload([_PRELOAD])

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        return self._forkserver_pid or 0

    def ensure_running(self) -> None:
        """Start it if it does not run. Raises OSError if the system cannot start it."""
        if self._forkserver_pid is not None:
            return  # a request fails if it has exited and was not collected
        if _tracker._fd is None:
            _tracker._fd = os.open(
                os.devnull, os.O_WRONLY
            )  # where a tracker would read: it counts as running
        parent = f"{os.getpid()} {self._log_level} {self._title}"
        with _socket_folder(), _environment({FORKSERVER_VARIABLE: parent, SAFE_PATH_VARIABLE: SAFE_PATH}):
            # The mask is inherited: a signal to the group does not end it before it ignores the signal.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
            try:
                super().ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            assert self._forkserver_address is not None
            self._uncollected.add(self.pid)
            self._address_fd = os.open(self._forkserver_address, os.O_PATH)
            self._forkserver_address = f"/proc/self/fd/{self._address_fd}"

    def kill(self) -> None:
        """Kill it, and with it all children. Call `collect` afterwards."""
        if self._forkserver_pid is not None:
            os.kill(self._forkserver_pid, signal.SIGKILL)

    def collect(self, *, wait: bool = False) -> int | None:
        """Exit code if it has exited since the last call, negative for a signal; None otherwise."""
        if self._forkserver_pid is None:
            return None
        pid, status = os.waitpid(self._forkserver_pid, 0 if wait else os.WNOHANG)
        if pid == 0:
            return None
        self._uncollected.discard(pid)
        assert self._forkserver_alive_fd is not None
        os.close(self._forkserver_alive_fd)
        os.close(self._address_fd)
        self._forkserver_pid = self._forkserver_alive_fd = self._forkserver_address = None
        return os.waitstatus_to_exitcode(status)

    def request(self, name: str, target: str, *arguments: Any) -> "Request":
        """Ask for a child that calls ``target`` (``module:function``). Raises OSError if that fails."""
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, name=name, args=(target, arguments)
        )
        return Request(process, self)


class Request(popen_forkserver.Popen):
    """A requested child. Its sentinel gives the process id and exit code, and ends with the forkserver."""

    def __init__(self, process: BaseProcess, server: ForkServer) -> None:
        self._server = server
        self._fds: list[int]
        super().__init__(process)

    def _launch(self, process: BaseProcess) -> None:
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            # Without the path, folder and main module of this process: the forkserver's are right.
            reduction.dump({"name": process.name}, data)
            reduction.dump(process, data)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, child_data = self._server.connect_to_new_process(self._fds)
        self._child_data = child_data  # stays open: its end tells the child that its parent has exited
        with contextlib.suppress(OSError):  # above the limit of an unprivileged user
            fcntl.fcntl(child_data, fcntl.F_SETPIPE_SZ, len(data.getbuffer()))
        os.set_blocking(child_data, False)
        try:
            written = os.write(child_data, data.getbuffer())
        except OSError:
            self.close()
            raise
        if written < len(data.getbuffer()):
            self.close()
            raise OSError(f"settings of {len(data.getbuffer())} bytes do not fit into a pipe")

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.sentinel)
        os.close(self._child_data)


def _run(target: str, arguments: tuple[Any, ...]) -> None:
    """Child: undo what `multiprocessing` leaves for its own children, then call the target."""
    # A handler that uses multiprocessing gets the default method and a resource tracker of its own.
    multiprocessing.set_start_method(None, force=True)
    os.close(_tracker._fd)
    _tracker._fd = None
    # The forkserver ends when the last copy of this descriptor is closed. Only the supervisor keeps one.
    os.close(_inherited._forkserver_alive_fd)
    _inherited._forkserver_alive_fd = None
    for fd in _inherited._inherited_fds:
        os.set_inheritable(fd, False)
    imported(target)(*arguments)


@contextlib.contextmanager
def _socket_folder() -> Iterator[None]:
    """Let `multiprocessing` make its socket in a new private folder, which is removed afterwards."""
    folder = tempfile.mkdtemp(prefix="jw-", dir=_short_folder())
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["tempdir"] = folder
    try:
        yield
    finally:
        del config["tempdir"]
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str:
    """The folder for temporary files, or one that is writable also where the file system is read-only."""
    with contextlib.suppress(OSError):
        folder = tempfile.gettempdir()
        if len(os.fsencode(folder)) <= _LONGEST_FOLDER_BYTES:
            return folder
    return "/dev/shm"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, and remove them afterwards."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
