"""Handlers with realistic durations and failures, for the screenshots of the documentation."""

import random
import time

from jobworker.worker import Job, PermanentError

_ERRORS = (
    "ConnectionError: milvus:19530 refused the connection",
    "MilvusException: <(code=1100, message=vector dimension 384, schema says 1024)>",
    "TimeoutError: no answer from the summary model within 20 s",
)


class _Simulated:
    """Sleeps for a random time; of 1,000 jobs some fail temporarily and some permanently."""

    mean_s = 0.02
    temporary_per_1000 = 8
    permanent_per_1000 = 1

    def handle(self, job: Job) -> None:
        """Sleep, then raise for some of the jobs."""
        rng = random.Random(f"{job.id} {job.retry_count}")
        time.sleep(rng.expovariate(1 / self.mean_s))  # the simulated work
        number = rng.randrange(1000)
        if number < self.permanent_per_1000:
            raise PermanentError("the payload names tenant t002, the envelope t001")
        if number < self.permanent_per_1000 + self.temporary_per_1000:
            raise RuntimeError(rng.choice(_ERRORS))


class Embed(_Simulated):
    """Simulates embedding_batch."""

    mean_s = 0.03


class WriteBack(_Simulated):
    """Simulates summary_write_back."""

    mean_s, temporary_per_1000, permanent_per_1000 = 0.2, 60, 8


class Rebuild(_Simulated):
    """Simulates index_rebuild."""

    mean_s, temporary_per_1000, permanent_per_1000 = 25.0, 0, 0


class Audit(_Simulated):
    """Simulates audit."""

    mean_s, temporary_per_1000, permanent_per_1000 = 0.004, 1, 0
