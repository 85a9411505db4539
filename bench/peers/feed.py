"""``feed.py MODULE``: enqueues jobs from stdin, one JSON a line, and prints the result of each."""

import importlib

# The environments of the peers have no orjson.
import json
import sys


def main() -> None:
    """Answer each line with ``ok ID``, or ``unknown ID`` if the client raised."""
    enqueue = importlib.import_module(sys.argv[1]).feeder()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            enqueue(job)
        except Exception:  # after any error of a client it is unknown whether the job is enqueued
            print("unknown", job["id"], flush=True)
        else:
            print("ok", job["id"], flush=True)


if __name__ == "__main__":
    main()
