"""In-memory job store for tests: it answers like the Redis store, on the test's own clock."""

import contextlib
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...errors import Fenced, NameHeld, StoreRefused, StoreUnavailable
from ...flow import FlowConfig, Lane
from ...keys import (
    NO_HOLDER,
    PAUSED_KEY,
    Holder,
    Source,
    batches_key,
    dead_letter_key,
    deaths_key,
    fence_key,
    ready_key,
    retry_key,
)
from ..announcements import Announcement, encode, parse
from ..ports import (
    RELEASED_IDLE_S,
    Backlog,
    Candidate,
    Dead,
    Depths,
    Entry,
    Kept,
    KeyFault,
    Promotion,
    PutBack,
    Retry,
    Screened,
    Settled,
    Settlement,
    TakenJobs,
    WaitingJob,
    do_nothing,
)
from .batches import MemoryBatchStore
from .cancel import MemoryCancelStore
from .cron import MemoryCronStore
from .forwarding import MemoryForwardStore
from .server import Group, MemoryServer, NameRecord, PendingEntry, Read, Stream, order

#: Jobs of lanes with changed limits that one call returns, to be sorted again.
_OUTDATED_JOBS = 500


_Outcome = Retry | Dead | PutBack | Kept | bytes


def _id_of(outcome: _Outcome) -> bytes:
    return outcome if isinstance(outcome, bytes) else outcome.id


