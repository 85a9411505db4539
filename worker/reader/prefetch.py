"""Prefetch buffer: entries that were read and not dispatched, parked types, and circuit breakers."""

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from .admission import AdmittedJob

#: First and longest time between two tries of a paused type (seconds).
_PAUSE_S = (1.0, 15.0)
#: A try of whose end nothing was heard for so long may be lost with its worker: another is made. Longer
#: than clients wait for a store, so that tries do not take up one worker after another.
_UNKNOWN_AFTER_S = 60.0
#: How often one job may say that its store does not answer while others of its type get through; from then
#: on the fault is taken to be the job's own.
_EXCUSES = 5
#: Excuses remembered at most; forgetting them only gives some jobs more patience.
_EXCUSES_KEPT = 10_000
#: Jobs and bytes that a paused type may have set aside of one stream, so that the other types behind them go
#: on; beyond that the stream waits. Bounds the reader's memory.
_ASIDE_JOBS, _ASIDE_BYTES = 10_000, 64 * 1024 * 1024
#: Most bytes of runnable jobs in the buffer; beyond it nothing is read, however much credit the workers have.
_HELD_BYTES = 64 * 1024 * 1024


class ParkedJobs:
    """Jobs of one type that wait for a pause to end; it knows how many are of which source."""

    def __init__(self) -> None:
        self._jobs: deque[AdmittedJob] = deque()
        self._count: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[AdmittedJob]:
        return iter(self._jobs)

    def put(self, arrival: AdmittedJob) -> None:
        """Add one behind the others."""
        self._jobs.append(arrival)
        self._count[arrival.source] += 1
        self._bytes[arrival.source] += len(arrival.entry.data or b"")

    def take(self) -> AdmittedJob:
        """The oldest."""
        arrival = self._jobs.popleft()
        self._count[arrival.source] -= 1
        self._bytes[arrival.source] -= len(arrival.entry.data or b"")
        return arrival

    def keep(self, arrivals: Iterable[AdmittedJob]) -> None:
        """Hold these instead of all that was there."""
        kept = list(arrivals)
        for held in (self._jobs, self._count, self._bytes):
            held.clear()
        for arrival in kept:
            self.put(arrival)

    def count(self, source: int) -> int:
        """How many are of a source."""
        return self._count[source]

    def full(self, source: int) -> bool:
        """Whether no more of a source should be set aside."""
        return self._count[source] >= _ASIDE_JOBS or self._bytes[source] >= _ASIDE_BYTES


