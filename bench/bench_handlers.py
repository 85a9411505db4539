"""Handlers that do nothing, or only say when they were started."""

import os
import time
from typing import Any, Self


class Noop:
    """Returns at once: what is measured is everything but the work."""

    def handle(self, job: Any) -> None:
        """Nothing."""


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
