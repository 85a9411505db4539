"""Admission: validates an entry and decides whether it runs, runs isolated, or is rejected."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from ..conditions import (
    CONDITION_KEYS,
    EXPIRES_AT,
    IDEMPOTENCY_KEY,
    Conditions,
    UniqueKeys,
    read_conditions,
)
from ..envelope import DeadJob, Header, batch_in, batch_of, is_oversized, read_header
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
        self._unique_keys = UniqueKeys() if unique else None
        self._wall_s = wall_s
        self._type_nos = type_nos
        self._max_payload = max_payload
        self._max_deaths = max_deaths
        self._scratch = bytearray()
        #: Batches of checked entries, by entry id, until they are taken.
        self._batches: dict[bytes, str] = {}

    def take_batches(self) -> dict[bytes, str]:
        """The batches of the entries that were checked since the last call, by entry id."""
        found = self._batches
        if found:
            self._batches = {}
        return found

    def check_all(
        self, stream_no: int, entries: Iterable[Entry]
    ) -> tuple[list[AdmittedJob], list[RejectedEntry]]:
        """Check entries of one stream; both lists keep their order."""
        admitted: list[AdmittedJob] = []
        rejected: list[RejectedEntry] = []
        for entry in entries:
            result = self.check(stream_no, entry)
            if isinstance(result, RejectedEntry):
                rejected.append(result)
            else:
                admitted.append(result)
        return admitted, rejected

    def check(self, stream_no: int, entry: Entry) -> AdmittedJob | RejectedEntry:
        """Check one entry. One that is larger than the limit is not parsed."""
        _, data, deliveries, entry_deaths = entry
        if data is None:
            return _reject(stream_no, entry, Reason.MALFORMED, "MalformedJob: the entry has no field 'data'")
        if is_oversized(data, self._max_payload):
            error = f"OversizedJob: {len(data)} bytes, at most {self._max_payload} are taken"
            self._note_batch(entry.id, batch_of(data))
            return _reject(stream_no, entry, Reason.OVERSIZED, error)
        try:
            envelope = read_header(data, self._scratch)
        except MalformedJob as malformed:
            return _reject(stream_no, entry, Reason.MALFORMED, f"MalformedJob: {malformed}")
        if envelope.metadata:
            self._note_batch(entry.id, batch_in(envelope.metadata))
        type_no = self._type_nos.get(envelope.type)
        if type_no is None:
            error = f"UnknownType: no handler for {envelope.type!r}; known: {', '.join(self._type_nos)}"
            return _reject(stream_no, entry, Reason.UNKNOWN_TYPE, error, envelope)
        deaths = entry_deaths + envelope.deaths
        if deaths >= self._max_deaths or deliveries > MAX_DELIVERIES:
            error = f"PoisonJob: {deaths} workers died under it, {deliveries} deliveries without an end"
            return _reject(stream_no, entry, Reason.POISON, error, envelope)
        isolated = deaths > 0 or deliveries >= ISOLATED_FROM_DELIVERIES
        unique = ""
        if metadata := envelope.metadata:
            key = metadata.get(IDEMPOTENCY_KEY)
            # Any later entry of a job is that of the key's owner.
            if key and self._unique_keys and not envelope.first_id:
                unique = self._unique_keys.name_of(envelope.type, envelope.tenant_id, key)
            if not _OTHER_CONDITIONS.isdisjoint(metadata):
                job = AdmittedJob(stream_no, type_no, entry, isolated, unique)
                return self._with_conditions(job, envelope)
        return _new(AdmittedJob, (stream_no, type_no, entry, isolated, unique, None))

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


def reject_expired(job: AdmittedJob, envelope: Header) -> RejectedEntry:
    """Reject a job whose latest start has passed."""
    latest = (envelope.metadata or {}).get(EXPIRES_AT)
    return _reject(job.stream_no, job.entry, Reason.EXPIRED, f"ExpiredJob: not started by {latest}", envelope)


def drop(job: AdmittedJob, why: Drop, by: bytes) -> RejectedEntry:
    """Drop a job in favour of another one; ``by`` is the id of that one's first entry."""
    assert job.entry.data is not None, "an admitted job has data"
    return _reject(job.stream_no, job.entry, why, by.decode(errors="replace"), read_header(job.entry.data))


def _reject(
    stream_no: int, entry: Entry, reason: Reason | Drop, error: str, envelope: Header | None = None
) -> RejectedEntry:
    dead_job = DeadJob(entry.data, entry.id, reason, error, envelope, entry.deaths)
    return RejectedEntry(stream_no, dead_job)
