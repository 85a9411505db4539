"""An operator's store in memory: what `jobworker.worker.admin` reads and changes, without a server."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jobworker.worker.flow import FlowConfig
from jobworker.worker.keys import Source, dead_letter_key, retry_key
from jobworker.worker.store.announcements import Announcement
from jobworker.worker.store.cron import CronHash, parse_cron_hash
from jobworker.worker.store.operator import (
    START,
    Consumer,
    FoundStreams,
    GroupState,
    LanePlace,
    Lease,
    Pause,
    Rivals,
    Scheduled,
    order_of,
)
from jobworker.worker.store.ports import Depths, Entry, KeyFault

SOURCE = Source("stream:test", "cg-test")
#: The clock of the fake store (unix seconds).
NOW_S = 10_000.0


def job(id: str, type: str = "audit", **fields: Any) -> bytes:
    """The JSON of a job."""
    return json.dumps({"id": id, "type": type, "tenant_id": "t1", **fields}).encode()


def letter(id: str, reason: str = "poison", job_id: str | None = "j", **fields: Any) -> Entry:
    """A dead letter; without a `job_id` it holds no job."""
    task = {"id": job_id, "type": "audit"} if job_id else None
    return Entry(id.encode(), json.dumps({"task": task, "reason": reason, **fields}).encode())


class FakeOperatorStore:
    """Streams, groups, retries and dead letters, each by stream."""

    url = ""

    def __init__(self, letters: dict[str, list[Entry]] | None = None) -> None:
        self.letters = {
            stream: sorted(some, key=lambda one: order_of(one.id)) for stream, some in (letters or {}).items()
        }
        self.streams: dict[str, list[Entry]] = defaultdict(list)
        self.groups: dict[str, GroupState] = {}
        self.leased: dict[bytes, Lease] = {}
        #: Pending entries that were cancelled.
        self.cancelled: set[bytes] = set()
        self.scheduled: dict[str, list[Scheduled]] = defaultdict(list)
        #: Entry id -> place of a job that was sorted.
        self.lanes: dict[bytes, LanePlace] = {}
        #: Entry id -> jobs that have its keys.
        self.known_rivals: dict[bytes, Rivals] = {}
        self.paused: list[Pause] = []
        self.cron: dict[str, CronHash] = {}
        self.requeued: list[tuple[str, bytes]] = []
        self.announced: list[Announcement] = []

    retry_key, dead_key = staticmethod(retry_key), staticmethod(dead_letter_key)

    def key_faults(self, source: Source) -> list[KeyFault]:
        return []

    def pause_faults(self) -> list[KeyFault]:
        return []

    def read_up_to(self, last_delivered: bytes, idle_s: float = 0.0, consumer: str = "host/blue") -> None:
        """Let the group of `SOURCE` have delivered the entries up to an id."""
        group = GroupState(last_delivered, len(self.leased), [Consumer(consumer, len(self.leased), idle_s)])
        self.groups[SOURCE.stream] = group

    def wall_now_s(self, stream: str) -> float:
        return NOW_S

    def dead_count(self, stream: str) -> int:
        return len(self.letters.get(stream, []))

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        newest_first = reversed(self.letters.get(stream, []))
        return [one for one in newest_first if before == START or order_of(one.id) < order_of(before)][:count]

    def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
        return [one for one in self.letters.get(stream, []) if order_of(one.id) > order_of(after)][:count]

    def requeue(self, stream: str, jobs: Sequence[tuple[bytes, bytes]], to: str = "") -> list[bool]:
        there = {one.id for one in self.letters[stream]}
        self.requeued += [(stream, id) for id, _ in jobs if id in there]
        return [id in there for id, _ in jobs]

    def purge(self, stream: str, ids: Sequence[bytes]) -> int:
        before = self.letters[stream]
        self.letters[stream] = [one for one in before if one.id not in ids]
        return len(before) - len(self.letters[stream])

    def retries(self, stream: str, start: int, count: int) -> list[Scheduled]:
        return sorted(self.scheduled[stream])[start : start + count]

    def retry_now(self, stream: str, jobs: Sequence[bytes]) -> int:
        moved = {one.data for one in self.scheduled[stream] if one.data in jobs and one.due_wall_s > NOW_S}
        self.scheduled[stream] = [
            one._replace(due_wall_s=NOW_S) if one.data in moved else one for one in self.scheduled[stream]
        ]
        return len(moved)

    def announcements(self) -> list[Announcement]:
        return self.announced

    def lane_place(self, stream: str, entry: Entry) -> LanePlace | None:
        return self.lanes.get(entry.id)

    def flow_config(self, stream: str) -> FlowConfig:
        return FlowConfig()

    def rivals(self, stream: str, entry: Entry) -> Rivals:
        return self.known_rivals.get(entry.id, Rivals())

    def find_streams(self) -> FoundStreams:
        names = {*self.streams, *self.scheduled, *self.letters}
        return FoundStreams(sorted(names), True)

    def cron_hash(self, stream: str) -> CronHash:
        return self.cron.get(stream) or parse_cron_hash({})

    def pauses(self) -> list[Pause]:
        return self.paused

    def group(self, source: Source) -> GroupState | None:
        return self.groups.get(source.stream)

    def entry(self, stream: str, id: bytes) -> Entry | None:
        return next((one for one in self.streams[stream] if one.id == id), None)

    def entries(self, stream: str, after: bytes, count: int) -> list[Entry]:
        return [one for one in self.streams[stream] if order_of(one.id) > order_of(after)][:count]

    def lease(self, source: Source, id: bytes) -> Lease | None:
        return self.leased.get(id)

    def is_moving(self, stream: str, id: bytes) -> bool:
        """No stream is spread."""
        return False

    def cancel_is_asked(self, stream: str, id: bytes) -> bool:
        return id in self.cancelled

    def depths(self, source: Source) -> Depths:
        return Depths(0, 0, 0, 0, 0.0, 0)
