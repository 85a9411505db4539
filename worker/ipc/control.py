"""Control socket between the supervisor and one child: small messages each way, with file descriptors.

A SEQPACKET socket keeps each message whole and reports the exit of the other side at once.
"""

import array
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ..cron.table import CronTable
from ..flow import FlowConfig
from ..telemetry.line_writer import take_dropped_lines
from ..telemetry.metrics import Gauge, MetricsBuffer

#: Longest message. Reports and stack dumps are cut to stay well below.
MAX_MESSAGE_BYTES = 128 * 1024
_MAX_FDS = 16
#: Most warnings of a report, and most characters of one.
_WARNINGS, _WARNING_CHARS = 16, 1000
#: Interval of reports without news (seconds). They show that a process without a heartbeat in shared memory
#: is alive. Short against the time after which the supervisor calls it stuck.
ALIVE_EVERY_S = 2.0


class Attach(msgspec.Struct, tag=True, frozen=True):
    """To the reader: worker ``slot`` has a new channel, whose three descriptors are attached."""

    slot: int
    generation: int


class WorkerExited(msgspec.Struct, tag=True, frozen=True):
    """To the reader: a worker exited. ``charge``: each job that it had started gets a death or a timeout."""

    slot: int
    generation: int
    cause: str
    charge: bool
    timed_out: bool = False
    details: dict[str, Any] = {}


class ExitReclaimed(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: the reader has reclaimed all jobs of an exited worker."""

    slot: int
    generation: int


class Retire(msgspec.Struct, tag=True, frozen=True):
    """To the reader: dispatch no more jobs to this worker."""

    slot: int
    generation: int


class SyncDone(msgspec.Struct, tag=True, frozen=True):
    """To a new reader: all workers were announced. Before this it does not know which jobs are in flight."""


class Drain(msgspec.Struct, tag=True, frozen=True):
    """To reader and reaper: take nothing new, finish the work under way, exit."""


class Configure(msgspec.Struct, tag=True, frozen=True):
    """To the reader: limits and weights of the configuration file, which was read again."""

    flow: FlowConfig


class SetCron(msgspec.Struct, tag=True, frozen=True):
    """To the reaper: the cron tables of the configuration file, read again."""

    tables: tuple[CronTable, ...]


class ShowBatch(msgspec.Struct, tag=True, frozen=True):
    """To the reaper: look a batch up. The answer has the same number."""

    number: int
    id: str


class BatchShown(msgspec.Struct, tag=True, frozen=True):
    """From the reaper: a batch (None: there is no such batch), or why the store does not answer."""

    number: int
    batch: dict[str, Any] | None
    error: str = ""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """From a child: it is set up and running."""


class HeldElsewhere(msgspec.Struct, tag=True, frozen=True):
    """From the reader: another service holds the instance's name; its lease ends in ``left_s`` seconds.

    ``renewed``: it renewed the lease since the reader first tried, so it is alive.
    """

    by: str
    left_s: float
    renewed: bool


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """From a child: its set-up failed. ``exit_code`` is the exit code for the service."""

    error: str
    exit_code: int


class Report(msgspec.Struct, tag=True, frozen=True):
    """From a child: metrics since the last report, and the error of a failing dependency (None: all answer).

    ``progress`` is the reader's number of completed read cycles. ``warnings`` are faults that a person must
    repair and that stop only a part of the work.
    """

    counts: list[tuple[str, tuple[str, ...], float]] = []
    gauges: list[Gauge] = []
    histograms: list[tuple[str, tuple[str, ...], list[int], float]] = []
    trouble: str | None = None
    progress: int = 0
    warnings: list[str] = []


Message = (
    Attach
    | SyncDone
    | WorkerExited
    | ExitReclaimed
    | Retire
    | Drain
    | Configure
    | SetCron
    | ShowBatch
    | BatchShown
    | Ready
    | HeldElsewhere
    | StartFailed
    | Report
)
_decoder = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.Encoder().encode


class ControlSocket:
    """One end of the socket. It never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reported: tuple[str | None, int, list[str]] | None = None
        self._mono_reported_s = 0.0

    @classmethod
    def pair(cls) -> tuple["ControlSocket", socket.socket]:
        """The parent's end, and the socket that the child gets."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE_BYTES)
        return cls(ours), theirs

    def fileno(self) -> int:
        """File descriptor, for selectors."""
        return self._sock.fileno()

    def report(
        self,
        metrics: MetricsBuffer,
        trouble: str | None,
        progress: int = 0,
        warnings: Sequence[str] = (),
        *,
        at_least_every_s: float = math.inf,
    ) -> bool:
        """Send what is new since the last report. Metrics stay in the buffer while the other side's is full.

        Each report wakes the supervisor, so one without news is sent only every ``at_least_every_s``. False
        if there was nothing to send.
        """
        if dropped := take_dropped_lines():
            metrics.count("z_novel_log_lines_dropped_total", by=dropped)
        texts = [text[:_WARNING_CHARS] for text in warnings[:_WARNINGS]]
        trouble = trouble and trouble[:_WARNING_CHARS]
        now, state = time.monotonic(), (trouble, progress, texts)
        if not metrics and state == self._reported and now - self._mono_reported_s < at_least_every_s:
            return False
        delta = metrics.take()
        if self.send(Report(delta.counts, delta.gauges, delta.histograms, trouble, progress, texts)):
            self._reported, self._mono_reported_s = state, now
        else:
            metrics.put_back(delta)
        return True

    def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send without waiting; False if the other side's buffer is full or the other side has exited.

        Raises ValueError for a message above `MAX_MESSAGE_BYTES`.
        """
        data = _encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], rights)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message with its descriptors, or None if there is none yet.

        Raises EOFError when the other side has exited and all its messages were received.
        """
        try:
            data, ancillary, _, _ = self._sock.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_SPACE(4 * _MAX_FDS))
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
        for fd in fds:
            os.set_inheritable(fd, False)
        return _decoder.decode(data), list(fds)

    def close(self) -> None:
        """Close this end."""
        self._sock.close()
