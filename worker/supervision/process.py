"""Child processes as the supervisor sees them, and their restart backoff."""

import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from ..ipc.channel import STARTING, Channel
from ..ipc.control import ControlSocket, Message, Standby, Start
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings

#: First and longest pause before a restart (seconds).
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 30.0
#: Longest pause after a process that was ready exits. A few poison jobs in a row must not delay the jobs
#: behind them for half a minute. Starting a reader costs a quarter of a CPU second, so a reader in a restart
#: loop uses about a third of a CPU.
MAX_PAUSE_AFTER_READY_S = 0.5
#: A process that ran for this long and was ready counts as healthy: its next exit counts as the first.
_HEALTHY_AFTER_S = 5.0
#: Quick exits without a pause after ready. A worker that was ready and then died was most likely killed by
#: its job, and the job's death count limits that. A pause pays off from the third quick exit on.
_FREE_EXITS_AFTER_READY = 2


class RestartBackoff:
    """Restart backoff: immediate after a long healthy run, exponential after quick exits.

    One instance per slot. ``exits_before_ready`` counts consecutive exits before the process was ready.
    """

    def __init__(self) -> None:
        self.exits_before_ready = 0
        self._quick_exits = 0
        self._mono_not_before_s = 0.0

    def record_exit(self, mono_now_s: float, *, was_ready: bool, lived_s: float) -> None:
        """Count an exit and set the time of the next start."""
        self.exits_before_ready = 0 if was_ready else self.exits_before_ready + 1
        self._quick_exits = 0 if was_ready and lived_s > _HEALTHY_AFTER_S else self._quick_exits + 1
        free_exits = _FREE_EXITS_AFTER_READY if was_ready else 0
        step = self._quick_exits - free_exits
        max_pause_s = MAX_PAUSE_AFTER_READY_S if was_ready else MAX_PAUSE_S
        pause_s = 0.0 if step <= 0 else min(max_pause_s, FIRST_PAUSE_S * 2.0 ** (step - 1))
        self._mono_not_before_s = mono_now_s + pause_s

    def wait_s(self, mono_now_s: float) -> float:
        """Seconds until the next start is allowed; 0.0 if it is allowed now."""
        return max(0.0, self._mono_not_before_s - mono_now_s)


#: A stack dump is cut to this size before it is logged or stored in dead letters.
_STACK_BYTES = 8 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessExit(NamedTuple):
    """How a process exited.

    ``cause`` is ``exit 1``, ``SIGKILL`` and the like; ``clean`` means exit code 0; ``stack`` is its dump.
    """

    cause: str
    clean: bool
    peak_rss_mib: int
    stack: str


