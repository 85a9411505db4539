"""Children of the process manager without processes: the test plays their part and moves the clock."""

import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

from jobworker.worker.errors import Exit
from jobworker.worker.ipc.channel import READY, STOPPING, Channel
from jobworker.worker.ipc.control import ControlSocket, Message, Ready, Report
from jobworker.worker.ipc.crash_marks import CrashMarks
from jobworker.worker.settings import Settings
from jobworker.worker.supervision.forkserver import ForkServer, PassedFd
from jobworker.worker.supervision.process import Child, ForkedProcess, Process, ProcessExit
from jobworker.worker.supervision.process_manager import ProcessManager
from jobworker.worker.telemetry.prometheus import PrometheusCollector


class FakeProcess(ForkedProcess):
    """A process that exists only as the exit that the test gives it."""

    def __init__(
        self, server: ForkServer, name: str, target: str, arguments: Sequence[Any], mono_now_s: float
    ) -> None:
        Process.__init__(self, name, mono_now_s)
        self.pid = 1 << 30  # above every process id
        control, blackbox, *self._fds = [os.dup(one.fd) for one in arguments if isinstance(one, PassedFd)]
        #: The child's end of its control socket.
        self.peer = ControlSocket(socket.socket(fileno=control))
        os.close(blackbox)
        self.signals: list[signal.Signals] = []
        self.process_exit: ProcessExit | None = None
        self.used_mib = 0
        self.computing = False
        #: Whether it has stopped to report and to heartbeat.
        self.silent = False
        #: Whether the forkserver does not answer about it.
        self.unanswered = False
        self.closed = False

    @property
    def event_fd(self) -> int:
        return -1

    def kill(self, number: signal.Signals) -> None:
        """Record the signal; a SIGKILL ends the process."""
        self.signals.append(number)
        if number == signal.SIGKILL:
            self.exit("SIGKILL")

    def exit(self, cause: str, *, with_forkserver: bool = False) -> None:
        """Let the process exit by ``exit N`` or the name of a signal; the first exit counts."""
        exited = ProcessExit(cause, cause == "exit 0", 100, "", with_forkserver)
        self.process_exit = self.process_exit or exited

    def collect(self) -> ProcessExit | None:
        return self.process_exit

    def wait(self, timeout_s: float) -> bool:
        return self.process_exit is not None

    def is_computing(self) -> bool:
        return self.computing

    def rss_mib(self) -> int:
        return self.used_mib

    def sample_peak(self) -> None:
        pass

    def is_unanswered(self) -> bool:
        return self.unanswered

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeChild(Child, FakeProcess):
    """A child whose part the test plays."""

    def become_ready(self) -> None:
        """Report ready, as a child does after its set-up."""
        self.peer.send(Ready())
        if self.channel is not None:
            self.channel.phase = READY

    def leave(self) -> None:
        """Stop in order: a worker announces it."""
        if self.channel is not None:
            self.channel.phase = STOPPING
        self.exit("exit 0")

    def received(self) -> list[Message]:
        """Messages since the last call; closes the descriptors that came along."""
        messages = []
        while (received := self.peer.receive()) is not None:
            messages.append(received[0])
            for fd in received[1]:
                os.close(fd)
        return messages

    def marks(self) -> CrashMarks:
        """The marks that a reader gets with its role."""
        return CrashMarks(os.dup(*self._fds))

    def release(self) -> None:
        """Close what a process closes when it ends, and the channel, which the reader may still read."""
        self.peer.close()
        for fd in self._fds:
            os.close(fd)
        if self.channel is not None and not self.channel._map.closed:
            self.channel.close()


class FakeServer(ForkServer):
    """A forkserver that exists only as the exit that the test gives it."""

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def kill(self) -> None:
        """Let it exit."""
        self.exit_code = -signal.SIGKILL

    def collect(self, *, wait: bool = False) -> int | None:
        code, self.exit_code = self.exit_code, None
        return code


class Service:
    """A process manager with fake children and a clock."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        #: Every child ever started, oldest first.
        self.all: list[FakeChild] = []
        #: Raised by each start of a child.
        self.start_error: OSError | None = None
        self.metrics = PrometheusCollector()
        self.server = FakeServer()
        self.settings = Settings(**{"procs": 2, "connect_timeout_s": 60.0, "max_payload": 1024, **options})
        self.manager = ProcessManager(self.settings, self.metrics, self.server, self._new_child)
        self.manager.start(self.settings, self.now)

    def _new_child(self, *arguments: Any, **options: Any) -> FakeChild:
        if self.start_error:
            raise self.start_error
        self.all.append(FakeChild(*arguments, **options))
        return self.all[-1]

    def tick(self, after_s: float = 0.0) -> Exit | None:
        """Move the clock, let living children report and run one tick."""
        self.now += after_s
        for child in self.living():
            if child.silent:
                continue
            if child.ready and child.channel is None:
                child.peer.send(Report())
            elif child.channel is not None:
                child.channel.heartbeat(self.now)
        return self.manager.tick(self.now)

    def complete(self) -> "Service":
        """Start everything and let it become ready."""
        for _ in range(10):
            self.tick(2.0)
            for child in self.living():
                if not child.ready:
                    child.become_ready()
        self.tick()
        assert self.manager.reasons() == []
        return self

    def living(self, role: str = "") -> list[FakeChild]:
        """Children that have not exited; with a role only those."""
        return [one for one in self.all if one.process_exit is None and role in ("", one.role)]

    def child(self, role: str, slot_no: int = 0) -> FakeChild:
        """The one living child of a slot."""
        (child,) = (one for one in self.living(role) if one.slot_no == slot_no)
        return child

    def channel(self, child: FakeChild) -> Channel:
        """The channel of a worker."""
        assert child.channel is not None
        return child.channel

    def restarts(self) -> dict[tuple[str, str], float]:
        """`z_novel_worker_restarts_total` by role and cause."""
        samples = self.metrics.totals()["z_novel_worker_restarts_total"]
        return {(str(one["role"]), str(one["cause"])): float(one["value"]) for one in samples}

    def close(self) -> None:
        """Release all descriptors."""
        self.manager.kill_all()
        for child in self.all:
            child.release()
        self.manager._marks.close()
