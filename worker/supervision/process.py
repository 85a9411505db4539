"""Child processes as the supervisor sees them, and their restart backoff."""

import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.forkserver import read_signed
from typing import Any, ClassVar, NamedTuple

from ..ipc.channel import STARTING, Channel
from ..ipc.control import ControlSocket, Message
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings
from .forkserver import ForkServer, PassedFd

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
#: Exit code of a process whose exit code is unknown: it died with the forkserver.
_LOST = -signal.SIGKILL


class ProcessExit(NamedTuple):
    """How a process exited.

    ``cause`` is ``exit 1``, ``SIGKILL`` and the like; ``clean`` means exit code 0; ``stack`` is its dump.
    ``with_forkserver``: the kernel killed it because the forkserver exited.
    """

    cause: str
    clean: bool
    peak_rss_mib: int
    stack: str
    with_forkserver: bool = False


class Process:
    """A process of the service. Its ``event_fd`` becomes readable when there is something to collect."""

    #: Processes whose exit status `collect` has not taken yet, of all objects.
    uncollected: ClassVar[set[int]] = set()

    def __init__(self, name: str, mono_now_s: float) -> None:
        self.name = name
        self.mono_started_s = mono_now_s
        self.ready = False
        self.pid = 0
        self.pidfd = -1
        self.peak_rss_mib = 0

    @property
    def event_fd(self) -> int:
        """Descriptor to poll for the next event of the process."""
        return self.pidfd

    def kill(self, number: signal.Signals) -> None:
        """Send a signal. Does nothing if the process has exited."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def collect(self) -> ProcessExit | None:
        """Collect the exit status, or None while the process runs. Call `close` afterwards."""
        code = self._exit_code()
        if code is None:
            return None
        self.uncollected.discard(self.pid)
        cause = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return ProcessExit(cause, code == 0, self.peak_rss_mib, self._stack())

    def _exit_code(self) -> int | None:
        """Exit code, negative for a signal, or None while the process runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def _stack(self) -> str:
        """Python stacks of the process at its end."""
        return ""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the exit and collect it. Returns False if the process still runs after ``timeout_s``."""
        mono_give_up_s = time.monotonic() + timeout_s
        while self.collect() is None:
            left_s = mono_give_up_s - time.monotonic()
            if left_s <= 0:
                return False
            _is_readable(self.event_fd, left_s)
        return True

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

    def sample_peak(self) -> None:
        """Read the peak of its memory. Call it while it runs: an exited process has none."""
        with suppress(OSError, IndexError), open(f"/proc/{self.pid}/status", "rb") as status:
            peak_kib = int(status.read().partition(b"VmHWM:")[2].split(maxsplit=1)[0])
            self.peak_rss_mib = max(self.peak_rss_mib, peak_kib >> 10)

    def close(self) -> None:
        """Close the descriptors."""
        if self.pidfd >= 0:
            os.close(self.pidfd)


def _is_readable(fd: int, timeout_s: float = 0.0) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Command(Process):
    """A running command, a child of this process.

    Raises OSError if the system cannot start it, and leaves nothing open.
    """

    def __init__(self, name: str, command: Sequence[str], pass_fds: Sequence[int], mono_now_s: float) -> None:
        super().__init__(name, mono_now_s)
        self._popen = subprocess.Popen(command, pass_fds=pass_fds, stdin=subprocess.DEVNULL)
        self.pid = self._popen.pid
        self.uncollected.add(self.pid)
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            self.uncollected.discard(self.pid)
            raise

    def _exit_code(self) -> int | None:
        code = super()._exit_code()
        self._popen.returncode = code  # stops Popen from waiting for a pid that the kernel may reuse
        return code


class ForkedProcess(Process):
    """A process that the forkserver forks. Its ``pid`` is 0 until the forkserver has answered.

    It is a child of the forkserver, which reports its exit code. When the forkserver exits, this process
    becomes its parent. Raises OSError if the forkserver cannot be asked.
    """

    def __init__(
        self, server: ForkServer, name: str, target: str, arguments: Sequence[Any], mono_now_s: float
    ) -> None:
        super().__init__(name, mono_now_s)
        self._signal: signal.Signals | None = None
        self._adopted = False
        self._request = server.request(name, target, *arguments)

    @property
    def event_fd(self) -> int:
        return self.pidfd if self._adopted else self._request.sentinel

    def kill(self, number: signal.Signals) -> None:
        if self.pidfd >= 0:
            super().kill(number)
        elif not self.pid:
            self._signal = number  # sent as soon as there is a process

    def collect(self) -> ProcessExit | None:
        exited = super().collect()
        return exited and exited._replace(with_forkserver=self._adopted and exited.cause == "SIGKILL")

    def _exit_code(self) -> int | None:
        if not self._adopted:
            try:
                while _is_readable(self._request.sentinel):
                    number = read_signed(self._request.sentinel)
                    if self.pid:
                        return int(number)
                    self._begin(number)
                return None
            except EOFError:
                self._adopted = True
        return self._adopted_exit_code()

    def _begin(self, pid: int) -> None:
        self.pid = pid
        self.uncollected.add(pid)
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # the exit code follows
        except OSError:  # short of descriptors: a process that cannot be watched must not run
            os.kill(pid, signal.SIGKILL)
            return
        self.sample_peak()
        if self._signal is not None:
            self.kill(self._signal)

    def _adopted_exit_code(self) -> int | None:
        """Exit code after the end of the forkserver."""
        if self.pidfd < 0:
            return _LOST  # it was never forked, or had exited
        try:
            return super()._exit_code()
        except ChildProcessError:
            # Still a child of the exiting forkserver, or one whose exit code the forkserver did not report.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, 0)
                return None
            return _LOST

    def is_unanswered(self) -> bool:
        """Whether the forkserver has still to report its process id or its exit code."""
        return not self._adopted and (not self.pid or (self.pidfd >= 0 and _is_readable(self.pidfd)))

    def close(self) -> None:
        super().close()
        self._request.close()


class Child(ForkedProcess):
    """A reader, reaper, api or worker with its control socket; a worker also has a channel."""

    def __init__(
        self, server: ForkServer, role: str, slot_no: int, generation: int, settings: Settings,
        mono_now_s: float, channel: Channel | None = None, marks: CrashMarks | None = None,
        listener_fd: int | None = None,
    ) -> None:  # fmt: skip
        self.role = role
        self.slot_no = slot_no
        self.generation = generation
        self.channel = channel
        #: The error of its dependency as it last reported it; None if there is none.
        self.trouble: str | None = None
        #: Faults that it last reported and that stop only a part of the work.
        self.warnings: list[str] = []
        self.progress = 0
        #: Whether it has closed its control socket and all its messages were received.
        self.hung_up = False
        self.mono_last_message_s = mono_now_s
        self.mono_sampled_s = mono_now_s
        #: Since when the forkserver owes an answer about it; None if it does not.
        self.mono_unanswered_s: float | None = None
        #: When it was found to exceed a limit; None while it does not.
        self.mono_overdue_s: float | None = None
        #: Why the supervisor kills it: ``timeout``, ``cancelled``, ``rss``, ``stuck`` or ``boot``.
        self.kill_cause = ""
        #: Whether it used a CPU when it was found overdue.
        self.was_computing = False
        self.stopping = False
        #: When a limit on its stop began to count; None while it is not stopping.
        self.mono_stopping_s: float | None = None
        #: Whether the supervisor killed it to stop it: its jobs are released without a death count.
        self.killed_by_stop = False
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()
        with ExitStack() as undo:
            self.blackbox_fd = os.memfd_create("blackbox")
            undo.callback(os.close, self.blackbox_fd)
            self.control, theirs = ControlSocket.pair()
            undo.callback(self.control.close)
            with theirs:
                fds: tuple[int, ...] = channel.fds if channel else (marks.fd,) if marks else ()
                fds += () if listener_fd is None else (listener_fd,)
                passed = [PassedFd(fd) for fd in (theirs.fileno(), self.blackbox_fd, *fds)]
                name = role if channel is None else f"{role} {slot_no}"
                arguments = (role, slot_no, settings.to_json(), *passed)
                super().__init__(server, name, "jobworker.worker.boot:main", arguments, mono_now_s)
            undo.pop_all()

    def _stack(self) -> str:
        """Python stacks that faulthandler dumped at a fatal signal or at SIGUSR2."""
        return os.pread(self.blackbox_fd, _STACK_BYTES, 0).decode("utf-8", "replace")

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
        os.close(self.blackbox_fd)
        self.control.close()
