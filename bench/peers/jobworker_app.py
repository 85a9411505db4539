"""jobworker with its defaults, except for the short backoff of all peers."""

import os
from collections.abc import Callable
from typing import Any

from chaos_load import ONE, STREAM

from jobworker.worker import Producer


def feeder() -> Callable[[dict[str, Any]], object]:
    """The function that enqueues a job."""
    producer = Producer(os.environ["PEER_REDIS_URL"])
    return lambda job: producer.enqueue(
        ONE, {"fate": job["fate"], "text": job["text"]},
        id=job["id"], tenant_id=job["tenant_id"], project_id="p1", stream=STREAM,
    )  # fmt: skip
