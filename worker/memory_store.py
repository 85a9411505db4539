"""The job store in memory, for tests: the same answers as the one on Redis, and a clock of your own."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import Fenced, StoreUnavailable
from .keys import Source
from .store import Dead, Depths, Entry, Promotion, Retry, Settlement

#: How idle a released entry looks: above any lease.
_RELEASED_IDLE_S = 30 * 24 * 3600.0
#: What a read may take beyond its blocking time before the store counts as gone.
_READ_MARGIN_S = 5.0


def _order(id: bytes) -> tuple[int, int]:
    ms, _, sequence = id.partition(b"-")
    return int(ms), int(sequence)


def _id_of(outcome: Retry | Dead | bytes) -> bytes:
    return outcome if isinstance(outcome, bytes) else outcome.id


@dataclass
class _Lease:
    consumer: str
    wall_since_s: float
    deliveries: int


@dataclass
class _Group:
    last_delivered: tuple[int, int] = (0, 0)
    leases: dict[bytes, _Lease] = field(default_factory=dict)
    #: consumer -> when it was last heard of
    consumers: dict[str, float] = field(default_factory=dict)
    waiting: list["_Read"] = field(default_factory=list)


@dataclass
class _Stream:
    entries: dict[bytes, bytes | None] = field(default_factory=dict)
    last_id: tuple[int, int] = (0, 0)
    groups: dict[str, _Group] = field(default_factory=dict)
    deaths: dict[bytes, int] = field(default_factory=dict)
    fence: dict[str, int] = field(default_factory=dict)
    #: (due, order of arrival, job)
    retries: list[tuple[float, int, bytes]] = field(default_factory=list)
    dead: list[bytes] = field(default_factory=list)


class _Read:
    """A read under way; its descriptor becomes readable when there is an answer."""

    def __init__(self, consumer: str, count: int, block_ms: int) -> None:
        self.consumer = consumer
        self.count = count
        self.mono_deadline_s = time.monotonic() + block_ms / 1000 + _READ_MARGIN_S
        self.answer: list[Entry] | None = None
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC)
        self.timer = threading.Timer(block_ms / 1000, self.give, ([],))
        self.timer.daemon = True

    def give(self, entries: list[Entry]) -> None:
        if self.answer is None:
            self.answer = entries
            os.eventfd_write(self.descriptor, 1)

    def end(self) -> None:
        self.timer.cancel()
        if self.timer.is_alive():
            self.timer.join()
        os.close(self.descriptor)


class MemoryServer:
    """What stores share: streams, groups and ZSETs, and the clock (unix seconds) they are kept by.

    Not ``blocking``: a read that finds nothing new is answered at once, whatever it was ready to wait.
    """

    def __init__(self, wall_now_s: Callable[[], float] = time.time, *, blocking: bool = True) -> None:
        self.wall_now_s = wall_now_s
        self.blocking = blocking
        self.lock = threading.RLock()
        #: Types that an operator has paused.
        self.paused: set[str] = set()
        self._streams: dict[str, _Stream] = {}
        self._arrivals = 0
        self._last_epoch = 0

    def entries(self, stream: str) -> dict[bytes, bytes | None]:
        """Everything in the stream, finished or not, by entry id."""
        return dict(self.stream(stream).entries)

    def waiting(self, stream: str) -> list[bytes]:
        """Jobs that wait for their next try, soonest first."""
        return [job for _, _, job in sorted(self.stream(stream).retries)]

    def dead_letters(self, stream: str) -> list[bytes]:
        """The dead letters of the stream, oldest first."""
        return list(self.stream(stream).dead)

    def delete_entry(self, stream: str, id: bytes) -> None:
        """Take an entry out of the stream, pending or not, as an operator might."""
        self.stream(stream).entries.pop(id, None)

    def delete_stream(self, stream: str) -> None:
        """Take the stream with its groups away, as an operator might; what waits for a retry stays."""
        found = self.stream(stream)
        found.entries.clear()
        found.groups.clear()

    def stream(self, name: str) -> _Stream:
        return self._streams.setdefault(name, _Stream())

    def append(self, name: str, data: bytes | None) -> bytes:
        """Add an entry (None: one without the data field); returns its id."""
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
        with self.lock:
            self._arrivals += 1
            self.stream(name).retries.append((self.wall_now_s() + delay_s, self._arrivals, job))

    def new_epoch(self) -> int:
        self._last_epoch += 1
        return self._last_epoch

    def serve(self, stream: _Stream, group: _Group) -> None:
        """Give undelivered entries to the reads that wait, first come first served."""
        while group.waiting:
            read = group.waiting[0]
            if read.answer is None:
                new = [id for id in stream.entries if _order(id) > group.last_delivered][: read.count]
                if not new:
                    return
                read.give([self._deliver(stream, group, id, read.consumer) for id in new])
            group.waiting.pop(0)

    def _deliver(self, stream: _Stream, group: _Group, id: bytes, consumer: str) -> Entry:
        group.last_delivered = _order(id)
        group.leases[id] = _Lease(consumer, self.wall_now_s(), 1)
        return Entry(id, stream.entries[id])


class MemoryStore:
    """`ReaderStore`, `ReaperStore` and `ProducerStore` over one `MemoryServer`."""

    def __init__(self, server: MemoryServer, consumer: str = "") -> None:
        self._server = server
        self._consumer = consumer
        self._epochs: dict[Source, int] = {}
        self._reads: dict[Source, _Read] = {}

    # the reader's side

    def acquire(self, sources: Sequence[Source]) -> None:
        """See `ReaderStore.acquire`."""
        with self._server.lock:
            for source in sources:
                self._heard_of(self._group(source))
                self._epochs[source] = self._server.new_epoch()
                self._server.stream(source.stream).fence[self._consumer] = self._epochs[source]

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        """See `ReaderStore.begin_read`."""
        if source in self._reads:
            raise RuntimeError(f"a read of {source.stream} is under way")
        with self._server.lock:
            group = self._group(source)
            self._heard_of(group)
            read = self._reads[source] = _Read(self._consumer, count, block_ms)
            group.waiting.append(read)
            self._server.serve(self._server.stream(source.stream), group)
            if read.answer is None:
                if block_ms > 0 and self._server.blocking:
                    read.timer.start()
                else:
                    read.give([])
        return read.descriptor

    def finish_read(self, source: Source) -> list[Entry]:
        """See `ReaderStore.finish_read`."""
        read = self._reads.pop(source, None)
        if read is None:
            return []
        left_ms = max(0.0, read.mono_deadline_s - time.monotonic()) * 1000
        poll = select.poll()
        poll.register(read.descriptor, select.POLLIN)
        answered = poll.poll(left_ms)
        self._end(source, read)
        if not answered or read.answer is None:
            raise StoreUnavailable(f"reading {source.stream}: no answer")
        return read.answer

    def reading(self, source: Source) -> bool:
        """See `ReaderStore.reading`."""
        return source in self._reads

    def abandon_reads(self) -> None:
        """See `ReaderStore.abandon_reads`."""
        for source, read in self._reads.items():
            self._end(source, read)
        self._reads.clear()

    def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
        """See `ReaderStore.own_pending`."""
        with self._server.lock:
            stream, group = self._server.stream(source.stream), self._group(source)
            own = sorted((id for id in group.leases if self._owns(group, id)), key=_order)
            for gone in [id for id in own if id not in stream.entries]:
                self._forget(stream, group, gone)
            left = [id for id in own if id in stream.entries and _order(id) > _order(after)]
            return [self._pending_entry(stream, group, id) for id in left[:count]]

    def take_over(
        self, source: Source, min_idle_ms: int, count: int, cursor: bytes
    ) -> tuple[bytes, list[Entry]]:
        """See `ReaderStore.take_over`."""
        with self._server.lock:
            stream, group = self._held(source), self._group(source)
            taken: list[Entry] = []
            for id in sorted((i for i in group.leases if _order(i) >= _order(cursor)), key=_order):
                if len(taken) == count:
                    return id, taken
                lease = group.leases[id]
                if (self._server.wall_now_s() - lease.wall_since_s) * 1000 < min_idle_ms:
                    continue
                if id not in stream.entries:
                    self._forget(stream, group, id)
                    continue
                group.leases[id] = _Lease(self._consumer, self._server.wall_now_s(), lease.deliveries + 1)
                taken.append(self._pending_entry(stream, group, id))
            return b"0-0", taken

    def settle(self, settlements: Sequence[Settlement]) -> set[bytes]:
        """See `ReaderStore.settle`."""
        with self._server.lock:
            refused: set[bytes] = set()
            for source, done, retries, dead in settlements:
                outcomes: list[Retry | Dead | bytes] = [*retries, *dead, *done]
                refused.update(_id_of(one) for one in outcomes if not self._settle_one(source, one))
            return refused

    def charge(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        """See `ReaderStore.charge`."""
        with self._server.lock:
            stream, group = self._held(source), self._group(source)
            charged = {id: count for id, count in deaths.items() if self._owns(group, id)}
            stream.deaths.update(charged)
            return charged

    def renew(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        """See `ReaderStore.renew`."""
        with self._server.lock:
            return self._set_idle(source, ids, 0.0)

    def release(self, source: Source, ids: Sequence[bytes]) -> None:
        """See `ReaderStore.release`."""
        with self._server.lock:
            lost = self._set_idle(source, ids, _RELEASED_IDLE_S)
            for id in set(ids) - lost:
                lease = self._group(source).leases[id]
                lease.deliveries = max(0, lease.deliveries - 1)

    def bodies(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """See `ReaderStore.bodies`."""
        with self._server.lock:
            entries = self._server.stream(source.stream).entries
            return {id: entries[id] for id in ids if id in entries}

    def paused(self) -> set[str]:
        """See `ReaderStore.paused`."""
        return set(self._server.paused)

    # the reaper's side

    def promote(self, stream: str, limit: int) -> Promotion:
        """See `ReaperStore.promote`."""
        with self._server.lock:
            retries = self._server.stream(stream).retries
            retries.sort()
            due = [retry for retry in retries if retry[0] <= self._server.wall_now_s()][:limit]
            for retry in due:
                self._server.append(stream, retry[2])
                retries.remove(retry)
            next_due_s = max(0.0, retries[0][0] - self._server.wall_now_s()) if retries else None
            return Promotion(len(due), next_due_s)

    def trim(self, stream: str) -> int:
        """See `ReaperStore.trim`."""
        with self._server.lock:
            found = self._server.stream(stream)
            finished = [id for id in found.entries if self._finished(found, id)] if found.groups else []
            for id in finished:
                del found.entries[id]
            return len(finished)

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        """See `ReaperStore.remove_idle_consumers`."""
        with self._server.lock:
            stream, group = self._server.stream(source.stream), self._group(source)
            owners = {lease.consumer for lease in group.leases.values()} | {keep}
            before = self._server.wall_now_s() - idle_ms / 1000
            idle = [name for name, seen in group.consumers.items() if name not in owners and seen <= before]
            for name in idle:
                del group.consumers[name]
                stream.fence.pop(name, None)
            return len(idle)

    def depths(self, source: Source) -> Depths:
        """See `ReaperStore.depths`."""
        with self._server.lock:
            stream, group = self._server.stream(source.stream), self._group(source)
            new = [id for id in stream.entries if _order(id) > group.last_delivered]
            age_s = max(0.0, self._server.wall_now_s() - _order(new[0])[0] / 1000) if new else 0.0
            return Depths(len(new), len(group.leases), len(stream.retries), len(stream.dead), age_s, len(new))

    # the producer's side

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """See `ProducerStore.add`."""
        return sum(1 for job in jobs if self._server.append(stream, job))

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        """See `ProducerStore.schedule`."""
        self._server.schedule(stream, job, delay_s)

    def close(self) -> None:
        """Drop reads in progress; the server keeps everything."""
        self.abandon_reads()

    def _group(self, source: Source) -> _Group:
        return self._server.stream(source.stream).groups.setdefault(source.group, _Group())

    def _heard_of(self, group: _Group) -> None:
        group.consumers[self._consumer] = self._server.wall_now_s()

    def _held(self, source: Source) -> _Stream:
        """The stream; raises `Fenced` where a newer reader holds our name."""
        stream = self._server.stream(source.stream)
        if source not in self._epochs:
            raise RuntimeError(f"{source.stream} was not acquired")
        if stream.fence.setdefault(self._consumer, self._epochs[source]) != self._epochs[source]:
            raise Fenced(f"a newer reader holds the name {self._consumer}")
        return stream

    def _owns(self, group: _Group, id: bytes) -> bool:
        return id in group.leases and group.leases[id].consumer == self._consumer

    def _pending_entry(self, stream: _Stream, group: _Group, id: bytes) -> Entry:
        return Entry(id, stream.entries[id], group.leases[id].deliveries, stream.deaths.get(id, 0))

    def _settle_one(self, source: Source, outcome: bytes | Retry | Dead) -> bool:
        stream, group = self._held(source), self._group(source)
        id = _id_of(outcome)
        if not self._owns(group, id):
            return False
        if isinstance(outcome, Retry):
            self._server.schedule(source.stream, outcome.data, outcome.delay_s)
        elif isinstance(outcome, Dead):
            stream.dead.append(outcome.data)
        self._forget(stream, group, id)
        return True

    def _set_idle(self, source: Source, ids: Sequence[bytes], idle_s: float) -> set[bytes]:
        stream, group = self._held(source), self._group(source)
        for id in ids:
            if self._owns(group, id) and id not in stream.entries:
                self._forget(stream, group, id)
            elif self._owns(group, id):
                group.leases[id].wall_since_s = self._server.wall_now_s() - idle_s
        return {id for id in ids if not self._owns(group, id)}

    def _end(self, source: Source, read: _Read) -> None:
        with self._server.lock, contextlib.suppress(ValueError):  # it was served already
            self._group(source).waiting.remove(read)
        read.end()

    @staticmethod
    def _forget(stream: _Stream, group: _Group, id: bytes) -> None:
        group.leases.pop(id, None)
        stream.deaths.pop(id, None)

    @staticmethod
    def _finished(stream: _Stream, id: bytes) -> bool:
        """Read and acknowledged by every group, and so are all the entries before it."""
        groups = stream.groups.values()
        open_ids = [_order(lease) for group in groups for lease in group.leases]
        return all(_order(id) <= group.last_delivered for group in groups) and _order(id) < min(
            open_ids, default=(_order(id)[0] + 1, 0)
        )