class MemoryStore(MemoryCronStore, MemoryBatchStore, MemoryCancelStore, MemoryForwardStore):
    """`ReaderStore`, `ReaperStore` and `ProducerStore` over one `MemoryServer`.

    The ports document the methods.
    """

    def __init__(self, server: MemoryServer, consumer: str = "", holder: Holder = NO_HOLDER) -> None:
        self._server = server
        self._consumer = consumer
        self._holder = holder
        self._epochs: dict[Source, int] = {}
        self._reads: dict[Source, Read] = {}
        self._claims: dict[Source, dict[bytes, bytes]] = {}

    # -- reader

    def acquire(self, sources: Sequence[Source]) -> None:
        with self._server.lock:
            for source in sources:
                self._server.check(source.stream, fence_key(source.stream))
                self._check_name(source.stream)
            for source in sources:
                self._record_call(self._group(source))
                self._epochs[source] = self._server.new_epoch()
                self._server.stream(source.stream).fence[self._consumer] = self._epochs[source]
                self._renew_record(source)

    def renew_name(self, sources: Sequence[Source]) -> None:
        with self._server.lock:
            for source in sources:
                self._fenced(source)
                self._renew_record(source)

    def release_name(self, sources: Sequence[Source]) -> None:
        with self._server.lock:
            for source in sources:
                stream = self._server.stream(source.stream)
                if source in self._epochs and stream.fence.get(self._consumer) == self._epochs[source]:
                    stream.names.pop(self._consumer, None)

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        if source in self._reads:
            raise RuntimeError(f"a read of {source.stream} is under way")
        with self._server.lock:
            group = self._group(source)
            self._record_call(group)
            read = self._reads[source] = Read(self._consumer, count, block_ms)
            group.blocked.append(read)
            self._server.serve(self._server.stream(source.stream), group)
            if read.answer is None:
                if block_ms > 0 and self._server.blocking:
                    read.timer.start()
                else:
                    read.give([])
        return read.descriptor

    def finish_read(self, source: Source) -> list[Entry]:
        read = self._reads.pop(source, None)
        if read is None:
            return []
        if source.stream in self._server.broken:
            self._end(source, read)
            self._server.check(source.stream)
        left_ms = max(0.0, read.mono_deadline_s - time.monotonic()) * 1000
        poll = select.poll()
        poll.register(read.descriptor, select.POLLIN)
        answered = poll.poll(left_ms)
        self._end(source, read)
        if not answered or read.answer is None:
            raise StoreUnavailable(f"reading {source.stream}: no answer")
        return read.answer

    def is_reading(self, source: Source) -> bool:
        return source in self._reads

    def abandon_read(self, source: Source) -> None:
        if read := self._reads.pop(source, None):
            self._end(source, read)

    def abandon_reads(self) -> None:
        for source, read in self._reads.items():
            self._end(source, read)
        self._reads.clear()

    def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
        with self._server.lock:
            self._server.check(source.stream, deaths_key(source.stream))
            stream, group = self._server.stream(source.stream), self._group(source)
            own = sorted((id for id in group.leases if self._owns(group, id)), key=order)
            for gone in [id for id in own if id not in stream.entries]:
                self._forget(stream, group, gone)
            left = [id for id in own if id in stream.entries and order(id) > order(after)]
            return [self._pending_entry(stream, group, id) for id in left[:count]]

    def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
        return [entry.id for entry in self.own_pending(source, after, count)]

    def claim(self, source: Source, min_idle_ms: int, count: int, cursor: bytes) -> tuple[bytes, list[Entry]]:
        with self._server.lock:
            stream, group = self._fenced(source), self._group(source)
            self._server.check(deaths_key(source.stream))
            claimed: list[Entry] = []
            for id in sorted((i for i in group.leases if order(i) >= order(cursor)), key=order):
                if len(claimed) == count:
                    return id, claimed
                lease = group.leases[id]
                if (self._server.wall_now_s() - lease.wall_since_s) * 1000 < min_idle_ms:
                    continue
                if id not in stream.entries:
                    self._forget(stream, group, id)
                    continue
                group.leases[id] = PendingEntry(
                    self._consumer, self._server.wall_now_s(), lease.deliveries + 1
                )
                claimed.append(self._pending_entry(stream, group, id))
            return b"0-0", claimed

    def has_lost(self, source: Source, min_idle_ms: int) -> bool:
        with self._server.lock:
            self._server.check(source.stream, fence_key(source.stream))
            stream, group = self._server.stream(source.stream), self._group(source)
            before = self._server.wall_now_s() - min_idle_ms / 1000
            return any(
                lease.consumer != self._consumer
                and lease.wall_since_s <= before
                and not self._left_s(stream, lease.consumer)
                for lease in group.leases.values()
            )

    def settle(
        self, settlements: Sequence[Settlement], meanwhile: Callable[[], None] = do_nothing
    ) -> list[Settled]:
        meanwhile()
        with self._server.lock:
            return [self._settle(settlement) for settlement in settlements]

    def set_deaths(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        with self._server.lock:
            stream, group = self._fenced(source), self._group(source)
            self._server.check(deaths_key(source.stream))
            stored = {id: count for id, count in deaths.items() if self._owns(group, id)}
            stream.deaths.update(stored)
            return stored

    def renew(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        with self._server.lock:
            return self._set_idle(source, ids, 0.0)

    def release(self, source: Source, ids: Sequence[bytes]) -> None:
        with self._server.lock:
            lost = self._set_idle(source, ids, RELEASED_IDLE_S)
            for id in set(ids) - lost:
                lease = self._group(source).leases[id]
                lease.deliveries = max(0, lease.deliveries - 1)

    def hand_back(self, source: Source, jobs: Mapping[bytes, bytes]) -> int:
        with self._server.lock:
            stream, group = self._fenced(source), self._group(source)
            own = [id for id in jobs if self._owns(group, id)]
            for id in own:
                self._forget(stream, group, id)
                stream.batches.leave([id])
                self._server.append(source.stream, jobs[id])
            return len(own)

    def idle_readers(self, source: Source) -> int:
        with self._server.lock:
            self._server.check(source.stream, fence_key(source.stream))
            stream, group = self._server.stream(source.stream), self._group(source)
            if any(order(id) > group.last_delivered for id in stream.entries):
                return 0
            busy = {lease.consumer for lease in group.leases.values()} | {self._consumer}
            return sum(name not in busy and self._left_s(stream, name) > 0 for name in group.consumers)

    def fetch(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        with self._server.lock:
            self._server.check(source.stream)
            entries = self._server.stream(source.stream).entries
            return {id: entries[id] for id in ids if id in entries}

    def key_faults(self, source: Source) -> list[KeyFault]:
        stream = source.stream
        derived = (fence_key(stream), deaths_key(stream), retry_key(stream), dead_letter_key(stream))
        of_batches = [batches_key(stream, part) for part in ("jobs", "due")]
        return self._server.faults(stream, *derived, ready_key(stream), *of_batches)

    def pause_faults(self) -> list[KeyFault]:
        return self._server.faults(PAUSED_KEY)

    def ask_state(self, sources: Iterable[Source]) -> None: ...

    def ask_due(self, streams: Iterable[str], limit: int) -> None: ...

    def paused_types(self) -> set[str]:
        self._server.check(PAUSED_KEY)
        return set(self._server.paused)

    # -- lanes

    def backlog(self, source: Source) -> Backlog:
        with self._server.lock:
            self._server.check(source.stream, ready_key(source.stream))
            stream, group = self._server.stream(source.stream), self._group(source)
            lag = sum(order(id) > group.last_delivered for id in stream.entries)
            lanes = stream.lanes
            facts = lag, lanes.by_type(), lanes.config.version, lanes.asked_types()
            return Backlog(*facts, lanes.in_series, stream.cancel_requests, stream.cancelled)

    def flow_config(self, source: Source) -> FlowConfig:
        return self._server.stream(source.stream).lanes.config

    def configure(self, source: Source, config: FlowConfig) -> bool:
        with self._server.lock:
            return self._server.stream(source.stream).lanes.configure(config)

    def sort(self, source: Source, version: int, lanes: Mapping[bytes, Sequence[WaitingJob]]) -> set[bytes]:
        with self._server.lock:
            stream, group = self._fenced(source), self._group(source)
            self._check_batches(source.stream, ready_key(source.stream))
            refused: set[bytes] = set()
            for name, jobs in lanes.items():
                own = [job for job in jobs if self._owns(group, job.id)]
                refused.update(job.id for job in jobs if not self._owns(group, job.id))
                if own:
                    stream.lanes.put(name, own, version)
                for job in own:
                    del group.leases[job.id]
                    stream.lanes.release(job.id)
                stream.batches.leave(job.id for job in own)
            return refused

    def take(self, source: Source, types: Iterable[str], count: int) -> TakenJobs:
        with self._server.lock:
            stream = self._fenced(source)
            self._server.check(deaths_key(source.stream), ready_key(source.stream))
            outdated = stream.lanes.take_outdated(_OUTDATED_JOBS)
            jobs = stream.lanes.take(set(types), count)
            lists = [self._give_lease(source, one) for one in (jobs, outdated)]
            limited = dict(stream.lanes.taken_limited)
            return TakenJobs(lists[0], lists[1], len(stream.lanes), stream.lanes.due_s(), limited)

    def _give_lease(self, source: Source, jobs: Sequence[WaitingJob]) -> list[Entry]:
        """Make jobs pending for this consumer. Entries that were deleted meanwhile are dropped."""
        stream, group = self._server.stream(source.stream), self._group(source)
        entries = []
        for job in jobs:
            if job.id not in stream.entries:
                stream.lanes.release(job.id)
            elif job.id not in group.leases:
                group.leases[job.id] = PendingEntry(self._consumer, self._server.wall_now_s(), 1)
                entries.append(self._pending_entry(stream, group, job.id))
        return entries

    def cancels(self, source: Source) -> dict[bytes, bool]:
        with self._server.lock:
            return dict(self._server.stream(source.stream).cancels)

    def end_cancels(self, source: Source, ids: Sequence[bytes]) -> None:
        with self._server.lock:
            for id in ids:
                self._server.stream(source.stream).cancels.pop(id, None)

    # -- idempotency and supersede keys

    def claim_keys(
        self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float
    ) -> dict[bytes, bytes]:
        with self._server.lock:
            conditions = self._fenced(source).conditions
            self._server.check(ready_key(source.stream))
            window_ms = max(1, round(window_s * 1000))
            found = {id: conditions.claim(name, id, window_ms) for id, name in keys}
            return {id: owner for id, owner in found.items() if owner is not None}

    def begin_claim(self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float) -> None:
        self._claims[source] = self.claim_keys(source, keys, window_s)

    def finish_claim(self, source: Source) -> dict[bytes, bytes]:
        return self._claims.pop(source, {})

    def screen(self, source: Source, candidates: Sequence[Candidate]) -> Screened:
        with self._server.lock:
            self._fenced(source)
            self._check_batches(source.stream, deaths_key(source.stream), ready_key(source.stream))
            screened = Screened({}, set(), set())
            for one in sorted(candidates, key=lambda one: order(one.first_id), reverse=True):
                self._screen_one(source, one, screened)
            return screened

    def _screen_one(self, source: Source, claim: Candidate, screened: Screened) -> None:
        stream, group = self._server.stream(source.stream), self._group(source)
        conditions = stream.conditions
        if not self._owns(group, claim.id):
            screened.lost.add(claim.id)
            return
        if claim.series:
            due_s = claim.due_s if claim.data else 0.0
            newer, replaced = conditions.lead(claim.series, claim.id, claim.first_id, due_s)
            if replaced:
                self._server.hasten(source.stream, b'"jobworker_first_id":"%s"' % replaced)
            if newer:
                screened.superseded[claim.id] = newer
                return
        if claim.data:
            delay_s = claim.due_s - self._server.wall_now_s()
            self._server.schedule(source.stream, claim.data, delay_s)
            self._forget(stream, group, claim.id)
            stream.batches.leave([claim.id])
            if len(stream.lanes) and len(stream.groups) == 1:
                stream.entries.pop(claim.id, None)
            screened.delayed.add(claim.id)

    def slot_holders(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        return set(ids) & self._server.stream(source.stream).lanes.slots.keys()

    # -- batches

    def register_batches(self, source: Source, batches: Mapping[bytes, str]) -> set[str]:
        with self._server.lock:
            stream, group = self._fenced(source), self._group(source)
            self._check_batches(source.stream)
            known = {batch for batch in batches.values() if stream.batches.get(batch) is not None}
            for id, batch in batches.items():
                if batch in known and self._owns(group, id):
                    stream.batches.members[id] = batch
            for batch in known:
                stream.batches.touch(batch)
            return set(batches.values()) - known

    def mend_batches(self, source: Source, cursor: bytes) -> tuple[bytes, int]:
        with self._server.lock:
            self._check_batches(source.stream)
            stream = self._server.stream(source.stream)
            pending = {id for group in stream.groups.values() for id in group.leases}
            gone = [id for id in stream.batches.members if id not in pending and id not in stream.entries]
            stream.batches.leave(gone, "dead")
            return b"0", len(gone)

    def _check_batches(self, stream: str, *keys: str) -> None:
        self._server.check(*keys, *(batches_key(stream, part) for part in ("jobs", "due")))

    def forget_keys(self, stream: str) -> int:
        with self._server.lock:
            return self._server.stream(stream).conditions.forget()

    def mend_slots(self, source: Source) -> int:
        with self._server.lock:
            stream, group = self._server.stream(source.stream), self._group(source)
            gone = stream.lanes.slots.keys() - group.leases.keys()
            for id in gone:
                stream.lanes.release(id)
            return len(gone)

    # -- reaper

    def promote(self, stream: str, limit: int) -> Promotion:
        with self._server.lock:
            self._server.check(retry_key(stream))
            retries = self._server.stream(stream).retries
            retries.sort()
            due = [retry for retry in retries if retry[0] <= self._server.wall_now_s()][:limit]
            if due:
                self._server.check(stream)
            for retry in due:
                self._server.append(stream, retry[2])
                retries.remove(retry)
            next_due_s = max(0.0, retries[0][0] - self._server.wall_now_s()) if retries else None
            return Promotion(len(due), next_due_s)

    def trim(self, stream: str) -> int:
        with self._server.lock:
            self._server.check(stream)
            trimmed = self._server.stream(stream)
            finished = self._finished(trimmed) if trimmed.groups else []
            for id in finished:
                del trimmed.entries[id]
            return len(finished)

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        with self._server.lock:
            self._server.check(source.stream, fence_key(source.stream))
            stream, group = self._server.stream(source.stream), self._group(source)
            owners = {lease.consumer for lease in group.leases.values()} | {keep}
            before = self._server.wall_now_s() - idle_ms / 1000
            idle = [
                name
                for name, last_call in group.consumers.items()
                if name not in owners
                and max(last_call, self._renewed_s(stream, name)) <= before
                and not self._left_s(stream, name)
            ]
            for name in idle:
                del group.consumers[name]
                stream.fence.pop(name, None)
                stream.names.pop(name, None)
            return len(idle)

    def depths(self, source: Source) -> Depths:
        with self._server.lock:
            self._server.check(source.stream)
            stream, group = self._server.stream(source.stream), self._group(source)
            new = [id for id in stream.entries if order(id) > group.last_delivered]
            waiting = stream.lanes.ids()
            first_ms = min((order(id)[0] for id in (*new[:1], *waiting)), default=None)
            age_s = 0.0 if first_ms is None else max(0.0, self._server.wall_now_s() - first_ms / 1000)
            others = tuple(name for name in stream.groups if name != source.group)
            counts = (len(new) + len(waiting), len(group.leases), len(stream.retries), len(stream.dead))
            wall_now_s = self._server.wall_now_s()
            ages_s = {
                tenant: max(0.0, wall_now_s - wall_s)
                for tenant, wall_s in stream.lanes.oldest_by_tenant().items()
            }
            return Depths(*counts, age_s, len(new), len(waiting), others, ages_s)

    # -- producer

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        return sum(1 for job in jobs if self._server.append(stream, job))

    def announce(
        self, service: str, types: Iterable[str], sources: Iterable[Source], shards: int = 0
    ) -> None:
        with self._server.lock:
            now_s = self._server.wall_now_s()
            self._server.services[service.encode()] = encode(types, sources, now_s, shards)
            for one in self.announcements():
                if one.is_outdated(now_s):
                    del self._server.services[one.service.encode()]

    def announcements(self) -> list[Announcement]:
        return parse(self._server.services)

    def close(self) -> None:
        """Abandon reads; the server keeps all its state."""
        self.abandon_reads()

    def _group(self, source: Source) -> Group:
        return self._server.stream(source.stream).groups.setdefault(source.group, Group())

    def _record_call(self, group: Group) -> None:
        group.consumers[self._consumer] = self._server.wall_now_s()

    def _fenced(self, source: Source) -> Stream:
        """The stream; raises `Fenced` if a newer reader holds our name."""
        self._server.check(source.stream, fence_key(source.stream))
        stream = self._server.stream(source.stream)
        if source not in self._epochs:
            raise RuntimeError(f"{source.stream} was not acquired")
        if stream.fence.setdefault(self._consumer, self._epochs[source]) != self._epochs[source]:
            raise Fenced(f"a newer reader holds the name {self._consumer}")
        return stream

    def _check_name(self, name: str) -> None:
        stream = self._server.stream(name)
        left_s = self._left_s(stream, self._consumer)
        if not left_s:
            return
        record = stream.names[self._consumer]
        token = record.holder.token
        if token != self._holder.token and token not in self._holder.predecessors:
            raise NameHeld(name, record.holder.about, left_s, f"{token} {record.wall_renewed_s}")

    def _left_s(self, stream: Stream, name: str) -> float:
        """Rest of a name's lease (seconds); 0.0 if no service holds it."""
        record = stream.names.get(name)
        if record is None or record.epoch != stream.fence.get(name):
            return 0.0
        return max(0.0, record.holder.lease_s - abs(self._server.wall_now_s() - record.wall_renewed_s))

    def _renewed_s(self, stream: Stream, name: str) -> float:
        """When a name was last renewed (unix seconds); 0.0 if its record is gone."""
        record = stream.names.get(name)
        return record.wall_renewed_s if record and record.epoch == stream.fence.get(name) else 0.0

    def _renew_record(self, source: Source) -> None:
        stream = self._server.stream(source.stream)
        now_s = self._server.wall_now_s()
        stream.names[self._consumer] = NameRecord(self._epochs[source], self._holder, now_s)

    def _owns(self, group: Group, id: bytes) -> bool:
        return id in group.leases and group.leases[id].consumer == self._consumer

    def _pending_entry(self, stream: Stream, group: Group, id: bytes) -> Entry:
        return Entry(id, stream.entries[id], group.leases[id].deliveries, stream.deaths.get(id, 0))

    def _settle(self, settlement: Settlement) -> Settled:
        source, done, retries, dead, _, put_back, _, dropped, kept, _ = settlement
        stream = source.stream
        refused: set[bytes] = set()
        cancelled: dict[bytes, bool] = {}
        unsettled: set[bytes] = set()
        refusal: StoreRefused | None = None
        kinds: tuple[tuple[str, Sequence[_Outcome]], ...] = (
            (stream, [*done, *dropped]),
            (retry_key(stream), retries),
            (dead_letter_key(stream), dead),
            (stream, kept),
            (ready_key(stream), put_back),
        )
        for key, outcomes in kinds:
            try:
                if outcomes:
                    self._check_batches(stream, key, deaths_key(stream), ready_key(stream))
                cancelled |= self._cancelled(source, outcomes)
                left = [one for one in outcomes if _id_of(one) not in cancelled]
                refused.update(_id_of(one) for one in left if not self._settle_one(settlement, one))
            except StoreRefused as error:
                unsettled.update(map(_id_of, outcomes))
                refusal = error
        return Settled(refused, unsettled, refusal, cancelled)

    def _cancelled(self, source: Source, outcomes: Sequence[_Outcome]) -> dict[bytes, bool]:
        """The entries that must neither be retried nor wait, because they were cancelled."""
        stream, group = self._server.stream(source.stream), self._group(source)
        ids = [one.id for one in outcomes if isinstance(one, Retry | PutBack)]
        return {id: stream.cancels[id] for id in ids if id in stream.cancels and self._owns(group, id)}

    def _settle_one(self, settlement: Settlement, outcome: _Outcome) -> bool:
        source = settlement.source
        stream, group = self._fenced(source), self._group(source)
        id = _id_of(outcome)
        if not self._owns(group, id):
            return False
        if isinstance(outcome, Retry):
            self._server.schedule(source.stream, outcome.data, outcome.delay_s)
            stream.batches.leave([id])
        elif isinstance(outcome, Dead):
            if outcome.data:
                stream.dead.append(outcome.data)
            if outcome.result:
                ttl_s = settlement.result_ttl_s
                self._server.keep_result(source.stream, outcome.job_id, outcome.result, ttl_s)
            if outcome.key:
                stream.conditions.free(outcome.key)
            stream.batches.leave([id], "dead")
        elif isinstance(outcome, Kept):
            if not (outcome.is_dropped and self.result(source.stream, outcome.job_id)):
                ttl_s = settlement.result_ttl_s
                self._server.keep_result(source.stream, outcome.job_id, outcome.result, ttl_s)
            stream.batches.leave([id], "done")
        elif isinstance(outcome, PutBack):
            stream.lanes.wait_for(outcome.key, Lane.decode(outcome.lane).type, outcome.wait_s)
            stream.lanes.put(outcome.lane, [outcome.job], settlement.version, in_front=True)
            del group.leases[id]
            stream.lanes.release(id)
            stream.batches.leave([id])
            return True
        else:
            stream.batches.leave([id], "done")
        self._forget(stream, group, id)
        if len(stream.lanes) and len(stream.groups) == 1:  # trimming cannot pass the entries that wait
            stream.entries.pop(id, None)
        return True

    def _set_idle(self, source: Source, ids: Sequence[bytes], idle_s: float) -> set[bytes]:
        stream, group = self._fenced(source), self._group(source)
        for id in ids:
            if self._owns(group, id) and id not in stream.entries:
                self._forget(stream, group, id)
            elif self._owns(group, id):
                group.leases[id].wall_since_s = self._server.wall_now_s() - idle_s
        return {id for id in ids if not self._owns(group, id)}

    def _end(self, source: Source, read: Read) -> None:
        with self._server.lock, contextlib.suppress(ValueError):  # it was answered already
            self._group(source).blocked.remove(read)
        read.end()

    @staticmethod
    def _forget(stream: Stream, group: Group, id: bytes) -> None:
        group.leases.pop(id, None)
        stream.deaths.pop(id, None)
        stream.lanes.release(id)

    @staticmethod
    def _finished(stream: Stream) -> list[bytes]:
        """The entries that every group has read and acknowledged, with all entries before them."""
        groups = stream.groups.values()
        needed = {order(lease) for group in groups for lease in group.leases}
        needed |= {order(id) for id in stream.lanes.ids()}
        moved, taken = order(stream.forwarding.moved), order(stream.forwarding.taken)
        ids = {id: order(id) for id in stream.entries}
        needed |= {place for place in ids.values() if moved < place <= taken}
        read_till = min(group.last_delivered for group in groups)
        first_needed = min(needed, default=(read_till[0] + 1, 0))
        return [id for id, place in ids.items() if place <= read_till and place < first_needed]
