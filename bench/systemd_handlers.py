"""Handlers for the run under a real systemd: one takes its time, one takes all the memory there is."""

import time
from typing import Any

_STEP_BYTES = 16 * 1024 * 1024


class Nap:
    """Sleeps ``payload.s`` seconds."""

    timeout = 120.0

    def handle(self, job: Any) -> None:
        """The sleep stands for work."""
        time.sleep(job.payload["s"])


class Eat:
    """Takes memory until the kernel ends its process."""

    timeout = 60.0

    def handle(self, job: Any) -> None:
        """Every page is written to, so that it is really there."""
        eaten = []
        while True:
            eaten.append(b"\1" * _STEP_BYTES)
