"""All of flow control on a real server, by readers that are killed before and after random commands."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence

from jobworker.worker.batches import BatchFinisher, find_batch
from jobworker.worker.cancel import Canceller, JobFilter
from jobworker.worker.conditions import UniqueKeys
from jobworker.worker.envelope import batch_of
from jobworker.worker.flow import FlowConfig, LaneRules, Limit, read_flow_header, tenant_key
from jobworker.worker.producer import Producer
from jobworker.worker.settings import Settings
from jobworker.worker.store.ports import Dead, Entry, PutBack, Retry, Settlement, WaitingJob
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from support.doomed_store import DoomedStore, Killed
from support.job_store_steps import S
from support.job_worlds import RedisWorld
from support.service import SOON_S, eventually

LIMITS = (Limit("a/tenant", "a", "tenant", concurrency=2),)
TENANTS, JOBS, WINDOW_S = ("t1", "t2", "t3"), 300, 86_400.0


class _DoomedReader(DoomedStore, RedisReaderStore):
    """A reader's."""


class _DoomedReaper(DoomedStore, RedisReaperStore):
    """A reaper's."""


class Role(threading.Thread):
    """A process that starts again whenever it was killed."""

    def __init__(self, name: str, url: str, done: threading.Event) -> None:
        super().__init__(name=name)
        self.kills = 0
        self._url = url
        self._done = done
        self._rng = random.Random(name)

    def run(self) -> None:
        while not self._done.is_set():
            try:
                self._live()
            except Killed:
                self.kills += 1

    def _live(self) -> None:
        raise NotImplementedError


class Reader(Role):
    """Reads, drops duplicates, sorts, takes and settles. ``ran``: ids of jobs that it settled as done."""

    def __init__(self, name: str, url: str, done: threading.Event) -> None:
        super().__init__(name, url, done)
        self.ran: list[str] = []
        self._keys = UniqueKeys()

    def _live(self) -> None:
        store = _DoomedReader(self._url, self.name)
        try:
            store.acquire([S])
            self._recover(store)
            while not self._done.is_set():
                store.begin_read(S, self._rng.randint(1, 20), 0)
                self._sort(store, store.finish_read(S))
                taken = store.take(S, ["a", "b"], self._rng.randint(1, 8))
                assert not taken.outdated
                self._settle(store, taken.entries)
        finally:
            store.close()

    def _recover(self, store: RedisReaderStore) -> None:
        entries = store.own_pending(S, b"0-0", 1000)
        with_slots = store.slot_holders(S, [entry.id for entry in entries])
        self._sort(store, [entry for entry in entries if entry.id not in with_slots])
        self._settle(store, [entry for entry in entries if entry.id in with_slots])

    def _sort(self, store: RedisReaderStore, entries: Sequence[Entry]) -> None:
        """Jobs whose keys others own end here; the rest waits in lanes."""
        if not entries:
            return
        self._register(store, entries)
        names = [(entry.id, name) for entry in entries if (name := self._key_of(entry))]
        owners = store.claim_keys(S, names, WINDOW_S) if names else {}
        lanes: dict[bytes, list[WaitingJob]] = {}
        for entry in entries:
            if entry.id not in owners:
                data = entry.data or b""
                lane = LaneRules(LIMITS).name_of(read_flow_header(data))
                lanes.setdefault(lane, []).append(WaitingJob(entry.id, len(data)))
        store.settle([Settlement(S, dropped=list(owners))])
        store.sort(S, store.flow_config(S).version, lanes)

    def _key_of(self, entry: Entry) -> str:
        job = json.loads(entry.data or b"")
        key = (job.get("metadata") or {}).get("idempotency_key")
        first = job.get("retry_count", 0) == 0
        return self._keys.name_of(job["type"], job["tenant_id"], key) if key and first else ""

    def _register(self, store: RedisReaderStore, entries: Sequence[Entry]) -> None:
        batches = {entry.id: batch_of(entry.data or b"") for entry in entries}
        store.register_batches(S, {id: batch for id, batch in batches.items() if batch})

    def _settle(self, store: RedisReaderStore, entries: Sequence[Entry]) -> None:
        """End each job in some way; one that was cancelled is not tried again."""
        if not entries:
            return
        self._register(store, entries)
        cancelled = store.cancels(S)
        outcome = Settlement(S, [], [], [], False, [], store.flow_config(S).version)
        for entry in entries:
            self._decide(outcome, entry, is_cancelled=entry.id in cancelled)
        (result,) = store.settle([outcome])
        assert result.error is None
        if result.cancelled:
            store.settle([Settlement(S, dead=[Dead(id, self._letter(id)) for id in result.cancelled])])
        store.end_cancels(S, [id for id in cancelled if id in {entry.id for entry in entries}])
        self.ran += [
            json.loads(entry.data or b"")["id"] for entry in entries if entry.id in set(outcome.done)
        ]

    def _letter(self, id: bytes) -> bytes:
        return b'{"entry":"%s"}' % id

    def _decide(self, outcome: Settlement, entry: Entry, *, is_cancelled: bool) -> None:
        data = entry.data or b""
        header = read_flow_header(data)
        kind = self._rng.choice(["done"] * 6 + ["dead", "retry", "back"])
        lists: tuple[list[object], ...] = (outcome.done, outcome.retries, outcome.dead, outcome.put_back)  # type: ignore[assignment]
        done, retries, dead, back = lists
        if is_cancelled or (kind == "dead" and b'"batch:' not in data):
            dead.append(Dead(entry.id, self._letter(entry.id)))
        elif kind == "retry":
            retries.append(Retry(entry.id, 0.0, json.dumps(json.loads(data) | {"retry_count": 1}).encode()))
        elif kind == "back":
            lane = LaneRules(LIMITS).name_of(header)
            job = WaitingJob(entry.id, len(data))
            back.append(PutBack(job, lane, tenant_key(header.type, header.tenant_id), 0.01))
        else:
            done.append(entry.id)


