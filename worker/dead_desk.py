"""Dead letters of some streams and a choice among them: gone through page by page, sent again, deleted."""

import contextlib
import heapq
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from typing import NamedTuple

from .dead_letters import Choice, Letter, fresh_job, read_letter
from .operator_store import START, OperatorStore, order_of, walk
from .store import Entry

#: Letters moved between two looks at the clock: a script each, some 10 ms of the server's time together.
AT_ONCE = 100


class Place(NamedTuple):
    """Where a page of letters ends: the last one that was looked at."""

    stream: str
    id: bytes


class LetterPage(NamedTuple):
    """Chosen letters, how many were looked at for them, and where to go on (None: that was all)."""

    letters: list[Letter]
    looked_at: int
    behind: Place | None


def aged(choice: Choice, now_s: float, older_than_s: float | None, newer_than_s: float | None) -> Choice:
    """The choice, narrowed down to ages (seconds before the store's clock `now_s`)."""
    return replace(
        choice,
        before_wall_s=math.inf if older_than_s is None else now_s - older_than_s,
        after_wall_s=0.0 if newer_than_s is None else now_s - newer_than_s,
    )


class DeadDesk:
    """What is done with dead letters. Every call raises `StoreUnavailable` as the store does."""

    def __init__(self, store: OperatorStore, streams: Sequence[str], choice: Choice) -> None:
        self.store = store
        self.streams = list(streams)
        self.choice = choice

    def count(self) -> int:
        """All letters of the streams, chosen or not."""
        return sum(self.store.dead_count(stream) for stream in self.streams)

    def letter(self, place: Place) -> Letter | None:
        """The letter at a place; None where it is gone."""
        found = self.store.dead_before(place.stream, _next(place.id), 1)
        return read_letter(place.stream, found[0]) if found and found[0].id == place.id else None

    def newest_first(self) -> Iterator[Letter]:
        """Every chosen letter of all streams."""
        return (letter for letter in self._downwards(None) if letter in self.choice)

    def page(self, size: int, look_at: int, behind: Place | None = None) -> LetterPage:
        """The next chosen letters, newest first; gives up after looking at so many."""
        chosen: list[Letter] = []
        looked_at, last = 0, behind
        for letter in self._downwards(behind):
            if len(chosen) == size or looked_at == look_at:
                return LetterPage(chosen, looked_at, last)
            looked_at, last = looked_at + 1, Place(letter.stream, letter.id)
            if letter in self.choice:
                chosen.append(letter)
        return LetterPage(chosen, looked_at, None)

    def _downwards(self, behind: Place | None) -> Iterator[Letter]:
        """Letters of all streams in one order: by id, newest first; of equal ids by stream."""
        ranks = {stream: rank for rank, stream in enumerate(self.streams)}
        parts = [self._of_stream(stream, self._start(stream, behind, ranks)) for stream in self.streams]
        return heapq.merge(
            *parts, key=lambda letter: (*order_of(letter.id), -ranks[letter.stream]), reverse=True
        )

    def _start(self, stream: str, behind: Place | None, ranks: dict[str, int]) -> bytes:
        """What the first letter of a stream stands in front of."""
        if behind is not None:
            passed = ranks[stream] <= ranks.get(behind.stream, -1)
            return behind.id if passed else _next(behind.id)
        newest_s = self.choice.before_wall_s
        return START if math.isinf(newest_s) else b"%d-0" % (int(newest_s * 1000) + 1)

    def _of_stream(self, stream: str, start: bytes) -> Iterator[Letter]:
        for entries in walk(lambda before, count: self.store.dead_before(stream, before, count), start):
            for letter in _read(stream, entries):
                if letter.wall_s < self.choice.after_wall_s:
                    return
                yield letter

    def oldest_first(self, stream: str, seen: Callable[[int], None]) -> Iterator[Letter]:
        """Chosen letters that are there now: what is given up while we work is not met again."""
        newest = self.store.dead_before(stream, START, 1)
        last = order_of(newest[0].id) if newest else (0, 0)
        for entries in walk(lambda after, count: self.store.dead_after(stream, after, count)):
            for letter in _read(stream, entries):
                if order_of(letter.id) > last:
                    return
                if letter in self.choice:
                    yield letter
                seen(1)


class Picked(DeadDesk):
    """Letters that were pointed at one by one, wherever they stand."""

    def __init__(self, store: OperatorStore, places: Sequence[Place]) -> None:
        self._places = sorted(places, key=lambda place: (place.stream, order_of(place.id)))
        ids = frozenset(place.id.decode() for place in places)
        super().__init__(store, sorted({place.stream for place in places}), Choice(ids))

    def count(self) -> int:
        """All that were pointed at."""
        return len(self._places)

    def oldest_first(self, stream: str, seen: Callable[[int], None]) -> Iterator[Letter]:
        """Those of a stream that are still there."""
        for place in self._places:
            if place.stream == stream:
                if letter := self.letter(place):
                    yield letter
                seen(1)


class Errand:
    """One deed done to every chosen letter, in lots, and what became of them so far."""

    def __init__(self, desk: DeadDesk, *, dry_run: bool = False) -> None:
        self.desk = desk
        self.dry_run = dry_run
        #: Letters it was done to; that were gone already; that hold no job.
        self.done = self.gone = self.skipped = 0

    def requeue(
        self,
        lots: Iterator[int] | None = None,
        seen: Callable[[int], None] = lambda _: None,
        skipped: Callable[[Letter], None] = lambda _: None,
    ) -> None:
        """Send them again as new jobs. `lots` says how many may go out next and may wait for it; `skipped`
        is told of each that holds no job and stays where it is."""

        def send(stream: str, letters: list[Letter]) -> list[bool]:
            jobs = [letter for letter in letters if letter.task is not None]
            for letter in (one for one in letters if one.task is None):
                self.skipped += 1
                skipped(letter)
            if self.dry_run:
                return [True] * len(jobs)
            fresh = [(one.id, fresh_job(one.task)) for one in jobs if one.task]
            return self.desk.store.requeue(stream, fresh)

        self._go(send, lots, seen)

    def purge(self, seen: Callable[[int], None] = lambda _: None) -> None:
        """Delete them for good."""

        def delete(stream: str, letters: list[Letter]) -> list[bool]:
            if self.dry_run:
                return [True] * len(letters)
            deleted = self.desk.store.purge(stream, [letter.id for letter in letters])
            return [number < deleted for number in range(len(letters))]

        self._go(delete, None, seen)

    def _go(
        self,
        deed: Callable[[str, list[Letter]], list[bool]],
        lots: Iterator[int] | None,
        seen: Callable[[int], None],
    ) -> None:
        lots = lots or repeat(AT_ONCE)
        for stream in self.desk.streams:
            chosen = self.desk.oldest_first(stream, seen)
            while letters := list(islice(chosen, next(lots))):
                with _no_interrupt():
                    done = deed(stream, letters)
                    self.done += sum(done)
                    self.gone += len(done) - sum(done)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits until a lot is counted, so that what is said of the rest is true."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(stream: str, entries: Sequence[Entry]) -> Iterator[Letter]:
    return (read_letter(stream, entry) for entry in entries)


def _next(id: bytes) -> bytes:
    """The smallest id that is larger."""
    ms, sequence = order_of(id)
    return b"%d-%d" % (ms, sequence + 1)
