"""The move of entries into shards and the shares of readers, on every job store."""

import time
from collections.abc import Sequence

import pytest

from jobworker.worker.keys import Source
from jobworker.worker.shards import shard_names
from jobworker.worker.store.batches import Added
from jobworker.worker.store.forwarding import ForwardEntry, Forwarding, ForwardStore
from jobworker.worker.store.ports import CancelReply, CancelRequest, Settlement
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_store_steps import S, read, readable
from support.job_worlds import World
from support.redis_servers import RedisServer

SHARD = Source(shard_names(S.stream, 2)[0], S.group)
OTHER_SHARD = Source(shard_names(S.stream, 2)[1], S.group)
LEASE_S = 0.2


def take(store: ForwardStore, by: str = "one", shards: int = 2, count: int = 100) -> Forwarding:
    part = store.forward_take(S, by, LEASE_S, shards, count)
    assert part is not None
    return part


def values(part: Forwarding) -> Sequence[bytes]:
    return [entry.value for entry in part.entries]


def finish(store: ForwardStore, part: Forwarding) -> None:
    store.forward_add(SHARD.stream, S.stream, part.entries)
    store.forward_done(S.stream, [entry.id for entry in part.entries])


def contents(world: World, source: Source = SHARD) -> list[bytes | None]:
    reader = world.reader("look")
    reader.acquire([source])
    return [entry.data for entry in read(reader, source=source)]


def test_each_step_may_be_repeated_and_comes_late(any_world: World) -> None:
    reader, store = any_world.reader("a"), any_world.reaper()
    reader.acquire([S])
    any_world.producer().add(S.stream, [b"1", b"2", b"3"])
    late = take(store, count=2)
    assert values(late) == [b"1", b"2"]
    assert values(take(store)) == [b"1", b"2"], "until they are moved"
    store.forward_add(SHARD.stream, S.stream, late.entries[:1])
    finish(store, late)
    rest = take(store)
    assert values(rest) == [b"3"]
    finish(store, rest)
    finish(store, late)
    assert values(take(store)) == []
    assert contents(any_world) == [b"1", b"2", b"3"]
    assert store.depths(S)[:3] == (0, 0, 0)


def test_entries_of_a_promoted_replica_with_a_slow_clock_are_moved_and_no_others(any_world: World) -> None:
    store = any_world.reaper()

    def add(*entries: tuple[int, bytes]) -> None:
        parts = [ForwardEntry(b"%d-0" % ms, b"data", value) for ms, value in entries]
        store.forward_add(SHARD.stream, S.stream, parts)

    add((1000, b"old"), (2000, b"replicated"), (3000, b"not replicated"), (3500, b"nor this"))
    slow = [(2000, b"replicated"), (2001, b"new"), (3000, b"same id"), (3001, b"later")]
    for _ in range(2):
        add(*slow)
    add((500, b"older than all"), (1000, b"old"), (4000, b"in time"))
    assert contents(any_world) == [
        b"old", b"replicated", b"not replicated", b"nor this", b"new", b"same id", b"later", b"in time",
    ]  # fmt: skip


def test_an_entry_goes_to_the_move_or_to_a_reader_and_trimming_keeps_those_in_between(
    any_world: World,
) -> None:
    reader, store = any_world.reader("a"), any_world.reaper()
    reader.acquire([S])
    any_world.producer().add(S.stream, [b"1", b"2", b"3"])
    taken = take(store, count=1)
    assert [entry.data for entry in read(reader, 1)] == [b"2"]
    assert store.trim(S.stream) == 0
    assert values(take(store)) == values(taken) == [b"1"]
    finish(store, taken)
    assert values(take(store)) == [b"3"]


def test_another_number_of_shards_counts_for_entries_that_are_not_taken_yet(any_world: World) -> None:
    reader, store = any_world.reader("a"), any_world.reaper()
    reader.acquire([S])
    any_world.producer().add(S.stream, [b"1", b"2"])
    before = take(store, count=1)
    assert take(store, shards=3) == before
    finish(store, before)
    after = take(store, shards=3)
    assert (after.shards, values(after)) == (3, [b"2"])
    assert store.used_shards(S.stream) == {2, 3}
    store.forget_shards(S.stream, 2)
    assert store.used_shards(S.stream) == {3}


