"""Batches in every job store: exact counts, callbacks that are enqueued once, kills, bad keys, a cluster."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jobworker.worker.batches import BatchFinisher, find_batch
from jobworker.worker.envelope import batch_of
from jobworker.worker.errors import StoreRefused
from jobworker.worker.flow import Lane
from jobworker.worker.keys import Source, batch_key, batches_key
from jobworker.worker.producer import Producer
from jobworker.worker.producer_batch import BatchChanged
from jobworker.worker.settings import Settings
from jobworker.worker.store.batches import DueBatch
from jobworker.worker.store.ports import (
    Candidate,
    Dead,
    Entry,
    PutBack,
    ReaderStore,
    ReaperStore,
    Retry,
    Settlement,
    WaitingJob,
)
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from support.doomed_store import DoomedStore, Killed
from support.job_store_steps import OTHER, S, read
from support.job_worlds import RedisWorld, World, settle
from support.service import SOON_S, eventually
from support.topologies import cluster

SETTINGS = Settings(streams=(S, OTHER), host="h", instance="i")
LANE = Lane("a", 5, "t1").encode()
DONE = {"type": "report", "payload": {"days": 1}, "stream": S.stream}


def reader(world: World, *sources: Source, name: str = "a") -> ReaderStore:
    store = world.reader(name)
    store.acquire(sources or (S,))
    return store


def producer(world: World) -> Producer:
    return Producer(store=world.producer())


def finisher(store: ReaperStore) -> BatchFinisher:
    return BatchFinisher(store, SETTINGS, MetricsBuffer(), time.monotonic)


def finish(store: ReaperStore) -> None:
    one = finisher(store)
    for source in SETTINGS.streams:
        one.run_once(source.stream)


def admit(store: ReaderStore, source: Source = S) -> list[bytes]:
    """Read entries and register their batches, as the reader does."""
    return register(store, read(store, source=source), source)


def register(store: ReaderStore, entries: Sequence[Entry], source: Source = S) -> list[bytes]:
    batches = {entry.id: batch_of(entry.data or b"") for entry in entries}
    assert store.register_batches(source, {id: batch for id, batch in batches.items() if batch}) == set()
    return [entry.id for entry in entries]


def counts(store: ReaperStore, id: str) -> tuple[int | None, int, int, str]:
    batch = find_batch(store, [S.stream, OTHER.stream], id)
    assert batch is not None
    return batch.total, batch.done, batch.dead, batch.state


def fill(world: World, jobs: int, *, on_complete: bool = False) -> str:
    with producer(world).batch("t1", on_complete=DONE if on_complete else None, name="Import") as batch:
        batch.enqueue_many({"type": "a", "stream": S.stream} for _ in range(jobs))
    return batch.id


def jobs_in(store: ReaderStore, source: Source = S) -> list[dict[str, object]]:
    return [json.loads(entry.data or b"") for entry in read(store, source=source)]


class TestCounts:
    def test_only_the_end_of_a_job_counts(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        id = fill(world, 4)
        assert counts(reaper, id) == (4, 0, 0, "closed")
        first, second, third, fourth = entries = read(store)
        register(store, entries)
        retry = Retry(third.id, 0.0, third.data or b"")
        settle(store, [Settlement(S, [first.id], [retry], [Dead(second.id, b"letter")])])
        assert counts(reaper, id) == (4, 1, 1, "closed"), "a retry has not ended"
        reaper.promote(S.stream, 10)
        settle(store, [Settlement(S, [*admit(store), fourth.id])])
        assert counts(reaper, id) == (4, 3, 1, "closed")

    def test_jobs_are_added_only_to_the_expected_total(self, world: World) -> None:
        def jobs(count: int, source: Source = S) -> Iterator[dict[str, object]]:
            return ({"type": "a", "stream": source.stream} for _ in range(count))

        first, second = (producer(world).batch(id="b", stream=S.stream) for _ in range(2))
        first.enqueue_many(jobs(2100), expected_total=0)
        for wrong in (0, 2099, 2101):
            with pytest.raises(BatchChanged, match=f"expected {wrong} jobs"):
                second.enqueue_many(jobs(1), expected_total=wrong)
        assert second.counts().total == 2100
        second.enqueue_many(jobs(3, OTHER), expected_total=2100)
        first.counts()
        first.enqueue_many(jobs(2, OTHER), expected_total=2103)
        with pytest.raises(BatchChanged):
            second.enqueue_many(jobs(2, OTHER), expected_total=2103)
        assert second.counts().total == 2105

    def test_a_job_that_was_handed_back_counts_at_its_end_alone(self, world: World) -> None:
        store, other = reader(world), reader(world, name="b")
        id = fill(world, 2)
        first, second = admit(store)
        data = store.fetch(S, [second])[second]
        assert data is not None
        assert store.hand_back(S, {second: data}) == 1
        world.reaper().mend_batches(S, b"0")
        assert counts(world.reaper(), id) == (2, 0, 0, "closed")
        settle(store, [Settlement(S, [first])])
        settle(other, [Settlement(S, admit(other))])
        assert counts(world.reaper(), id) == (2, 2, 0, "closed")

    @pytest.mark.parametrize("sure", [True, False])
    def test_an_entry_counts_once(self, world: World, sure: bool) -> None:
        """The answer to a settlement may be lost; then it is sent again."""
        store, other = reader(world), reader(world, name="b")
        id = fill(world, 3)
        ids = admit(store)
        for _ in range(2):
            store.settle([Settlement(S, ids[:2], sure=sure)])
        other.register_batches(S, dict.fromkeys(ids, id))
        assert settle(other, [Settlement(S, [], [], [Dead(one, b"{}") for one in ids])]) == set(ids)
        assert counts(world.reaper(), id) == (3, 2, 0, "closed")

    def test_beside_another_consumer_too(self, world: World) -> None:
        store, other = reader(world), reader(world, name="b")
        id = fill(world, 3)
        ids = register(store, read(store, 2))
        rest = admit(other)
        settle(store, [Settlement(S, ids)])
        assert counts(world.reaper(), id) == (3, 2, 0, "closed")
        settle(other, [Settlement(S, rest)])
        assert counts(world.reaper(), id) == (3, 3, 0, "closed")

    def test_a_job_that_waits_in_a_lane_is_counted_when_it_ends(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        id = fill(world, 2)
        ids = admit(store)
        lane = LANE
        assert store.sort(S, 0, {lane: [WaitingJob(one, 50) for one in ids]}) == set()
        assert reaper.mend_batches(S, b"0")[1] == 0, "they are not lost"
        first, second = store.take(S, ["a"], 10).entries
        register(store, [first, second])
        back = PutBack(WaitingJob(first.id, 50), lane, "key", 0.001)
        settle(store, [Settlement(S, [second.id], put_back=[back])])
        assert reaper.mend_batches(S, b"0")[1] == 0
        assert counts(reaper, id) == (2, 1, 0, "closed")
        world.pass_time(0.05)
        settle(store, [Settlement(S, register(store, store.take(S, ["a"], 10).entries))])
        assert counts(reaper, id) == (2, 2, 0, "closed")

    def test_a_registered_job_that_is_delayed_is_counted_when_it_ends(self, world: World) -> None:
        """A clock that was set back can make a pending job wait for its time again."""
        store, reaper = reader(world), world.reaper()
        id = fill(world, 1)
        (entry,) = read(store)
        register(store, [entry])
        due_s = reaper.cron_clock(S.stream)[1] + 1.0
        assert store.screen(S, [Candidate(entry.id, entry.id, "", due_s, entry.data or b"")]).delayed == {
            entry.id
        }
        reaper.trim(S.stream)
        assert reaper.mend_batches(S, b"0")[1] == 0
        world.pass_time(1.1)
        reaper.promote(S.stream, 10)
        settle(store, [Settlement(S, admit(store))])
        assert counts(reaper, id) == (1, 1, 0, "closed")

    def test_a_pending_entry_that_was_deleted_by_hand_counts_as_dead(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        id = fill(world, 3)
        ids = admit(store)
        for one in ids[:2]:
            world.delete_entry(S.stream, one)
        assert [entry.id for entry in store.own_pending(S, b"0-0", 10)] == ids[2:]
        reaper.mend_batches(S, b"0")
        assert counts(reaper, id) == (3, 0, 2, "closed")
        assert world.dead_letters(S.stream) == []
        world.delete_stream(S.stream)
        assert reaper.mend_batches(S, b"0")[1] == 1
        assert counts(reaper, id) == (3, 0, 3, "closed")

    def test_the_total_counts_what_was_enqueued(self, world: World) -> None:
        reaper = world.reaper()
        with producer(world).batch("t1") as batch:
            batch.enqueue("a", None, stream=S.stream)
            batch.enqueue("a", None, stream=S.stream, id="x", delay=60)
            batch.enqueue("a", None, stream=S.stream, id="x", delay=60)
            assert counts(reaper, batch.id) == (3, 0, 0, "open")
            with pytest.raises(ValueError, match="no JSON"):
                batch.enqueue_many(
                    [{"type": "a", "stream": S.stream}, {"type": "a", "payload": {float("nan")}}]
                )
        assert counts(reaper, batch.id) == (4, 0, 0, "closed")
        assert world.length(S.stream) == 4

    def test_a_batch_without_a_record_is_not_counted(self, world: World) -> None:
        store = reader(world)
        world.producer().add(S.stream, [b"{}"])
        (id,) = [entry.id for entry in read(store)]
        assert store.register_batches(S, {id: "unknown"}) == {"unknown"}
        settle(store, [Settlement(S, [id])])
        assert world.reaper().batch_hash(S.stream, "unknown") is None
        assert world.reaper().batch_ids(S.stream, 10) == []

    @pytest.mark.parametrize("part", ["jobs", "due"])
    def test_a_damaged_key_refuses_and_loses_nothing(self, world: World, part: str) -> None:
        store = reader(world)
        id = fill(world, 3)
        first, *ids = admit(store)
        settle(store, [Settlement(S, [first])])
        key = batches_key(S.stream, part)
        world.break_key(key)
        with pytest.raises(StoreRefused):
            settle(store, [Settlement(S, ids[:1], [Retry(ids[1], 60.0, b"{}")])])
        assert key in [fault.key for fault in store.key_faults(S)]
        world.repair_key(key)
        settle(store, [Settlement(S, ids)])
        assert counts(world.reaper(), id) == (3, 3, 0, "closed")


class TestTheEnd:
    def test_the_callback_is_enqueued_once_with_the_counts(self, world: World) -> None:
        store, reapers = reader(world), [world.reaper(), world.reaper()]
        id = fill(world, 2, on_complete=True)
        first, second = admit(store)
        settle(store, [Settlement(S, [first])])
        finish(reapers[0])
        assert jobs_in(store) == []
        settle(store, [Settlement(S, dead=[Dead(second, b"{}")])])
        for reaper in reapers * 2:
            finish(reaper)
        (callback,) = jobs_in(store)
        assert callback["id"] == f"batch:{id}"
        assert callback["payload"] == {"days": 1}
        assert callback["tenant_id"] == "t1"
        assert callback["metadata"] == {
            "completed_batch_id": id, "batch_total": "2", "batch_done": "1", "batch_dead": "1",
        }  # fmt: skip
        assert counts(reapers[0], id) == (2, 1, 1, "finished")
        assert reapers[0].batch_due(S.stream) == []
        assert reapers[0].batch_ids(S.stream, 10) == [id]

    def test_a_batch_that_is_not_closed_does_not_finish(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        batch = producer(world).batch(on_complete=DONE, id="import-7")
        batch.enqueue("a", None, stream=S.stream)
        with pytest.raises(ValueError, match="stream"), batch:
            batch.enqueue("a", None, stream="x" * 1000)
        settle(store, [Settlement(S, admit(store))])
        finish(reaper)
        assert not reaper.batch_finish(S.stream, batch.id, b"{}", "", 60)
        assert counts(reaper, batch.id) == (1, 1, 0, "open")
        with producer(world).batch(on_complete=DONE, id="import-7") as batch:
            batch.enqueue("a", None, stream=S.stream)
        settle(store, [Settlement(S, admit(store))])
        finish(reaper)
        assert counts(reaper, batch.id) == (2, 2, 0, "finished")
        with pytest.raises(ValueError, match="has finished"):
            batch.enqueue("a", None, stream=S.stream)
        with pytest.raises(ValueError, match="has finished"):
            producer(world).batch(on_complete=DONE, id="import-7")

    def test_an_empty_batch_finishes(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        id = fill(world, 0, on_complete=True)
        finish(reaper)
        assert [job["id"] for job in jobs_in(store)] == [f"batch:{id}"]
        assert counts(reaper, id) == (0, 0, 0, "finished")

    def test_jobs_on_several_streams_are_one_batch(self, world: World) -> None:
        store, reaper = reader(world, S, OTHER), world.reaper()
        with producer(world).batch(on_complete=DONE) as batch:
            batch.enqueue_many({"type": "a", "stream": name} for name in (S.stream, OTHER.stream) * 3)
        assert counts(reaper, batch.id) == (6, 0, 0, "closed")
        settle(store, [Settlement(S, admit(store))])
        finish(reaper)
        assert reaper.batch_due(S.stream) == reaper.batch_due(OTHER.stream) == []
        settle(store, [Settlement(OTHER, admit(store, OTHER))])
        finish(reaper)
        assert counts(reaper, batch.id) == (6, 6, 0, "finished")
        assert [job["id"] for job in jobs_in(store)] == [f"batch:{batch.id}"]
        assert reaper.batch_ids(OTHER.stream, 10) == [], "it is listed on its home stream"

    def test_a_close_while_the_reaper_looks_is_not_overlooked(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        batch = producer(world).batch(on_complete=DONE)
        batch.enqueue("a", None, stream=S.stream)
        settle(store, [Settlement(S, admit(store))])
        (due,) = reaper.batch_due(S.stream)
        batch.close()
        reaper.batch_seen(S.stream, due)
        finish(reaper)
        assert counts(reaper, batch.id)[3] == "finished"

    def test_a_batch_that_was_overlooked_is_found_again(self, world: World) -> None:
        store, reaper = reader(world), world.reaper()
        id = fill(world, 1, on_complete=True)
        settle(store, [Settlement(S, admit(store))])
        for due in reaper.batch_due(S.stream):
            reaper.batch_seen(S.stream, due)
        assert reaper.batch_sweep(S.stream, 0, 60.0) == (1, 0)
        assert reaper.batch_due(S.stream) == [DueBatch(id, b"-1")]
        finish(reaper)
        assert counts(reaper, id)[3] == "finished"
        assert reaper.batch_sweep(S.stream, 0, 60.0) == (0, 0)

    def test_a_finished_batch_is_kept_for_some_time(self, world: World) -> None:
        store, reaper = reader(world, S, OTHER), world.reaper()
        with producer(world).batch(on_complete=DONE) as batch:
            batch.enqueue_many({"type": "a", "stream": name} for name in (S.stream, OTHER.stream))
        settle(store, [Settlement(S, admit(store)), Settlement(OTHER, admit(store, OTHER))])
        assert reaper.batch_finish(S.stream, batch.id, b"", "why", 1.0)
        reaper.batch_seal(OTHER.stream, batch.id, 1.0)
        world.pass_time(2.1)
        reaper.batch_sweep(S.stream, 0, 1.0)
        assert reaper.batch_ids(S.stream, 10) == []
        assert find_batch(reaper, [S.stream, OTHER.stream], batch.id) is None

    @pytest.mark.parametrize(
        "on_complete", [b"{", b"{}", b'{"type": ""}', b'{"type": "a", "tenant_id": "/"}']
    )
    def test_a_callback_that_is_no_job_does_not_stop_the_batch(
        self, world: World, on_complete: bytes
    ) -> None:
        store, reaper = reader(world), world.reaper()
        world.producer().batch_open(S.stream, "b", {"on_complete": on_complete})
        world.producer().batch_close(S.stream, "b")
        finish(reaper)
        found = find_batch(reaper, [S.stream], "b")
        assert found is not None
        assert found.state == "finished"
        assert "on_complete is no job" in found.record.error
        assert jobs_in(store) == []


class TestOnServers:
    def test_the_documented_commands_of_other_languages(self, redis_world: RedisWorld) -> None:
        store, reaper, client = reader(redis_world), redis_world.reaper(), redis_world.server.client
        record = {"total": 2, "closed": 1, "on_complete": '{"type": "report", "payload": null}'}
        client.hset(batch_key(S.stream, "import-7"), mapping=record)
        client.hset(batches_key(S.stream, "due"), "import-7", "closed")
        for number in range(2):
            job = {"id": f"j{number}", "type": "a", "metadata": {"batch_id": "import-7"}}
            client.xadd(S.stream, {"data": json.dumps(job)})
        finish(reaper)
        first, second = admit(store)
        assert reaper.batch_ids(S.stream, 10) == ["import-7"]
        assert client.ttl(batch_key(S.stream, "import-7")) > 0
        settle(store, [Settlement(S, [first])])
        finish(reaper)
        assert counts(reaper, "import-7") == (2, 1, 0, "closed")
        settle(store, [Settlement(S, [second])])
        finish(reaper)
        assert counts(reaper, "import-7") == (2, 2, 0, "finished")
        assert [job["id"] for job in jobs_in(store)] == ["batch:import-7"]

    def test_the_time_of_creation_has_milliseconds(self, redis_world: RedisWorld) -> None:
        """Imports that follow each other within a second get different versions by it."""
        with producer(redis_world).batch("t1") as batch:
            batch.enqueue("a", None, stream=S.stream)
        written = redis_world.server.client.hget(batch_key(S.stream, batch.id), "created")
        assert written.partition(b".")[2].isdigit()

    def test_a_total_that_is_set_at_the_end(self, redis_world: RedisWorld) -> None:
        store, reaper, client = reader(redis_world), redis_world.reaper(), redis_world.server.client
        client.hset(batch_key(S.stream, "b"), "name", "Import")
        client.xadd(S.stream, {"data": '{"id": "j", "type": "a", "metadata": {"batch_id": "b"}}'})
        settle(store, [Settlement(S, admit(store))])
        finish(reaper)
        assert counts(reaper, "b") == (None, 1, 0, "open")
        client.hset(batch_key(S.stream, "b"), mapping={"total": 1, "closed": 1})
        client.hset(batches_key(S.stream, "due"), "b", "closed")
        finish(reaper)
        assert counts(reaper, "b") == (1, 1, 0, "finished")

    @pytest.mark.parametrize("value", ["a string", {"total": "x", "done": "y", "closed": "1"}])
    def test_a_damaged_record_stops_no_other_batch(self, redis_world: RedisWorld, value: object) -> None:
        store, reaper, client = reader(redis_world), redis_world.reaper(), redis_world.server.client
        bad, good = fill(redis_world, 1, on_complete=True), fill(redis_world, 1, on_complete=True)
        ids = admit(store)
        key = batch_key(S.stream, bad)
        client.delete(key)
        client.set(key, value) if isinstance(value, str) else client.hset(key, mapping=value)
        assert settle(store, [Settlement(S, ids)]) == set()
        finish(reaper)
        assert counts(reaper, good) == (1, 1, 0, "finished")
        assert store.own_pending(S, b"0-0", 10) == []

    def test_a_requeued_dead_letter_is_waited_for_again(self, redis_world: RedisWorld) -> None:
        store, reaper, operator = (
            reader(redis_world),
            redis_world.reaper(),
            OperatorStore(redis_world.server.url),
        )
        id = fill(redis_world, 2, on_complete=True)
        entries = read(store)
        first, second = register(store, entries)
        settle(store, [Settlement(S, dead=[Dead(first, b"{}")])])
        (letter,) = operator.dead_after(S.stream, b"0-0", 10)
        assert operator.requeue(S.stream, [(letter.id, entries[0].data or b"")]) == [True]
        assert operator.requeue(S.stream, [(letter.id, entries[0].data or b"")]) == [False]
        assert counts(reaper, id) == (2, 0, 0, "closed")
        settle(store, [Settlement(S, [*admit(store), second])])
        finish(reaper)
        assert counts(reaper, id) == (2, 2, 0, "finished")
        operator.close()

    def test_a_job_whose_group_was_deleted_is_counted_when_it_has_run(self, redis_world: RedisWorld) -> None:
        store, reaper = reader(redis_world), redis_world.reaper()
        id = fill(redis_world, 1)
        admit(store)
        redis_world.server.client.xgroup_destroy(*S)
        assert reaper.mend_batches(S, b"0")[1] == 0
        assert read(store) == []
        settle(store, [Settlement(S, admit(store))])
        assert counts(reaper, id) == (1, 1, 0, "closed")

    def test_nothing_is_kept_for_jobs_without_a_batch(self, redis_world: RedisWorld) -> None:
        store = reader(redis_world)
        redis_world.producer().add(S.stream, [b'{"id": "j", "type": "a"}'])
        settle(store, [Settlement(S, admit(store))])
        finish(redis_world.reaper())
        assert redis_world.server.client.keys("batch*") == []


class _DoomedReader(DoomedStore, RedisReaderStore):
    """A reader's."""


