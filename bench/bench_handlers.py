"""Handlers that do nothing, only say when they were started, or wait in vain."""

import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Self

from jobworker.worker import Unavailable

#: How long `WaitsForPeer` waits for an answer: as long as a client of a vector store might.
_ANSWER_WITHIN_S = 10.0


class Noop:
    """Returns at once: what is measured is everything but the work."""

    def handle(self, job: Any) -> None:
        """Nothing."""


class Many:
    """Takes many jobs at once, each batch for as long as a small model might."""

    max_batch = 32

    def handle_batch(self, jobs: Sequence[Any]) -> list[BaseException | None]:
        """Sleep."""
        time.sleep(0.1)  # stands for the work
        return [None] * len(jobs)


class WaitsForPeer:
    """WaitsForPeer the peer at BENCH_PEER for something that its jobs need, and finds it unavailable."""

    max_batch = 32

    def handle_batch(self, jobs: Sequence[Any]) -> list[BaseException | None]:
        """Wait for an answer."""
        host, _, port = os.environ["BENCH_PEER"].rpartition(":")
        try:
            with socket.create_connection((host, int(port)), _ANSWER_WITHIN_S) as peer:
                peer.recv(1)
        except TimeoutError:
            return [Unavailable("no answer") for _ in jobs]
        return [None] * len(jobs)


class Stamps:
    """A file that several processes append lines ``<job id> <monotonic ns>`` to; lines are never torn."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    @classmethod
    def from_environment(cls) -> Self | None:
        """The file named by BENCH_STAMPS, if it is set."""
        path = os.environ.get("BENCH_STAMPS")
        return cls(path) if path else None

    def write(self, job_id: str, mono_ns: int) -> None:
        """Append one line."""
        os.write(self._fd, f"{job_id} {mono_ns}\n".encode())


class Stamp:
    """Writes when each job was started, by the clock that all processes of a host share."""

    def __init__(self) -> None:
        self._stamps = Stamps(os.environ["BENCH_STAMPS"])

    def handle(self, job: Any) -> None:
        """The time first; writing it down is not part of what is measured."""
        mono_ns = time.monotonic_ns()
        self._stamps.write(job.id, mono_ns)
