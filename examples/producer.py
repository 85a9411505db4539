"""Producer in Python: one job, a delayed job, and several jobs in one round trip.

python examples/producer.py redis://localhost:6379/0 Ada Grace Barbara
"""

import sys

from jobworker.worker import NewJob, Producer

#: Seconds until the second job becomes due.
_DELAY_S = 1.0


def send(redis_url: str, names: list[str]) -> list[str]:
    """Enqueue one `greet` job per name and return the ids.

    Each call returns after Redis has confirmed the jobs. Raises ValueError for a job that the service would
    dead-letter, StoreUnavailable where Redis does not answer: then enqueue again under the same ids.
    """
    first, second, *rest = names
    with Producer(redis_url) as producer:
        ids = [
            producer.enqueue("greet", {"name": first}, metadata={"request_id": "example-1"}),
            producer.enqueue("greet", {"name": second}, delay=_DELAY_S, timeout=5),
        ]
        return ids + producer.enqueue_many(NewJob("greet", {"name": name}) for name in rest)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: producer.py REDIS_URL NAME NAME [NAME ...]")
    print(*send(sys.argv[1], sys.argv[2:]), sep="\n")
