"""The job store on real servers: damaged keys, and the format that other programs see."""

import json

import pytest

from jobworker.worker import keys
from jobworker.worker.errors import (
    Fenced,
    NameHeld,
    StoreUnavailable,
)
from jobworker.worker.keys import Holder
from jobworker.worker.store.ports import Dead, Retry, Settlement
from support.job_store_steps import S, given, read
from support.job_worlds import RedisWorld, settle

FENCE, DEATHS = "fence:stream:test", "deaths:stream:test"
#: Two starts of services whose lease is long.
STARTED, STARTED_LATER = Holder("t1", "pid 1", 60.0), Holder("t2", "pid 2", 60.0)


class TestName:
    def test_a_name_without_a_record_by_an_older_version_can_be_acquired(
        self, redis_world: RedisWorld
    ) -> None:
        redis_world.server.client.hset(FENCE, "a", 5)
        store = redis_world.reader("a", STARTED)
        store.acquire([S])
        store.renew_name([S])

    def test_an_older_version_of_the_service_can_acquire_the_name(self, redis_world: RedisWorld) -> None:
        store, other = redis_world.reader("a", STARTED), redis_world.reader("a", STARTED_LATER)
        store.acquire([S])
        client = redis_world.server.client
        client.hset(FENCE, "a", int(client.hget(FENCE, "a")) + 1)
        with pytest.raises(Fenced):
            store.renew_name([S])
        other.acquire([S])

    def test_the_last_holder_acquires_the_name_again_after_an_older_snapshot(
        self, redis_world: RedisWorld
    ) -> None:
        client = redis_world.server.client
        redis_world.reader("a", STARTED).acquire([S])
        snapshot = client.dump(FENCE)
        last = redis_world.reader("a", Holder("t3", "pid 3", 60.0, ("t1",)))
        last.acquire([S])
        client.restore(FENCE, 0, snapshot, replace=True)
        with pytest.raises(StoreUnavailable, match="OUTDATED"):
            last.renew_name([S])
        last.acquire([S])
        last.renew_name([S])
        with pytest.raises(NameHeld, match="pid 3"):
            redis_world.reader("a", STARTED_LATER).acquire([S])

    @pytest.mark.parametrize("record", [b"", b"nonsense", b"[1]", b'{"epoch": 1}'])
    def test_a_damaged_record_blocks_no_service(self, redis_world: RedisWorld, record: bytes) -> None:
        redis_world.reader("a", STARTED).acquire([S])
        redis_world.server.client.hset(FENCE, "/holder/a", record)
        redis_world.reader("a", STARTED_LATER).acquire([S])

    def test_a_record_from_the_future_does_not_count(self, redis_world: RedisWorld) -> None:
        """The server's clock was set back."""
        redis_world.reader("a", STARTED).acquire([S])
        client = redis_world.server.client
        record = json.loads(client.hget(FENCE, "/holder/a"))
        record["renewed"] = str(int(record["renewed"]) + 3_600_000)
        client.hset(FENCE, "/holder/a", json.dumps(record))
        redis_world.reader("a", STARTED_LATER).acquire([S])

    @pytest.mark.parametrize(
        "about",
        # A lease of 5 ms would still hold if the test is quick.
        [b"-5", b"null", b"[1]", b'{"a": 1}', b"true"],
        ids=["number", "null", "list", "object", "bool"],
    )
    def test_a_record_with_fields_of_another_kind_blocks_no_service(
        self, redis_world: RedisWorld, about: bytes
    ) -> None:
        redis_world.reader("a", STARTED).acquire([S])
        client = redis_world.server.client
        record = client.hget(FENCE, "/holder/a")
        for field in ("about", "token", "renewed", "lease"):
            members = json.loads(record) | {field: json.loads(about)}
            client.hset(FENCE, "/holder/a", json.dumps(members))
            redis_world.reader("a", STARTED_LATER).acquire([S])
            client.hset(FENCE, "a", json.loads(record)["epoch"])

    def test_a_record_with_an_endless_lease_does_not_count(self, redis_world: RedisWorld) -> None:
        redis_world.reader("a", STARTED).acquire([S])
        client = redis_world.server.client
        record = json.loads(client.hget(FENCE, "/holder/a"))
        for lease in ("1e300", "inf", "nan", 10**15):
            client.hset(FENCE, "/holder/a", json.dumps(record | {"lease": lease}))
            redis_world.reader("a", STARTED_LATER).acquire([S])
            client.hset(FENCE, "a", record["epoch"])

    @pytest.mark.parametrize(
        "epoch", [b"abc", b"", b"nan", b"inf", b"-5", b"1e400", b"0x10", b"9" * 30, b" 5"]
    )
    def test_a_damaged_epoch_is_replaced_and_fences_older_readers(
        self, redis_world: RedisWorld, epoch: bytes
    ) -> None:
        store, ids = given(redis_world, b"1", b"2")
        client = redis_world.server.client
        client.hset(FENCE, "a", epoch)
        assert store.renew(S, ids) == set(), "the reader takes the name again"
        assert client.hget(FENCE, "a").isdigit()
        client.hset(FENCE, "a", epoch)
        successor = redis_world.reader("a")
        successor.acquire([S])
        with pytest.raises(Fenced):
            settle(store, [Settlement(S, ids)])
        assert settle(successor, [Settlement(S, ids)]) == set()


