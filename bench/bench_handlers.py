"""Handlers of the benchmarks: no-op, batch, hung dependency, start times."""

import os
import socket
import time
from collections.abc import Sequence
from typing import Any, Self

from jobworker.worker import Unavailable

#: Timeout of `WaitsForPeer`, like that of a vector store's client.
_ANSWER_WITHIN_S = 10.0


class Noop:
    """No-op handler: everything but the work is measured."""

    def handle(self, job: Any) -> None:
        """Do nothing."""


class Many:
    """Batch handler; a batch takes as long as with a small model."""

    max_batch = 32

    def handle_batch(self, jobs: Sequence[Any]) -> list[BaseException | None]:
        """Sleep."""
        time.sleep(0.1)  # simulated work
        return [None] * len(jobs)


class WaitsForPeer:
    """Handler that waits in vain for the dependency at BENCH_PEER and reports it unavailable."""

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
    """File of start times: processes append lines ``<job id> <monotonic ns>``, each in one write."""

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


class _Stamping:
    def __init__(self) -> None:
        self._stamps = Stamps(os.environ["BENCH_STAMPS"])
        self._work_s = float(os.environ.get("BENCH_WORK_MS", "0")) / 1000


class Stamp(_Stamping):
    """Handler that records when each job starts, by the clock that all processes of a host share."""

    def handle(self, job: Any) -> None:
        """Read the clock first: the write is not measured."""
        mono_ns = time.monotonic_ns()
        self._stamps.write(job.id, mono_ns)
        if self._work_s:
            time.sleep(self._work_s)  # simulated work


class NoopBatch:
    """No-op handler of batches."""

    max_batch = 100

    def handle_batch(self, jobs: Sequence[Any]) -> list[BaseException | None]:
        """Do nothing."""
        return [None] * len(jobs)


class StampBatch(_Stamping):
    """`Stamp` as a handler of batches."""

    max_batch = 100

    def handle_batch(self, jobs: Sequence[Any]) -> list[BaseException | None]:
        """Read the clock first: the write is not measured."""
        mono_ns = time.monotonic_ns()
        for job in jobs:
            self._stamps.write(job.id, mono_ns)
        return [None] * len(jobs)


class Uneven(_Stamping):
    """`Stamp` whose jobs take 10 ms, and six 5 s, close together."""

    def handle(self, job: Any) -> None:
        """Note the start, then sleep."""
        self._stamps.write(job.id, time.monotonic_ns())
        is_long = int(job.id.removeprefix("bench-")) in range(100, 112, 2)
        time.sleep(5.0 if is_long else 0.01)  # simulated work


class Sleep:
    """Sleeps for BENCH_SLEEP_S seconds and does nothing else."""

    def __init__(self) -> None:
        self._sleep_s = float(os.environ["BENCH_SLEEP_S"])

    def handle(self, job: Any) -> None:
        """Sleep."""
        time.sleep(self._sleep_s)  # the job of this handler
