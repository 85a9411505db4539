"""Cancellation of jobs by their ids or by a filter: finds those that have not ended.

Jobs that wait are removed at once, each in one atomic step; the service that has a prefetched or running one
is asked to end it.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

from .conditions import unique_name
from .envelope import DeadJob, Header, dead_letter, read_header
from .errors import MalformedJob, StoreUnavailable
from .outcome import Reason
from .results import CANCELLED, CancelOutcome, encode_result, is_kept
from .store.operator import order_of, walk
from .store.ports import CancelReply, CancelRequest, CancelStore, Entry

#: Entries and retries that a search for one id looks at in each stream: about a second for all of them.
SCAN_LIMIT = 100_000
#: Jobs per store call: one script each. Retries come with their payloads, which may be megabytes.
_BATCH = 100
#: Ids that JSON writes without escapes, so that they can be searched for before the JSON is parsed.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:-]+")
_ERROR = "JobCancelled: it was cancelled while it waited"


_OUTCOMES = {
    CancelReply.GONE: CancelOutcome.ENDED,
    CancelReply.REMOVED: CancelOutcome.CANCELLED,
    CancelReply.UNSCHEDULED: CancelOutcome.CANCELLED,
    CancelReply.ASKED: CancelOutcome.REQUESTED,
}
#: How long a move into a shard is waited for, and the interval between two looks (seconds). If the service
#: that moves entries is lost, another one continues after 2 s.
_MOVE_LIMIT_S, _MOVE_PAUSE_S = 10.0, 0.05


class JobFilter(NamedTuple):
    """Conditions on jobs; a job must meet all that are set. ``ids`` are those of jobs or of their entries."""

    ids: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()

    def matches(self, entry_id: bytes, header: Header) -> bool:
        """Whether a job meets the conditions."""
        return (
            (not self.ids or header.id in self.ids or entry_id.decode() in self.ids)
            and (not self.types or header.type in self.types)
            and (not self.tenants or header.tenant_id in self.tenants)
        )

    def may_match(self, entry_id: bytes, data: bytes) -> bool:
        """A quick test: False only if the job does not match."""
        if not self.ids or entry_id.decode() in self.ids:
            return True
        return any(not _PLAIN_ID.fullmatch(id) or id.encode() in data for id in self.ids)


class CancelledJob(NamedTuple):
    """A job that matched, and what was done."""

    stream: str
    entry_id: str
    id: str
    type: str
    tenant_id: str
    outcome: CancelOutcome


class Canceller:
    """Cancels the jobs of some streams that match a filter. Calls raise `StoreUnavailable` as the store does.

    A cancelled job becomes a dead letter with the reason ``cancelled``, or with ``discard`` is dropped. Jobs
    that are sent after the start are left alone.
    """

    def __init__(
        self,
        store: CancelStore,
        streams: Sequence[str],
        selected: JobFilter,
        *,
        by: str,
        discard: bool = False,
        dry_run: bool = False,
        scan_limit: int | None = None,
        result_ttl_s: float = 3600.0,
        wall_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._streams = streams
        self._selected = selected
        self._by = by
        self._discard = discard
        self._dry_run = dry_run
        self._scan_limit = scan_limit
        self._result_ttl_s = result_ttl_s
        self._wall_now_s = wall_now_s
        #: Ids of jobs that are on their way into a shard.
        self._moving: set[str] = set()
        #: Entries and retries that were looked at.
        self.scanned = 0
        #: Names of streams that were not looked at to their end.
        self.incomplete: list[str] = []

    def run(self) -> Iterator[CancelledJob]:
        """Cancel, and return each job that matched; one that has ended is returned if its entry is left.

        The retries are looked at before and after the stream: a job may leave one for the other meanwhile.
        Those that are on their way into a shard are looked for again, until they have arrived. Raises
        `StoreUnavailable` if they do not.
        """
        yield from self._cancel_all()
        mono_give_up_s = time.monotonic() + _MOVE_LIMIT_S
        while self._moving:
            if time.monotonic() > mono_give_up_s:
                some = ", ".join(sorted(self._moving)[:3])
                raise StoreUnavailable(
                    f"jobs are on their way into shards and do not arrive, such as {some:.300}: see whether "
                    "a service with --shards runs, and try again"
                )
            time.sleep(_MOVE_PAUSE_S)  # the store sends no event
            self._selected = JobFilter(ids=frozenset(self._moving))
            self._moving = set()
            yield from self._cancel_all()

    def _cancel_all(self) -> Iterator[CancelledJob]:
        for stream in self._streams:
            if not self._dry_run:  # which would count each retry twice
                yield from self._cancel_retries(stream)
            yield from self._cancel_entries(stream)
            yield from self._cancel_retries(stream)

    def _cancel_entries(self, stream: str) -> Iterator[CancelledJob]:
        entries = self._bounded(stream, self._entries(stream))
        found = (one for entry in entries if (one := self._match(entry)))
        while batch := list(islice(found, _BATCH)):
            yield from self._cancel(stream, batch)

    def _cancel_retries(self, stream: str) -> Iterator[CancelledJob]:
        """The ranks of the jobs behind a removed one change with each step."""
        start = looked_at = 0
        while page := self._store.retry_page(stream, start, _BATCH):
            entries = self._bounded(stream, (Entry(b"", data) for data in page), looked_at)
            cancelled = self._cancel(stream, [one for entry in entries if (one := self._match(entry))])
            yield from cancelled
            looked_at += len(page)
            start += len(page) if self._dry_run else len(page) - len(cancelled)
            if stream in self.incomplete:
                return

    def _entries(self, stream: str) -> Iterator[Entry]:
        last = order_of(self._store.last_id(stream))
        for page in walk(lambda after, count: self._store.stream_page(stream, after, count)):
            for entry in page:
                if order_of(entry.id) > last:
                    return
                yield entry

    def _bounded(self, stream: str, entries: Iterator[Entry], looked_at: int = 0) -> Iterator[Entry]:
        """The entries up to the scan limit; notes the stream if that cuts some off."""
        for number, entry in enumerate(entries, looked_at):
            if number == self._scan_limit:
                self.incomplete.append(stream)
                return
            self.scanned += 1
            yield entry

    def _match(self, entry: Entry) -> tuple[Entry, Header] | None:
        if entry.data is None or not self._selected.may_match(entry.id, entry.data):
            return None
        try:
            header = read_header(entry.data)
        except MalformedJob:  # it becomes a dead letter by itself
            return None
        return (entry, header) if self._selected.matches(entry.id, header) else None

    def _cancel(self, stream: str, jobs: Sequence[tuple[Entry, Header]]) -> list[CancelledJob]:
        if not jobs:
            return []
        requests = [self._request(stream, entry, header) for entry, header in jobs]
        replies = self._store.cancel(stream, requests, result_ttl_s=self._result_ttl_s, dry_run=self._dry_run)
        self._moving.update(
            header.id for (_, header), reply in zip(jobs, replies, strict=True) if reply == CancelReply.MOVING
        )
        return [
            CancelledJob(
                stream, entry.id.decode(), header.id, header.type, header.tenant_id, _OUTCOMES[reply]
            )
            for (entry, header), reply in zip(jobs, replies, strict=True)
            # A retry that left its set, and a job that is moved, are found elsewhere.
            if reply != CancelReply.MOVING and (entry.id or reply != CancelReply.GONE)
        ]

    def _request(self, stream: str, entry: Entry, header: Header) -> CancelRequest:
        assert entry.data is not None, "only a job matches"
        now = datetime.fromtimestamp(self._wall_now_s(), UTC)
        now_text = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        letter = result = b""
        if not self._discard:
            job = DeadJob(entry.data, entry.id, Reason.CANCELLED, _ERROR, header, entry.deaths)
            letter = dead_letter(job, stream=stream, worker=self._by, failed_at=now_text)
        if is_kept(header.metadata):
            result = encode_result(CANCELLED, now_text, error=_ERROR, reason=Reason.CANCELLED)
        first_id = header.first_id.encode() or entry.id
        return CancelRequest(entry.id, entry.data, letter, header.id, result, unique_name(header), first_id)


def outcome_of(jobs: Sequence[CancelledJob]) -> CancelOutcome:
    """What was done to a job that was found in all these places."""
    found = {job.outcome for job in jobs}
    for outcome in (CancelOutcome.REQUESTED, CancelOutcome.CANCELLED, CancelOutcome.ENDED):
        if outcome in found:
            return outcome
    return CancelOutcome.UNKNOWN
