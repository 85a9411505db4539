"""Dead letters of some streams and a choice among them: gone through page by page, sent again, deleted."""

import contextlib
import heapq
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any, NamedTuple

import msgspec

from ..store.operator import START, OperatorStore, order_of, walk
from ..store.ports import Entry

_NOTHING = msgspec.Raw(b"null")


class _Written(msgspec.Struct):
    """A letter as it stands in the store. Nothing is required: others may have written it."""

    task: msgspec.Raw = _NOTHING
    error: str = ""
    failed_at: str = ""
    reason: str = ""
    original_id: str = ""
    worker: str = ""
    retry_count: int = 0
    deaths: int = 0
    raw: str | None = None
    details: dict[str, Any] | None = None


class _Named(msgspec.Struct):
    """What a job is called, also where the rest of it is in order no more."""

    id: str = ""
    type: str = ""
    tenant_id: str = ""
    project_id: str = ""


@dataclass(frozen=True)
class Letter:
    """One dead letter. ``task`` is the job as it was received, None where that could not be read."""

    stream: str
    id: bytes
    job_id: str
    type: str
    tenant_id: str
    project_id: str
    reason: str
    error: str
    failed_at: str
    original_id: str
    worker: str
    retry_count: int
    deaths: int
    task: bytes | None
    raw: str | None
    details: dict[str, Any] | None

    @property
    def wall_s(self) -> float:
        """When it was written, by the store's clock (unix seconds)."""
        return int(self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True)
class LetterFilter:
    """Which letters are meant: all that fit everything that is given. Times are unix seconds."""

    ids: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    error: str = ""
    after_wall_s: float = 0.0
    before_wall_s: float = float("inf")

    @property
    def everything(self) -> bool:
        """Whether nothing was given."""
        return self == LetterFilter()

    def __contains__(self, letter: Letter) -> bool:
        return (
            (not self.ids or bool(self.ids & {letter.id.decode(), letter.job_id, letter.original_id}))
            and (not self.reasons or letter.reason in self.reasons)
            and (not self.types or letter.type in self.types)
            and (not self.tenants or letter.tenant_id in self.tenants)
            and self.error in letter.error
            and self.after_wall_s <= letter.wall_s <= self.before_wall_s
        )


_written = msgspec.json.Decoder(_Written, strict=False)
_named = msgspec.json.Decoder(_Named)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_letter(stream: str, entry: Entry) -> Letter:
    """A letter of ``dlq:<stream>``; what cannot be read is shown as far as it goes."""
    try:
        said = _written.decode(entry.data or b"")
    except (ValueError, RecursionError) as error:
        said = _Written(error=f"not a dead letter: {error}")
    task = bytes(said.task)
    named = _name(task)
    return Letter(
        stream, entry.id, named.id, named.type, named.tenant_id, named.project_id, said.reason, said.error,
        said.failed_at, said.original_id, said.worker, said.retry_count, said.deaths,
        task if named.id and named.type else None, said.raw, said.details,
    )  # fmt: skip


def _name(task: bytes) -> _Named:
    try:
        return _named.decode(task)
    except (ValueError, RecursionError):
        return _Named()


def fresh_job(task: bytes) -> bytes:
    """The job as it was first sent: without what earlier tries have counted; all else keeps its bytes."""
    members = _members.decode(task)
    counted = [name for name in ("retry_count", "deaths") if name in members]
    if not counted:
        return task
    for name in counted:
        del members[name]
    return msgspec.json.encode(members)


#: Letters moved between two looks at the clock: a script each, some 10 ms of the server's time together.
AT_ONCE = 100


class Cursor(NamedTuple):
    """Where a page of letters ends: the last one that was looked at."""

    stream: str
    id: bytes


class LetterPage(NamedTuple):
    """Chosen letters, how many were looked at for them, and where to go on (None: that was all)."""

    letters: list[Letter]
    looked_at: int
    behind: Cursor | None


def aged(
    choice: LetterFilter, now_s: float, older_than_s: float | None, newer_than_s: float | None
) -> LetterFilter:
    """The choice, narrowed down to ages (seconds before the store's clock `now_s`)."""
    return replace(
        choice,
        before_wall_s=math.inf if older_than_s is None else now_s - older_than_s,
        after_wall_s=0.0 if newer_than_s is None else now_s - newer_than_s,
    )


class DeadLetterQueue:
    """What is done with dead letters. Every call raises `StoreUnavailable` as the store does."""

    def __init__(self, store: OperatorStore, streams: Sequence[str], choice: LetterFilter) -> None:
        self.store = store
        self.streams = list(streams)
        self.choice = choice

    def count(self) -> int:
        """All letters of the streams, chosen or not."""
        return sum(self.store.dead_count(stream) for stream in self.streams)

    def letter(self, place: Cursor) -> Letter | None:
        """The letter at a place; None where it is gone."""
        found = self.store.dead_before(place.stream, _next(place.id), 1)
        return read_letter(place.stream, found[0]) if found and found[0].id == place.id else None

    def newest_first(self) -> Iterator[Letter]:
        """Every chosen letter of all streams."""
        return (letter for letter in self._downwards(None) if letter in self.choice)

    def page(self, size: int, look_at: int, behind: Cursor | None = None) -> LetterPage:
        """The next chosen letters, newest first; gives up after looking at so many."""
        chosen: list[Letter] = []
        looked_at, last = 0, behind
        for letter in self._downwards(behind):
            if len(chosen) == size or looked_at == look_at:
                return LetterPage(chosen, looked_at, last)
            looked_at, last = looked_at + 1, Cursor(letter.stream, letter.id)
            if letter in self.choice:
                chosen.append(letter)
        return LetterPage(chosen, looked_at, None)

    def _downwards(self, behind: Cursor | None) -> Iterator[Letter]:
        """Letters of all streams in one order: by id, newest first; of equal ids by stream."""
        ranks = {stream: rank for rank, stream in enumerate(self.streams)}
        parts = [self._of_stream(stream, self._start(stream, behind, ranks)) for stream in self.streams]
        return heapq.merge(
            *parts, key=lambda letter: (*order_of(letter.id), -ranks[letter.stream]), reverse=True
        )

    def _start(self, stream: str, behind: Cursor | None, ranks: dict[str, int]) -> bytes:
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


class SelectedLetters(DeadLetterQueue):
    """Letters that were pointed at one by one, wherever they stand."""

    def __init__(self, store: OperatorStore, places: Sequence[Cursor]) -> None:
        self._places = sorted(places, key=lambda place: (place.stream, order_of(place.id)))
        ids = frozenset(place.id.decode() for place in places)
        super().__init__(store, sorted({place.stream for place in places}), LetterFilter(ids))

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


class BulkOperation:
    """One deed done to every chosen letter, in lots, and what became of them so far."""

    def __init__(self, desk: DeadLetterQueue, *, dry_run: bool = False) -> None:
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
