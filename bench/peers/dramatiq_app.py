"""Dramatiq: heartbeat timeout of 5 s instead of 60; maintenance with 10 % of commands instead of 0.1 %."""

import os
from collections.abc import Callable
from typing import Any

import acts
import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(
    RedisBroker(url=os.environ["PEER_REDIS_URL"], heartbeat_timeout=5000, maintenance_chance=100_000)
)


@dramatiq.actor(max_retries=3, min_backoff=100, max_backoff=2000)
def run(job: dict[str, Any]) -> None:
    """One job."""
    acts.act(job)


def feeder() -> Callable[[dict[str, Any]], object]:
    """The function that enqueues a job."""
    return run.send
