"""Handlers for the test with a real systemd: one sleeps, one exhausts memory."""

import time
from typing import Any

_STEP_BYTES = 16 * 1024 * 1024


class Nap:
    """Sleeps ``payload.s`` seconds."""

    timeout = 120.0

    def handle(self, job: Any) -> None:
        """Sleep, as simulated work."""
        time.sleep(job.payload["s"])


class Eat:
    """Allocates memory until the kernel kills the process."""

    timeout = 60.0

    def handle(self, job: Any) -> None:
        """Write to every page, so that it is really allocated."""
        eaten = []
        while True:
            eaten.append(b"\1" * _STEP_BYTES)
