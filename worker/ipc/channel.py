"""The shared memory between the reader and one worker: a ring each way, the in-flight table, status words.

It is a memfd passed by descriptor: nothing of it has a name, so nothing is left behind whatever ends the
program, and no resource tracker unlinks it under a living process.
"""

import mmap
import os
import select
from typing import Self

import msgspec

from ..outcome import Failure
from .inflight import TABLE_BYTES, InFlight
from .ring import Ring


class JobFrame(msgspec.Struct, array_like=True, gc=False):
    """What the reader pushes: jobs for consecutive rows of the table, as (source, entry id, data)."""

    first_row: int
    jobs: list[tuple[int, bytes, bytes]]


class OutcomeFrame(msgspec.Struct, array_like=True, gc=False):
    """What the worker pushes for one job that failed; success is a byte in the table."""

    row: int
    failure: Failure


_HEADER_BYTES = 4096
#: Outcomes of failed jobs only; each is bounded (see runner), so this holds thousands.
_OUTCOME_BYTES = 1 << 20
#: Beside the largest job: a frame of small jobs with its few bytes a job (see lane), which may be larger.
_FRAME_SLACK_BYTES = 320 * 1024

(
    _JOBS_HEAD, _JOBS_TAIL, _OUT_HEAD, _OUT_TAIL, _TABLE_TAIL, _TABLE_TAKEN, _PHASE, _APPETITE, _FINISHED,
    _REFUSED, _LONERS,
) = range(11)  # fmt: skip
# Floats from here on: seconds of the monotonic clock, which all processes of a host share.
_DEADLINE, _BEAT, _SINCE = range(16, 19)

STARTING, READY, STOPPING = 0, 1, 2
#: Types that a worker's bitmasks cover: the first 64, one bit of a word each.
REFUSABLE = 64


class Channel:
    """Both ends open the same three descriptors; who may write which word is said at each property."""

    def __init__(self, memory_fd: int, jobs_fd: int, outcomes_fd: int) -> None:
        self.fds = (memory_fd, jobs_fd, outcomes_fd)
        size = os.fstat(memory_fd).st_size
        self._map = mmap.mmap(memory_fd, size)
        self._view = memoryview(self._map)
        self._words = self._view[:_HEADER_BYTES].cast("Q")
        self._times = self._view[:_HEADER_BYTES].cast("d")
        table_end = _HEADER_BYTES + _aligned(TABLE_BYTES)
        out_end = table_end + _OUTCOME_BYTES
        self.table = InFlight(self._words, _TABLE_TAIL, _TABLE_TAKEN, self._view[_HEADER_BYTES:table_end])
        self.outcomes = Ring(self._words, _OUT_HEAD, _OUT_TAIL, self._view[table_end:out_end])
        self.jobs = Ring(self._words, _JOBS_HEAD, _JOBS_TAIL, self._view[out_end:])

    @classmethod
    def create(cls, max_payload: int) -> Self:
        """New shared memory for one worker; pages are taken only as they are touched.

        ``max_payload`` is the largest job in bytes.
        """
        size = _HEADER_BYTES + _aligned(TABLE_BYTES) + _OUTCOME_BYTES
        size += _aligned(2 * (max_payload + _FRAME_SLACK_BYTES))
        memory_fd = os.memfd_create("jobworker", os.MFD_CLOEXEC)
        os.ftruncate(memory_fd, size)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(memory_fd, os.eventfd(0, flags), os.eventfd(0, flags))

    @property
    def phase(self) -> int:
        """STARTING, READY or STOPPING (written by the worker)."""
        return int(self._words[_PHASE])

    @phase.setter
    def phase(self, value: int) -> None:
        self._words[_PHASE] = value

    @property
    def batch_hint(self) -> int:
        """How many jobs are taken at once of the type at hand (written by the worker)."""
        return int(self._words[_APPETITE])

    @batch_hint.setter
    def batch_hint(self, jobs: int) -> None:
        self._words[_APPETITE] = jobs

    @property
    def unsupported_types(self) -> int:
        """One bit a type, by its number: what this worker cannot run (written by the worker before READY)."""
        return int(self._words[_REFUSED])

    @unsupported_types.setter
    def unsupported_types(self, kinds: int) -> None:
        self._words[_REFUSED] = kinds

    @property
    def exclusive_types(self) -> int:
        """One bit a type, by its number: whose jobs are given nothing to wait behind them, and wait behind
        nothing (written by the worker before READY)."""
        return int(self._words[_LONERS])

    @exclusive_types.setter
    def exclusive_types(self, kinds: int) -> None:
        self._words[_LONERS] = kinds

    @property
    def finished(self) -> int:
        """How many jobs the worker has run to their end (written by the worker)."""
        return int(self._words[_FINISHED])

    @finished.setter
    def finished(self, jobs: int) -> None:
        self._words[_FINISHED] = jobs

    @property
    def mono_deadline_s(self) -> float:
        """When what runs now must have ended; 0.0 while nothing runs (written by the worker)."""
        return float(self._times[_DEADLINE])

    @property
    def mono_since_s(self) -> float:
        """When what runs now was started; only meaningful while there is a deadline (worker)."""
        return float(self._times[_SINCE])

    def running(self, mono_since_s: float, mono_deadline_s: float) -> None:
        """Say since when something runs and until when it may (worker); 0.0 and 0.0: nothing runs."""
        self._times[_SINCE] = mono_since_s
        self._times[_DEADLINE] = mono_deadline_s

    @property
    def mono_heartbeat_s(self) -> float:
        """When the worker last went round its loop."""
        return float(self._times[_BEAT])

    def heartbeat(self, mono_now_s: float) -> None:
        """Touched by the worker's loop, never by a side thread."""
        self._times[_BEAT] = mono_now_s

    def wake_worker(self) -> None:
        """Tell the worker that there are jobs."""
        os.eventfd_write(self.fds[1], 1)

    def wake_reader(self) -> None:
        """Tell the reader that there are outcomes, or that the phase has changed."""
        os.eventfd_write(self.fds[2], 1)

    def wait_for_jobs(self, timeout_s: float, also: int) -> bool:
        """Sleep until woken, ``also`` is readable, or the time is over (worker). True when woken."""
        poll = select.poll()
        poll.register(self.fds[1], select.POLLIN)
        poll.register(also, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
        return self.fds[1] in ready and clear_eventfd(self.fds[1])

    def close(self) -> None:
        """Unmap and close; the memory goes when the last process has done so."""
        for fd in self.fds:
            os.close(fd)
        for part in (self.table, self.outcomes, self.jobs):
            for value in vars(part).values():
                if isinstance(value, memoryview):  # also where others hold it still
                    value.release()
            vars(part).clear()
        self._words.release()
        self._times.release()
        self._view.release()
        self._map.close()


def clear_eventfd(eventfd: int) -> bool:
    """Take an eventfd's count back to zero; False where it was zero."""
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    return True


def _aligned(size: int) -> int:
    return (size + 4095) & ~4095
