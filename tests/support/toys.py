"""Handlers that misbehave to order and write down every start and end of a job: what process tests observe.

Each appends one line at a job's start and one at its end to ``$TOYS_DIR/events``, by a single write in append
mode, so that the lines of many processes never mix and a killed one leaves whole lines only.
"""

import asyncio
import ctypes
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import shared_memory
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import Job, JobCancelled, PermanentError

#: The environment variable that names the folder; the service's children inherit it.
FOLDER_VARIABLE = "TOYS_DIR"
#: A gate that a failed test never opened must not hold its worker for ever.
GATE_LIMIT_S = 60.0
#: In the folder: one line for each event, in the order of their writes.
EVENTS_FILE = "events"


class Event(NamedTuple):
    """One line: ``what`` is start or end, ``mono_s`` the machine's monotonic clock."""

    what: str
    id: str
    retry_count: int
    pid: int
    mono_s: float


def folder() -> Path:
    """Where the events and the gates are."""
    return Path(os.environ[FOLDER_VARIABLE])


def record(what: str, jobs: Sequence[Job]) -> None:
    """Append one line for each job, all in one write."""
    now = time.monotonic()
    lines = [json.dumps(Event(what, job.id, job.retry_count, os.getpid(), now)) + "\n" for job in jobs]
    fd = os.open(folder() / EVENTS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, "".join(lines).encode())
    finally:
        os.close(fd)


def read_event(line: str) -> Event:
    """The event of a whole line."""
    return Event(*json.loads(line))


class Recorded:
    """Base: records the start, does ``work``, records the end (only where that returned)."""

    def handle(self, job: Job) -> None:
        record("start", [job])
        self.work(job)
        record("end", [job])

    def work(self, job: Job) -> None:
        """What the toy does."""


class Noop(Recorded):
    """Succeeds."""


class Sleep(Recorded):
    """Sleeps ``payload.s`` seconds."""

    def work(self, job: Job) -> None:
        time.sleep(job.payload["s"])


class Gate(Recorded):
    """Waits until the test opens the gate ``payload.gate``."""

    def work(self, job: Job) -> None:
        give_up_at = time.monotonic() + GATE_LIMIT_S
        while not (folder() / job.payload["gate"]).exists():
            if time.monotonic() > give_up_at:
                raise TimeoutError("the gate was never opened")
            time.sleep(0.005)  # a file that another process makes has no event without inotify


class Hermit(Gate):
    """The same, without a parent."""

    alone = True


class Crowd:
    """Takes up to 32 jobs at once and waits until the test opens the gate of the first."""

    max_batch = 32

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        record("start", jobs)
        Gate().work(jobs[0])
        record("end", jobs)
        return [None] * len(jobs)


class Flaky(Recorded):
    """Fails until it has been retried ``payload.times`` times."""

    def work(self, job: Job) -> None:
        if job.retry_count < job.payload["times"]:
            raise ConnectionError(f"try {job.retry_count} of {job.id}")


class Permanent(Recorded):
    """Can never succeed."""

    def work(self, job: Job) -> None:
        raise PermanentError("no such chapter")


def die(how: str) -> None:
    """End this process: ``SIGKILL``, ``SIGSEGV`` (a real one), ``exit 0``, ``exit 7``; or not, for ``''``."""
    ways: dict[str, Callable[[], object]] = {
        "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "SIGSEGV": lambda: ctypes.string_at(0),
        "exit 0": lambda: os._exit(0),
        "exit 7": lambda: os._exit(7),
    }
    if how:
        ways[how]()


class Die(Recorded):
    """Takes its worker along, as ``payload.how`` says."""

    def work(self, job: Job) -> None:
        die(job.payload["how"])


class Hang(Recorded):
    """Never returns: in a loop of Python, or (``payload.in`` is ``c``) in C that holds the interpreter."""

    timeout = 0.5

    def work(self, job: Job) -> None:
        if job.payload["in"] == "c":
            re.match(r"(a+)+$", "a" * 64 + "b")  # 2 ** 64 steps, none of which lets another thread run
        while True:
            time.sleep(0.01)


class Deaf(Recorded):
    """Makes its worker deaf to SIGTERM: ``payload.how`` is ignore, block or raise."""

    def work(self, job: Job) -> None:
        how = job.payload["how"]
        if how == "block":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "ignore" else self._interrupted)

    def _interrupted(self, *_: object) -> None:
        raise InterruptedError("SIGTERM")


