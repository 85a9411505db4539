"""What the reader has read and not handed out: jobs that may run, suspects, and jobs whose type is paused."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from .triage import Arrival

#: First and longest time between two tries of a paused type (seconds).
_PAUSE_S = (1.0, 15.0)
#: How often one job may say that its store does not answer while others of its type get through; from then
#: on the fault is taken to be the job's own.
_EXCUSES = 5
#: Excuses remembered at most; forgetting them only gives some jobs more patience.
_EXCUSES_KEPT = 10_000


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
        """A job got through: go on as before."""
        self.open = False
        self.recoveries += 1
        self._failures = 0
        self._trying = False

    def may_try(self, mono_now_s: float) -> bool:
        """Whether one job may be tried now (half-open); another follows if its fate stays unknown."""
        if not self.open or mono_now_s < self._mono_try_at_s:
            return False
        self._trying = True
        self._mono_try_at_s = mono_now_s + _PAUSE_S[1]
        return True


class Backlog:
    """Queues in order of arrival. ``ready`` may be handed to any worker, ``suspects`` one at a time."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.ready: deque[Arrival] = deque()
        self.suspects: deque[Arrival] = deque()
        self._held: list[deque[Arrival]] = [deque() for _ in kinds]
        self._breakers = [Breaker() for _ in kinds]
        # For each job that was excused: how often, and after how many recoveries of its type the last time.
        self._excuses: dict[tuple[int, bytes], tuple[int, int]] = {}

    def __iter__(self) -> Iterator[Arrival]:
        yield from self.ready
        yield from self.suspects
        for held in self._held:
            yield from held

    def add(self, arrival: Arrival) -> None:
        """Queue a job behind those of its sort."""
        if self._breakers[arrival.kind].open:
            self._held[arrival.kind].append(arrival)
        elif arrival.alone:
            self.suspects.append(arrival)
        else:
            self.ready.append(arrival)

    def waiting(self, source: int) -> int:
        """How many jobs stand in the way of reading more from a source: its own paused ones, all others."""
        paused = sum(arrival.source == source for held in self._held for arrival in held)
        return paused + len(self.ready) + len(self.suspects)

    def excused(self, kind: int, source: int, entry_id: bytes) -> bool:
        """Whether a job that blames an unavailable store is believed. It always is while no job of its type
        gets through; one that goes on blaming it each time the others have recovered is not."""
        recoveries = self._breakers[kind].recoveries
        times, seen = self._excuses.get((source, entry_id), (0, -1))
        if seen != recoveries:
            times += 1
        if len(self._excuses) > _EXCUSES_KEPT:
            self._excuses.clear()
        self._excuses[source, entry_id] = (times, recoveries)
        return times <= _EXCUSES

    def pause(self, arrival: Arrival, mono_now_s: float) -> None:
        """Take a job back whose store did not answer, and pause its type."""
        self._breakers[arrival.kind].failed(mono_now_s)
        held = self._held[arrival.kind]
        held.append(arrival)
        held.extend(waiting for waiting in self.ready if waiting.kind == arrival.kind)
        self.ready = deque(waiting for waiting in self.ready if waiting.kind != arrival.kind)

    def answered(self, kinds: Iterable[int]) -> None:
        """Jobs of these types got through: what was held goes on."""
        for kind in kinds:
            if self._breakers[kind].open:
                self._breakers[kind].answered()
                self._resume(kind, len(self._held[kind]))

    def tend(self, mono_now_s: float) -> None:
        """Let one job of a paused type through where it is time to try."""
        for kind, breaker in enumerate(self._breakers):
            if self._held[kind] and breaker.may_try(mono_now_s):
                self._resume(kind, 1)

    def paused(self, kind: int) -> bool:
        """Whether a type is paused."""
        return self._breakers[kind].open

    def drop(self, source: int, ids: set[bytes]) -> None:
        """Forget entries that are somebody else's by now."""
        for queue in (self.ready, self.suspects, *self._held):
            kept = [a for a in queue if not (a.source == source and a.entry.id in ids)]
            queue.clear()
            queue.extend(kept)

    def clear(self) -> None:
        """Forget all; types stay paused."""
        for queue in (self.ready, self.suspects, *self._held):
            queue.clear()

    def _resume(self, kind: int, count: int) -> None:
        """Move held jobs to where they would be if their type had not been paused."""
        for _ in range(count):
            arrival = self._held[kind].popleft()
            (self.suspects if arrival.alone else self.ready).append(arrival)
