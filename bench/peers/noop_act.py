"""Job and client of the peers in ``run.py``. Standard library only: each peer has its own environment."""

import functools
import os
import sys
import time
from collections.abc import Callable

TEXT = "Snow had fallen on the pass all night, and the road below the inn was gone by the morning."


@functools.cache
def _stamps() -> int | None:
    path = os.environ.get("BENCH_STAMPS")
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if path else None


def act(job: dict[str, object]) -> None:
    """Append ``<job id> <monotonic ns>`` to the file BENCH_STAMPS, if it is set."""
    mono_ns, stamps = time.monotonic_ns(), _stamps()
    if stamps is not None:
        os.write(stamps, f"{job['id']} {mono_ns}\n".encode())


def job(number: int) -> dict[str, object]:
    """A job with the payload of the other benchmarks."""
    return {
        "id": f"bench-{number:012d}", "tenant_id": "t001", "project_id": "p123",
        "payload": {"tenant_id": "t001", "project_id": "p123", "ids": [f"seg-{number:08d}"], "texts": [TEXT]},
    }  # fmt: skip


def enqueue(send: Callable[[dict[str, object]], object]) -> None:
    """Run the command line of a peer's module."""
    command, jobs = sys.argv[1], int(sys.argv[2])
    if command == "fill":
        for number in range(jobs):
            send(job(number))
        return
    due_s = time.monotonic()
    for number in range(jobs):
        due_s += float(sys.argv[3])
        time.sleep(max(0.0, due_s - time.monotonic()))  # the interval is intended
        one = job(number)
        mono_ns = time.monotonic_ns()
        send(one)
        print(one["id"], mono_ns, flush=True)
