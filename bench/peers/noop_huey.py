"""huey with a no-op job, or one that records its start.

noop_huey.py fill JOBS               enqueue jobs
noop_huey.py send JOBS EVERY_S       enqueue one job at a time; prints ``<job id> <monotonic ns>`` of each
"""

import os

import noop_act
from huey import RedisHuey

huey = RedisHuey("bench", url=os.environ["PEER_REDIS_URL"], results=False)


@huey.task()
def run(job: dict[str, object]) -> None:
    """One job."""
    noop_act.act(job)


if __name__ == "__main__":
    # The consumer imports the module by its name, so jobs must name it so.
    import noop_huey

    noop_act.enqueue(noop_huey.run)
