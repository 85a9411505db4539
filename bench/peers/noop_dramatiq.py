"""Dramatiq with a no-op job, or one that records its start.

noop_dramatiq.py fill JOBS               enqueue jobs
noop_dramatiq.py send JOBS EVERY_S       enqueue one job at a time; prints ``<job id> <monotonic ns>`` of each
"""

import os

import dramatiq
import noop_act
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["PEER_REDIS_URL"]))


@dramatiq.actor
def run(job: dict[str, object]) -> None:
    """One job."""
    noop_act.act(job)


if __name__ == "__main__":
    noop_act.enqueue(run.send)
