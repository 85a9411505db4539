"""Dead-letter administration: read, filter and page dead letters, requeue or purge them in bulk.

The store requeues or deletes each letter in one atomic step. An operation that is interrupted loses no job
and sends no job twice; running it again completes it.
"""

import base64
import heapq
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from ..conditions import requeued
from ..envelope import read_envelope
from ..errors import MalformedJob, StoreRefused
from ..store.operator import START, order_of, walk
from ..store.ports import Entry
from .identity import read_identity, read_malformed_identity
from .refusals import faults_of, refusal

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Letters per store call: one script each, about 10 ms of server time together. Requeues with a rate are
#: paced between these calls.
BATCH_SIZE = 100

_NULL = msgspec.Raw(b"null")


class _StoredLetter(msgspec.Struct):
    """The JSON of a dead letter. No field is required: another program may have written it."""

    task: msgspec.Raw = _NULL
    error: str = ""
    failed_at: str = ""
    reason: str = ""
    original_id: str = ""
    worker: str = ""
    retry_count: int = 0
    deaths: int = 0
    raw: str | None = None
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Letter:
    """One dead letter. ``task`` holds the bytes of the job as received, from the member ``raw`` if they are
    there only; None if they are not a job.

    The names of a malformed job are read from ``raw``, as far as they are valid.
    """

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
        """When the job was dead-lettered, by the store's clock (unix seconds)."""
        return int(self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True)
class LetterFilter:
    """Conditions on dead letters. A letter must meet all that are set. Times are unix seconds."""

    ids: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    error: str = ""
    after_wall_s: float = 0.0
    before_wall_s: float = float("inf")

    @property
    def is_empty(self) -> bool:
        """Whether no condition is set, so that every letter matches."""
        return self == LetterFilter()

    def with_ages(self, now_s: float, older_than_s: float | None, newer_than_s: float | None) -> Self:
        """This filter with limits on age: seconds before `now_s` on the store's clock, None for no limit."""
        return replace(
            self,
            before_wall_s=math.inf if older_than_s is None else now_s - older_than_s,
            after_wall_s=0.0 if newer_than_s is None else now_s - newer_than_s,
        )

    def __contains__(self, letter: Letter) -> bool:
        return (
            (not self.ids or bool(self.ids & {letter.id.decode(), letter.job_id, letter.original_id}))
            and (not self.reasons or letter.reason in self.reasons)
            and (not self.types or letter.type in self.types)
            and (not self.tenants or letter.tenant_id in self.tenants)
            and self.error in letter.error
            and self.after_wall_s <= letter.wall_s <= self.before_wall_s
        )


_stored = msgspec.json.Decoder(_StoredLetter, strict=False)


def read_letter(stream: str, entry: Entry) -> Letter:
    """Parse an entry of ``dlq:<stream>``. An invalid one becomes a letter whose error says so."""
    try:
        stored = _stored.decode(entry.data or b"")
    except (ValueError, RecursionError) as error:
        stored = _StoredLetter(error=f"not a dead letter: {error}")
    raw = _decode_raw(stored.raw) if stored.raw else b""
    task = raw if stored.task == _NULL and _is_job(raw) else bytes(stored.task)
    job = read_identity(task)
    readable = bool(job.id and job.type)
    if raw and not readable:
        job = read_malformed_identity(raw)
    return Letter(
        stream, entry.id, job.id, job.type, job.tenant_id, job.project_id, stored.reason, stored.error,
        stored.failed_at, stored.original_id, stored.worker, stored.retry_count, stored.deaths,
        task if readable else None, stored.raw, stored.details,
    )  # fmt: skip


