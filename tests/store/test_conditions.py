"""Suite of idempotency keys, supersede keys and delays: the store in memory and real servers decide alike."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker.conditions import read_conditions, unique_bucket, unique_name
from jobworker.worker.envelope import read_header, with_first_id, with_retry
from jobworker.worker.errors import Fenced, StoreRefused
from jobworker.worker.flow import LaneRules, read_flow_header
from jobworker.worker.keys import Source, ready_key
from jobworker.worker.store.ports import (
    Candidate,
    Dead,
    Entry,
    OwnedKey,
    ReaderStore,
    Retry,
    Screened,
    Settlement,
    WaitingJob,
)
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from support.job_worlds import RedisWorld, World, settle
from support.topologies import cluster

S = Source("stream:test", "cg-test")
WINDOW_S = 3600.0


def job(id: str, tenant: str = "t1", type: str = "a", **metadata: str) -> bytes:
    return json.dumps({"id": id, "type": type, "tenant_id": tenant, "metadata": metadata}).encode()


def reader(world: World, name: str = "one") -> ReaderStore:
    store = world.reader(name)
    store.acquire([S])
    return store


def read(store: ReaderStore) -> list[Entry]:
    store.begin_read(S, 10_000, 0)
    return store.finish_read(S)


def given(world: World, store: ReaderStore, *jobs: bytes) -> list[Entry]:
    """Add jobs, and let the reader have them."""
    world.producer().add(S.stream, jobs)
    return read(store)


def candidate(entry: Entry, delay_until_s: float = 0.0) -> Candidate:
    data = entry.data or b""
    first_id, series, _, _ = read_conditions(read_header(data), entry.id)
    moved = with_first_id(data, first_id.decode()) if delay_until_s else b""
    return Candidate(entry.id, first_id, series, delay_until_s, moved)


def screen(store: ReaderStore, entries: Iterable[Entry]) -> Screened:
    return store.screen(S, [candidate(entry) for entry in entries])


def delay(store: ReaderStore, entry: Entry, due_s: float) -> Screened:
    return store.screen(S, [candidate(entry, due_s)])


def claim(store: ReaderStore, *entries: Entry, window_s: float = WINDOW_S) -> dict[bytes, bytes]:
    keys = [(entry.id, unique_name(read_header(entry.data or b""))) for entry in entries]
    return store.claim_keys(S, keys, window_s)


def dead(entry: Entry) -> Settlement:
    name = unique_name(read_header(entry.data or b""))
    key = OwnedKey(unique_bucket(entry.id, WINDOW_S), name, entry.id)
    return Settlement(S, dead=[Dead(entry.id, b"{}", key)])


def sort(store: ReaderStore, entries: Iterable[Entry]) -> None:
    for entry in entries:
        name = LaneRules().name_of(read_flow_header(entry.data or b""))
        assert store.sort(S, 0, {name: [WaitingJob(entry.id, len(entry.data or b""))]}) == set()


def take(store: ReaderStore, count: int = 100) -> list[Entry]:
    return store.take(S, ["a", "b"], count).entries


def now_s(entry: Entry) -> float:
    """The server's time when an entry was added."""
    return int(entry.id.partition(b"-")[0]) / 1000


def names(entries: Iterable[Entry]) -> list[str]:
    return [json.loads(entry.data or b"")["id"] for entry in entries]


RUNS = Screened({}, set(), set())