class Breaker:
    """Pauses one type while something that its handler needs does not answer."""

    def __init__(self) -> None:
        self.open = False
        self.recoveries = 0
        self._failures = 0
        self._trying = False
        self._mono_try_at_s = 0.0

    def failed(self, mono_now_s: float) -> None:
        """A job found the thing unavailable: pause, longer each time a try fails too."""
        if self.open and not self._trying:
            return  # one of those that were under way already
        first, longest = _PAUSE_S
        self._mono_try_at_s = mono_now_s + min(longest, first * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        self.open = True
        self._trying = False

    def answered(self) -> None:
        """A job succeeded: close the breaker."""
        self.open = False
        self.recoveries += 1
        self._failures = 0
        self._trying = False

    def may_try(self, mono_now_s: float) -> bool:
        """Whether one job may be tried now (half-open); another follows if its fate stays unknown."""
        if not self.open or mono_now_s < self._mono_try_at_s:
            return False
        self._trying = True
        self._mono_try_at_s = mono_now_s + _UNKNOWN_AFTER_S
        return True


class PrefetchBuffer:
    """Queues in order of arrival. ``ready`` may be handed to any worker, ``isolated`` one at a time to
    an empty one: jobs that may kill it, and those that would keep others waiting for minutes."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.ready: deque[AdmittedJob] = deque()
        self.isolated: deque[AdmittedJob] = deque()
        #: Types that an operator has paused.
        self.paused_types: set[int] = set()
        # One bit a type, by its number: these go as suspects do.
        self._loners = 0
        self._held = [ParkedJobs() for _ in kinds]
        self._breakers = [Breaker() for _ in kinds]
        # For each job that was excused: how often, and after how many recoveries of its type the last time.
        self._excuses: dict[tuple[int, bytes], tuple[int, int]] = {}
        # The largest job since there was last none: most of the time it says enough about all of them.
        self._largest_bytes = 0

    def __iter__(self) -> Iterator[AdmittedJob]:
        yield from self.ready
        yield from self.isolated
        for held in self._held:
            yield from held

    def add(self, arrival: AdmittedJob) -> None:
        """Queue a job behind those of its sort."""
        self._largest_bytes = max(self._largest_bytes, len(arrival.entry.data or b""))
        if self._breakers[arrival.kind].open or arrival.kind in self.paused_types:
            self._held[arrival.kind].put(arrival)
        else:
            self._queue_of(arrival).append(arrival)

    def extend(self, arrivals: Sequence[AdmittedJob]) -> None:
        """Queue jobs, each behind those of its sort."""
        special = self._loners or self.paused_types or any(breaker.open for breaker in self._breakers)
        if special or any(arrival.alone for arrival in arrivals):
            for arrival in arrivals:
                self.add(arrival)
        elif arrivals:
            largest_bytes = max([len(arrival.entry.data or b"") for arrival in arrivals])
            self._largest_bytes = max(self._largest_bytes, largest_bytes)
            self.ready.extend(arrivals)

    def set_exclusive_types(self, kinds: int) -> None:
        """From now on hand out jobs of these types, a bit each, to empty workers only, and alone."""
        if kinds & ~self._loners:
            self._loners |= kinds
            queued = list(self.ready)
            self.ready.clear()
            for arrival in queued:
                self._queue_of(arrival).append(arrival)

    def _queue_of(self, arrival: AdmittedJob) -> deque[AdmittedJob]:
        alone = arrival.alone or self._loners >> arrival.kind & 1
        return self.isolated if alone else self.ready

    def take(self, count: int, refused: int = 0) -> list[AdmittedJob]:
        """The first jobs, at most ``count``, of types whose bit is not in ``refused``; the others stay."""
        if not refused:
            return [self.ready.popleft() for _ in range(min(count, len(self.ready)))]
        taken: list[AdmittedJob] = []
        passed: list[AdmittedJob] = []
        while self.ready and len(taken) < count:
            arrival = self.ready.popleft()
            (passed if refused >> arrival.kind & 1 else taken).append(arrival)
        self.ready.extendleft(reversed(passed))
        return taken

    def waiting(self, source: int) -> int:
        """How many jobs count against reading more of a stream: all runnable ones, and its parked ones only
        if there are too many, so that other types behind them continue."""
        paused = sum(held.count(source) for held in self._held if held.full(source))
        return paused + len(self.ready) + len(self.isolated)

    @property
    def full(self) -> bool:
        """Whether what may run is as many bytes as may wait here; what is paused has limits of its own."""
        jobs = len(self.ready) + len(self.isolated)
        if not jobs:
            self._largest_bytes = 0
        if jobs * self._largest_bytes < _HELD_BYTES:
            return False
        waiting = itertools.chain(self.ready, self.isolated)
        return sum(len(arrival.entry.data or b"") for arrival in waiting) >= _HELD_BYTES

    def is_within_grace(self, kind: int, source: int, entry_id: bytes) -> bool:
        """Whether a job that reports `Unavailable` is retried for free: always while no job of its type
        succeeds, and at most five times while others do."""
        recoveries = self._breakers[kind].recoveries
        times, seen = self._excuses.get((source, entry_id), (0, -1))
        if seen != recoveries:
            times += 1
        if len(self._excuses) > _EXCUSES_KEPT:
            self._excuses.clear()
        self._excuses[source, entry_id] = (times, recoveries)
        return times <= _EXCUSES

    def pause(self, arrival: AdmittedJob, mono_now_s: float) -> None:
        """Take a job back whose store did not answer, and pause its type."""
        self._breakers[arrival.kind].failed(mono_now_s)
        self._held[arrival.kind].put(arrival)
        self.ready = self._set_aside(self.ready, {arrival.kind})

    def set_paused_types(self, kinds: set[int]) -> None:
        """Pause exactly these types until told otherwise; what was handed out already is not called back."""
        ended, self.paused_types = self.paused_types - kinds, set(kinds)
        self.ready = self._set_aside(self.ready, kinds)
        self.isolated = self._set_aside(self.isolated, kinds)
        for kind in ended:
            if not self._breakers[kind].open:
                self._resume(kind, len(self._held[kind]))

    def _set_aside(self, queue: deque[AdmittedJob], kinds: set[int]) -> deque[AdmittedJob]:
        """Move jobs of some types out of a queue; returns what is left of it."""
        for arrival in queue:
            if arrival.kind in kinds:
                self._held[arrival.kind].put(arrival)
        return deque(arrival for arrival in queue if arrival.kind not in kinds)

    def answered(self, kinds: Iterable[int]) -> None:
        """Jobs of these types succeeded: resume the parked ones."""
        for kind in kinds:
            if self._breakers[kind].open:
                self._breakers[kind].answered()
                if kind not in self.paused_types:
                    self._resume(kind, len(self._held[kind]))

    def release_probes(self, mono_now_s: float) -> None:
        """Let one job of a paused type through where it is time to try."""
        for kind, breaker in enumerate(self._breakers):
            if kind not in self.paused_types and len(self._held[kind]) and breaker.may_try(mono_now_s):
                self._resume(kind, 1)

    def paused(self, kind: int) -> bool:
        """Whether the circuit breaker of a type is open."""
        return self._breakers[kind].open

    def drop(self, source: int, ids: set[bytes]) -> None:
        """Forget entries that another consumer has claimed."""
        for queue in (self.ready, self.isolated):
            kept = [a for a in queue if not (a.source == source and a.entry.id in ids)]
            queue.clear()
            queue.extend(kept)
        for held in self._held:
            held.keep(a for a in held if not (a.source == source and a.entry.id in ids))

    def clear(self) -> None:
        """Forget all; types stay paused."""
        self.ready.clear()
        self.isolated.clear()
        for held in self._held:
            held.keep(())

    def _resume(self, kind: int, count: int) -> None:
        """Move held jobs to where they would be if their type had not been paused."""
        for _ in range(count):
            arrival = self._held[kind].take()
            self._queue_of(arrival).append(arrival)
