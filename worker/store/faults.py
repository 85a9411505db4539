"""Streams that the store refuses: each waits and is tried again by itself, while the others continue.

A key of the wrong type, a stream at its last possible id or a missing permission concerns one stream. Only a
person can repair it, so the log, the health page and a metric name the key and the command.
"""

import logging
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from ..errors import StoreRefused
from ..keys import Source
from ..store_advice import lacks_permission, store_advice
from .backoff import ReconnectBackoff
from .ports import KeyFault

log = logging.getLogger("jobworker.faults")

#: First and longest wait (seconds) before a refused stream is tried again.
_FIRST_S, _MAX_S = 1.0, 10.0
#: A stream that worked for this long (seconds) starts again with the shortest wait.
_STABLE_S = 60.0
#: Most characters of the store's error in a text.
_ERROR_CHARS = 300


class _FaultStore(Protocol):
    """What the stores of reader and reaper have in common here."""

    def key_faults(self, source: Source) -> list[KeyFault]: ...


class _Guard:
    """Context manager that isolates a stream if the store refuses what its block does."""

    def __init__(self, faults: "StreamFaults", stream_no: int) -> None:
        self._faults = faults
        self._stream_no = stream_no

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, StoreRefused):
            return False
        self._faults.isolate(self._stream_no, error)
        return True


class StreamFaults:
    """Refused streams of one role, by stream number. ``isolated`` has those that wait for a repair."""

    def __init__(
        self,
        store: _FaultStore,
        streams: Sequence[Source],
        set_gauge: Callable[[str, tuple[str, ...], float], None],
        role: str,
        rng: random.Random,
        mono_s: Callable[[], float],
    ) -> None:
        self.isolated: dict[int, str] = {}
        #: Called with the number of each stream that was isolated.
        self.on_isolated: list[Callable[[int], None]] = []
        self._store = store
        self._streams = streams
        self._set_gauge = set_gauge
        self._role = role
        self._mono_s = mono_s
        self._backoffs = [ReconnectBackoff(rng, _FIRST_S, _MAX_S) for _ in streams]
        self._mono_retry_at_s: dict[int, float] = {}
        self._mono_resumed_s: dict[int, float] = {}
        self._guards = [_Guard(self, stream_no) for stream_no in range(len(streams))]
        for stream_no in range(len(streams)):
            self._report(stream_no)

    def __contains__(self, stream_no: int) -> bool:
        return stream_no in self.isolated

    def guard(self, stream_no: int) -> _Guard:
        """For ``with``: if the store refuses what the block does, its rest is skipped and the stream is
        isolated."""
        return self._guards[stream_no]

    def isolate(self, stream_no: int, error: StoreRefused) -> None:
        """The store refused a command of this stream: leave it alone, longer after each time."""
        was_isolated = stream_no in self.isolated
        faults = self._store.key_faults(self._streams[stream_no])
        if faults or not was_isolated:
            self._describe(stream_no, faults, str(error))
        if was_isolated:
            return
        if self._mono_s() - self._mono_resumed_s.get(stream_no, 0.0) > _STABLE_S:
            self._backoffs[stream_no].reset()
        self._postpone(stream_no)
        self._report(stream_no)
        for callback in self.on_isolated:
            callback(stream_no)

    def due(self) -> list[int]:
        """The isolated streams that may be tried now: their wait is over, and no key has a known fault."""
        now = self._mono_s()
        ready = []
        for stream_no in [one for one in self.isolated if self._mono_retry_at_s[one] <= now]:
            self._postpone(stream_no)
            faults = self._store.key_faults(self._streams[stream_no])
            if any(fault.blocks or self._role == "reaper" for fault in faults):
                self._describe(stream_no, faults, "")
            else:
                ready.append(stream_no)
        return ready

    def resume(self, stream_no: int) -> None:
        """The store takes commands of this stream again."""
        del self.isolated[stream_no]
        self._mono_resumed_s[stream_no] = self._mono_s()
        self._report(stream_no)
        log.info("stream.resumed", extra={"stream": self._streams[stream_no].stream})

    def _postpone(self, stream_no: int) -> None:
        self._mono_retry_at_s[stream_no] = self._mono_s() + self._backoffs[stream_no].next_wait_s()

    def _describe(self, stream_no: int, faults: Sequence[KeyFault], error: str) -> None:
        """Say why the stream is isolated, once for each reason."""
        text = describe(faults) or error[:_ERROR_CHARS]
        if not self.isolated.get(stream_no, "").startswith(text):
            self.isolated[stream_no] = text
            hint = "; ".join(fault.repair for fault in faults)
            if not faults and lacks_permission(error):
                hint = store_advice(error)
                self.isolated[stream_no] = f"{text}. What to do: {hint}"
            log.error("stream.isolated", extra={
                "stream": self._streams[stream_no].stream, "error": text,
                "keys": [fault.key for fault in faults], "hint": hint,
            })  # fmt: skip

    def _report(self, stream_no: int) -> None:
        labels = (self._streams[stream_no].stream, self._role)
        self._set_gauge("z_novel_stream_isolated", labels, float(stream_no in self.isolated))

    @property
    def all_isolated(self) -> bool:
        """Whether no stream works."""
        return len(self.isolated) == len(self._streams)

    def warnings(self) -> list[str]:
        """One text for each isolated stream: its key and the command that repairs it."""
        return [
            f"stream {self._streams[one].stream} is isolated: {text}" for one, text in self.isolated.items()
        ]


def describe(faults: Sequence[KeyFault]) -> str:
    """The faults as one text."""
    return "; ".join(f"key {fault.key} {fault.problem}, repair: {fault.repair}" for fault in faults)
