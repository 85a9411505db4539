"""Control socket between the supervisor and one child: small messages each way, with descriptors.

A socket of kind SEQPACKET keeps each message whole and reports the end of the other side at once.
"""

import array
import os
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from ..telemetry.metrics import MetricsBuffer

#: Longest message; deltas and stack dumps are cut to fit well below.
MAX_MESSAGE_BYTES = 128 * 1024
_MAX_FDS = 16


class Standby(msgspec.Struct, tag=True, frozen=True):
    """To a child, before its Start: that may be long in coming, be ready to be the next reader or reaper."""

    number: int
    parent_pid: int
    instance: str


class Start(msgspec.Struct, tag=True, frozen=True):
    """To a child, first of all but for a Standby: what it is, and the settings as JSON.

    A worker's channel or the reader's marks come along. ``blackbox_fd`` is inherited under that number:
    faulthandler writes the stacks of a crash there.
    """

    role: str
    slot: int
    parent_pid: int
    blackbox_fd: int
    settings: bytes


class Attach(msgspec.Struct, tag=True, frozen=True):
    """To the reader: worker ``slot`` has a new channel (its three descriptors come along)."""

    slot: int
    generation: int


class WorkerExited(msgspec.Struct, tag=True, frozen=True):
    """To the reader: that worker has ended. ``charge``: what it had started counts as a death or time-out."""

    slot: int
    generation: int
    cause: str
    charge: bool
    timed_out: bool = False
    details: dict[str, Any] = {}


class ExitReclaimed(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: the reader has dealt with all that a gone worker held."""

    slot: int
    generation: int


class Retire(msgspec.Struct, tag=True, frozen=True):
    """To the reader: give this worker nothing more."""

    slot: int
    generation: int


class SyncDone(msgspec.Struct, tag=True, frozen=True):
    """To a new reader: that was every worker there is. Before this it does not know what is in flight."""


class Drain(msgspec.Struct, tag=True, frozen=True):
    """To reader and reaper: finish what is under way, take nothing new, end."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """From a child: it is set up and works."""


class HeldElsewhere(msgspec.Struct, tag=True, frozen=True):
    """From the reader: another service holds the instance's name; its lease ends in ``left_s`` seconds.

    ``renewed``: it did since the reader first asked, so it lives.
    """

    by: str
    left_s: float
    renewed: bool


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """From a child: it could not be set up; ``exit_code`` is what the service should end with."""

    error: str
    exit_code: int


class Report(msgspec.Struct, tag=True, frozen=True):
    """From a child: counts since the last report, trouble with its dependency (None: there is none), and for
    the reader the number of completed read cycles."""

    counts: list[tuple[str, tuple[str, ...], float]] = []
    gauges: list[tuple[str, tuple[str, ...], float]] = []
    histograms: list[tuple[str, tuple[str, ...], list[int], float]] = []
    trouble: str | None = None
    progress: int = 0


Message = (
    Standby
    | Start
    | Attach
    | SyncDone
    | WorkerExited
    | ExitReclaimed
    | Retire
    | Drain
    | Ready
    | HeldElsewhere
    | StartFailed
    | Report
)
_decoder = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.Encoder().encode


class ControlSocket:
    """One end of the line."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple["ControlSocket", socket.socket]:
        """The parent's end, and the socket that the child inherits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE_BYTES)
        return cls(ours), theirs

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    def report(self, tally: MetricsBuffer, trouble: str | None, progress: int = 0) -> None:
        """Send what was counted; it stays counted while the other side is not taking messages."""
        delta = tally.take()
        if not self.send(Report(delta.counts, delta.gauges, delta.histograms, trouble, progress)):
            tally.put_back(delta)

    def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send now or not at all: False where the other side is not taking messages (or is gone).

        Raises ValueError for a message that no receiver would take.
        """
        data = _encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are taken")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], rights)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message that is there, with its descriptors, or None.

        Raises EOFError when the other side has ended and all it sent was received.
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
        """Hang up."""
        self._sock.close()
