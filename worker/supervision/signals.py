"""Signal queue: a handler enqueues, one loop acts."""

import signal
import socket
from types import TracebackType
from typing import Any, Self


class SignalQueue:
    """Catches signals while it is entered and restores what it replaced; readable when one has come."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._signals = signals
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        self._wakeup_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        """For selectors."""
        return self._read.fileno()

    def take(self) -> list[signal.Signals]:
        """The signals that came since the last call, in order."""
        try:
            return [signal.Signals(number) for number in self._read.recv(256) if number in self._signals]
        except BlockingIOError:
            return []
