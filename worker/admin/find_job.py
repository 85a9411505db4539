"""Where a job is and why it waits there, found by its id in everything that the store holds of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..keys import Source
from ..store.operator import GroupState, Lease, OperatorStore, Pause, order_of, walk
from ..store.ports import HANDED_BACK_IDLE_S, Entry
from .dead_letters import read_letter
from .status_client import Service

#: A consumer that was not heard of for so long is not reading: reads block for 2 s, then come again.
SILENT_S = 10.0
#: Where no service says what its lease is: the default of --lease.
_LEASE_S = 30.0
#: A retry that is due for longer than this has nobody to move it: the reaper looks twice a second.
_OVERDUE_S = 3.0
_RETRIES_AT_ONCE = 200
#: States of a job that has begun perhaps and is not at its end.
_UNDER_WAY = frozenset({"running", "pending", "retrying"})
_ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:-]+")


class JobIdentity(msgspec.Struct):
    """What a job is called and has been through; the rest of it need not be in order."""

    id: str = ""
    type: str = ""
    tenant_id: str = ""
    project_id: str = ""
    retry_count: int = 0
    deaths: int = 0


_named = msgspec.json.Decoder(JobIdentity)


@dataclass
class JobLocation:
    """One place where the job is. ``state``: queued, running, pending, retrying, dead or finished."""

    state: str
    stream: str
    why: str
    job_id: str = ""
    type: str = ""
    tenant_id: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class JobFinder:
    """Looks through the streams of a deployment, at no more than ``scan`` entries of each place."""

    def __init__(
        self, store: OperatorStore, sources: Sequence[Source], services: Sequence[Service], scan: int
    ) -> None:
        self._store = store
        self._sources = sources
        self._services = services
        self._scan = scan
        self._pauses: dict[str, Pause] = {}
        self._now_s = 0.0
        self.looked_at = 0
        #: The places that were too long to be looked through.
        self.given_up: list[str] = []

    def find(self, id: str) -> list[JobLocation]:
        """Everywhere that a job (or an entry) of this id is."""
        self._pauses = {pause.kind: pause for pause in self._store.pauses()}
        self._now_s = self._store.wall_now_s(self._sources[0].stream)
        found: list[JobLocation] = []
        for source in self._sources:
            found += self._in_stream(source, id)
            found += self._in_retries(source.stream, id)
            found += self._in_dead_letters(source.stream, id)
        # The entry of an earlier try stands in the stream until it is trimmed: that try is no news.
        found = [one for one in found if one.state != "finished"] or found
        self._add_progress([one for one in found if one.state in _UNDER_WAY])
        return found

    def _add_progress(self, found: Sequence[JobLocation]) -> None:
        """Say how far the job is where it rebuilds a collection; also between two tries of it."""
        for rebuild in self._store.rebuilds() if found else ():
            of = rebuild.fields
            for one in found:
                if one.job_id == of.get("job") and of.get("phase", "done") != "done":
                    one.facts |= {
                        "rebuilds": rebuild.collection, "phase": of["phase"],
                        "rows_copied": int(of.get("copied", 0)), "rows": int(of.get("total", 0)),
                    }  # fmt: skip
                    one.why += f"; {_how_far(rebuild.collection, one.facts)}"

    # -- the stream

    def _in_stream(self, source: Source, id: str) -> list[JobLocation]:
        group = self._store.group(source)
        if _ENTRY_ID.fullmatch(id):
            entry = self._store.entry(source.stream, id.encode())
            return [self._about(source, group, entry)] if entry else []
        is_it = _matcher(id)
        entries = self._bounded(source.stream, lambda at, n: self._store.entries(source.stream, at, n))
        matches = [entry.id for entry in entries if is_it(entry.data)]
        whole = (self._store.entry(source.stream, entry_id) for entry_id in matches)
        return [self._about(source, group, entry) for entry in whole if entry]

    def _bounded(self, place: str, page: Callable[[bytes, int], list[Entry]]) -> Iterator[Entry]:
        """Entries of a place, as many as we may look at."""
        left = self._scan
        for entries in walk(page):
            for entry in entries:
                if left == 0:
                    self.given_up.append(place)
                    return
                left -= 1
                self.looked_at += 1
                yield entry

    def _about(self, source: Source, group: GroupState | None, entry: Entry) -> JobLocation:
        job = read_identity(entry.data)
        about = JobLocation("", source.stream, "", job.id, job.type, job.tenant_id)
        about.facts = {"entry_id": entry.id.decode(), "retry_count": job.retry_count}
        if group is None or order_of(entry.id) > order_of(group.last_delivered):
            return self._queued(source, group, entry, about)
        lease = self._store.lease(source, entry.id)
        if lease is None:
            about.state, about.why = "finished", "done or dealt with; the entry will be trimmed"
            return about
        about.facts |= {"deliveries": lease.deliveries, "deaths": entry.deaths + job.deaths}
        return self._pending(lease, about)

    def _queued(
        self, source: Source, group: GroupState | None, entry: Entry, about: JobLocation
    ) -> JobLocation:
        about.state = "queued"
        if group is None:
            about.why = f"no service has read this stream yet: there is no group {source.group}"
            return about
        ahead, exact = self._ahead(source.stream, group, entry.id)
        about.facts |= {"ahead": ahead, "ahead_is_exact": exact}
        heard_s = min((consumer.idle_s for consumer in group.consumers), default=None)
        place = f"{ahead if exact else f'more than {ahead}'} queued ahead of it"
        if heard_s is None or heard_s > SILENT_S:
            silence = "" if heard_s is None else f" for {heard_s:.0f} s"
            about.why = f"no service reads this stream{silence}; {place}"
        elif about.type in self._pauses:
            about.why = f"{self._paused(about.type)}; {place}"
        else:
            about.why = f"waits for its turn; {place}"
        return about

    def _ahead(self, stream: str, group: GroupState, id: bytes) -> tuple[int, bool]:
        """How many undelivered entries stand before it, and whether all were counted."""
        count = 0
        start = group.last_delivered
        for entries in walk(lambda at, n: self._store.entries(stream, at, n), start):
            before = sum(order_of(entry.id) < order_of(id) for entry in entries)
            count += before
            if before < len(entries):
                return count, True
            if count >= self._scan:
                return count, False
        return count, True

    def _pending(self, lease: Lease, about: JobLocation) -> JobLocation:
        about.state = "pending"
        about.facts |= {"consumer": lease.consumer, "renewed_s_ago": round(lease.idle_s, 3)}
        for service in self._services:
            for worker, running, job in service.running():
                if (job["stream"], job["entry_id"]) == (about.stream, about.facts["entry_id"]):
                    about.state = "running"
                    about.facts |= {"worker": f"{service.consumer}/{worker['slot']}", **_times(running)}
                    about.why = (
                        f"worker {service.consumer}/{worker['slot']} (pid {worker['pid']}) runs it for "
                        f"{running['for_s']:.1f} s; its limit is in {running['limit_in_s']:.0f} s"
                    )
                    return about
        about.why = self._why_pending(lease, about)
        if about.facts["deaths"]:
            about.why += f"; {about.facts['deaths']} workers died under it, so it runs alone"
        return about

    def _why_pending(self, lease: Lease, about: JobLocation) -> str:
        lease_s = max([float(s.said.get("lease_s", _LEASE_S)) for s in self._services] or [_LEASE_S])
        if lease.idle_s >= HANDED_BACK_IDLE_S:
            return f"{lease.consumer} gave it back when it stopped: the next service that reads takes it over"
        holder = f"{lease.consumer} holds it, renewed {lease.idle_s:.0f} s ago"
        if lease.idle_s > lease_s:
            return f"{holder}: longer than its lease, so a running service takes it over"
        if about.type in self._pauses:
            return f"{self._paused(about.type)}; {holder}"
        if any(about.type in service.flagged("z_novel_circuit_open") for service in self._services):
            return f"what type {about.type} needs does not answer; it is tried now and then; {holder}"
        return f"{holder}; it waits for a worker there, or runs"

    def _paused(self, kind: str) -> str:
        pause = self._pauses[kind]
        note = f" ({pause.note})" if pause.note else ""
        since_s = max(0.0, self._now_s - pause.wall_since_s)
        return f"type {kind} is paused for {since_s:.0f} s{note}: jobworker resume {kind}"

    # -- retries and dead letters

    def _in_retries(self, stream: str, id: str) -> list[JobLocation]:
        is_it = _matcher(id)
        found, start = [], 0
        while page := self._store.retries(stream, start, _RETRIES_AT_ONCE):
            self.looked_at += len(page)
            found += [self._retrying(stream, one.due_wall_s, one.data) for one in page if is_it(one.data)]
            start += len(page)
            if start >= self._scan:
                self.given_up.append(f"retries of {stream}")
                break
        return found

    def _retrying(self, stream: str, due_wall_s: float, data: bytes) -> JobLocation:
        job = read_identity(data)
        in_s = due_wall_s - self._now_s
        why = f"its next try is in {max(0.0, in_s):.1f} s"
        if in_s < -_OVERDUE_S:
            why = f"its next try is {-in_s:.0f} s overdue: no service moves retries of this stream"
        elif job.type in self._pauses:
            why += f"; then: {self._paused(job.type)}"
        facts = {"due_in_s": round(in_s, 3), "retry_count": job.retry_count, "deaths": job.deaths}
        return JobLocation("retrying", stream, why, job.id, job.type, job.tenant_id, facts)

    def _in_dead_letters(self, stream: str, id: str) -> list[JobLocation]:
        found = []
        page = self._store.dead_before
        for entry in self._bounded(f"dead letters of {stream}", lambda at, n: page(stream, at, n)):
            if entry.data is None or (_PLAIN_ID.fullmatch(id) and not _mentions(entry, id)):
                continue
            letter = read_letter(stream, entry)
            if id in (letter.job_id, letter.original_id, letter.id.decode()):
                facts = {
                    "letter": letter.id.decode(), "reason": letter.reason, "error": letter.error,
                    "failed_at": letter.failed_at, "retry_count": letter.retry_count,
                    "deaths": letter.deaths, "worker": letter.worker, "original_id": letter.original_id,
                }  # fmt: skip
                why = f"given up ({letter.reason}) at {letter.failed_at}: {letter.error}"
                found.append(
                    JobLocation("dead", stream, why, letter.job_id, letter.type, letter.tenant_id, facts)
                )
        return found


def _how_far(collection: str, facts: dict[str, Any]) -> str:
    """In words, for instance: z_novel_story_segments: fill, 4000 of 10000 rows (40 %)."""
    copied, rows = facts["rows_copied"], facts["rows"]
    share = f" ({100 * min(copied, rows) // rows} %)" if rows else ""
    return f"{collection}: {facts['phase']}, {copied} of {rows} rows{share}"


def _mentions(entry: Entry, id: str) -> bool:
    return id.encode() in (entry.data or b"") or id.encode() == entry.id


def _matcher(id: str) -> Callable[[bytes | None], bool]:
    """Whether a job has this id; ids of plain letters are looked for before anything is parsed."""
    needle = id.encode() if _PLAIN_ID.fullmatch(id) else b""
    return lambda data: data is not None and needle in data and read_identity(data).id == id


def read_identity(data: bytes | None) -> JobIdentity:
    """As much of a job as can be read; nothing of what is none."""
    try:
        return _named.decode(data or b"")
    except (ValueError, RecursionError):
        return JobIdentity()


def _times(running: dict[str, Any]) -> dict[str, Any]:
    return {"running_for_s": running["for_s"], "limit_in_s": running["limit_in_s"]}
