"""A worker that starts jobs while they are asked back, and is stopped now and then.

``python -m support.hand_back [SEED]`` in the folder of the tests; a process of its own, since it forks.
Prints how many jobs ran, were taken back, and were returned.
"""

import os
import random
import signal
import sys
import time
from collections import deque

from jobworker.worker.ipc.channel import Channel
from jobworker.worker.ipc.inflight import QUEUED, RETURNED, ROWS, SETTLES_S, STARTED, InFlight

JOBS = ROWS // 4
#: A job of the worker: about a hundred of them while the reader waits.
_JOB_S = 0.0004
#: Jobs that are asked back at once, from a little ahead of the worker on: it reaches them during the wait.
_ASKED, _AHEAD = 40, 60


def work(table: InFlight) -> None:
    """Start every job, as a worker does."""
    for row in range(JOBS):
        table.begin(row)
        time.sleep(_JOB_S)


def ask_and_take(table: InFlight, worker: int, rng: random.Random) -> set[int]:
    """Ask for jobs near the place of the worker, and take them; stop the worker meanwhile at times."""
    taken: set[int] = set()
    asked: deque[tuple[float, list[int]]] = deque()
    while table.state(JOBS - 1) == QUEUED or asked:
        place = next((row for row in range(JOBS) if table.state(row) == QUEUED), JOBS)
        rows = [row for row in range(place, min(JOBS, place + _AHEAD + _ASKED)) if rng.random() < 0.4]
        table.ask_back([row for row in rows if not table.asked[row]])
        asked.append((time.monotonic() + SETTLES_S, rows))
        stops = rng.random() < 0.5
        if stops:
            os.kill(worker, signal.SIGSTOP)
        while asked and time.monotonic() < asked[0][0]:
            time.sleep(0.002)  # the wait is the protocol's
        taken.update(table.take_back(asked.popleft()[1]))
        if stops:
            os.kill(worker, signal.SIGCONT)
    return taken


def main(seed: int) -> None:
    channel = Channel.create(1024)
    table = channel.table
    table.write([0] * JOBS, [0] * JOBS, [0] * JOBS, [False] * JOBS, [b"1-0"] * JOBS)
    table.head += JOBS
    worker = os.fork()
    if not worker:
        work(table)
        os._exit(0)
    try:
        taken = ask_and_take(table, worker, random.Random(seed))
    except BaseException:
        os.kill(worker, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(worker, 0)
    assert status == 0
    ran = {row for row in range(JOBS) if table.state(row) == STARTED}
    returned = {row for row in range(JOBS) if table.state(row) == RETURNED}
    assert not ran & taken, "a job runs here and elsewhere"
    assert taken <= returned, "the worker passes over what was taken"
    assert ran | returned == set(range(JOBS)), "no job is lost"
    assert all(table.is_taken_back(row) == (row in taken) for row in returned)
    print(len(ran), len(taken), len(returned - taken))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