class _DoomedReaper(DoomedStore, RedisReaperStore):
    """A reaper's."""


def run_jobs(store: RedisReaderStore, rng: random.Random, done: threading.Event) -> None:
    """What a reader does: settle what is pending, then new entries, of each stream."""
    store.acquire([S, OTHER])
    entries = {source: store.own_pending(source, b"0-0", 1000) for source in (S, OTHER)}
    while not done.is_set():
        for source in (S, OTHER):
            register(store, entries[source], source)
            settle(store, [with_some_outcomes(source, entries[source], rng)])
            entries[source] = read(store, rng.randint(1, 20), source)


def with_some_outcomes(source: Source, entries: Sequence[Entry], rng: random.Random) -> Settlement:
    outcome = Settlement(source, [], [], [])
    for entry in entries:
        data = entry.data or b""
        kind = 0 if b'"batch:' in data else rng.choice([0, 0, 0, 1, 2])
        outcome[1 + kind].append((entry.id, Retry(entry.id, 0.0, data), Dead(entry.id, data))[kind])  # type: ignore[attr-defined]
    return outcome


def finish_batches(store: RedisReaperStore, rng: random.Random, done: threading.Event) -> None:
    one = finisher(store)
    while not done.wait(rng.uniform(0.0, 0.01)):
        for source in (S, OTHER):
            store.promote(source.stream, 100)
            store.mend_batches(source, b"0")
            one.run_once(source.stream)


