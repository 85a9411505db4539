"""Admission: validates an entry and decides whether it runs, runs isolated, or is rejected."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..envelope import Envelope, read_envelope
from ..errors import MalformedJob
from ..outcome import Reason
from ..store.ports import Entry

#: Deliveries without an end after which a job is run alone: hosts that took it may have died of it.
ALONE_AFTER_DELIVERIES = 4
#: Deliveries without an end after which it is given up: that many hosts do not fail by chance.
MAX_DELIVERIES = 12


#: Error of a job that is refused because a reader ended as it read it.
READER_DIED = "ReaderDied: the reader ended while it read this job, so no other reader looks into it"


class AdmittedJob(NamedTuple):
    """A job that may be run. ``kind`` is its type's number; ``alone``: it may have killed a worker."""

    source: int
    kind: int
    entry: Entry
    alone: bool


class RejectedEntry(NamedTuple):
    """A job that no worker will see. ``envelope`` is None where it could not be read."""

    source: int
    entry: Entry
    reason: Reason
    error: str
    envelope: Envelope | None = None


_new = tuple.__new__  # a named tuple's own constructor takes four times as long, once per job


class Admission:
    """Decides by size, form, type and history."""

    def __init__(self, kinds: Mapping[str, int], max_payload: int, max_deaths: int) -> None:
        self._kinds = kinds
        self._max_payload = max_payload
        self._max_deaths = max_deaths
        self._scratch = bytearray()

    def sift(self, source: int, entries: Iterable[Entry]) -> tuple[list[AdmittedJob], list[RejectedEntry]]:
        """Every entry becomes one or the other, in order."""
        arrivals: list[AdmittedJob] = []
        refusals: list[RejectedEntry] = []
        for entry in entries:
            verdict = self(source, entry)
            if isinstance(verdict, RejectedEntry):
                refusals.append(verdict)
            else:
                arrivals.append(verdict)
        return arrivals, refusals

    def __call__(self, source: int, entry: Entry) -> AdmittedJob | RejectedEntry:
        """Every entry becomes one or the other; size is looked at before anything is parsed."""
        _, data, deliveries, died = entry
        if data is None:
            return RejectedEntry(
                source, entry, Reason.MALFORMED, "MalformedJob: the entry has no field 'data'"
            )
        if len(data) > self._max_payload:
            error = f"OversizedJob: {len(data)} bytes, at most {self._max_payload} are taken"
            return RejectedEntry(source, entry, Reason.OVERSIZED, error)
        try:
            envelope = read_envelope(data, self._scratch)
        except MalformedJob as refused:
            return RejectedEntry(source, entry, Reason.MALFORMED, f"MalformedJob: {refused}")
        kind = self._kinds.get(envelope.type)
        if kind is None:
            error = f"UnknownType: no handler for {envelope.type!r}; known: {', '.join(self._kinds)}"
            return RejectedEntry(source, entry, Reason.UNKNOWN_TYPE, error, envelope)
        deaths = died + envelope.deaths
        if deaths >= self._max_deaths or deliveries > MAX_DELIVERIES:
            error = f"PoisonJob: {deaths} workers died under it, {deliveries} deliveries without an end"
            return RejectedEntry(source, entry, Reason.POISON, error, envelope)
        alone = deaths > 0 or deliveries >= ALONE_AFTER_DELIVERIES
        return _new(AdmittedJob, (source, kind, entry, alone))
