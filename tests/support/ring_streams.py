"""Two real processes over a ring, one of them killed at random moments, and every frame counted.

``python -m support.ring_streams both|producer|consumer SEED`` in the folder of the tests. Frames carry their
number and a body that follows from it, so that a torn, lost, repeated or foreign one cannot pass.
"""

import mmap
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import NoReturn

from jobworker.worker.ipc.channel import Channel
from jobworker.worker.ipc.ring import Ring
from jobworker.worker.supervision.pdeathsig import tie_to_parent

FRAMES = 100_000
ROUNDS = 30
#: How long a process runs before it is killed (seconds): from its very start to thousands of frames.
LIVES_S = (0.0, 0.01)
#: The whole of it; a peer that hangs ends the program.
WITHIN_S = 30
COUNT = 0

BODIES = [random.Random(i).randbytes(i % 131) for i in range(997)]


def frame(number: int) -> bytes:
    body = number.to_bytes(8, "big") + BODIES[number % len(BODIES)]
    return zlib.crc32(body).to_bytes(4, "big") + body


def number_of(seen: memoryview) -> int:
    body = bytes(seen[4:])
    assert zlib.crc32(body) == int.from_bytes(seen[:4], "big"), f"torn frame of {len(seen)} bytes"
    number = int.from_bytes(body[:8], "big")
    assert bytes(seen) == frame(number)
    return number


def produce(ring: Ring, start: int, stop: int, count: memoryview) -> None:
    """``count`` says how many pushes have returned."""
    for number in range(start, stop):
        data = frame(number)
        while not ring.push(data):
            os.sched_yield()
        count[COUNT] = number + 1


def consume(ring: Ring, expected: int, count: memoryview | None = None) -> int:
    """Take what is there, which must continue at ``expected``; ``count`` says how many were dealt with."""
    for seen, tail in ring.frames():
        number = number_of(seen)
        assert number == expected, f"frame {number} where {expected} is due"
        expected += 1
        if count is not None:
            count[COUNT] = expected
        ring.release(tail)
    return expected


def child(action: Callable[[], None]) -> int:
    parent_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _run_and_leave(action, parent_pid)


def _run_and_leave(action: Callable[[], None], parent_pid: int) -> NoReturn:
    status = 1
    try:
        tie_to_parent(parent_pid)
        action()
        status = 0
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
    finally:
        os._exit(status)


def end(pid: int, kill: bool) -> None:
    if kill:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (-signal.SIGKILL if kill else 0), f"peer ended with {code}"


def both(ring: Ring, count: memoryview, rng: random.Random) -> int:
    """No process dies: a hundred thousand frames, each whole and in order."""
    pid = child(lambda: produce(ring, 0, FRAMES, count))
    taken = 0
    while taken < FRAMES:
        taken = consume(ring, taken)
        os.sched_yield()
    end(pid, kill=False)
    return taken


def producer(ring: Ring, count: memoryview, rng: random.Random) -> int:
    """What a killed producer had pushed is there, whole; its successor continues behind it."""
    taken = 0
    for _ in range(ROUNDS):
        start = taken
        pid = child(lambda start=start: produce(ring, start, start + FRAMES, count))  # type: ignore[misc]
        until = time.monotonic() + rng.uniform(*LIVES_S)
        while time.monotonic() < until:
            taken = consume(ring, taken)
        end(pid, kill=True)
        taken = consume(ring, taken)
        assert taken >= count[COUNT], "a frame was pushed and is not there"
    return taken


def consumer(ring: Ring, count: memoryview, rng: random.Random) -> int:
    """A killed consumer's successor finds the frame that was not released, and every one after it."""
    pushed = 0
    for _ in range(ROUNDS):
        pid = child(lambda: consume_for_ever(ring, count))
        until = time.monotonic() + rng.uniform(*LIVES_S)
        while time.monotonic() < until:
            pushed += ring.push(frame(pushed))
        end(pid, kill=True)
    assert consume(ring, first_there(ring, count), count) == pushed
    return pushed


def consume_for_ever(ring: Ring, count: memoryview) -> None:
    expected = first_there(ring, count)
    while True:
        expected = consume(ring, expected, count)
        os.sched_yield()


def first_there(ring: Ring, count: memoryview) -> int:
    """The first frame in the ring: the one after the last that was dealt with, or that one unreleased."""
    dealt_with = int(count[COUNT])
    for seen, _ in ring.frames():
        number = number_of(seen)
        assert number in (dealt_with, dealt_with - 1), f"frame {number}, and {dealt_with} were dealt with"
        return number
    return dealt_with


def main() -> None:
    mode, seed = sys.argv[1:]
    signal.alarm(WITHIN_S)
    channel = Channel.create(1024)
    count = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    run = {"both": both, "producer": producer, "consumer": consumer}[mode]
    print(run(channel.jobs, count, random.Random(int(seed))))


if __name__ == "__main__":
    main()
