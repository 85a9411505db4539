"""Process groups of workers: what a handler started ends with its worker, also if the supervisor is killed.

Each worker leads a process group. A subprocess of a handler stays in it, unless the handler starts it with
``start_new_session=True``. The supervisor is a subreaper, so orphans become its children.
"""

import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Set
from contextlib import suppress

from .forkserver import ForkServer, PassedFd
from .process import ForkedProcess, Process, RestartBackoff

log = logging.getLogger("jobworker.process_groups")

#: Time between SIGTERM and SIGKILL. Python's resource tracker uses it to unlink shared memory.
_GRACE_S = 1.0
#: Time after which a process that SIGKILL does not end is left alone: it must not hold up a stop.
_GIVE_UP_S = 3.0
#: How long the guard may take to exit once its socket is closed.
_GUARD_EXIT_S = 2.0


class ProcessGroups:
    """Groups of exited workers in which processes are left."""

    def __init__(self) -> None:
        self._mono_kill_at_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._mono_kill_at_s)

    @property
    def leader_pids(self) -> set[int]:
        """The workers that led these groups."""
        return set(self._mono_kill_at_s)

    def end(self, leader_pid: int, mono_now_s: float) -> None:
        """End the group of a worker that has exited and was collected; 0 if it was never forked."""
        if leader_pid and _reap(leader_pid):
            _signal(leader_pid, signal.SIGTERM)
            self._mono_kill_at_s[leader_pid] = mono_now_s + _GRACE_S

    def tick(self, mono_now_s: float) -> None:
        """Reap what has ended, and kill what ignores SIGTERM."""
        for pgid, kill_at_s in list(self._mono_kill_at_s.items()):
            if not _reap(pgid) or mono_now_s > kill_at_s + _GIVE_UP_S:
                del self._mono_kill_at_s[pgid]
            elif mono_now_s > kill_at_s:
                _signal(pgid, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill every process that is left."""
        for pgid in self._mono_kill_at_s:
            if _reap(pgid):
                _signal(pgid, signal.SIGKILL)
        self._mono_kill_at_s.clear()


def _signal(pgid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # a program of another user, such as sudo
        os.killpg(pgid, number)


def _reap(pgid: int) -> bool:
    """Reap exited children of the group; False if this process has no child in it.

    The number of an empty group may belong to another program: never signal it without this check.
    """
    try:
        while os.waitid(os.P_PGID, pgid, os.WEXITED | os.WNOHANG) is not None:
            pass
    except ChildProcessError:
        return False
    return True


def reap_adopted() -> None:
    """Reap exited children that this process did not start: orphans that it adopted."""
    with suppress(ChildProcessError):
        while True:
            exited = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if exited is None or exited.si_pid in Process.uncollected:
                return  # `Process.collect` is about to collect it
            os.waitpid(exited.si_pid, os.WNOHANG)


class GroupGuard:
    """Process that kills the workers' groups when the supervisor is killed; restarted if it exits."""

    def __init__(self, server: ForkServer, title: str) -> None:
        self._server = server
        self._title = title
        self._process: ForkedProcess | None = None
        self._socket: socket.socket | None = None
        self._backoff = RestartBackoff()
        self._protected: Set[int] = frozenset()
        self._restarts: Counter[str] = Counter()

    @property
    def event_fds(self) -> list[int]:
        """Descriptor that tells of its exit; empty while it does not run."""
        return [self._process.event_fd] if self._process is not None else []

    def take_restarts(self) -> list[tuple[str, tuple[str, ...], float]]:
        """Unexpected exits since the last call, as counts of z_novel_worker_restarts_total."""
        taken, self._restarts = self._restarts, Counter()
        return [("z_novel_worker_restarts_total", ("guard", cause), n) for cause, n in taken.items()]

    def update(self, leader_pids: Set[int], mono_now_s: float) -> None:
        """Tell the guard which groups there are, and start it if it does not run."""
        if self._process is not None and (exited := self._process.collect()) is not None:
            log.error("child.exited", extra={
                "child": "guard", "process_id": self._process.pid, "cause": exited.cause,
            })  # fmt: skip
            self._restarts[exited.cause] += 1
            lived_s = mono_now_s - self._process.mono_started_s
            self._backoff.record_exit(mono_now_s, was_ready=True, lived_s=lived_s)
            self._process.close()
            self._process = None
        if self._process is None:
            if self._backoff.wait_s(mono_now_s):
                return
            try:
                self._start(mono_now_s)
            except OSError as error:
                log.error("child.spawn_failed", extra={"child": "guard", "error": str(error)})
                self._backoff.record_exit(mono_now_s, was_ready=False, lived_s=0.0)
                return
        if leader_pids != self._protected and self._send(leader_pids):
            self._protected = frozenset(leader_pids)

    def _start(self, mono_now_s: float) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._protected = frozenset()
        with theirs:
            self._process = ForkedProcess(
                self._server, "guard", "jobworker.worker.supervision.guard:main",
                (PassedFd(theirs.fileno()), self._title), mono_now_s,
            )  # fmt: skip

    def _send(self, leader_pids: Set[int]) -> bool:
        assert self._socket is not None
        try:
            self._socket.send(" ".join(map(str, sorted(leader_pids))).encode() + b"\n")
        except OSError:  # full or gone; the next update tries again
            return False
        return True

    def close(self) -> None:
        """End the guard. No worker is left, so it has nothing to kill."""
        if self._socket is not None:
            self._send(frozenset())
            self._socket.close()
        if self._process is not None:
            if not self._process.wait(_GUARD_EXIT_S):
                self._process.kill(signal.SIGKILL)
                self._process.wait(_GUARD_EXIT_S)
            self._process.close()
            self._process = None