class Reaper(Role):
    """Promotes retries and finishes batches."""

    def _live(self) -> None:
        store = _DoomedReaper(self._url)
        finisher = BatchFinisher(store, Settings(streams=(S,)), MetricsBuffer(), time.monotonic)
        try:
            while not self._done.wait(self._rng.uniform(0.0, 0.01)):
                store.promote(S.stream, 100)
                store.mend_batches(S, b"0")
                finisher.run_once(S.stream)
        finally:
            store.close()


class Watcher(threading.Thread):
    """Looks all the time at what must hold at every instant; ``wrong`` says what did not."""

    def __init__(self, world: RedisWorld, done: threading.Event) -> None:
        super().__init__(name="watcher")
        self.wrong: list[str] = []
        self.most = 0
        self._client = world.server.client
        self._done = done

    def run(self) -> None:
        ended_before: Counter[str] = Counter()
        while not self._done.wait(0.001):
            running = [int(number) for number in self._client.hvals(f"ready:{S.stream}/running")]
            self.most = max([self.most, *running])
            for id in BATCHES:
                record = self._client.hgetall(f"batch:{S.stream}/{id}")
                total, done, dead = (int(record.get(name, 0)) for name in (b"total", b"done", b"dead"))
                if not ended_before[id] <= done + dead <= total:
                    self.wrong.append(f"batch {id}: {record}")
                ended_before[id] = done + dead
        if self.most > 2:
            self.wrong.append(f"{self.most} at once")


BATCHES = ("b1", "b2", "b3")


def send(world: RedisWorld) -> list[str]:
    """Jobs of several tenants and priorities, in batches; every third has the key of the one before."""
    rng, ids = random.Random(1), []
    producer = Producer(store=world.producer())
    for number, batch_id in enumerate(BATCHES):
        done = {"type": "b", "tenant_id": "t1", "stream": S.stream}
        with producer.batch("t1", on_complete=done, id=batch_id) as batch:
            for of_batch in range(JOBS // len(BATCHES)):
                key = f"{number}/{of_batch - (of_batch % 3 == 2)}"
                ids.append(batch.enqueue(
                    rng.choice("aab") if of_batch % 3 == 0 else "a", None, id=f"j{number}-{of_batch}",
                    tenant_id=TENANTS[of_batch // 3 % 3], stream=S.stream,
                    metadata={"priority": str(rng.randint(0, 10)), "idempotency_key": key},
                ))  # fmt: skip
    return ids


def test_jobs_are_exact_though_their_readers_and_reapers_are_killed_between_all_commands(
    redis_world: RedisWorld,
) -> None:
    url, client, done = redis_world.server.url, redis_world.server.client, threading.Event()
    store = redis_world.reader("setup")
    store.acquire([S])
    assert store.configure(S, FlowConfig(0, LIMITS, {}))
    readers = [Reader(f"reader {number}", url, done) for number in (1, 2, 3)]
    threads = [*readers, Reaper("reaper 1", url, done), Reaper("reaper 2", url, done)]
    watcher = Watcher(redis_world, done)
    ids = send(redis_world)
    for thread in (*threads, watcher):
        thread.start()
    cancelled = frozenset(random.Random(2).sample(ids, 30))
    list(Canceller(redis_world.producer(), [S.stream], JobFilter(cancelled), by="test").run())
    reaper = redis_world.reaper()

    def all_ended() -> bool:
        found = [find_batch(reaper, [S.stream], id) for id in BATCHES]
        left = client.xpending(S.stream, S.group)["pending"] + client.zcard(f"retry:{S.stream}")
        waiting = int(client.hget(f"ready:{S.stream}", "n") or 0)
        return not left and not waiting and all(one and one.state == "finished" for one in found)

    try:
        eventually(all_ended, 60.0, "all jobs ended")
    finally:
        done.set()
        for thread in (*threads, watcher):
            thread.join(SOON_S)
    assert not watcher.wrong
    assert watcher.most == 2, "the limit was reached"
    assert all(role.kills for role in threads)
    ran = Counter(id for reader in readers for id in reader.ran)
    assert max(ran.values()) == 1, "a job that was settled as done was settled again"
    doubled = [(ids[n - 1], ids[n]) for n in range(len(ids)) if n % (JOBS // len(BATCHES)) % 3 == 2]
    both = [pair for pair in doubled if ran.keys() >= set(pair) and cancelled.isdisjoint(pair)]
    assert not both, "of two jobs with one key both ran"
    for id in BATCHES:
        batch = find_batch(reaper, [S.stream], id)
        assert batch is not None
        assert batch.done + batch.dead == batch.total == JOBS // len(BATCHES)
    assert client.hlen(f"ready:{S.stream}/slots") == client.hlen(f"batches:{S.stream}/jobs") == 0
    assert reaper.mend_slots(S) == 0