def test_an_entry_that_is_moved_is_neither_cancelled_nor_ended(any_world: World) -> None:
    reader, store, producer = any_world.reader("a"), any_world.reaper(), any_world.producer()
    reader.acquire([S])
    producer.add(S.stream, [b"{}", b"{}"])
    part = take(store, count=1)
    (id,) = (entry.id for entry in part.entries)
    request = CancelRequest(id, b"{}", b"letter")
    assert producer.cancel(S.stream, [request], result_ttl_s=1.0) == [CancelReply.MOVING]
    finish(store, part)
    assert producer.cancel(S.stream, [request], result_ttl_s=1.0) == [CancelReply.GONE]
    assert any_world.dead_letters(S.stream) == []


def test_a_shard_counts_the_jobs_of_a_batch_once_it_knows_the_home(any_world: World) -> None:
    store, shard = any_world.reader("a"), any_world.reaper()
    store.acquire([SHARD])
    assert shard.batch_open(S.stream, "b", {"name": b"n"})
    assert shard.batch_add(SHARD.stream, "b", S.stream, []) is Added.YES
    shard.forward_add(SHARD.stream, S.stream, [ForwardEntry(b"1-0", b"data", b"{}")])
    (entry,) = read(store, source=SHARD)
    assert store.register_batches(SHARD, {entry.id: "b"}) == set()
    store.settle([Settlement(SHARD, done=[entry.id])])
    counted = shard.batch_hash(SHARD.stream, "b")
    assert counted is not None
    assert (counted.home, counted.done) == (S.stream, 1)


class TestServers:
    """What the store in memory does not do."""

    @pytest.fixture(autouse=True)
    def _flush(self, redis_server: RedisServer) -> None:
        redis_server.client.flushall()

    def test_the_move_is_leased_and_follows_the_group(self, redis_server: RedisServer) -> None:
        store = RedisReaperStore(redis_server.url)
        assert store.forward_take(S, "one", LEASE_S, 2, 10) is None, "no reader has created the group"
        RedisReaderStore(redis_server.url, "a").acquire([S])
        take(store)
        assert store.forward_take(S, "two", LEASE_S, 2, 10) is None
        time.sleep(LEASE_S)  # the server's clock decides
        take(store, by="two")
        for _ in range(2500):
            redis_server.client.xadd(S.stream, {"other": "x" * 100, "data": "d"})
        redis_server.client.xadd(S.stream, {"other": "x"})
        moved = 0
        operator = OperatorStore(redis_server.url)
        while (part := take(store, by="two", count=1000)).entries:
            assert operator.is_moving(S.stream, part.entries[0].id)
            finish(store, part)
            assert not operator.is_moving(S.stream, part.entries[0].id)
            moved += len(part.entries)
        assert moved == 2501
        assert redis_server.client.xlen(S.stream) == 0
        assert [fields for _, fields in redis_server.client.xrevrange(SHARD.stream, count=2)] == [
            {b"other": b"x"}, {b"data": b"d"},
        ]  # fmt: skip
        (group,) = redis_server.client.xinfo_groups(S.stream)
        assert (group["pending"], group["lag"]) == (0, 0)

    def test_a_watch_ends_with_the_next_entry(self, redis_server: RedisServer) -> None:
        store = RedisReaperStore(redis_server.url)
        RedisReaderStore(redis_server.url, "a").acquire([S])
        fd = store.begin_watch(S.stream, take(store).taken)
        assert fd is not None
        assert not readable(fd, 0.05)
        redis_server.client.xadd(S.stream, {"data": "d"})
        assert readable(fd, 5.0)
        store.end_watch(S.stream)
        store.close()

    def test_readers_share_the_shards_evenly_as_they_come_and_go(self, redis_server: RedisServer) -> None:
        readers = [RedisReaderStore(redis_server.url, name) for name in "abc"]

        def settle(count: int, *some: RedisReaderStore) -> list[int]:
            for _ in range(3):
                shares = [one.share_shards(S.stream, 60.0, count) for one in some]
            assert sorted(number for share in shares for number in share) == list(range(min(count, count)))
            return sorted(map(len, shares))

        a, b, c = readers
        assert settle(4, a) == [4]
        assert settle(4, a, b) == [2, 2]
        assert settle(4, a, b, c) == [1, 1, 2]
        assert settle(2, a, b, c) == [0, 1, 1], "another number is shared by itself"
        assert a.share_shards(S.stream, 0.0, 4) == set()
        assert settle(4, b, c) == [2, 2]
        assert b.share_shards(S.stream, 0.01, 4)
        time.sleep(0.02)  # the server's clock decides
        assert settle(4, c) == [4]