class TestIdempotencyKeys:
    def test_a_second_job_with_the_key_is_a_duplicate(self, world: World) -> None:
        store = reader(world)
        first, second = given(world, store, job("1", idempotency_key="k"), job("2", idempotency_key="k"))
        assert claim(store, first, second) == {second.id: first.id}

    @pytest.mark.parametrize("key", ["k", "编" * 40, "x" * 41, "y" * 16_000], ids=len)
    def test_type_tenant_and_key_must_be_the_same(self, world: World, key: str) -> None:
        store = reader(world)
        one, *others, again = given(
            world, store, job("1", idempotency_key=key), job("2", idempotency_key=key + "2"),
            job("3", tenant="t2", idempotency_key=key), job("4", type="b", idempotency_key=key),
            job("5", tenant="1", type="at", idempotency_key=key), job("6", idempotency_key=key),
        )  # fmt: skip
        assert claim(store, one, *others) == {}
        assert claim(store, again) == {again.id: one.id}

    def test_a_job_that_is_delivered_again_owns_its_key(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1", idempotency_key="k"))
        for _ in range(3):
            assert claim(store, entry) == {}
        other = reader(world, "two")
        (claimed,) = other.claim(S, 0, 10, b"0-0")[1]
        assert claim(other, claimed) == {}

    def test_a_key_stays_taken_after_success_until_the_window_ends(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1", idempotency_key="k"))
        claim(store, entry, window_s=0.5)
        settle(store, [Settlement(S, [entry.id])])
        (late,) = given(world, store, job("2", idempotency_key="k"))
        assert claim(store, late, window_s=0.5) == {late.id: entry.id}
        world.pass_time(0.6)
        (later,) = given(world, store, job("3", idempotency_key="k"))
        assert claim(store, later, window_s=0.5) == {}

    def test_a_key_is_taken_across_the_border_of_buckets(self, world: World) -> None:
        store = reader(world)
        owners = []
        for number in range(8):
            (entry,) = given(world, store, job(str(number), idempotency_key="k"))
            owners.append(claim(store, entry, window_s=0.5).get(entry.id, entry.id))
            world.pass_time(0.15)
        starts = sorted({int(owner.partition(b"-")[0]) for owner in owners})
        assert len(starts) > 1
        assert all(later - earlier >= 500 for earlier, later in itertools.pairwise(starts))

    def test_keys_are_deleted_after_two_windows(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1", idempotency_key="k"))
        claim(store, entry, window_s=0.2)
        claim(store, entry, window_s=WINDOW_S)
        world.pass_time(1.5)
        assert world.reaper().forget_keys(S.stream) == 1
        assert world.reaper().forget_keys(S.stream) == 0
        (late,) = given(world, store, job("2", idempotency_key="k"))
        assert claim(store, late) == {late.id: entry.id}

    def test_a_dead_letter_frees_the_key_that_the_job_owns(self, world: World) -> None:
        store = reader(world)
        entry, second = given(world, store, job("1", idempotency_key="k"), job("2", idempotency_key="k"))
        claim(store, entry)
        settle(store, [dead(second)])
        (third,) = given(world, store, job("3", idempotency_key="k"))
        assert claim(store, third) == {third.id: entry.id}
        settle(store, [dead(entry)])
        assert claim(store, third) == {}

    def test_of_many_jobs_on_two_hosts_one_owns_each_key(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        jobs = [job(str(number), idempotency_key=f"k{number % 1200}") for number in range(4800)]
        world.producer().add(S.stream, jobs)
        one.begin_read(S, 2400, 0)
        mine, others = one.finish_read(S), read(two)
        duplicates = claim(one, *mine) | claim(two, *others)
        assert len(duplicates) == 3600
        assert set(duplicates.values()) == {entry.id for entry in mine[:1200]}

    def test_a_fenced_reader_takes_no_key(self, world: World) -> None:
        old = reader(world)
        (entry,) = given(world, old, job("1", idempotency_key="k"))
        reader(world)
        with pytest.raises(Fenced):
            claim(old, entry)

    def test_a_broken_key_of_the_stream_is_refused(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1", idempotency_key="k"))
        world.break_key(ready_key(S.stream))
        with pytest.raises(StoreRefused):
            claim(store, entry)
        world.repair_key(ready_key(S.stream))
        assert claim(store, entry) == {}


def test_jobs_run_while_the_server_has_no_memory_for_their_keys(redis_world: RedisWorld) -> None:
    store, client = reader(redis_world), redis_world.server.client
    first, second = given(
        redis_world, store, job("1", idempotency_key="k"), job("2", idempotency_key="k"),
    )  # fmt: skip
    client.config_set("maxmemory", 1)
    try:
        assert claim(store, first) == {}
    finally:
        client.config_set("maxmemory", 0)
    assert claim(store, second) == {}
    assert claim(store, first) == {first.id: second.id}


class TestDelays:
    def test_a_job_waits_until_its_time(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1"))
        assert delay(store, entry, now_s(entry) + 0.4) == Screened({}, {entry.id}, set())
        depths = world.reaper().depths(S)
        assert (depths.pending, depths.retrying) == (0, 1)
        assert world.reaper().promote(S.stream, 10).moved == 0
        world.pass_time(0.5)
        assert world.reaper().promote(S.stream, 10).moved == 1
        (again,) = read(store)
        header = read_header(again.data or b"")
        assert (header.id, header.first_id, header.retry_count) == ("1", entry.id.decode(), 0)
        assert again.deaths == 0

    def test_a_repeated_call_moves_nothing_twice(self, world: World) -> None:
        store = reader(world)
        (entry,) = given(world, store, job("1"))
        delay(store, entry, now_s(entry) + 60)
        assert delay(store, entry, now_s(entry) + 60).lost == {entry.id}
        assert len(world.waiting(S.stream)) == 1

    def test_equal_jobs_wait_side_by_side(self, world: World) -> None:
        store = reader(world)
        for entry in given(world, store, job("1"), job("1")):
            delay(store, entry, now_s(entry) + 60)
        assert len(world.waiting(S.stream)) == 2

    def test_an_entry_of_another_consumer_is_not_moved(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        (entry,) = given(world, one, job("1"))
        assert delay(two, entry, now_s(entry) + 60).lost == {entry.id}
        assert world.waiting(S.stream) == []


class TestSupersedeKeys:
    def test_of_many_jobs_the_newest_may_run(self, world: World) -> None:
        store = reader(world)
        entries = given(world, store, *(job(str(number), supersede_key="c7") for number in range(5)))
        newest = entries.pop()
        screened = screen(store, [*entries, newest])
        assert screened.superseded == {entry.id: newest.id for entry in entries}

    def test_an_older_job_that_is_read_later_is_superseded(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        world.producer().add(S.stream, [job("1", supersede_key="c7"), job("2", supersede_key="c7")])
        one.begin_read(S, 1, 0)
        (older,), (newer,) = one.finish_read(S), read(two)
        assert screen(two, [newer]) == RUNS
        assert screen(one, [older]).superseded == {older.id: newer.id}

    def test_type_tenant_and_key_must_be_the_same(self, world: World) -> None:
        store = reader(world)
        entries = given(
            world, store, job("1", supersede_key="k"), job("2", supersede_key="l"),
            job("3", tenant="t2", supersede_key="k"), job("4", type="b", supersede_key="k"),
        )  # fmt: skip
        assert screen(store, entries) == RUNS

    def test_a_retry_of_an_older_job_is_superseded(self, world: World) -> None:
        store = reader(world)
        (older,) = given(world, store, job("1", supersede_key="c7"))
        assert screen(store, [older]) == RUNS
        data = with_retry(older.data or b"", 1, 0, first_id=older.id.decode())
        settle(store, [Settlement(S, retries=[Retry(older.id, 0.0, data)])])
        (newer,) = given(world, store, job("2", supersede_key="c7"))
        assert screen(store, [newer]) == RUNS
        settle(store, [Settlement(S, [newer.id])])
        world.reaper().promote(S.stream, 10)
        (again,) = read(store)
        assert screen(store, [again]).superseded == {again.id: newer.id}

    def test_a_delayed_job_is_replaced_at_once(self, world: World) -> None:
        store = reader(world)
        (older,) = given(world, store, job("1", supersede_key="c7"))
        delay(store, older, now_s(older) + 600)
        (newer,) = given(world, store, job("2", supersede_key="c7"))
        delay(store, newer, now_s(newer) + 700)
        assert world.reaper().promote(S.stream, 10).moved == 1
        (dropped,) = read(store)
        assert screen(store, [dropped]).superseded == {dropped.id: newer.id}
        assert names([Entry(b"", data) for data in world.waiting(S.stream)]) == ["2"]

    def test_jobs_of_a_series_run_one_at_a_time(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        (older,) = given(world, one, job("1", supersede_key="c7"))
        screen(one, [older])
        sort(one, [older])
        assert names(take(one)) == ["1"]
        (newer,) = given(world, two, job("2", supersede_key="c7"))
        screen(two, [newer])
        sort(two, [newer])
        assert take(one) == take(two) == []
        settle(one, [Settlement(S, [older.id])])
        assert names(take(two)) == ["2"]
        settle(two, [Settlement(S, dropped=[newer.id])])
        assert world.reaper().depths(S).pending == 0

    def test_replaced_jobs_leave_their_lane_while_the_series_runs(self, world: World) -> None:
        store = reader(world)
        (running_job,) = given(world, store, job("1", supersede_key="c7"))
        screen(store, [running_job])
        sort(store, [running_job])
        take(store)
        for id in ("2", "3", "4"):
            (entry,) = given(world, store, job(id, supersede_key="c7"))
            assert screen(store, [entry]) == RUNS
            sort(store, [entry])
        replaced = take(store)
        assert names(replaced) == ["2", "3"]
        assert screen(store, replaced).superseded.keys() == {entry.id for entry in replaced}
        settle(store, [Settlement(S, dropped=[entry.id for entry in replaced])])
        assert take(store) == []
        settle(store, [Settlement(S, [running_job.id])])
        assert names(take(store)) == ["4"]

    def test_jobs_without_the_key_run_beside_a_series(self, world: World) -> None:
        store = reader(world)
        entries = given(world, store, job("1", supersede_key="c7"), job("2"), job("3"))
        screen(store, entries[:1])
        sort(store, entries)
        assert store.backlog(S).in_series == 1
        assert store.backlog(S).waiting == {"a": 2}
        assert sorted(names(take(store))) == ["1", "2", "3"]
        assert store.backlog(S).in_series == 0


def test_on_a_cluster_all_keys_are_in_the_slot_of_their_stream(tmp_path: Path) -> None:
    with cluster(tmp_path, masters=1) as nodes:
        (server,) = nodes.servers
        url = nodes.url()
        store, producer = RedisReaderStore(url, "a"), RedisProducerStore(url)
        store.acquire([S])
        metadata: dict[str, Any] = {"idempotency_key": "k", "supersede_key": "c7"}
        producer.add(S.stream, [job("1", **metadata), job("2", supersede_key="c7")])
        first, second = read(store)
        assert claim(store, first) == {}
        assert screen(store, [first, second]).superseded == {first.id: second.id}
        assert delay(store, second, now_s(second) + 60).delayed == {second.id}
        keys = server.client.keys("ready:{stream:test}/*/*")
        assert len(keys) == 2  # bucket, newest of the series
        store.close()
        producer.close()
