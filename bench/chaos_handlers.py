"""Handlers of the chaos test: they act as the payload says, and record every try."""

import os
import signal
import time
from collections.abc import Sequence

from chaos_events import END, FAIL, START, EventWriter

from jobworker.worker import Job, PermanentError

#: Duration of a job, or of a whole batch.
WORK_S = 0.01
#: Job timeout, after which a stopped worker is killed; far longer than a job on a busy machine.
TIMEOUT_S = 3.0


def _act(writer: EventWriter, job: Job) -> None:
    """Succeed, fail or kill the worker."""
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
    """Handler of single jobs."""

    timeout = TIMEOUT_S

    def __init__(self) -> None:
        self._writer = EventWriter()

    def handle(self, job: Job) -> None:
        """Record the start, work, act, record the outcome."""
        tries = [(job.id, job.retry_count)]
        self._writer.write(START, tries)
        time.sleep(WORK_S)  # simulated work
        try:
            _act(self._writer, job)
        except Exception:
            self._writer.write(FAIL, tries)
            raise
        self._writer.write(END, tries)


class Many:
    """Batch handler: shows what happens to the other jobs of a batch whose job kills the worker."""

    max_batch = 8
    timeout = TIMEOUT_S

    def __init__(self) -> None:
        self._writer = EventWriter()

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        """As `One`, with one piece of work for the whole batch."""
        self._writer.write(START, [(job.id, job.retry_count) for job in jobs])
        time.sleep(WORK_S)  # simulated work
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
