"""In-memory job server for tests: streams, groups and retries, on the test's own clock."""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import StoreRefused
from ...keys import Holder
from ..forwarding import ForwardEntry
from ..ports import Entry, KeyFault
from .batch_counts import MemoryBatches
from .conditions import MemoryConditions
from .lanes import MemoryLanes

#: Time that a read may take beyond its block time before the store counts as unavailable.
_READ_MARGIN_S = 5.0
#: Entries of a stream that a shard remembers.
_APPENDED = 10_000


def order(id: bytes) -> tuple[int, int]:
    """Sort key of an entry id."""
    ms, _, sequence = id.partition(b"-")
    return int(ms), int(sequence)


@dataclass
class PendingEntry:
    """An entry that was delivered to a consumer and is not acknowledged."""

    consumer: str
    wall_since_s: float
    deliveries: int


@dataclass
class Group:
    """A consumer group."""

    last_delivered: tuple[int, int] = (0, 0)
    leases: dict[bytes, PendingEntry] = field(default_factory=dict)
    #: Consumer -> time of its last call (unix seconds).
    consumers: dict[str, float] = field(default_factory=dict)
    blocked: list["Read"] = field(default_factory=list)


@dataclass
class NameRecord:
    """Record of the service that holds a consumer's name."""

    epoch: int
    holder: Holder
    wall_renewed_s: float


@dataclass
class ForwardState:
    """What was moved into shards, and by whom; of a shard, the last entries of each stream that it has."""

    by: str = ""
    wall_until_s: float = 0.0
    shards: int = 0
    taken: bytes = b"0-0"
    moved: bytes = b"0-0"
    used: set[int] = field(default_factory=set)
    #: Stream -> its entries that were appended to this shard lately.
    appended: defaultdict[str, deque[ForwardEntry]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_APPENDED))
    )


@dataclass
class Stream:
    """A stream with its groups, retries, dead letters, fences, lanes, batches and keys of jobs."""

    lanes: MemoryLanes
    batches: MemoryBatches
    conditions: MemoryConditions
    entries: dict[bytes, bytes | None] = field(default_factory=dict)
    last_id: tuple[int, int] = (0, 0)
    groups: dict[str, Group] = field(default_factory=dict)
    deaths: dict[bytes, int] = field(default_factory=dict)
    fence: dict[str, int] = field(default_factory=dict)
    names: dict[str, NameRecord] = field(default_factory=dict)
    #: (due time in unix seconds, order of arrival, job)
    retries: list[tuple[float, int, bytes]] = field(default_factory=list)
    dead: list[bytes] = field(default_factory=list)
    #: Pending entries that were cancelled, and whether each becomes a dead letter.
    cancels: dict[bytes, bool] = field(default_factory=dict)
    #: Number of requests to cancel pending entries, and of cancelled jobs that waited.
    cancel_requests: int = 0
    cancelled: int = 0
    #: Job id -> expiry (unix seconds) and record of its result.
    results: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    #: Fields of the hash of cron tables.
    cron: dict[bytes, bytes] = field(default_factory=dict)
    forwarding: ForwardState = field(default_factory=ForwardState)


class Read:
    """Blocking read. Its descriptor becomes readable when there is an answer."""

    def __init__(self, consumer: str, count: int, block_ms: int) -> None:
        self.consumer = consumer
        self.count = count
        self.mono_deadline_s = time.monotonic() + block_ms / 1000 + _READ_MARGIN_S
        self.answer: list[Entry] | None = None
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        self.timer = threading.Timer(block_ms / 1000, self.give, ([],))
        self.timer.daemon = True

    def give(self, entries: list[Entry]) -> None:
        """Answer the read, unless it was answered before."""
        if self.answer is None:
            self.answer = entries
            os.eventfd_write(self.descriptor, 1)

    def end(self) -> None:
        """Close the descriptor."""
        self.timer.cancel()
        if self.timer.is_alive():
            self.timer.join()
        os.close(self.descriptor)


