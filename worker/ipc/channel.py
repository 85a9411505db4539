"""Shared memory between the reader and one worker: a ring each way, the in-flight table, status words.

The memory is a memfd that is passed by descriptor. It has no name, so nothing is left behind however the
program ends, and no resource tracker unlinks it under a living process.
"""

import mmap
import os
import select
from typing import NamedTuple, Self

import msgspec

from ..outcome import Failure
from .inflight import TABLE_BYTES, InFlight
from .ring import Ring


class JobFrame(msgspec.Struct, array_like=True, gc=False):
    """Jobs from the reader for consecutive rows of the table, as (stream number, entry id, data)."""

    first_row: int
    jobs: list[tuple[int, bytes, bytes]]


class KeptValue(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a job that asks for its result has returned, as JSON; ``error`` says why it is not kept."""

    job_id: str
    value: bytes
    error: str = ""


class OutcomeFrame(msgspec.Struct, array_like=True, gc=False):
    """Failure of one job, or a result that is kept, from the worker.

    Any other success has no frame: it is a state byte in the table.
    """

    row: int
    failure: Failure | None
    kept: KeptValue | None = None


#: Made once: the children of the forkserver share them.
job_frames = msgspec.msgpack.Decoder(JobFrame)
outcome_frames = msgspec.msgpack.Decoder(OutcomeFrame)


class Woken(NamedTuple):
    """What ended a wait: there may be jobs, the control socket has a message; neither after the timeout."""

    jobs: bool
    control: bool


_HEADER_BYTES = 4096
#: Size of the outcome ring. A failure with its traceback has at most 48 KiB, a kept result 256 KiB.
_OUTCOME_BYTES = 1 << 20
#: Room beside the largest job: for the fields of its retries. A frame of small jobs with a few bytes for each
#: may be larger, too (see dispatch).
_FRAME_SLACK_BYTES = 320 * 1024

(
    _JOBS_HEAD, _JOBS_TAIL, _OUT_HEAD, _OUT_TAIL, _TABLE_TAIL, _TABLE_TAKEN, _PHASE, _BATCH_HINT, _FINISHED,
    _UNSUPPORTED, _EXCLUSIVE, _STOP, _CANCELS,
) = range(13)  # fmt: skip
# From here on the words are floats: seconds of the monotonic clock, which all processes of a host share.
_DEADLINE, _HEARTBEAT, _STARTED, _CANCEL_BY = range(16, 20)

STARTING, READY, STOPPING = 0, 1, 2
#: Types that a worker's bitmasks cover: the first 64, one bit for each in a word of 64 bits.
MASKED_TYPES = 64


class Channel:
    """Shared memory of one worker and two eventfds that wake its ends.

    Reader and worker open the same three descriptors. Each word has one writer: its property names it.
    """

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
        """New shared memory for one worker. ``max_payload`` is the size of the largest job in bytes.

        The kernel allocates pages when they are first touched. Raises OSError and leaves nothing open if
        descriptors or memory are short.
        """
        size = _HEADER_BYTES + _aligned(TABLE_BYTES) + _OUTCOME_BYTES
        size += _aligned(2 * (max_payload + _FRAME_SLACK_BYTES))
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        fds: list[int] = []
        try:
            fds.append(os.memfd_create("jobworker", os.MFD_CLOEXEC))
            os.ftruncate(fds[0], size)
            for _ in range(2):
                fds.append(os.eventfd(0, flags))
            return cls(*fds)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise

    @property
    def phase(self) -> int:
        """STARTING, READY or STOPPING (written by the worker)."""
        return int(self._words[_PHASE])

    @phase.setter
    def phase(self, value: int) -> None:
        self._words[_PHASE] = value

    @property
    def batch_hint(self) -> int:
        """Jobs that the handler of the current type takes at once (written by the worker)."""
        return int(self._words[_BATCH_HINT])

    @batch_hint.setter
    def batch_hint(self, jobs: int) -> None:
        self._words[_BATCH_HINT] = jobs

    @property
    def unsupported_types(self) -> int:
        """Bitmask of the type numbers that this worker cannot run (written by the worker before READY)."""
        return int(self._words[_UNSUPPORTED])

    @unsupported_types.setter
    def unsupported_types(self, type_mask: int) -> None:
        self._words[_UNSUPPORTED] = type_mask

    @property
    def exclusive_types(self) -> int:
        """Bitmask of exclusive types: no other job is queued on this worker before or after one of theirs.

        Written by the worker before READY.
        """
        return int(self._words[_EXCLUSIVE])

    @exclusive_types.setter
    def exclusive_types(self, type_mask: int) -> None:
        self._words[_EXCLUSIVE] = type_mask

    @property
    def stop_requested(self) -> bool:
        """Whether the worker must finish the running job and exit (written by the supervisor)."""
        return bool(self._words[_STOP])

    def request_stop(self) -> None:
        """Ask the worker to stop; no handler can block or ignore this, as it can SIGTERM (supervisor)."""
        self._words[_STOP] = 1
        self.wake_worker()

    @property
    def has_cancels(self) -> bool:
        """Whether any row of the table was marked cancelled (written by the reader)."""
        return bool(self._words[_CANCELS])

    def cancel(self, row: int) -> None:
        """Mark the job of a row cancelled (reader)."""
        self.table.cancel(row)
        self._words[_CANCELS] = 1

    @property
    def mono_cancel_by_s(self) -> float:
        """Time by which cancelled jobs that run must have ended; 0.0 while none runs (reader)."""
        return float(self._times[_CANCEL_BY])

    @mono_cancel_by_s.setter
    def mono_cancel_by_s(self, mono_s: float) -> None:
        self._times[_CANCEL_BY] = mono_s

    def is_cancel_overdue(self, mono_now_s: float) -> bool:
        """Whether the worker runs cancelled jobs only, and their grace time is over."""
        by_s = self.mono_cancel_by_s
        return bool(by_s) and mono_now_s > by_s and self.table.runs_only_cancelled()

    @property
    def finished(self) -> int:
        """Number of jobs that this worker has finished (written by the worker)."""
        return int(self._words[_FINISHED])

    @finished.setter
    def finished(self, jobs: int) -> None:
        self._words[_FINISHED] = jobs

    @property
    def mono_deadline_s(self) -> float:
        """Time at which the running jobs exceed their timeout; 0.0 while none runs (worker)."""
        return float(self._times[_DEADLINE])

    @property
    def mono_since_s(self) -> float:
        """Start of the running jobs; valid while there is a deadline (worker)."""
        return float(self._times[_STARTED])

    @property
    def has_jobs(self) -> bool:
        """Whether jobs are in the ring, or were taken out and are not settled."""
        return not self.jobs.empty() or self.table.taken != self.table.tail

    def set_running(self, mono_since_s: float, mono_deadline_s: float) -> None:
        """Publish start and deadline of the running jobs (worker); 0.0 and 0.0: none runs."""
        self._times[_STARTED] = mono_since_s
        self._times[_DEADLINE] = mono_deadline_s

    def extend_deadline(self, mono_deadline_s: float) -> None:
        """Publish a later deadline of the running jobs (worker)."""
        self._times[_DEADLINE] = mono_deadline_s

    @property
    def mono_heartbeat_s(self) -> float:
        """Time of the last heartbeat (written by the worker)."""
        return float(self._times[_HEARTBEAT])

    def heartbeat(self, mono_now_s: float) -> None:
        """Publish that the worker's loop is alive. Never call it from a thread, which may outlive a hang."""
        self._times[_HEARTBEAT] = mono_now_s

    def wake_worker(self) -> None:
        """Signal that there are jobs."""
        os.eventfd_write(self.fds[1], 1)

    def wake_reader(self) -> None:
        """Signal that there are outcomes, or that the phase or the batch hint changed."""
        os.eventfd_write(self.fds[2], 1)

    def wait_for_jobs(self, timeout_s: float, control_fd: int) -> Woken:
        """Wait for jobs, a message on ``control_fd`` or the timeout (worker)."""
        poll = select.poll()
        poll.register(self.fds[1], select.POLLIN)
        poll.register(control_fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
        return Woken(self.fds[1] in ready and clear_eventfd(self.fds[1]), control_fd in ready)

    def close(self) -> None:
        """Unmap and close. The kernel frees the memory once every process has done so."""
        for fd in self.fds:
            os.close(fd)
        for part in (self.table, self.outcomes, self.jobs):
            for value in vars(part).values():
                if isinstance(value, memoryview):  # also views that the caller kept
                    value.release()
            vars(part).clear()
        self._words.release()
        self._times.release()
        self._view.release()
        self._map.close()


def clear_eventfd(eventfd: int) -> bool:
    """Reset an eventfd's count to zero; False if it was zero."""
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    return True


def _aligned(size: int) -> int:
    return (size + 4095) & ~4095
