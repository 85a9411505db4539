"""Admission: validates an entry and decides whether it runs, runs isolated, or is rejected."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import msgspec

from ..conditions import (
    CONDITION_KEYS,
    EXPIRES_AT,
    IDEMPOTENCY_KEY,
    Conditions,
    UniqueKeys,
    read_conditions,
)
from ..envelope import (
    BATCH_FIELD,
    DeadJob,
    Header,
    Route,
    batch_in,
    batch_of,
    is_oversized,
    read_header,
    read_headers,
    read_routes,
)
from ..errors import MalformedJob
from ..outcome import Drop, Reason
from ..store.ports import Entry

#: Unsettled deliveries from which a job runs isolated: the hosts that took it may have died from it.
ISOLATED_FROM_DELIVERIES = 4
#: Unsettled deliveries beyond which a job is poison: that many hosts do not fail by chance.
MAX_DELIVERIES = 12

#: Error of a poison entry: a reader exited while it read it.
READER_DIED = "ReaderDied: the reader ended while it read this job, so no other reader looks into it"


class AdmittedJob(NamedTuple):
    """A job that may run. ``isolated``: it may have killed a worker, so it runs alone.

    ``unique`` is the name of its idempotency key, if it has to be claimed. ``conditions`` are None where it
    has none, or they were checked when it was first admitted.
    """

    stream_no: int
    type_no: int
    entry: Entry
    isolated: bool
    unique: str = ""
    conditions: Conditions | None = None


class RejectedEntry(NamedTuple):
    """An entry that never reaches a worker: it becomes a dead letter, or is dropped if the reason is a
    `Drop`."""

    stream_no: int
    job: DeadJob


_OTHER_CONDITIONS = CONDITION_KEYS - {IDEMPOTENCY_KEY}
#: How producers write the name of an idempotency key. It may be written otherwise: a route shows any.
_KEY_MEMBER = b'"%s"' % IDEMPOTENCY_KEY.encode()

_new = tuple.__new__  # a named tuple's own constructor takes four times as long, once per job


class Admission:
    """Admission rules: size, wire format, type, history and latest start of an entry.

    ``type_nos`` maps the type names to their numbers; ``max_payload`` is in bytes. ``unique``: whether
    idempotency keys count.
    """

    def __init__(
        self,
        type_nos: Mapping[str, int],
        max_payload: int,
        max_deaths: int,
        *,
        unique: bool = True,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._key_name = UniqueKeys().name_of if unique else None
        self._wall_s = wall_s
        self._type_nos = type_nos
        self._max_payload = max_payload
        self._max_deaths = max_deaths
        #: Batches of checked entries, by entry id, until they are taken.
        self._batches: dict[bytes, str] = {}

    def take_batches(self) -> dict[bytes, str]:
        """The batches of the entries that were checked since the last call, by entry id."""
        found = self._batches
        if found:
            self._batches = {}
        return found

    def check_all(
        self, stream_no: int, entries: Sequence[Entry], *, by_route: bool = False
    ) -> tuple[list[AdmittedJob], list[RejectedEntry]]:
        """Check entries of one stream; both lists keep their order.

        ``by_route``: of usual jobs only the route is read, in a third of the time. The worker that gets such
        a job checks the rest, and its outcome says that it is malformed.
        """
        jobs = [data for _, data, _, _ in entries if data is not None and len(data) <= self._max_payload]
        fit = len(jobs) == len(entries)
        # Producers send keys with all jobs or with none: a look at one job spares reading routes in vain.
        has_keys = self._key_name is not None and bool(jobs) and _KEY_MEMBER in jobs[0]
        if by_route and fit and not has_keys and (routes := read_routes(jobs)) is not None:
            results = self._route_all(stream_no, entries, routes)
        elif fit and (headers := read_headers(jobs)) is not None:
            results = list(map(partial(self._decide, stream_no), entries, headers))
        else:
            results = [self.check(stream_no, entry) for entry in entries]
        rejected = [one for one in results if isinstance(one, RejectedEntry)]
        if not rejected:
            return cast(list[AdmittedJob], results), rejected
        return [one for one in results if isinstance(one, AdmittedJob)], rejected

    def _route_all(
        self, stream_no: int, entries: Sequence[Entry], routes: Sequence[Route]
    ) -> list[AdmittedJob | RejectedEntry]:
        type_nos, keys_count = self._type_nos, self._key_name is not None
        results: list[AdmittedJob | RejectedEntry] = []
        for entry, route in zip(entries, routes, strict=True):
            _, _, deliveries, deaths = entry
            type_no, given = type_nos.get(route.type), route.metadata
            is_usual = type_no is not None and not (deaths or route.deaths or route.first_id)
            is_usual = is_usual and deliveries < ISOLATED_FROM_DELIVERIES
            if is_usual and given is not None:
                # A malformed job must not claim a key: other jobs would be dropped as its duplicates.
                is_usual = not (keys_count and given.idempotency_key)
                is_usual = is_usual and given.supersede_key is given.not_before is None
                is_usual = is_usual and given.expires_at is given.batch_id is None
            if is_usual:
                results.append(_new(AdmittedJob, (stream_no, type_no, entry, False, "", None)))
            else:
                results.append(self.check(stream_no, entry))
        return results

    def check(self, stream_no: int, entry: Entry) -> AdmittedJob | RejectedEntry:
        """Check one entry. One that is larger than the limit is not parsed."""
        data = entry.data
        if data is None:
            return _reject(stream_no, entry, Reason.MALFORMED, "MalformedJob: the entry has no field 'data'")
        if len(data) > self._max_payload and is_oversized(data, self._max_payload):
            error = f"OversizedJob: {len(data)} bytes, at most {self._max_payload} are taken"
            self._note_batch(entry.id, batch_of(data))
            return _reject(stream_no, entry, Reason.OVERSIZED, error)
        try:
            header = read_header(data)
        except MalformedJob as malformed:
            return _reject(stream_no, entry, Reason.MALFORMED, f"MalformedJob: {malformed}")
        return self._decide(stream_no, entry, header)

    def _decide(self, stream_no: int, entry: Entry, header: Header) -> AdmittedJob | RejectedEntry:
        metadata = header.metadata
        if metadata and BATCH_FIELD in metadata:
            self._note_batch(entry.id, batch_in(metadata))
        type_no = self._type_nos.get(header.type)
        if type_no is None:
            error = f"UnknownType: no handler for {header.type!r}; known: {', '.join(self._type_nos)}"
            return _reject(stream_no, entry, Reason.UNKNOWN_TYPE, error, header)
        _, _, deliveries, entry_deaths = entry
        deaths = entry_deaths + header.deaths
        if deaths >= self._max_deaths or deliveries > MAX_DELIVERIES:
            error = f"PoisonJob: {deaths} workers died under it, {deliveries} deliveries without an end"
            return _reject(stream_no, entry, Reason.POISON, error, header)
        isolated = deaths > 0 or deliveries >= ISOLATED_FROM_DELIVERIES
        job = _new(AdmittedJob, (stream_no, type_no, entry, isolated, self._key_of(header), None))
        if metadata and not _OTHER_CONDITIONS.isdisjoint(metadata):
            return self._with_conditions(job, header)
        return job

    def _key_of(self, header: Header) -> str:
        """Name of the idempotency key that the job has to claim; empty if there is none."""
        key = header.metadata and header.metadata.get(IDEMPOTENCY_KEY)
        # Any later entry of a job is that of the key's owner.
        if not key or not self._key_name or header.first_id:
            return ""
        return self._key_name(header.type, header.tenant_id, key)

    def _with_conditions(self, job: AdmittedJob, envelope: Header) -> AdmittedJob | RejectedEntry:
        try:
            conditions = read_conditions(envelope, job.entry.id)
        except MalformedJob as malformed:
            error = f"MalformedJob: {malformed}"
            return _reject(job.stream_no, job.entry, Reason.MALFORMED, error, envelope)
        if max(conditions.due_s, self._wall_s()) >= conditions.expires_s:
            return reject_expired(job, envelope)
        return job._replace(conditions=conditions)

    def _note_batch(self, entry_id: bytes, batch: str) -> None:
        if batch:
            self._batches[entry_id] = batch


class _Tenant(msgspec.Struct):
    tenant_id: str = ""


_tenants = msgspec.json.Decoder(_Tenant)


def tenant_of(data: bytes | None) -> str:
    """The tenant of a job; empty if there is none, or the bytes are no job."""
    try:
        return _tenants.decode(data or b"").tenant_id
    except (ValueError, RecursionError):
        return ""


def reject_unread(stream_no: int, entry: Entry) -> RejectedEntry:
    """Reject an entry that made a reader exit, without parsing it."""
    return _reject(stream_no, entry, Reason.POISON, READER_DIED)


def reject_malformed(stream_no: int, entry: Entry, error: MalformedJob) -> RejectedEntry:
    """Reject a job of which only its route was read when it was admitted."""
    return _reject(stream_no, entry, Reason.MALFORMED, f"MalformedJob: {error}")


def reject_expired(job: AdmittedJob, envelope: Header) -> RejectedEntry:
    """Reject a job whose latest start has passed."""
    latest = (envelope.metadata or {}).get(EXPIRES_AT)
    return _reject(job.stream_no, job.entry, Reason.EXPIRED, f"ExpiredJob: not started by {latest}", envelope)


def drop(job: AdmittedJob, why: Drop, by: bytes) -> RejectedEntry:
    """Drop a job in favour of another one; ``by`` is the id of that one's first entry."""
    assert job.entry.data is not None, "an admitted job has data"
    header = read_header(job.entry.data)
    return _reject(job.stream_no, job.entry, why, by.decode(errors="replace"), header)


def _reject(
    stream_no: int, entry: Entry, reason: Reason | Drop, error: str, envelope: Header | None = None
) -> RejectedEntry:
    dead_job = DeadJob(entry.data, entry.id, reason, error, envelope, entry.deaths)
    return RejectedEntry(stream_no, dead_job)
