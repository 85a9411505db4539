"""Handlers that do as each job's payload says, and write every try down for the oracle."""

import os
import signal
import time
from collections.abc import Sequence

from chaos_events import END, FAIL, START, EventWriter

from jobworker.worker import Job, PermanentError

#: What a job takes, or a batch of them together.
WORK_S = 0.01
#: A stopped worker is killed after this; far above what a job takes on a machine that is short of processors.
TIMEOUT_S = 3.0


def _act(writer: EventWriter, job: Job) -> None:
    """Succeed, fail or take the worker along."""
    match job.payload["fate"]:
        case "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        case "permanent":
            raise PermanentError("never")
        case "exhausted":
            raise ValueError("not now, nor ever")
        case "flaky" if job.retry_count == 0:
            raise ConnectionError("not now")
    writer.effect(job.tenant_id, job.id, job.payload["text"])


class One:
    """Takes one job at a time."""

    timeout = TIMEOUT_S

    def __init__(self) -> None:
        self._writer = EventWriter()

    def handle(self, job: Job) -> None:
        """Write the start, work, act, write how it ended."""
        tries = [(job.id, job.retry_count)]
        self._writer.write(START, tries)
        time.sleep(WORK_S)  # stands for the work
        try:
            _act(self._writer, job)
        except Exception:
            self._writer.write(FAIL, tries)
            raise
        self._writer.write(END, tries)


class Many:
    """Takes up to eight jobs at once: what becomes of the mates of a job that kills its worker?"""

    max_batch = 8
    timeout = TIMEOUT_S

    def __init__(self) -> None:
        self._writer = EventWriter()

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """As `One`, the work shared."""
        self._writer.write(START, [(job.id, job.retry_count) for job in jobs])
        time.sleep(WORK_S)  # stands for the work
        return [self._outcome(job) for job in jobs]

    def _outcome(self, job: Job) -> BaseException | None:
        tries = [(job.id, job.retry_count)]
        try:
            _act(self._writer, job)
        except Exception as error:
            self._writer.write(FAIL, tries)
            return error
        self._writer.write(END, tries)
        return None
