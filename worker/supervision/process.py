"""Child processes as the supervisor sees them, and their restart backoff."""

import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..ipc.channel import Channel
from ..ipc.control import ControlSocket, Message, Standby, Start
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings

#: First and longest pause before a start (seconds).
FIRST_S, LONGEST_S = 0.1, 30.0
#: Longest pause after an end that came when the process was ready: a handful of poisonous jobs in a row must
#: not keep the innocent ones behind them waiting for half a minute. A reader's start costs a quarter of a
#: second of a processor, so one that ends again and again takes about a third of one.
LONGEST_READY_S = 0.5
#: A process that was ready for this long was fine: its next end counts as the first.
_FINE_AFTER_S = 5.0


class RestartBackoff:
    """The pause of one place. ``unready_ends`` counts ends in a row before the process was ready."""

    def __init__(self) -> None:
        self.unready_ends = 0
        self._quick_ends = 0
        self._mono_not_before_s = 0.0

    def ended(self, mono_now_s: float, *, was_ready: bool, lived_s: float) -> None:
        """Take note of an end; a first end after being ready costs no pause at all."""
        self.unready_ends = 0 if was_ready else self.unready_ends + 1
        self._quick_ends = 0 if was_ready and lived_s > _FINE_AFTER_S else self._quick_ends + 1
        # A worker that became ready and then died was most likely killed by its job, which is dealt with by
        # counting the job's deaths: only from the third quick end on is the pause worth its price.
        free_ends = 2 if was_ready else 0
        step = self._quick_ends - free_ends
        longest_s = LONGEST_READY_S if was_ready else LONGEST_S
        pause_s = 0.0 if step <= 0 else min(longest_s, FIRST_S * 2.0 ** (step - 1))
        self._mono_not_before_s = mono_now_s + pause_s

    def wait_s(self, mono_now_s: float) -> float:
        """Seconds until the next start."""
        return max(0.0, self._mono_not_before_s - mono_now_s)


#: A stack dump is cut to this before it goes into logs and dead letters.
_STACK_BYTES = 8 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Ended(NamedTuple):
    """How a process ended. ``cause`` is ``exit 1``, ``SIGKILL`` and the like; ``stack`` is what it dumped."""

    cause: str
    clean: bool
    peak_rss_mib: int
    stack: str


class Process:
    """A started command with a descriptor that becomes readable when it has ended."""

    def __init__(self, name: str, command: Sequence[str], pass_fds: Sequence[int], mono_now_s: float) -> None:
        self.name = name
        self.mono_started_s = mono_now_s
        self.ready = False
        self.blackbox_fd = os.memfd_create("blackbox")
        self._popen = subprocess.Popen(
            command, pass_fds=(*pass_fds, self.blackbox_fd), stdin=subprocess.DEVNULL
        )
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal; nothing where it has ended."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return

    def collect(self) -> Ended | None:
        """How it ended, or None while it runs. Call `close` after the end."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = os.waitstatus_to_exitcode(status)
        self._popen.returncode = code  # so that Popen does not wait for a pid that may be another's by then
        cause = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return Ended(cause, code == 0, usage.ru_maxrss // 1024, self._stack())

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end and collect it; False where it still runs after that time."""
        select.select([self.pidfd], [], [], max(0.0, timeout_s))
        return self.collect() is not None

    def _stack(self) -> str:
        """What faulthandler left: the Python stacks at a fatal signal, or when asked by SIGUSR2."""
        return os.pread(self.blackbox_fd, _STACK_BYTES, 0).decode("utf-8", "replace")

    def is_computing(self) -> bool:
        """Whether it runs at this moment; False where it waits for something or was stopped."""
        try:
            with open(f"/proc/{self.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] == "R"
        except (OSError, IndexError):
            return False

    def rss_mib(self) -> int:
        """Memory that it holds now; 0 once it has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * _PAGE_BYTES >> 20
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self.pidfd)
        os.close(self.blackbox_fd)


class Child(Process):
    """A process of ours with its line to the supervisor; it begins as nothing and is given a role.

    A worker also has a channel.
    """

    def __init__(self, mono_now_s: float) -> None:
        self.role = ""
        self.slot = 0
        self.generation = 0
        self.channel: Channel | None = None
        self.trouble: str | None = None
        self.progress = 0
        self.mono_heard_s = mono_now_s
        self.mono_killed_s: float | None = None
        self.kill_cause = ""
        #: Whether it was computing when it was found to be overdue.
        self.was_computing = False
        self.stopping = False
        self.killed_by_drain = False
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()
        self.link, theirs = ControlSocket.pair()
        command = [sys.executable, "-m", "jobworker.worker.boot", str(theirs.fileno())]
        with theirs:
            super().__init__("spare", command, [theirs.fileno()], mono_now_s)

    def stand_by(self, number: int, settings: Settings) -> None:
        """Have it import what reader and reaper need, and wait for `begin`."""
        self.tell(Standby(number, os.getpid(), settings.instance))

    def begin(
        self, role: str, slot: int, generation: int, settings: Settings, mono_now_s: float,
        channel: Channel | None = None, marks: CrashMarks | None = None,
    ) -> None:  # fmt: skip
        """Give it its role, a worker its channel and the reader its marks; what it is measured by counts
        from now."""
        self.role = role
        self.name = role if channel is None else f"{role} {slot}"
        self.slot = slot
        self.generation = generation
        self.channel = channel
        self.mono_started_s = self.mono_heard_s = mono_now_s
        start = Start(role, slot, os.getpid(), self.blackbox_fd, settings.to_json())
        self.tell(start, channel.fds if channel else (marks.fd,) if marks else ())

    def tell(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send, or keep for `flush` while the child is not taking messages; the order is kept."""
        self._outbox.append((message, fds))
        self.flush()

    def flush(self) -> None:
        """Send what is waiting, as far as the child takes it."""
        while self._outbox and self.link.send(*self._outbox[0]):
            self._outbox.popleft()

    def close(self) -> None:
        """Give everything back but the channel, which the reader may still be reading."""
        super().close()
        self.link.close()
