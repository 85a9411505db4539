"""Find a job by its id in streams, retry sets and dead-letter queues, and say why it waits there."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..conditions import NOT_BEFORE, SERIES, parse_time
from ..envelope import batch_of, read_header
from ..errors import MalformedJob, StoreRefused, StoreUnavailable
from ..extension import extension, imported
from ..keys import Source
from ..shards import unread_shard_advice
from ..store.announcements import Announcement, suggestion
from ..store.operator import GroupState, LanePlace, Lease, Pause, order_of, walk
from ..store.ports import RELEASED_IDLE_S, Entry, KeyFault
from .dead_letters import read_letter
from .identity import JobIdentity, read_identity
from .refusals import faults_of, refusal
from .status_client import Service, handled_types

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: A consumer that was idle for longer is not reading: a reader blocks for at most 2 s, then reads again.
SILENT_S = 10.0
#: A retry that is due for longer is overdue: the reaper promotes due retries every 0.9 s at least.
OVERDUE_S = 5.0
#: The default of --lease, for the case that no service answers.
_DEFAULT_LEASE_S = 30.0
#: Streams that are searched besides those of the deployment.
_MAX_OTHERS = 50
#: Retries per store call.
_RETRY_PAGE = 200
#: States of a job that may have begun and has not ended.
_UNDER_WAY = frozenset({"running", "pending", "retrying"})
#: Facts of a job that was perhaps not run, because another one was.
_RIVALS = frozenset({"duplicate_of", "superseded_by"})
#: Details of a dead letter that show where the handler was.
_TRACES = ("traceback", "stack")
_ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")
#: Ids that JSON writes without escapes, so that they can be searched for before the JSON is parsed.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass
class JobLocation:
    """One place where the job is.

    ``state``: queued, delayed, running, pending, retrying, dead or finished.
    """

    state: str
    stream: str
    why: str
    job_id: str = ""
    type: str = ""
    tenant_id: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class JobFinder:
    """Searches the streams of a deployment, in each at most ``scan_limit`` entries, as many retries and as
    many dead letters. Every call raises `StoreUnavailable` as the store does."""

    def __init__(
        self, store: "OperatorStore", sources: Sequence[Source], services: Sequence[Service], scan_limit: int
    ) -> None:
        self._store = store
        self._sources = sources
        self._services = services
        self._scan_limit = scan_limit
        self._pauses: dict[str, Pause] = {}
        self._now_s = 0.0
        self._announcements: list[Announcement] = []
        #: Types that services handle; empty if unknown.
        self._types: frozenset[str] = frozenset()
        #: Names of the streams that were searched.
        self.searched: list[str] = []
        #: Entries, retries and letters that were scanned.
        self.scanned = 0
        #: Names of the streams and sets that were not scanned to their end.
        self.incomplete: list[str] = []
        #: What the store refused to show, in words.
        self.refused: list[str] = []

    def find(self, id: str) -> list[JobLocation]:
        """Every place that holds a job, or an entry, with this id."""
        self._read_context()
        locations: list[JobLocation] = []
        for source in self._sources:
            self.searched.append(source.stream)
            for name, key_of, search in self._searches(source, id):
                with self._note_refusal(name, partial(faults_of, self._store, source.stream, key_of)):
                    locations += search()
        for source in () if locations else self._other_sources():
            self.searched.append(source.stream)
            with suppress(StoreUnavailable):  # the key may have another type
                locations += [one for *_, search in self._searches(source, id) for one in search()]
        locations = _unfinished_first(locations)
        for one in locations:
            if one.state == "finished" and not one.facts.keys() & _RIVALS:
                one.why += self._how_it_ended(one, by_entry=bool(_ENTRY_ID.fullmatch(id)))
        self._add_progress([one for one in locations if one.state in _UNDER_WAY])
        return locations

    def find_in(self, source: Source, id: str) -> list[JobLocation]:
        """Every place of one stream that holds the job, without the progress of a long one. Raises
        `StoreRefused` if one of the places cannot be read."""
        self._read_context()
        self.searched.append(source.stream)
        return _unfinished_first([one for *_, search in self._searches(source, id) for one in search()])

    def _read_context(self) -> None:
        with self._note_refusal("paused types", self._store.pause_faults):
            self._pauses = {pause.job_type: pause for pause in self._store.pauses()}
        self._now_s = self._store.wall_now_s(self._sources[0].stream)
        self._announcements = self._store.announcements()
        self._types, _ = handled_types(self._announcements, self._services, self._now_s)

    def _how_it_ended(self, location: JobLocation, *, by_entry: bool) -> str:
        """What is known of an acknowledged entry, beside which the search found neither retry nor letter."""
        if f"dead letters of {location.stream}" in self.incomplete:
            return "; not all dead letters were searched for it"
        if by_entry:
            return f", and it has no dead letter; search for job {location.job_id} to see a later try of it"
        if f"retries of {location.stream}" in self.incomplete:
            return "; not all retries were searched for it"
        return (
            ", and it has neither a retry nor a dead letter: so it is after a success. "
            "The job store keeps no further record"
        )

    def _searches(
        self, source: Source, id: str
    ) -> list[tuple[str, Callable[[str], str], Callable[[], list[JobLocation]]]]:
        """The places of a stream, each with its name, the function that gives its key, and its search."""
        stream, store = source.stream, self._store
        return [
            (f"stream {stream}", str, partial(self._search_stream, source, id)),
            (f"retries of {stream}", store.retry_key, partial(self._search_retries, stream, id)),
            (f"dead letters of {stream}", store.dead_key, partial(self._search_dead_letters, stream, id)),
        ]

    @contextmanager
    def _note_refusal(self, what: str, read_faults: Callable[[], list[KeyFault]]) -> Iterator[None]:
        """Note that the store refuses ``what`` if it does; the rest of the block is left out."""
        try:
            yield
        except StoreRefused as error:
            self.refused.append(refusal(what, error, read_faults))
            self.incomplete.append(what)

    def _other_sources(self) -> list[Source]:
        """Further streams that services read, and those that no service reads: names may be misspelt."""
        searched = {source.stream for source in self._sources}
        announced = {source for one in self._announcements for source in one.sources}
        others = sorted(source for source in announced if source.stream not in searched)
        searched |= {source.stream for source in others}
        found = self._store.find_streams()
        others += [Source(name, "") for name in found.names if name not in searched]
        if not found.complete or len(others) > _MAX_OTHERS:
            self.incomplete.append("other streams")
        return others[:_MAX_OTHERS]

    def _add_progress(self, locations: Sequence[JobLocation]) -> None:
        """Add how far a long job is, also between two tries of it."""
        if not locations or not self._store.url:
            return
        for progress in imported(extension().progress)(self._store.url):
            for one in locations:
                if one.job_id == progress.job_id:
                    one.facts |= progress.facts
                    one.why += f"; {progress.text}"

    # -- the stream

    def _search_stream(self, source: Source, id: str) -> list[JobLocation]:
        group = self._store.group(source)
        if _ENTRY_ID.fullmatch(id):
            entry = self._store.entry(source.stream, id.encode())
            return [self._locate(source, group, entry)] if entry else []
        matches = _matcher(id)
        entries = self._scan(source.stream, lambda at, n: self._store.entries(source.stream, at, n))
        matching_ids = [entry.id for entry in entries if matches(entry.data)]
        # Read again one by one: only this call returns the deaths of an entry.
        complete = (self._store.entry(source.stream, entry_id) for entry_id in matching_ids)
        return [self._locate(source, group, entry) for entry in complete if entry]

    def _scan(self, name: str, page: Callable[[bytes, int], list[Entry]]) -> Iterator[Entry]:
        """Entries up to the scan limit. Records `name` as incomplete where the limit cuts them off."""
        left = self._scan_limit
        for entries in walk(page):
            for entry in entries:
                if left == 0:
                    self.incomplete.append(name)
                    return
                left -= 1
                self.scanned += 1
                yield entry

    def _locate(self, source: Source, group: GroupState | None, entry: Entry) -> JobLocation:
        job = read_identity(entry.data)
        location = JobLocation("", source.stream, "", job.id, job.type, job.tenant_id)
        location.facts = {"entry_id": entry.id.decode(), "retry_count": job.retry_count, **_last_error(job)}
        location.facts |= _batch(entry.data)
        if group is None or order_of(entry.id) > order_of(group.last_delivered):
            return self._queued(source, group, entry, location)
        lease = self._store.lease(source, entry.id)
        if lease is None:
            if place := self._lane_place(source.stream, entry):
                return self._waiting(place, location)
            if self._store.is_moving(source.stream, entry.id):
                location.state, location.why = "queued", "on its way into its shard"
                return location
            return self._finished(source, entry, location)
        location.facts |= {"deliveries": lease.deliveries, "deaths": entry.deaths + job.deaths}
        self._pending(lease, location)
        if self._store.cancel_is_asked(source.stream, entry.id):
            location.facts["cancelled"] = True
            location.why += "; it was cancelled, so the service that has it ends it"
        return location

    def _finished(self, source: Source, entry: Entry, location: JobLocation) -> JobLocation:
        """An acknowledged entry. Its job was perhaps not run, because another one was."""
        location.state = "finished"
        location.why = f"acknowledged in group {source.group}"
        try:
            owner, newest = self._store.rivals(source.stream, entry)
        except MalformedJob:
            return location
        if owner:
            location.facts["duplicate_of"] = owner.decode()
            location.why = (
                f"not run: a duplicate of the job in entry {owner.decode()}, by its idempotency_key"
            )
        elif newest:
            location.facts["superseded_by"] = newest.decode()
            location.why += (
                f"; the job in entry {newest.decode()} has the same supersede_key and is newer: it replaced "
                "this one, unless this one ran before"
            )
        return location

    def _lane_place(self, stream: str, entry: Entry) -> LanePlace | None:
        try:
            return self._store.lane_place(stream, entry)
        except ValueError:  # no job
            return None

    def _waiting(self, place: LanePlace, location: JobLocation) -> JobLocation:
        """A job that was sorted and waits for its turn."""
        location.state = "queued"
        location.facts |= {"ahead_in_lane": place.ahead, "blocked_by": place.blocked_by}
        position = f"{place.ahead} jobs of its tenant, type and priority ahead of it"
        if location.type in self._pauses:
            location.why = f"{self._paused(location.type)}; {position}"
        elif place.is_outdated:
            location.why = f"limits have changed: it is sorted again within seconds; {position}"
        elif place.blocked_by is None:
            location.why = f"sorted: waits for the turn of its tenant and priority; {position}"
        elif place.blocked_by.startswith(SERIES):
            location.why = f"another job with its supersede_key runs; {position}"
        elif place.blocked_by.startswith("="):
            location.why = f"a handler asked jobs of its type to wait (RateLimited); {position}"
        else:
            name, _, value = place.blocked_by.partition("=")
            of = f" for {value}" if value else ""
            location.why = f"limit {name} is reached{of}; {position}"
        return location

    def _queued(
        self, source: Source, group: GroupState | None, entry: Entry, location: JobLocation
    ) -> JobLocation:
        location.state = "queued"
        if not source.group:
            known = (one.stream for one in self._sources)
            hint = unread_shard_advice(source.stream) or suggestion(source.stream, known)
            location.why = f"no service reads this stream: {hint}"
            return location
        if group is None:
            location.why = f"no service has read this stream yet: there is no group {source.group}"
            return location
        ahead, exact = self._count_ahead(source.stream, group, entry.id)
        location.facts |= {"ahead": ahead, "ahead_is_exact": exact}
        idle_s = min((consumer.idle_s for consumer in group.consumers), default=None)
        position = f"{ahead if exact else f'more than {ahead}'} queued ahead of it"
        if idle_s is None or idle_s > SILENT_S:
            silence = "" if idle_s is None else f" for {idle_s:.0f} s"
            location.why = f"no service reads this stream{silence}; {position}"
        elif location.type in self._pauses:
            location.why = f"{self._paused(location.type)}; {position}"
        elif unhandled := self._unhandled(location.type):
            location.why = f"{unhandled}; {position}"
        else:
            location.why = f"waits for its turn; {position}"
        if until := self._delayed_until(entry.data):
            location.facts["not_before"] = until
            location.why += f"; then it is delayed until {until}"
        return location

    def _delayed_until(self, data: bytes | None) -> str:
        """The earliest start of a job as its producer wrote it; empty if that has passed."""
        try:
            text = (read_header(data or b"").metadata or {}).get(NOT_BEFORE, "")
            return text if text and parse_time(text) > self._now_s else ""
        except (MalformedJob, ValueError):
            return ""

    def _count_ahead(self, stream: str, group: GroupState, id: bytes) -> tuple[int, bool]:
        """The number of undelivered entries before this one, and whether it is exact. Counting stops at the
        scan limit."""
        count = 0
        start = group.last_delivered
        for entries in walk(lambda at, n: self._store.entries(stream, at, n), start):
            before = sum(order_of(entry.id) < order_of(id) for entry in entries)
            count += before
            if before < len(entries):
                return count, True
            if count >= self._scan_limit:
                return count, False
        return count, True

    def _pending(self, lease: Lease, location: JobLocation) -> JobLocation:
        location.state = "pending"
        location.facts |= {"consumer": lease.consumer, "renewed_s_ago": round(lease.idle_s, 3)}
        for service in self._services:
            for worker, running, job in service.running():
                if (job["stream"], job["entry_id"]) == (location.stream, location.facts["entry_id"]):
                    name = f"{service.consumer}/{worker['slot']}"
                    location.state = "running"
                    location.facts |= {
                        "worker": name, "running_for_s": running["for_s"],
                        "limit_in_s": running["limit_in_s"],
                    }  # fmt: skip
                    location.why = (
                        f"worker {name} (pid {worker['pid']}) has run it for {running['for_s']:.1f} s; "
                        f"{_time_left(running['limit_in_s'])}"
                    )
                    return location
        location.why = self._why_pending(lease, location)
        if location.facts["deaths"]:
            location.why += f"; {location.facts['deaths']} workers died while they ran it, so it runs alone"
        return location

    def _why_pending(self, lease: Lease, location: JobLocation) -> str:
        lease_s = max(
            [float(s.status.get("lease_s", _DEFAULT_LEASE_S)) for s in self._services] or [_DEFAULT_LEASE_S]
        )
        if lease.idle_s >= RELEASED_IDLE_S:
            return f"{lease.consumer} released it when it stopped: the next service that reads claims it"
        holder = f"leased by {lease.consumer}, renewed {lease.idle_s:.0f} s ago"
        if lease.idle_s > lease_s:
            return f"{holder}: the lease has expired, so a running service claims it"
        if location.type in self._pauses:
            return f"{self._paused(location.type)}; {holder}"
        if any(location.type in service.types_with("z_novel_circuit_open") for service in self._services):
            return (
                f"the circuit breaker of type {location.type} is open, because its dependency does not "
                f"answer; one job is tried now and then; {holder}"
            )
        if any(
            location.type in service.types_with("z_novel_crash_circuits_open") for service in self._services
        ):
            return (
                f"jobs of type {location.type} kill worker after worker; those of the same tenant run "
                f"one after another; {holder}"
            )
        return f"{holder}; it waits for a worker there, or runs"

    def _unhandled(self, job_type: str) -> str:
        """Why the type is not run, in words; empty if a service handles it, or that is unknown."""
        if not self._types or job_type in self._types:
            return ""
        return f"no service handles type {job_type}: {suggestion(job_type, self._types)}"

    def _paused(self, job_type: str) -> str:
        pause = self._pauses[job_type]
        note = f" ({pause.note})" if pause.note else ""
        paused_s = max(0.0, self._now_s - pause.wall_since_s)
        return f"type {job_type} is paused for {paused_s:.0f} s{note}: jobworker resume {job_type}"

    # -- retries and dead letters

    def _search_retries(self, stream: str, id: str) -> list[JobLocation]:
        matches = _matcher(id)
        locations, start = [], 0
        while page := self._store.retries(stream, start, _RETRY_PAGE):
            self.scanned += len(page)
            locations += [
                self._retrying(stream, one.due_wall_s, one.data) for one in page if matches(one.data)
            ]
            start += len(page)
            if start >= self._scan_limit:
                self.incomplete.append(f"retries of {stream}")
                break
        return locations

    def _retrying(self, stream: str, due_wall_s: float, data: bytes) -> JobLocation:
        job = read_identity(data)
        in_s = due_wall_s - self._now_s
        what = "its delayed start" if job.is_delayed else "the next try"
        why = f"{what} is in {max(0.0, in_s):.1f} s"
        until = self._delayed_until(data) if job.is_delayed else ""
        if until:
            why = f"delayed until {until}: {why}"
        if in_s < -OVERDUE_S:
            why = f"{what} is {-in_s:.0f} s overdue: no running service promotes jobs of this stream"
        elif job.type in self._pauses:
            why += f"; then: {self._paused(job.type)}"
        elif unhandled := self._unhandled(job.type):
            why += f"; then it becomes a dead letter: {unhandled}"
        if job.last_error:
            why += f"; the last one failed: {job.last_error}"
        facts = {
            "due_in_s": round(in_s, 3) + 0.0, "retry_count": job.retry_count, "deaths": job.deaths,
            **_last_error(job), **_batch(data),
        }  # fmt: skip
        state = "delayed" if job.is_delayed else "retrying"
        return JobLocation(state, stream, why, job.id, job.type, job.tenant_id, facts)

    def _search_dead_letters(self, stream: str, id: str) -> list[JobLocation]:
        locations = []
        page = self._store.dead_before
        for entry in self._scan(f"dead letters of {stream}", lambda at, n: page(stream, at, n)):
            if entry.data is None or (_PLAIN_ID.fullmatch(id) and not _mentions(entry, id)):
                continue
            letter = read_letter(stream, entry)
            if id in (letter.job_id, letter.original_id, letter.id.decode()):
                facts = {
                    "letter": letter.id.decode(), "reason": letter.reason, "error": letter.error,
                    "failed_at": letter.failed_at, "retry_count": letter.retry_count,
                    "deaths": letter.deaths, "worker": letter.worker, "original_id": letter.original_id,
                }  # fmt: skip
                facts |= _batch(letter.task)
                facts |= {
                    name: (letter.details or {})[name] for name in _TRACES if name in (letter.details or {})
                }
                why = f"dead-lettered ({letter.reason}) at {letter.failed_at}: {letter.error}"
                locations.append(
                    JobLocation("dead", stream, why, letter.job_id, letter.type, letter.tenant_id, facts)
                )
        return locations


def _unfinished_first(locations: list[JobLocation]) -> list[JobLocation]:
    """The entry of an earlier try remains in the stream until it is trimmed: it is shown only alone."""
    return [one for one in locations if one.state != "finished"] or locations


def _time_left(limit_in_s: float) -> str:
    if limit_in_s <= 0:
        return f"it is {abs(limit_in_s):.1f} s past its timeout: its worker is being killed"
    return f"it times out in {limit_in_s:.1f} s" if limit_in_s < 10 else f"it times out in {limit_in_s:.0f} s"


def _last_error(job: JobIdentity) -> dict[str, str]:
    return {"last_error": job.last_error} if job.last_error else {}


def _batch(data: bytes | None) -> dict[str, str]:
    batch = batch_of(data or b"")
    return {"batch": batch} if batch else {}


def _mentions(entry: Entry, id: str) -> bool:
    """Whether a dead letter may name the id. A malformed job is kept as base64, so that is always read."""
    data = entry.data or b""
    return id.encode() in data or id.encode() == entry.id or b'"raw"' in data


def _matcher(id: str) -> Callable[[bytes | None], bool]:
    """A test whether a job has this id. A plain id is searched for in the bytes first: that is much faster
    than parsing each job."""
    needle = id.encode() if _PLAIN_ID.fullmatch(id) else b""
    return lambda data: data is not None and needle in data and read_identity(data).id == id