def _decode_raw(text: str) -> bytes:
    """The bytes of a job that is kept as base64; empty if it is damaged."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def _is_job(data: bytes) -> bool:
    """Whether the service would accept the bytes. The reader may die before it parses a valid job."""
    try:
        read_envelope(data)
    except MalformedJob:
        return False
    return True


class Cursor(NamedTuple):
    """Position of one letter. A page ends at a cursor and the next page starts behind it."""

    stream: str
    id: bytes


class LetterPage(NamedTuple):
    """Matching letters, how many letters were scanned for them, and the cursor of the next page (None: no
    more letters)."""

    letters: list[Letter]
    scanned: int
    next_cursor: Cursor | None


class DeadLetterQueue:
    """The dead letters of some streams that match a filter. Every call raises `StoreUnavailable` as the
    store does, but not for streams whose keys the store refuses if they are to be left out."""

    def __init__(
        self,
        store: "OperatorStore",
        streams: Sequence[str],
        letter_filter: LetterFilter,
        *,
        leave_out_refused: bool = False,
    ) -> None:
        self._leaves_out_refused = leave_out_refused
        #: The streams that were left out, in words.
        self.refused: dict[str, str] = {}
        self.store = store
        self.streams = list(streams)
        self.filter = letter_filter

    def count(self) -> int:
        """The number of letters in the streams, matching or not."""
        total = 0
        for stream in self.streams:
            with self.guard(stream):
                total += self.store.dead_count(stream)
        return total

    @contextmanager
    def guard(self, stream: str) -> Iterator[None]:
        """Leave out the rest of the block, and note the stream, if the store refuses its keys."""
        try:
            yield
        except StoreRefused as error:
            if not self._leaves_out_refused:
                raise
            self.refused[stream] = refusal(
                f"dead letters of {stream}",
                error,
                partial(faults_of, self.store, stream, self.store.dead_key),
            )

    def get(self, cursor: Cursor) -> Letter | None:
        """The letter at a cursor; None if it was requeued or deleted."""
        entries = self.store.dead_before(cursor.stream, _next_id(cursor.id), 1)
        return read_letter(cursor.stream, entries[0]) if entries and entries[0].id == cursor.id else None

    def newest_first(self) -> Iterator[Letter]:
        """The matching letters of all streams."""
        return (letter for letter in self._scan_newest_first(None) if letter in self.filter)

    def page(self, size: int, scan_limit: int, cursor: Cursor | None = None) -> LetterPage:
        """Up to `size` matching letters behind the cursor, newest first. Scans at most `scan_limit` letters,
        so that a filter that matches nothing cannot hold the caller up."""
        matching: list[Letter] = []
        scanned, last = 0, cursor
        for letter in self._scan_newest_first(cursor):
            if len(matching) == size or scanned == scan_limit:
                return LetterPage(matching, scanned, last)
            scanned, last = scanned + 1, Cursor(letter.stream, letter.id)
            if letter in self.filter:
                matching.append(letter)
        return LetterPage(matching, scanned, None)

    def _scan_newest_first(self, cursor: Cursor | None) -> Iterator[Letter]:
        """Letters of all streams in one order: by id descending, equal ids by the order of the streams."""
        ranks = {stream: rank for rank, stream in enumerate(self.streams)}
        parts = [self._scan_stream(stream, self._start_id(stream, cursor, ranks)) for stream in self.streams]
        return heapq.merge(
            *parts, key=lambda letter: (*order_of(letter.id), -ranks[letter.stream]), reverse=True
        )

    def _start_id(self, stream: str, cursor: Cursor | None, ranks: dict[str, int]) -> bytes:
        """The exclusive upper bound of the ids to read. Ids are unique within a stream only: of the letters
        with the cursor's id, streams up to the cursor's own were already shown."""
        if cursor is not None:
            already_shown = ranks[stream] <= ranks.get(cursor.stream, -1)
            return cursor.id if already_shown else _next_id(cursor.id)
        newest_s = self.filter.before_wall_s
        return START if math.isinf(newest_s) else b"%d-0" % (max(0, int(newest_s * 1000)) + 1)

    def _scan_stream(self, stream: str, start: bytes) -> Iterator[Letter]:
        with self.guard(stream):
            for entries in walk(lambda before, count: self.store.dead_before(stream, before, count), start):
                for letter in _read_all(stream, entries):
                    if letter.wall_s < self.filter.after_wall_s:
                        return
                    yield letter

    def oldest_first(self, stream: str, on_scanned: Callable[[int], None]) -> Iterator[Letter]:
        """The matching letters that exist now. Letters written later are not returned: a requeued job that
        fails again would otherwise be requeued for ever. `on_scanned` gets the number of letters scanned."""
        newest = self.store.dead_before(stream, START, 1)
        last = order_of(newest[0].id) if newest else (0, 0)
        for entries in walk(lambda after, count: self.store.dead_after(stream, after, count)):
            for letter in _read_all(stream, entries):
                if order_of(letter.id) > last:
                    return
                if letter in self.filter:
                    yield letter
                on_scanned(1)


class SelectedLetters(DeadLetterQueue):
    """Dead letters that a person selected one by one."""

    def __init__(self, store: "OperatorStore", cursors: Sequence[Cursor]) -> None:
        self._cursors = sorted(cursors, key=lambda cursor: (cursor.stream, order_of(cursor.id)))
        ids = frozenset(cursor.id.decode() for cursor in cursors)
        super().__init__(store, sorted({cursor.stream for cursor in cursors}), LetterFilter(ids))

    def count(self) -> int:
        """The number of selected letters."""
        return len(self._cursors)

    def oldest_first(self, stream: str, on_scanned: Callable[[int], None]) -> Iterator[Letter]:
        """The selected letters of a stream that still exist."""
        for cursor in self._cursors:
            if cursor.stream == stream:
                if letter := self.get(cursor):
                    yield letter
                on_scanned(1)


class BulkOperation:
    """Requeues or purges every letter of a queue, in batches, and counts the results."""

    def __init__(self, queue: DeadLetterQueue, *, dry_run: bool = False, to: str = "") -> None:
        self.queue = queue
        self._to = to
        self.dry_run = dry_run
        #: Letters that were processed; that had disappeared before; that hold no job and were left.
        self.done = self.gone = self.skipped = 0

    def requeue(
        self,
        batch_sizes: Iterator[int] | None = None,
        on_scanned: Callable[[int], None] = lambda _: None,
        on_skipped: Callable[[Letter], None] = lambda _: None,
    ) -> None:
        """Send the jobs again with their counters reset, to their stream or the one of ``to``.

        `batch_sizes` yields the size of each batch and may block, which limits the rate. `on_skipped` gets
        each letter that holds no job; such letters are left.
        """

        def send(stream: str, letters: list[Letter]) -> tuple[int, int]:
            for letter in letters:
                if letter.task is None:
                    self.skipped += 1
                    on_skipped(letter)
            jobs = [
                (letter.id, requeued(letter.task, letter.original_id))
                for letter in letters
                if letter.task is not None
            ]
            if self.dry_run:
                return len(jobs), 0
            sent = self.queue.store.requeue(stream, jobs, self._to)
            return sum(sent), len(sent) - sum(sent)

        self._run(send, batch_sizes, on_scanned)

    def purge(self, on_scanned: Callable[[int], None] = lambda _: None) -> None:
        """Delete the letters permanently."""

        def delete(stream: str, letters: list[Letter]) -> tuple[int, int]:
            if self.dry_run:
                return len(letters), 0
            deleted = self.queue.store.purge(stream, [letter.id for letter in letters])
            return deleted, len(letters) - deleted

        self._run(delete, None, on_scanned)

    def _run(
        self,
        operation: Callable[[str, list[Letter]], tuple[int, int]],
        batch_sizes: Iterator[int] | None,
        on_scanned: Callable[[int], None],
    ) -> None:
        """Apply `operation` to each batch. It returns how many letters it processed and how many were
        gone."""
        batch_sizes = batch_sizes or repeat(BATCH_SIZE)
        for stream in self.queue.streams:
            letters = self.queue.oldest_first(stream, on_scanned)
            with self.queue.guard(stream):
                while batch := list(islice(letters, next(batch_sizes))):
                    with _defer_sigint():
                        done, gone = operation(stream, batch)
                        self.done += done
                        self.gone += gone


@contextmanager
def _defer_sigint() -> Iterator[None]:
    """Hold Ctrl-C back until a batch is counted: the report on an interrupted operation must be true."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read_all(stream: str, entries: Sequence[Entry]) -> Iterator[Letter]:
    return (read_letter(stream, entry) for entry in entries)


def _next_id(id: bytes) -> bytes:
    """The smallest id that is greater."""
    ms, sequence = order_of(id)
    return b"%d-%d" % (ms, sequence + 1)