class Spawner(Recorded):
    """Starts ``payload.command`` and leaves it running, then waits at ``payload.gate``, if there is one.

    With ``payload.session`` the command gets a session of its own.
    """

    def work(self, job: Job) -> None:
        command = ["sh", "-c", job.payload["command"]]
        subprocess.Popen(command, start_new_session=job.payload.get("session", False))
        if "gate" in job.payload:
            record("spawned", [job])
            Gate().work(job)


class Multiprocess(Recorded):
    """Uses `multiprocessing` as a program of its own does: default start method, named shared memory."""

    def work(self, job: Job) -> None:
        assert multiprocessing.get_start_method() == "fork"
        memory = shared_memory.SharedMemory(create=True, size=8)
        try:
            child = multiprocessing.Process(target=_fill, args=(memory.name,))
            child.start()
            child.join()
            assert (child.exitcode, memory.buf[0]) == (0, 7)
        finally:
            memory.close()
            memory.unlink()


def _fill(name: str) -> None:
    memory = shared_memory.SharedMemory(name)
    memory.buf[0] = 7
    memory.close()


class Batch:
    """Takes up to 32 jobs at once; the one whose payload has ``how`` takes the worker along."""

    max_batch = 32

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        record("start", jobs)
        for job in jobs:
            die((job.payload or {}).get("how", ""))
        record("end", jobs)
        return [None] * len(jobs)


class Unable:
    """Cannot be set up."""

    def setup(self, settings: object) -> None:
        raise RuntimeError("the licence has run out")

    def handle(self, job: Job) -> None:
        """Never reached."""


class SpeechlessError(Exception):
    """An exception without a text, as a mistake in a handler's own class makes it."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Speechless(Noop):
    """A handler whose setup raises an exception without a text."""

    def setup(self, settings: object) -> None:
        raise SpeechlessError


class AsyncGate:
    """The same as `Gate` on the worker's event loop, with a lock made in ``setup``, and a log line."""

    async def setup(self, settings: object) -> None:
        self.lock = asyncio.Lock()
        self.loop = asyncio.get_running_loop()

    async def handle(self, job: Job) -> None:
        record("start", [job])
        give_up_at = time.monotonic() + GATE_LIMIT_S
        async with self.lock:
            assert asyncio.get_running_loop() is self.loop
            while not (folder() / job.payload["gate"]).exists():
                if time.monotonic() > give_up_at:
                    raise TimeoutError("the gate was never opened")
                await asyncio.sleep(0.005)  # a file that another process makes has no event without inotify
        logging.getLogger("toys").warning("passed the gate")
        record("end", [job])


class AsyncHang:
    """Never ends on its first try: awaits, or (``payload.in`` is ``c``) runs C that holds the interpreter."""

    timeout = 0.5

    async def handle(self, job: Job) -> None:
        record("start", [job])
        if job.retry_count == 0:
            if job.payload["in"] == "c":
                re.match(r"(a+)+$", "a" * 64 + "b")  # 2 ** 64 steps, none of which lets another thread run
            await asyncio.Event().wait()
        record("end", [job])


class Answer:
    """Returns ``payload.answer``, or fails for good with ``payload.error``."""

    def handle(self, job: Job) -> object:
        record("start", [job])
        if "error" in job.payload:
            raise PermanentError(job.payload["error"])
        record("end", [job])
        return job.payload["answer"]


class Watchful(Gate):
    """Waits at ``payload.gate``, and ends early once it sees that it was cancelled."""

    def work(self, job: Job) -> None:
        give_up_at = time.monotonic() + GATE_LIMIT_S
        while not (folder() / job.payload["gate"]).exists():
            if job.cancelled:
                record("saw", [job])
                raise JobCancelled("it was told to stop")
            if time.monotonic() > give_up_at:
                raise TimeoutError("the gate was never opened")
            time.sleep(0.005)


class AsyncWatchful(AsyncGate):
    """The same on the worker's event loop: it is cancelled where it awaits."""

    async def handle(self, job: Job) -> None:
        try:
            await super().handle(job)
        except asyncio.CancelledError:
            record("saw", [job])
            raise


class Yielding:
    """A generator: its body never runs."""

    def handle(self, job: Job) -> Iterator[Job]:
        yield job