DAMAGED_COUNTS = [b"abc", b"", b"-3", b"1.5", b"1_0", b" 1", b"\xff", b"9" * 5000]


class TestDamagedDeaths:
    """Worker deaths that are no number: the job counts as innocent, the key is named, no reader ends."""

    @pytest.mark.parametrize("count", DAMAGED_COUNTS)
    def test_listing_pending_entries(
        self, redis_world: RedisWorld, count: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, ids = given(redis_world, b"1", b"2")
        redis_world.server.client.hset(DEATHS, ids[0], count)
        assert [entry.deaths for entry in store.own_pending(S, b"0-0", 10)] == [0, 0]
        (record,) = [one for one in caplog.records if one.message == "deaths.damaged"]
        assert (record.key, record.entry_id) == (DEATHS, ids[0].decode())  # type: ignore[attr-defined]

    @pytest.mark.parametrize("count", DAMAGED_COUNTS)
    def test_claiming_entries(self, redis_world: RedisWorld, count: bytes) -> None:
        _, ids = given(redis_world, b"1")
        redis_world.server.client.hset(DEATHS, ids[0], count)
        other = redis_world.reader("b")
        other.acquire([S])
        assert [entry.deaths for entry in other.claim(S, 0, 10, b"0-0")[1]] == [0]
        assert other.set_deaths(S, {ids[0]: 1}) == {ids[0]: 1}
        assert redis_world.server.client.hget(DEATHS, ids[0]) == b"1"


class TestDamagedFields:
    @pytest.mark.parametrize(
        "field", ["abc", "1", "-", "1-2-3", "9" * 30 + "-0", "18446744073709551616-0", "1-\xff"]
    )
    def test_fields_that_are_no_ids_do_not_hinder_a_deleted_stream(
        self, redis_world: RedisWorld, field: str
    ) -> None:
        store, ids = given(redis_world, b"1")
        client = redis_world.server.client
        client.hset(DEATHS, mapping={field: 1, ids[0].decode(): 1})
        client.delete(S.stream)
        assert read(store) == []
        assert not client.exists(DEATHS), "counts of entries that are gone are deleted"
        world_jobs = redis_world.producer().add(S.stream, [b"2"])
        assert (world_jobs, [entry.data for entry in read(store)]) == (1, [b"2"])


class TestFormat:
    def test_keys_are_those_of_the_contract(self, redis_world: RedisWorld) -> None:
        store, (a, b) = given(redis_world, b"1", b"2")
        settle(store, [Settlement(S, [], [Retry(a, 2.5, b"again")], [Dead(b, b"dead")])])
        client = redis_world.server.client
        (member, due), = client.zrange("retry:stream:test", 0, -1, withscores=True)  # fmt: skip
        now, us = client.time()
        assert member == b"again"
        assert due == pytest.approx(now + us / 1e6 + 2.5, abs=1)
        assert due % 1 != 0
        assert client.xrange("dlq:stream:test")[0][1] == {b"data": b"dead"}

    def test_settlement_removes_the_death_counts(self, redis_world: RedisWorld) -> None:
        store, (a, b) = given(redis_world, b"1", b"2")
        store.set_deaths(S, {a: 1, b: 1})
        settle(store, [Settlement(S, [a], [Retry(b, 0, b"r")])])
        assert not redis_world.server.client.exists(keys.deaths_key(S.stream))

    def test_two_equal_jobs_differ_in_blanks_only(self, redis_world: RedisWorld) -> None:
        store, (a, b) = given(redis_world, b"1", b"2")
        settle(store, [Settlement(S, [], [Retry(a, 0, b'{"x":1}'), Retry(b, 0, b'{"x":1}')])])
        one, other = redis_world.waiting(S.stream)
        assert one != other
        assert one.strip(b" \t") == other.strip(b" \t") == b'{"x":1}'

    def test_an_empty_read_costs_the_server_one_command(self, redis_world: RedisWorld) -> None:
        store, _ = given(redis_world, b"1")
        client = redis_world.server.client
        client.config_resetstat()
        read(store)
        calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
        assert calls.pop("cmdstat_xreadgroup") == 1
        assert set(calls) <= {"cmdstat_config|resetstat", "cmdstat_info"}


class TestAnnouncementsThatOthersWrote:
    def test_invalid_records_are_ignored_and_outdated_ones_deleted(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        valid = '{"types":["gone"],"streams":{},"renewed":1}'
        client.hset("jobworker:services", mapping={
            "no-json": "abc", "list": "[]", "kinds": valid.replace('"gone"', "1"), "old": valid,
            "nan": valid.replace(":1}", ":NaN}"), "deep": "[" * 10_000, b"\xff": b"\xff",
            "long": valid.replace("gone", "x" * 600_000).replace(":1}", ":1e12}"),
        })  # fmt: skip
        redis_world.reaper().announce("me", ["shout"], [])
        assert [one.service for one in redis_world.producer().announcements()] == ["me"]
        assert client.hexists("jobworker:services", "old") == 0

    def test_a_key_of_another_type_or_a_forbidden_one_stops_nothing(
        self, redis_world: RedisWorld, caplog: pytest.LogCaptureFixture
    ) -> None:
        redis_world.server.client.set("jobworker:services", "text")
        reaper = redis_world.reaper()
        for _ in range(2):
            reaper.announce("me", ["shout"], [])
        assert redis_world.producer().announcements() == []
        assert [record.msg for record in caplog.records] == ["service.not_announced"]