class MemoryServer:
    """State that several `MemoryStore` objects share, and its clock (unix seconds).

    Unless ``blocking``, a read that finds nothing new is answered at once, whatever its block time.
    """

    def __init__(self, wall_now_s: Callable[[], float] = time.time, *, blocking: bool = True) -> None:
        self.wall_now_s = wall_now_s
        self.blocking = blocking
        self.lock = threading.RLock()
        #: Keys that the server refuses, as if they had another type: a stream's name, or one of `keys`.
        self.broken: set[str] = set()
        #: Types that an operator has paused.
        self.paused: set[str] = set()
        #: Consumer name of a service -> its record, see ``announcements``.
        self.services: dict[bytes, bytes] = {}
        self._streams: dict[str, Stream] = {}
        self._arrivals = 0
        self._last_epoch = 0

    def entries(self, stream: str) -> dict[bytes, bytes | None]:
        """All entries of the stream, acknowledged or not, by entry id."""
        return dict(self.stream(stream).entries)

    def waiting(self, stream: str) -> list[bytes]:
        """Scheduled retries, soonest first."""
        return [job for _, _, job in sorted(self.stream(stream).retries)]

    def dead_letters(self, stream: str) -> list[bytes]:
        """The dead letters of the stream, oldest first."""
        return list(self.stream(stream).dead)

    def delete_entry(self, stream: str, id: bytes) -> None:
        """Delete an entry, pending or not, as an operator might."""
        self.stream(stream).entries.pop(id, None)

    def delete_stream(self, stream: str) -> None:
        """Delete the stream with its groups, as an operator might; its retries stay."""
        deleted = self.stream(stream)
        deleted.entries.clear()
        deleted.groups.clear()

    def check(self, *keys: str) -> None:
        """Raise `StoreRefused` if one of the keys is broken."""
        for key in keys:
            if key in self.broken:
                raise StoreRefused(f"the job store refused: WRONGTYPE {key}")

    def faults(self, *keys: str) -> list[KeyFault]:
        """The faults of these keys."""
        return [
            KeyFault(key, "is broken", f"RENAME {key} {key}:damaged") for key in keys if key in self.broken
        ]

    def stream(self, name: str) -> Stream:
        """The stream of this name; it is created if it is missing."""
        if name not in self._streams:
            conditions = MemoryConditions(self.wall_now_s)
            batches = MemoryBatches(self.wall_now_s)
            self._streams[name] = Stream(MemoryLanes(self.wall_now_s, conditions), batches, conditions)
        return self._streams[name]

    def append(self, name: str, data: bytes | None) -> bytes:
        """Append an entry (None: one without the data field); returns its id."""
        with self.lock:
            stream = self.stream(name)
            now = (int(self.wall_now_s() * 1000), 0)
            last = stream.last_id
            stream.last_id = now if now > last else (last[0], last[1] + 1)
            id = b"%d-%d" % stream.last_id
            stream.entries[id] = data
            for group in stream.groups.values():
                self.serve(stream, group)
            return id

    def schedule(self, name: str, job: bytes, delay_s: float) -> None:
        """Schedule a retry of a job."""
        with self.lock:
            self._arrivals += 1
            self.stream(name).retries.append((self.wall_now_s() + delay_s, self._arrivals, job))

    def keep_result(self, name: str, job_id: str, record: bytes, ttl_s: float) -> None:
        """Keep the result of a job for some time."""
        self.stream(name).results[job_id] = (self.wall_now_s() + ttl_s, record)

    def hasten(self, name: str, mark: bytes) -> None:
        """Make the scheduled job that contains these bytes due now."""
        with self.lock:
            retries = self.stream(name).retries
            retries[:] = [
                (min(due_s, self.wall_now_s()) if mark in job else due_s, number, job)
                for due_s, number, job in retries
            ]

    def new_epoch(self) -> int:
        """An epoch that no reader has had."""
        self._last_epoch += 1
        return self._last_epoch

    def serve(self, stream: Stream, group: Group) -> None:
        """Deliver new entries to blocked reads, in the order of the reads."""
        while group.blocked:
            read = group.blocked[0]
            if read.answer is None:
                new = [id for id in stream.entries if order(id) > group.last_delivered][: read.count]
                if not new:
                    return
                read.give([self._deliver(stream, group, id, read.consumer) for id in new])
            group.blocked.pop(0)

    def _deliver(self, stream: Stream, group: Group, id: bytes, consumer: str) -> Entry:
        group.last_delivered = order(id)
        group.leases[id] = PendingEntry(consumer, self.wall_now_s(), 1)
        return Entry(id, stream.entries[id])
