"""Dispatch: grants workers credit and hands jobs over to them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_

import msgspec

from ..ipc.channel import READY, Channel, JobFrame, job_frames
from ..ipc.control import WorkerExited
from ..ipc.inflight import QUEUED, ROWS, SETTLES_S, InFlightJob
from ..keys import Source
from ..telemetry import trace
from .admission import AdmittedJob
from .prefetch import PrefetchBuffer

#: A worker's credit covers the jobs that it finishes in this time: enough that it never runs dry between two
#: ticks of the reader, little enough that the last jobs of a backlog do not queue behind one worker.
_QUEUE_S = 0.2
#: The same while a backlog is sorted: an urgent job, or one of another tenant, waits behind these jobs only.
_SORTED_QUEUE_S = 0.01
#: A tick that sorts may take longer than that. A job is asked for in one tick, dispatched in the next and
#: settled in the third.
_TICKS_OF_A_JOB = 3
#: A job that has run for this long (seconds) holds up what is queued behind it: its worker gets no more.
_LONG_S = 0.5
#: Interval at which a worker's rate is measured (seconds).
_MEASURE_EVERY_S = 0.05
#: The rate is measured early once a worker has finished this number of its windows, and of jobs: then its
#: window is far too small. Two windows, because outcomes come in bursts of up to one.
_EARLY_WINDOWS, _EARLY_JOBS = 2, 8
#: Not earlier than this: a shorter time is no measure of a rate (seconds).
_EARLY_S = 0.002
#: Most bytes and jobs of one frame: with small frames a worker starts while the next frame is encoded.
_FRAME_BYTES = 256 * 1024
_FRAME_JOBS = 512
#: Entries that are read beyond jobs that wait for certain workers: other workers may find jobs behind them.
_LOOK_PAST = 1024
#: One in this number of workers may run suspects, or start again after one; at least one may.
_SUSPECT_SHARE = 4
#: A worker that died under a suspect and has no successor for this long no longer counts (seconds).
_SUCCESSOR_S = 60.0
#: The in-flight table stores the deaths of a job in one byte.
_MAX_STORED_DEATHS = 255


class WorkerHandle:
    """The reader's handle of one worker: its channel, its rate and its credit.

    ``exited`` is set once the worker's process has ended. A ``retired`` worker gets no more jobs. A
    ``reserved`` worker gets none until it is idle: it runs an exclusive or isolated job, or drains for one.
    """

    def __init__(self, slot: int, generation: int, channel: Channel, mono_now_s: float) -> None:
        self.slot = slot
        self.generation = generation
        self.channel = channel
        self.table = channel.table
        self.exited: WorkerExited | None = None
        self.retired = False
        #: Until its outcomes are collected once: an earlier reader may have settled the first ones.
        self.is_new = True
        self._settled_jobs = 0
        self._is_dry = False
        #: Whether it had finished all its jobs at some time of the last measurement: it could have done more.
        self.ran_dry = False
        self._measured_at = mono_now_s
        self._jobs_per_s = 0.0
        #: Time in which it finishes the jobs that its credit covers (seconds).
        self.queue_s = _QUEUE_S
        self._restore_head()
        #: Whether its running job takes long. Then it gets no more jobs, and may lose those behind that one.
        self.held_up = False
        #: Whether jobs were asked back that it has not passed over yet.
        self.has_asked = bool(self.table.asked_back())
        self._asked_at = mono_now_s
        self.reserved = self.has_exclusive_job or self.runs_suspect
        channel.wake_worker()

    def _restore_head(self) -> None:
        """Count the rows of frames that an earlier reader pushed and the worker has not taken.

        ``taken`` is read again after the frames, because the worker may take a frame in between.
        """
        for frame, _ in self.channel.jobs.frames():
            decoded = job_frames.decode(frame)
            self.table.head = max(self.table.head, decoded.first_row + len(decoded.jobs))
        self.table.head = max(self.table.head, self.table.taken)

    @property
    def jobs_per_s(self) -> float:
        """The rate at its last measurement."""
        return self._jobs_per_s

    @property
    def accepts_jobs(self) -> bool:
        """Whether it may get any job now."""
        return not (self.exited or self.retired or self.reserved) and self.channel.phase == READY

    @property
    def credit(self) -> int:
        """Number of jobs that it may get now."""
        return max(0, self.window - len(self.table))

    @property
    def window(self) -> int:
        """Number of jobs that it may have in flight now."""
        return self._full_window if self.accepts_jobs and not self.held_up else 0

    @property
    def _full_window(self) -> int:
        return min(max(2 * self.channel.batch_hint, int(self._jobs_per_s * self.queue_s)), ROWS)

    def supports(self, type_no: int) -> bool:
        """Whether the worker runs jobs of this type."""
        return not self.channel.unsupported_types >> type_no & 1

    def may_queue(self, type_no: int) -> bool:
        """Whether a job of this type may be queued on the worker behind others."""
        return self.supports(type_no) and not self.is_exclusive(type_no)

    def note_running(self, mono_now_s: float) -> None:
        """Note whether the running job takes long."""
        is_running = self.channel.mono_deadline_s > 0.0
        self.held_up = is_running and mono_now_s - self.channel.mono_since_s >= _LONG_S

    def ask_back(self, jobs: Sequence[InFlightJob], mono_s: Callable[[], float]) -> None:
        """Ask for unstarted jobs back. The clock is read last: this process may pause before it asks."""
        if jobs:
            self.table.ask_back([job.row for job in jobs])
            self.has_asked, self._asked_at = True, mono_s()

    def asked_unstarted(self, mono_now_s: float) -> list[InFlightJob]:
        """The jobs that were asked back and are not started, once it is time to take them."""
        if not self.has_asked or mono_now_s - self._asked_at < SETTLES_S:
            return []
        rows = [row for row in self.table.asked_back() if not self.table.is_taken_back(row)]
        return [self.table.job(row) for row in rows if self.table.state(row) == QUEUED]

    def is_exclusive(self, type_no: int) -> bool:
        """Whether no other job is queued on the worker before or after one of this type."""
        return bool(self.channel.exclusive_types >> type_no & 1)

    @property
    def has_exclusive_job(self) -> bool:
        """Whether a job of an exclusive type is in flight on it."""
        return any(self.is_exclusive(job.type_no) for job in self.table.unsettled())

    @property
    def runs_suspect(self) -> bool:
        """Whether an isolated job is in flight on it."""
        return any(job.isolated for job in self.table.unsettled())

    def dispatch(self, jobs: Sequence[AdmittedJob]) -> int:
        """Push jobs in frames; returns how many it took (fewer if its ring is full)."""
        pushed = 0
        while pushed < len(jobs):
            frame = _next_frame(jobs, pushed)
            if not self._push(frame):
                break
            pushed += len(frame)
        if pushed:
            self.channel.wake_worker()
        return pushed

    def _push(self, frame: Sequence[AdmittedJob]) -> bool:
        """Write the rows, push the jobs, move the head over the rows: in this order (see `inflight`)."""
        stream_nos, type_nos, entries, isolated, _, _ = zip(*frame, strict=True)
        ids, bodies, _, deaths = zip(*entries, strict=True)
        if any(deaths):
            deaths = tuple(min(count, _MAX_STORED_DEATHS) for count in deaths)
        self.table.write(stream_nos, type_nos, deaths, isolated, ids)
        jobs = list(zip(stream_nos, ids, bodies, strict=True))
        if not self.channel.jobs.push(msgspec.msgpack.encode(JobFrame(self.table.head, jobs))):
            return False
        self.table.head += len(frame)
        return True

    def record_settled(self, rows: range) -> None:
        """These rows are settled in the store: mark them so, and count them for the rate."""
        self.table.settle(rows)
        self._settled_jobs += len(rows)
        self._is_dry = self._is_dry or not len(self.table)

    def update_rate(self, mono_now_s: float) -> None:
        """Measure the rate, if the interval is over or the window turns out to be far too small."""
        elapsed_s = mono_now_s - self._measured_at
        is_early = self._settled_jobs >= max(_EARLY_JOBS, _EARLY_WINDOWS * self._full_window)
        if elapsed_s >= (_EARLY_S if is_early else _MEASURE_EVERY_S):
            self._jobs_per_s = self._settled_jobs / elapsed_s
            self.ran_dry = self._is_dry
            self._settled_jobs, self._is_dry = 0, False
            self._measured_at = mono_now_s


def _next_frame(jobs: Sequence[AdmittedJob], start: int) -> Sequence[AdmittedJob]:
    """The next jobs that share a frame: at least one, then up to the limits."""
    frame = jobs[start : start + _FRAME_JOBS]
    sizes = [len(job.entry.data or b"") for job in frame]
    if sum(sizes) <= _FRAME_BYTES:
        return frame
    fitting = sum(size_bytes <= _FRAME_BYTES for size_bytes in itertools.accumulate(sizes))
    return frame[: max(1, fitting)]


class Dispatcher:
    """Hands jobs of the prefetch buffer over to the workers, oldest first, by their credit.

    Isolated and exclusive jobs go to idle workers, one each. An exclusive job never takes the last free
    worker of several that support its type.
    """

    def __init__(self, streams: Sequence[Source], buffer: PrefetchBuffer) -> None:
        self.buffer = buffer
        self.workers: list[WorkerHandle] = []
        #: Whether the jobs of a stream are sorted: little is queued at the workers then.
        self.is_sorted = False
        self._streams = streams
        self._crashes = buffer.crashes
        # Slots whose worker died under a suspect, and when: no successor is ready yet.
        self._lost_slots: dict[int, float] = {}
        self._suspects_from_s = 0.0
        self._openings = 0
        self._mono_last_s = 0.0

    def find(self, slot: int, generation: int) -> WorkerHandle | None:
        """The worker of this slot and generation, or None if it is not attached."""
        return next((one for one in self.workers if (one.slot, one.generation) == (slot, generation)), None)

    @property
    def credit(self) -> int:
        """Number of jobs that the workers can take; 0 while the prefetch buffer is full."""
        return 0 if self.buffer.full else sum(worker.credit for worker in self.workers)

    @property
    def has_idle_worker(self) -> bool:
        """Whether a worker has nothing to do, and nothing waits for it."""
        if self.buffer.full or self.buffer.ready:
            return False
        return any(worker.accepts_jobs and not len(worker.table) for worker in self.workers)

    @property
    def runs_low(self) -> bool:
        """Whether a worker has credit for half of the jobs that it may have in flight."""
        return any(2 * worker.credit >= worker.window > 0 for worker in self.workers)

    @property
    def is_idle(self) -> bool:
        """Whether no job is in flight."""
        return not any(len(worker.table) for worker in self.workers)

    @property
    def jobs_per_s(self) -> float:
        """Jobs that the workers finish per second."""
        return sum(worker.jobs_per_s for worker in self.workers)

    def capacity(self, stream_no: int) -> int:
        """Number of entries of a stream that may be read now."""
        credit = self.credit
        return credit and credit - self.buffer.waiting(stream_no) + min(self._unmatched(), _LOOK_PAST)

    def _unmatched(self) -> int:
        """Number of ready jobs, while a worker that supports none of them has credit."""
        idle = any(worker.channel.unsupported_types and worker.credit for worker in self.workers)
        return len(self.buffer.ready) if idle else 0

    def unsettled_keys(self) -> set[tuple[int, bytes]]:
        """Stream number and entry id of every entry that is in flight or in the prefetch buffer."""
        in_flight = {job.key for worker in self.workers for job in worker.table.unsettled()}
        return in_flight | {(job.stream_no, job.entry.id) for job in self.buffer}

    def dispatch(self, mono_now_s: float) -> None:
        """Hand over what the workers can take now."""
        for worker in self.workers:
            worker.update_rate(mono_now_s)
            worker.queue_s = self._sorted_queue_s(worker, mono_now_s) if self.is_sorted else _QUEUE_S
        self._mono_last_s = mono_now_s
        if self._crashes.watching or self._lost_slots or len(self.buffer.suspects):
            self._pace_suspects(mono_now_s)
        exclusive_types = (worker.channel.exclusive_types for worker in self.workers)
        self.buffer.set_exclusive_types(reduce(or_, exclusive_types, 0))
        self._dispatch_isolated(self.buffer.isolated, mono_now_s)
        self._dispatch_ready(self.buffer.ready, mono_now_s)

    def _sorted_queue_s(self, worker: WorkerHandle, mono_now_s: float) -> float:
        """The time that a worker's credit covers while a backlog is sorted.

        The rate of a worker that ran dry is only what it was given, so it gets twice as much: otherwise rate
        and credit would pull each other down.
        """
        ticks_s = _TICKS_OF_A_JOB * (mono_now_s - self._mono_last_s)
        covered_s = max(_SORTED_QUEUE_S, ticks_s) * (2 if worker.ran_dry else 1)
        return min(covered_s, _QUEUE_S)

    def record_exit(self, worker: WorkerHandle, mono_now_s: float) -> None:
        """A worker died; if it ran a suspect, its slot counts as running one until it is ready again."""
        if worker.runs_suspect:
            self._lost_slots[worker.slot] = mono_now_s

    def _pace_suspects(self, mono_now_s: float) -> None:
        """Let suspects run on a share of the workers, and none of a tenant before its time."""
        self._crashes.expire(mono_now_s)
        if self._openings != self._crashes.openings:
            self._openings = self._crashes.openings
            self.buffer.hold_slowed()
        running = [one for one in self.workers if not one.exited]
        for slot, died_s in list(self._lost_slots.items()):
            ready = any(one.slot == slot and one.channel.phase == READY for one in running)
            if ready or mono_now_s - died_s > _SUCCESSOR_S:
                del self._lost_slots[slot]
                # The only worker works as long for others as its restart took.
                self._suspects_from_s = 2 * mono_now_s - died_s
        if not len(self.buffer.suspects):
            return
        slots = {one.slot for one in running} | self._lost_slots.keys()
        if len(slots) == 1 and mono_now_s < self._suspects_from_s:
            return
        suspects = sum(job.isolated for job in self.buffer.isolated)
        busy = sum(one.reserved and one.runs_suspect for one in running)
        room = max(1, len(slots) // _SUSPECT_SHARE) - suspects - busy - len(self._lost_slots)
        self.buffer.release_suspects(
            mono_now_s, room, lambda type_no: any(one.supports(type_no) for one in running)
        )

    def _dispatch_isolated(self, queue: deque[AdmittedJob], mono_now_s: float) -> None:
        """Dispatch each isolated or exclusive job to an idle worker.

        If none is idle, stop feeding the least-loaded worker so that it drains.
        """
        for worker in self.workers:
            if worker.reserved and not len(worker.table) and not worker.exited:
                worker.reserved = False
        if not queue:
            return
        for worker in sorted(self.workers, key=_load):
            job = self._first_match(worker, queue) if worker.accepts_jobs and not len(worker.table) else None
            if job and worker.dispatch([job]):
                queue.remove(job)
                worker.reserved = True
                self._crashes.record_start([job], mono_now_s)
                self._trace([job])
        # Under steady load no worker is ever idle. One at a time drains, beside those with exclusive jobs.
        if not any(worker.reserved and not worker.has_exclusive_job for worker in self.workers):
            busy = [one for one in self.workers if one.accepts_jobs and self._first_match(one, queue)]
            if busy:
                min(busy, key=_load).reserved = True

    def _dispatch_ready(self, queue: deque[AdmittedJob], mono_now_s: float) -> None:
        """Share ready jobs evenly between the workers with credit, the least-loaded first."""
        unmatched: list[WorkerHandle] = []
        while queue:
            workers = [worker for worker in self.workers if worker.credit > 0 and worker not in unmatched]
            if not workers:
                return
            worker = min(workers, key=_load)
            share = _level([_load(one) for one in workers], len(queue)) - _load(worker)
            jobs = self.buffer.take(min(share, worker.credit), worker.channel.unsupported_types)
            if not jobs:
                unmatched.append(worker)
                continue
            pushed = worker.dispatch(jobs)
            if self._crashes.watching:
                self._crashes.record_start(jobs[:pushed], mono_now_s)
            self._trace(jobs[:pushed])
            queue.extendleft(reversed(jobs[pushed:]))
            if not pushed:
                return

    def _trace(self, jobs: Iterable[AdmittedJob]) -> None:
        if trace.enabled():
            for job in jobs:
                trace.dispatched(self._streams[job.stream_no].stream, job.entry.id, job.entry.data or b"")

    def _first_match(self, worker: WorkerHandle, queue: Iterable[AdmittedJob]) -> AdmittedJob | None:
        """The first job that this worker may get."""
        return next(
            (
                job
                for job in queue
                if worker.supports(job.type_no)
                and (not worker.is_exclusive(job.type_no) or self._leaves_a_worker(worker, job.type_no))
            ),
            None,
        )

    def _leaves_a_worker(self, worker: WorkerHandle, type_no: int) -> bool:
        """Whether another worker without an exclusive job supports the type, or this one alone does."""
        able = [one for one in self.workers if not (one.exited or one.retired) and one.supports(type_no)]
        return able == [worker] or any(one is not worker and not one.has_exclusive_job for one in able)


def _load(worker: WorkerHandle) -> int:
    return len(worker.table)


def _level(loads: Sequence[int], jobs: int) -> int:
    """The load that the least-loaded workers have after they have shared these jobs."""
    total, sharing = jobs, 0
    for load in sorted(loads):
        if sharing and load * sharing >= total:
            break
        total, sharing = total + load, sharing + 1
    return -(-total // sharing)
