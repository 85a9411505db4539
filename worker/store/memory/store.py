"""The job store in memory, for tests: the same answers as the one on Redis, and a clock of your own."""

import contextlib
import select
import time
from collections.abc import Iterable, Mapping, Sequence

from ...errors import Fenced, NameHeld, StoreUnavailable
from ...keys import NO_HOLDER, Holder, Source
from ..ports import RELEASED_IDLE_S, Dead, Depths, Entry, Promotion, Retry, Settlement
from .server import Group, Hold, MemoryServer, PendingEntry, Read, Stream, order


def _id_of(outcome: Retry | Dead | bytes) -> bytes:
    return outcome if isinstance(outcome, bytes) else outcome.id


class MemoryStore:
    """`ReaderStore`, `ReaperStore` and `ProducerStore` over one `MemoryServer`."""

    def __init__(self, server: MemoryServer, consumer: str = "", holder: Holder = NO_HOLDER) -> None:
        self._server = server
        self._consumer = consumer
        self._holder = holder
        self._epochs: dict[Source, int] = {}
        self._reads: dict[Source, Read] = {}

    # the reader's side

    def acquire(self, sources: Sequence[Source]) -> None:
        """See `ReaderStore.acquire`."""
        with self._server.lock:
            for source in sources:
                self._refuse_a_held_name(source.stream)
            for source in sources:
                self._heard_of(self._group(source))
                self._epochs[source] = self._server.new_epoch()
                self._server.stream(source.stream).fence[self._consumer] = self._epochs[source]
                self._record(source)

    def renew_name(self, sources: Sequence[Source]) -> None:
        """See `ReaderStore.renew_name`."""
        with self._server.lock:
            for source in sources:
                self._held(source)
                self._record(source)

    def release_name(self, sources: Sequence[Source]) -> None:
        """See `ReaderStore.release_name`."""
        with self._server.lock:
            for source in sources:
                stream = self._server.stream(source.stream)
                if source in self._epochs and stream.fence.get(self._consumer) == self._epochs[source]:
                    stream.holds.pop(self._consumer, None)

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        """See `ReaderStore.begin_read`."""
        if source in self._reads:
            raise RuntimeError(f"a read of {source.stream} is under way")
        with self._server.lock:
            group = self._group(source)
            self._heard_of(group)
            read = self._reads[source] = Read(self._consumer, count, block_ms)
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

    def is_reading(self, source: Source) -> bool:
        """See `ReaderStore.is_reading`."""
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
            own = sorted((id for id in group.leases if self._owns(group, id)), key=order)
            for gone in [id for id in own if id not in stream.entries]:
                self._forget(stream, group, gone)
            left = [id for id in own if id in stream.entries and order(id) > order(after)]
            return [self._pending_entry(stream, group, id) for id in left[:count]]

    def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
        """See `ReaderStore.own_ids`."""
        return [entry.id for entry in self.own_pending(source, after, count)]

    def claim(self, source: Source, min_idle_ms: int, count: int, cursor: bytes) -> tuple[bytes, list[Entry]]:
        """See `ReaderStore.claim`."""
        with self._server.lock:
            stream, group = self._held(source), self._group(source)
            taken: list[Entry] = []
            for id in sorted((i for i in group.leases if order(i) >= order(cursor)), key=order):
                if len(taken) == count:
                    return id, taken
                lease = group.leases[id]
                if (self._server.wall_now_s() - lease.wall_since_s) * 1000 < min_idle_ms:
                    continue
                if id not in stream.entries:
                    self._forget(stream, group, id)
                    continue
                group.leases[id] = PendingEntry(
                    self._consumer, self._server.wall_now_s(), lease.deliveries + 1
                )
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

    def set_deaths(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        """See `ReaderStore.set_deaths`."""
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
            lost = self._set_idle(source, ids, RELEASED_IDLE_S)
            for id in set(ids) - lost:
                lease = self._group(source).leases[id]
                lease.deliveries = max(0, lease.deliveries - 1)

    def fetch(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """See `ReaderStore.fetch`."""
        with self._server.lock:
            entries = self._server.stream(source.stream).entries
            return {id: entries[id] for id in ids if id in entries}

    def paused_types(self) -> set[str]:
        """See `ReaderStore.paused_types`."""
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
            idle = [
                name
                for name, seen in group.consumers.items()
                if name not in owners and seen <= before and not self._left_s(stream, name)
            ]
            for name in idle:
                del group.consumers[name]
                stream.fence.pop(name, None)
                stream.holds.pop(name, None)
            return len(idle)

    def depths(self, source: Source) -> Depths:
        """See `ReaperStore.depths`."""
        with self._server.lock:
            stream, group = self._server.stream(source.stream), self._group(source)
            new = [id for id in stream.entries if order(id) > group.last_delivered]
            age_s = max(0.0, self._server.wall_now_s() - order(new[0])[0] / 1000) if new else 0.0
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

    def _group(self, source: Source) -> Group:
        return self._server.stream(source.stream).groups.setdefault(source.group, Group())

    def _heard_of(self, group: Group) -> None:
        group.consumers[self._consumer] = self._server.wall_now_s()

    def _held(self, source: Source) -> Stream:
        """The stream; raises `Fenced` where a newer reader holds our name."""
        stream = self._server.stream(source.stream)
        if source not in self._epochs:
            raise RuntimeError(f"{source.stream} was not acquired")
        if stream.fence.setdefault(self._consumer, self._epochs[source]) != self._epochs[source]:
            raise Fenced(f"a newer reader holds the name {self._consumer}")
        return stream

    def _refuse_a_held_name(self, name: str) -> None:
        stream = self._server.stream(name)
        left_s = self._left_s(stream, self._consumer)
        if not left_s:
            return
        hold = stream.holds[self._consumer]
        token = hold.holder.token
        if token != self._holder.token and token not in self._holder.predecessors:
            raise NameHeld(name, hold.holder.about, left_s, f"{token} {hold.wall_renewed_s}")

    def _left_s(self, stream: Stream, name: str) -> float:
        """How long a name's lease still runs; 0 where no service holds it."""
        hold = stream.holds.get(name)
        if hold is None or hold.epoch != stream.fence.get(name):
            return 0.0
        return max(0.0, hold.holder.lease_s - abs(self._server.wall_now_s() - hold.wall_renewed_s))

    def _record(self, source: Source) -> None:
        stream = self._server.stream(source.stream)
        stream.holds[self._consumer] = Hold(self._epochs[source], self._holder, self._server.wall_now_s())

    def _owns(self, group: Group, id: bytes) -> bool:
        return id in group.leases and group.leases[id].consumer == self._consumer

    def _pending_entry(self, stream: Stream, group: Group, id: bytes) -> Entry:
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

    def _end(self, source: Source, read: Read) -> None:
        with self._server.lock, contextlib.suppress(ValueError):  # it was served already
            self._group(source).waiting.remove(read)
        read.end()

    @staticmethod
    def _forget(stream: Stream, group: Group, id: bytes) -> None:
        group.leases.pop(id, None)
        stream.deaths.pop(id, None)

    @staticmethod
    def _finished(stream: Stream, id: bytes) -> bool:
        """Read and acknowledged by every group, and so are all the entries before it."""
        groups = stream.groups.values()
        open_ids = [order(lease) for group in groups for lease in group.leases]
        return all(order(id) <= group.last_delivered for group in groups) and order(id) < min(
            open_ids, default=(order(id)[0] + 1, 0)
        )
