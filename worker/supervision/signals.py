"""Signal queue: signal handlers enqueue, the supervisor's loop acts."""

import signal
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class SignalQueue:
    """Context manager that catches signals and restores the previous handlers and mask on exit.

    No signal stays blocked: the program that started this one may have blocked SIGTERM, which is inherited.

    Its descriptor is readable while a signal is queued. Neither end blocks, so a flood of signals cannot stop
    the process; signals beyond the socket's buffer are lost.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._previous_wakeup_fd = -1
        self._previous_mask: set[int] = set()

    def __enter__(self) -> Self:
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            self._previous_handlers[number] = signal.signal(number, lambda *_: None)
        self._previous_mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        """Descriptor for select and poll."""
        return self._read.fileno()

    def wake(self) -> None:
        """Make the descriptor readable without a signal (any thread)."""
        with suppress(OSError):  # full: it is readable; closed: the loop has ended
            self._write.send(b"\0")

    def take(self) -> list[signal.Signals]:
        """Signals received since the last call, in order."""
        try:
            return [signal.Signals(number) for number in self._read.recv(256) if number in self._signals]
        except BlockingIOError:
            return []