class Role(threading.Thread):
    """A role that starts again whenever it was killed."""

    def __init__(self, name: str, url: str, done: threading.Event) -> None:
        super().__init__(name=name)
        self.kills = 0
        self._url = url
        self._done = done

    def run(self) -> None:
        rng = random.Random(self.name)
        while not self._done.is_set():
            is_reader = self.name.startswith("reader")
            store = _DoomedReader(self._url, self.name) if is_reader else _DoomedReaper(self._url)
            try:
                if isinstance(store, _DoomedReader):
                    run_jobs(store, rng, self._done)
                else:
                    finish_batches(store, rng, self._done)
            except Killed:
                self.kills += 1
            finally:
                store.close()


def test_counts_are_exact_though_readers_and_reapers_are_killed_between_all_commands(
    redis_world: RedisWorld,
) -> None:
    url, client, done = redis_world.server.url, redis_world.server.client, threading.Event()
    roles = [Role(name, url, done) for name in ("reader 1", "reader 2", "reaper 1", "reaper 2")]
    for role in roles:
        role.start()
    sizes = {f"b{number}": number * 11 for number in range(1, 21)}
    sender, store, names = producer(redis_world), redis_world.reaper(), [S.stream, OTHER.stream]
    for id, size in sizes.items():
        streams = names[: 1 + size % 2]
        with sender.batch("t1", on_complete=DONE | {"stream": OTHER.stream}, id=id) as batch:
            batch.enqueue_many({"type": "a", "stream": streams[n % len(streams)]} for n in range(size))
    eventually(lambda: {counts(store, id)[3] for id in sizes} == {"finished"}, 60.0, "all finished")
    eventually(lambda: not any(client.xpending(one.stream, one.group)["pending"] for one in (S, OTHER)))
    done.set()
    for role in roles:
        role.join(SOON_S)
        assert not role.is_alive()
        assert role.kills
    letters = [json.loads(fields[b"data"]) for name in names for _, fields in client.xrange(f"dlq:{name}")]
    dead = Counter(letter["metadata"]["batch_id"] for letter in letters)
    for id, size in sizes.items():
        assert counts(store, id) == (size, size - dead[id], dead[id], "finished")
    sent = Counter(json.loads(fields[b"data"])["id"] for _, fields in client.xrange(OTHER.stream))
    assert {id: times for id, times in sent.items() if id.startswith("batch:")} == {
        f"batch:{id}": 1 for id in sizes
    }
    assert not client.exists(batches_key(S.stream, "jobs"), batches_key(OTHER.stream, "jobs"))


