"""taskiq on a Redis stream: acknowledgement after the run, claims after 5 s instead of 10 minutes."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import acts
from taskiq import SimpleRetryMiddleware
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(
    os.environ["PEER_REDIS_URL"],
    consumer_id="0",
    idle_timeout=5000,
    unacknowledged_lock_timeout=5,
    xread_count=1,
    unacknowledged_batch_size=1,
).with_middlewares(SimpleRetryMiddleware(default_retry_count=3))


@broker.task(task_name="run", retry_on_error=True)
async def run(job: dict[str, Any]) -> None:
    """One job."""
    acts.act(job)


def feeder() -> Callable[[dict[str, Any]], object]:
    """The function that enqueues a job."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(broker.startup())
    return lambda job: loop.run_until_complete(run.kiq(job))
