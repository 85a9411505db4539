"""RQ: three immediate retries; maintenance every 5 s instead of every 10 minutes."""

import os
from collections.abc import Callable
from typing import Any

import acts
from redis import Redis
from rq import Queue, Retry


def run(job: dict[str, Any]) -> None:
    """One job."""
    acts.act(job)


def feeder() -> Callable[[dict[str, Any]], object]:
    """The function that enqueues a job."""
    chaos = Queue("chaos", connection=Redis.from_url(os.environ["PEER_REDIS_URL"]))
    return lambda job: chaos.enqueue("rq_app.run", job, retry=Retry(max=3), job_timeout=10)