class Process:
    """A running command with a pidfd, which becomes readable when the process exits.

    Raises OSError if the system cannot start it, and leaves nothing open.
    """

    #: Processes whose exit status `collect` has not taken yet, of all objects.
    uncollected: ClassVar[set[int]] = set()

    def __init__(self, name: str, command: Sequence[str], pass_fds: Sequence[int], mono_now_s: float) -> None:
        self.name = name
        self.mono_started_s = mono_now_s
        self.ready = False
        self.blackbox_fd = os.memfd_create("blackbox")
        try:
            self._popen = subprocess.Popen(
                command, pass_fds=(*pass_fds, self.blackbox_fd), stdin=subprocess.DEVNULL
            )
        except OSError:
            os.close(self.blackbox_fd)
            raise
        self.pid = self._popen.pid
        self.uncollected.add(self.pid)
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            self.uncollected.discard(self.pid)
            os.close(self.blackbox_fd)
            raise

    def kill(self, number: signal.Signals) -> None:
        """Send a signal. Does nothing if the process has exited."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return

    def collect(self) -> ProcessExit | None:
        """Collect the exit status, or None while the process runs. Call `close` afterwards."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.uncollected.discard(self.pid)
        code = os.waitstatus_to_exitcode(status)
        self._popen.returncode = code  # stops Popen from waiting for a pid that the kernel may reuse
        cause = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return ProcessExit(cause, code == 0, usage.ru_maxrss // 1024, self._stack())

    def wait(self, timeout_s: float) -> bool:
        """Wait for the exit and collect it. Returns False if the process still runs after ``timeout_s``."""
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self.pidfd, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)
        return self.collect() is not None

    def _stack(self) -> str:
        """Python stacks that faulthandler dumped at a fatal signal or at SIGUSR2."""
        return os.pread(self.blackbox_fd, _STACK_BYTES, 0).decode("utf-8", "replace")

    def is_computing(self) -> bool:
        """Whether it uses a CPU at this moment. False while it waits, and while it is stopped (SIGSTOP)."""
        try:
            with open(f"/proc/{self.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] == "R"
        except (OSError, IndexError):
            return False

    def rss_mib(self) -> int:
        """Resident memory in MiB; 0 after the exit."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * _PAGE_BYTES >> 20
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.pidfd)
        os.close(self.blackbox_fd)


class Child(Process):
    """A child of the supervisor with its control socket; a worker also has a channel.

    It starts without a role. `start_role` assigns one, at once or after a time as a standby.
    """

    def __init__(self, mono_now_s: float) -> None:
        self.role = ""
        self.slot_no = 0
        self.generation = 0
        self.channel: Channel | None = None
        #: The error of its dependency as it last reported it; None if there is none.
        self.trouble: str | None = None
        #: Faults that it last reported and that stop only a part of the work.
        self.warnings: list[str] = []
        self.progress = 0
        self.mono_last_message_s = mono_now_s
        #: When it was found to exceed a limit; None while it does not.
        self.mono_overdue_s: float | None = None
        #: Why the supervisor kills it: ``timeout``, ``rss``, ``stuck`` or ``boot``.
        self.kill_cause = ""
        #: Whether it used a CPU when it was found overdue.
        self.was_computing = False
        self.stopping = False
        #: When a limit on its stop began to count; None while it is not stopping.
        self.mono_stopping_s: float | None = None
        #: Whether the supervisor killed it to stop it: its jobs are released without a death count.
        self.killed_by_stop = False
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()
        self.control, theirs = ControlSocket.pair()
        command = [sys.executable, "-P", "-m", "jobworker.worker.boot", str(theirs.fileno())]
        try:
            with theirs:
                super().__init__("standby", command, [theirs.fileno()], mono_now_s)
        except OSError:
            self.control.close()
            raise

    def make_standby(self, number: int, settings: Settings) -> None:
        """Let it import the modules of reader and reaper and wait for `start_role`."""
        self.send(Standby(number, os.getpid(), settings.instance))

    def start_role(
        self, role: str, slot_no: int, generation: int, settings: Settings, mono_now_s: float,
        channel: Channel | None = None, marks: CrashMarks | None = None,
    ) -> None:  # fmt: skip
        """Assign its role, and pass the channel to a worker or the marks to the reader.

        Its age and its time limits count from now.
        """
        self.role = role
        self.name = role if channel is None else f"{role} {slot_no}"
        self.slot_no = slot_no
        self.generation = generation
        self.channel = channel
        self.mono_started_s = self.mono_last_message_s = mono_now_s
        start = Start(role, slot_no, os.getpid(), self.blackbox_fd, settings.to_json())
        self.send(start, channel.fds if channel else (marks.fd,) if marks else ())

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send a message, or queue it for `flush` while the socket is full. The order is kept."""
        self._outbox.append((message, fds))
        self.flush()

    def flush(self) -> None:
        """Send queued messages until the socket is full."""
        while self._outbox and self.control.send(*self._outbox[0]):
            self._outbox.popleft()

    def stop(self) -> None:
        """Ask a worker to finish its job and exit.

        A running worker reads the request in the channel. It gets no signal: a handler may have replaced the
        signal's action by one that raises. A worker that is still starting is ended by the signal.
        """
        self.stopping = True
        assert self.channel is not None
        self.channel.request_stop()
        if self.channel.phase == STARTING:
            self.kill(signal.SIGTERM)

    def close(self) -> None:
        """Close everything but the channel, which the reader may still read."""
        super().close()
        self.control.close()
