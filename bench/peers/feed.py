"""``feed.py MODULE``: enqueue the jobs that come in, one JSON a line, and say of each whether that worked."""

import importlib
import json
import sys


def main() -> None:
    """Answer each line with ``ok ID``, or ``unknown ID`` where the client raised."""
    enqueue = importlib.import_module(sys.argv[1]).feeder()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            enqueue(job)
        except Exception:  # whatever a client raises: it is unknown whether the job is in
            print("unknown", job["id"], flush=True)
        else:
            print("ok", job["id"], flush=True)


if __name__ == "__main__":
    main()
