"""Bounded buffer of log lines in front of a descriptor that may block, with a thread that writes them.

A pipe that no process reads, a stopped terminal and a hung disk block write(2). The thread waits there in the
place of the role. Lines that do not fit into the buffer are dropped and counted.
"""

import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

#: Most bytes of lines that wait. A single line may be longer.
MAX_BYTES = 1024 * 1024
#: Longest wait of a caller for its own line. Without it, the last lines before a crash would be lost.
PATIENCE_S = 0.05
#: Longest wait for the remaining lines when the process exits.
_FLUSH_TIMEOUT_S = 0.5


class LineWriter:
    """Writes lines in order, from a daemon thread that starts with the first line.

    A caller waits briefly until its line is written, at most once while the descriptor blocks. ``notice``
    makes the line that tells, after a gap, how many lines were dropped. A forked child gets an empty buffer
    and a thread of its own.
    """

    def __init__(
        self, write: Callable[[bytes], object], notice: Callable[[int], bytes], *,
        max_bytes: int = MAX_BYTES, patience_s: float = PATIENCE_S,
    ) -> None:  # fmt: skip
        self._write, self._notice = write, notice
        self._max_bytes, self._patience_s = max_bytes, patience_s
        self._pid = 0
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        # Each line with 0, a notice with the number of lines that it reports.
        self._lines: deque[tuple[bytes, int]] = deque()
        self._waiting_bytes = 0
        self._queued = self._finished = 0
        self._blocked = False
        self._gap = 0
        self._uncounted = 0

    @property
    def is_unused(self) -> bool:
        """Whether no line was put, neither by this process nor by the one that forked it."""
        return not self._pid

    def put(self, line: bytes) -> None:
        """Write a line, now or later; drop it if the buffer is full."""
        if self._pid != os.getpid():
            self._start()
        with self._changed:
            if self._lines and self._waiting_bytes + len(line) > self._max_bytes:
                self._drop()
                return
            self._write_notice()
            self._append(line)
            if not self._blocked:
                self._blocked = not self._wait_for(self._queued, self._patience_s)

    def flush(self) -> None:
        """Wait until all lines are written, but not long: the process is about to exit."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._write_notice()
            self._wait_for(self._queued, _FLUSH_TIMEOUT_S)

    def take_dropped(self) -> int:
        """Number of lines dropped since the last call."""
        with self._changed:
            dropped, self._uncounted = self._uncounted, 0
            return dropped

    def _start(self) -> None:
        self._reset()
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def _write_notice(self) -> None:
        if self._gap:
            gap, self._gap = self._gap, 0
            self._append(self._notice(gap), gap)

    def _append(self, line: bytes, gap: int = 0) -> None:
        self._lines.append((line, gap))
        self._waiting_bytes += len(line)
        self._queued += 1
        self._changed.notify_all()

    def _drop(self, gap: int = 0) -> None:
        """Count a lost line, or the lines that a lost notice reported, which are counted already."""
        self._gap += gap or 1
        self._uncounted += not gap

    def _wait_for(self, number: int, timeout_s: float) -> bool:
        return self._changed.wait_for(lambda: self._finished >= number, timeout_s)

    def _run(self) -> None:
        # Signals are for the main thread, which may be in a call that only its own signals interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line, gap = self._lines[0]
            written = self._try_write(line)
            with self._changed:
                self._lines.popleft()
                self._waiting_bytes -= len(line)
                self._finished += 1
                self._blocked = self._blocked and bool(self._lines)
                if not written:
                    self._drop(gap)
                self._changed.notify_all()

    def _try_write(self, line: bytes) -> bool:
        """False if the line is lost: a full disk, a closed pipe."""
        try:
            self._write(line)
        except (OSError, ValueError):
            return False
        return True


def write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor and wait as long as it takes, also if another process made it non-blocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def write_briefly(fd: int, data: bytes) -> None:
    """Write the last words of a process that is about to exit, also where the descriptor blocks."""
    thread = threading.Thread(target=_write_or_lose, args=(fd, data), daemon=True)
    thread.start()
    thread.join(_FLUSH_TIMEOUT_S)


def _write_or_lose(fd: int, data: bytes) -> None:
    with suppress(OSError):
        write_all(fd, data)


#: The writer of this process's log; None before the log is set up.
log_writer: LineWriter | None = None


def take_dropped_lines() -> int:
    """Log lines of this process that were dropped since the last call."""
    return log_writer.take_dropped() if log_writer else 0