def test_on_a_cluster_a_batch_is_in_the_slots_of_its_streams(tmp_path: Path) -> None:
    with cluster(tmp_path, masters=1) as nodes:
        url = nodes.url()
        store, reaper, operator = RedisReaderStore(url, "a"), RedisReaperStore(url), OperatorStore(url)
        store.acquire([S, OTHER])
        with Producer(url) as sender, sender.batch(on_complete=DONE) as batch:
            batch.enqueue_many({"type": "a", "stream": name} for name in (S.stream, OTHER.stream) * 2)
        first, second = register(store, read(store))
        settle(store, [Settlement(S, [first], dead=[Dead(second, b"{}")])])
        settle(store, [Settlement(OTHER, admit(store, OTHER))])
        (letter,) = operator.dead_after(S.stream, b"0-0", 10)
        job = {"id": "j", "type": "a", "metadata": {"batch_id": batch.id}}
        operator.requeue(S.stream, [(letter.id, json.dumps(job).encode())])
        finish(reaper)
        assert counts(reaper, batch.id) == (4, 3, 0, "closed")
        ids = admit(store)
        assert store.sort(S, 0, {LANE: [WaitingJob(one, 50) for one in ids]}) == set()
        settle(store, [Settlement(S, register(store, store.take(S, ["a"], 10).entries))])
        assert reaper.mend_batches(S, b"0") == (b"0", 0)
        finish(reaper)
        assert counts(reaper, batch.id) == (4, 4, 0, "finished")
        assert [job["id"] for job in jobs_in(store)] == [f"batch:{batch.id}"]
        assert operator.find_streams().names == sorted([S.stream, OTHER.stream])
        for one in (store, reaper, operator):
            one.close()
