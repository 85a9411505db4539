"""Minimal consumer: XREADGROUP and XACK with the plain client; jobs are not parsed.

    bare.py STREAM GROUP CONSUMER      with BENCH_REDIS_URL; with BENCH_STAMPS it records arrival times

It is the baseline: any at-least-once consumer on the same server and client has these costs. It reads until
it is killed.
"""

import os
import signal
import sys
import time

import orjson
from bench_handlers import Stamps
from rig import connect

#: Entries of a read: enough to spread the cost of the round trip.
_COUNT = 100
_BLOCK_MS = 2000


def consume(url: str, stream: str, group: str, consumer: str) -> None:
    """Read, and acknowledge each read together with the next one."""
    stamps = Stamps.from_environment()
    with connect(url) as client:
        client.ping()
        print("ready", flush=True)
        done: list[bytes] = []
        while True:
            pipe = client.pipeline(transaction=False)
            if done:
                pipe.xack(stream, group, *done)
            pipe.xreadgroup(group, consumer, {stream: ">"}, count=_COUNT, block=_BLOCK_MS)
            reply = pipe.execute()[-1]
            mono_ns = time.monotonic_ns()
            entries = reply[0][1] if reply else []
            if stamps is not None:
                for _, fields in entries:
                    stamps.write(orjson.loads(fields[b"data"])["id"], mono_ns)
            done = [entry_id for entry_id, _ in entries]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    consume(os.environ["BENCH_REDIS_URL"], *sys.argv[1:])
