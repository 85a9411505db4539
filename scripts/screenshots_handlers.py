"""Handlers that take their time and fail as real ones do, for the pictures of the documentation."""

import random
import time

from jobworker.worker import Job, PermanentError

_TROUBLES = (
    "ConnectionError: milvus:19530 refused the connection",
    "MilvusException: <(code=1100, message=vector dimension 384, schema says 1024)>",
    "TimeoutError: no answer from the summary model within 20 s",
)


class _Steady:
    """Works for some milliseconds; of a thousand jobs some fail for now, and some for good."""

    mean_s = 0.02
    for_now = 8
    for_good = 1

    def handle(self, job: Job) -> None:
        """Sleep, and sometimes raise."""
        chance = random.Random(f"{job.id} {job.retry_count}")
        time.sleep(chance.expovariate(1 / self.mean_s))  # the work that the picture is of
        lot = chance.randrange(1000)
        if lot < self.for_good:
            raise PermanentError("the payload names tenant t002, the envelope t001")
        if lot < self.for_good + self.for_now:
            raise RuntimeError(chance.choice(_TROUBLES))


class Embed(_Steady):
    """Stands for embedding_batch."""

    mean_s = 0.03


class WriteBack(_Steady):
    """Stands for summary_write_back."""

    mean_s, for_now, for_good = 0.2, 60, 8


class Rebuild(_Steady):
    """Stands for index_rebuild."""

    mean_s, for_now, for_good = 25.0, 0, 0


class Audit(_Steady):
    """Stands for audit."""

    mean_s, for_now, for_good = 0.004, 1, 0
