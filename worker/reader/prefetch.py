"""Prefetch buffer: jobs that were read and not dispatched, among them the parked jobs of paused types."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from .admission import AdmittedJob
from .circuit_breaker import CircuitBreakers
from .suspects import SuspectQueue

#: Most jobs and bytes of one stream that a paused type may park, so that other types behind them continue.
#: Beyond that the stream waits. This bounds the reader's memory.
_PARKED_JOBS, _PARKED_BYTES = 10_000, 64 * 1024 * 1024
#: Most bytes of runnable jobs. Beyond it nothing is read, however much credit the workers have.
_RUNNABLE_BYTES = 64 * 1024 * 1024
#: Tenants whose suspects are looked at in one tick.
_TURNS = 64


class ParkedJobs:
    """Jobs of one paused type, oldest first, counted by stream."""

    def __init__(self) -> None:
        self._jobs: deque[AdmittedJob] = deque()
        self._count: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[AdmittedJob]:
        return iter(self._jobs)

    def put(self, job: AdmittedJob) -> None:
        """Append a job."""
        self._jobs.append(job)
        self._count[job.stream_no] += 1
        self._bytes[job.stream_no] += len(job.entry.data or b"")

    def take(self) -> AdmittedJob:
        """Remove and return the oldest job."""
        job = self._jobs.popleft()
        self._count[job.stream_no] -= 1
        self._bytes[job.stream_no] -= len(job.entry.data or b"")
        return job

    def replace(self, jobs: Iterable[AdmittedJob]) -> None:
        """Replace all jobs; ``jobs`` may be a generator over the present ones."""
        replacement = list(jobs)
        for container in (self._jobs, self._count, self._bytes):
            container.clear()
        for job in replacement:
            self.put(job)

    def count(self, stream_no: int) -> int:
        """Number of jobs of a stream."""
        return self._count[stream_no]

    def full(self, stream_no: int) -> bool:
        """Whether no more jobs of a stream should be parked."""
        return self._count[stream_no] >= _PARKED_JOBS or self._bytes[stream_no] >= _PARKED_BYTES


class PrefetchBuffer:
    """Queues of admitted jobs, in order of arrival.

    ``ready`` jobs may go to any worker. ``isolated`` jobs go one at a time to an idle worker: they may kill
    it, or they are of an exclusive type. ``suspects`` may kill a worker and wait for `release_suspects`. Jobs
    of a paused type, or of a type whose circuit breaker is open, are parked.
    """

    def __init__(self, breakers: CircuitBreakers) -> None:
        self.ready: deque[AdmittedJob] = deque()
        self.isolated: deque[AdmittedJob] = deque()
        self.suspects = SuspectQueue()
        #: Types that an operator has paused.
        self.paused_types: set[int] = set()
        # Bitmask of type numbers. Bits are never cleared: their workers may be gone for a moment only.
        self._exclusive_types = 0
        self._breakers = breakers
        self.crashes = breakers.crashes
        self._parked = [ParkedJobs() for _ in range(len(breakers))]
        # Size of the largest job since the buffer was last empty: a cheap upper bound for all of them.
        self._largest_bytes = 0

    def __iter__(self) -> Iterator[AdmittedJob]:
        yield from self.ready
        yield from self.isolated
        yield from self.suspects
        for parked in self._parked:
            yield from parked

    @property
    def empty(self) -> bool:
        """Whether it has no job, also none that is parked."""
        return next(iter(self), None) is None

    def add(self, job: AdmittedJob, mono_due_s: float = 0.0) -> None:
        """Append a job to its queue; a suspect may start from ``mono_due_s`` on."""
        self._largest_bytes = max(self._largest_bytes, len(job.entry.data or b""))
        if self.is_parked(job.type_no):
            self._parked[job.type_no].put(job)
        elif job.isolated or self.crashes.slows(job):
            self.suspects.put(self.crashes.key_of(job), job, mono_due_s)
        else:
            self._queue_of(job).append(job)

    def extend(self, jobs: Sequence[AdmittedJob]) -> None:
        """Append each job to its queue. The usual case, ready jobs only, takes no step per job."""
        special = self._exclusive_types or self.paused_types or self._breakers.any_open
        special = special or self.crashes.watching
        if special or any(job.isolated for job in jobs):
            for job in jobs:
                self.add(job)
        elif jobs:
            largest_bytes = max([len(job.entry.data or b"") for job in jobs])
            self._largest_bytes = max(self._largest_bytes, largest_bytes)
            self.ready.extend(jobs)

    def requeue(self, jobs: Sequence[AdmittedJob]) -> None:
        """Put jobs that an exited worker had not started in front of the ready ones, in their order."""
        front = []
        for job in jobs:
            if self.is_parked(job.type_no) or self._is_isolated(job) or self.crashes.slows(job):
                self.add(job)
            else:
                self._largest_bytes = max(self._largest_bytes, len(job.entry.data or b""))
                front.append(job)
        self.ready.extendleft(reversed(front))

    def set_exclusive_types(self, type_mask: int) -> None:
        """From now on give jobs of these types to idle workers only, one at a time."""
        if type_mask & ~self._exclusive_types:
            self._exclusive_types |= type_mask
            queued = list(self.ready)
            self.ready.clear()
            for job in queued:
                self._queue_of(job).append(job)

    def is_parked(self, type_no: int) -> bool:
        """Whether jobs of a type may not start now: it is paused, or its circuit breaker is open."""
        return self._breakers[type_no].open or type_no in self.paused_types

    def _is_isolated(self, job: AdmittedJob) -> bool:
        return job.isolated or bool(self._exclusive_types >> job.type_no & 1)

    def _queue_of(self, job: AdmittedJob) -> deque[AdmittedJob]:
        return self.isolated if self._is_isolated(job) else self.ready

    def take(self, count: int, unsupported_types: int = 0) -> list[AdmittedJob]:
        """Remove and return the first ready jobs, at most ``count``, whose type is not in the bitmask."""
        if not unsupported_types:
            return [self.ready.popleft() for _ in range(min(count, len(self.ready)))]
        taken: list[AdmittedJob] = []
        skipped: list[AdmittedJob] = []
        while self.ready and len(taken) < count:
            job = self.ready.popleft()
            (skipped if unsupported_types >> job.type_no & 1 else taken).append(job)
        self.ready.extendleft(reversed(skipped))
        return taken

    def waiting(self, stream_no: int) -> int:
        """Jobs that count against reading more of a stream: all runnable jobs of any stream.

        Parked jobs and suspects of the stream count only once there are too many. Until then other jobs
        behind them continue.
        """
        parked = sum(parked.count(stream_no) for parked in self._parked if parked.full(stream_no))
        suspects, suspect_bytes = self.suspects.count(stream_no), self.suspects.size_bytes(stream_no)
        if suspects >= _PARKED_JOBS or suspect_bytes >= _PARKED_BYTES:
            parked += suspects
        return parked + len(self.ready) + len(self.isolated)

    @property
    def full(self) -> bool:
        """Whether the runnable jobs reach their limit in bytes; parked jobs have limits of their own."""
        jobs = len(self.ready) + len(self.isolated)
        if not jobs:
            self._largest_bytes = 0
        if jobs * self._largest_bytes < _RUNNABLE_BYTES:
            return False
        runnable = itertools.chain(self.ready, self.isolated)
        return sum(len(job.entry.data or b"") for job in runnable) >= _RUNNABLE_BYTES

    def defer(self, job: AdmittedJob, mono_now_s: float) -> None:
        """Take back a job whose dependency is unavailable; park its type."""
        self._breakers[job.type_no].record_failure(mono_now_s)
        self._parked[job.type_no].put(job)
        self.ready = self._park(self.ready, {job.type_no})

    def set_paused_types(self, type_nos: set[int]) -> None:
        """Pause exactly these types. Jobs that were dispatched already keep running."""
        resumed, self.paused_types = self.paused_types - type_nos, set(type_nos)
        self.ready = self._park(self.ready, type_nos)
        self.isolated = self._park(self.isolated, type_nos)
        for type_no in resumed:
            if not self._breakers[type_no].open:
                self._resume(type_no)

    def _park(self, queue: deque[AdmittedJob], type_nos: set[int]) -> deque[AdmittedJob]:
        """Park the jobs of some types; returns the rest of the queue."""
        for job in queue:
            if job.type_no in type_nos:
                self._parked[job.type_no].put(job)
        return deque(job for job in queue if job.type_no not in type_nos)

    def record_success(self, type_nos: Iterable[int]) -> None:
        """Jobs of these types succeeded: close their breakers and resume their parked jobs."""
        for type_no in type_nos:
            if self._breakers[type_no].open:
                self._breakers[type_no].record_success()
                if type_no not in self.paused_types:
                    self._resume(type_no)

    def release_probes(self, mono_now_s: float) -> None:
        """Make one job of each type runnable whose breaker is due for a probe."""
        for type_no, parked in enumerate(self._parked):
            if (
                type_no not in self.paused_types
                and len(parked)
                and self._breakers[type_no].try_half_open(mono_now_s)
            ):
                job = parked.take()  # also a suspect: the probe is one job
                self._queue_of(job).append(job)

    def release_suspects(self, mono_now_s: float, room: int, supported: Callable[[int], bool]) -> None:
        """Make at most ``room`` suspects runnable, of types that a worker supports now; tenants take turns.

        Jobs of a tenant that is no longer slowed down become ordinary again.
        """
        for key in self.suspects.keys(_TURNS):
            if self.is_parked(key.type_no):
                for job in self.suspects.take_if(key, lambda _: True):
                    self._parked[key.type_no].put(job)
                continue
            if not self.crashes.is_open(key):
                for job in self.suspects.take_if(key, lambda job: not job.isolated):
                    self._queue_of(job).append(job)
            while room > 0 and supported(key.type_no) and self.crashes.may_start(key, mono_now_s):
                suspect = self.suspects.take_due(key, mono_now_s)
                if suspect is None:
                    break
                self.isolated.append(suspect._replace(isolated=True))
                self.crashes.record_start([suspect], mono_now_s)
                room -= 1

    def hold_slowed(self) -> None:
        """Take ready jobs of tenants that are slowed down out of the queue."""
        slowed = [job for job in self.ready if self.crashes.slows(job)]
        if slowed:
            taken = {(job.stream_no, job.entry.id) for job in slowed}
            self.ready = deque(job for job in self.ready if (job.stream_no, job.entry.id) not in taken)
            for job in slowed:
                self.add(job)

    def discard(self, stream_no: int, ids: set[bytes]) -> None:
        """Forget entries that another consumer has claimed."""
        for queue in (self.ready, self.isolated):
            rest = [job for job in queue if not (job.stream_no == stream_no and job.entry.id in ids)]
            queue.clear()
            queue.extend(rest)
        self.suspects.discard(lambda job: job.stream_no == stream_no and job.entry.id in ids)
        for parked in self._parked:
            parked.replace(job for job in parked if not (job.stream_no == stream_no and job.entry.id in ids))

    def discard_stream(self, stream_no: int) -> None:
        """Forget all jobs of a stream."""
        self.discard(stream_no, {job.entry.id for job in self if job.stream_no == stream_no})

    def clear(self) -> None:
        """Forget all jobs; types stay paused."""
        self.ready.clear()
        self.isolated.clear()
        self.suspects = SuspectQueue()
        for parked in self._parked:
            parked.replace(())

    def _resume(self, type_no: int) -> None:
        """Move all parked jobs of a type to the queues where they would be without the pause."""
        for _ in range(len(self._parked[type_no])):
            self.add(self._parked[type_no].take())
