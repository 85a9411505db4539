"""The job store on real servers: their errors, restarts, URLs, and the keys as other programs see them."""

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from jobworker.worker import keys
from jobworker.worker.errors import (
    AnswerTooLarge,
    ConfigurationError,
    Fenced,
    NameHeld,
    StoreRefused,
    StoreUnavailable,
)
from jobworker.worker.keys import Holder, Source, base_stream
from jobworker.worker.settings import without_credentials
from jobworker.worker.store.ports import Dead, Entry, Retry, Settlement
from jobworker.worker.store.redis import blocking_read
from jobworker.worker.store.redis.connect import require_version
from jobworker.worker.store.redis.key_scan import find_streams
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_worlds import RedisWorld, settle
from support.redis_servers import RedisServer, free_port, require

S = Source("stream:test", "cg-test")
SOON_S = 5.0
FENCE, DEATHS = "fence:stream:test", "deaths:stream:test"
#: Two starts of services whose lease is long.
STARTED, STARTED_LATER = Holder("t1", "pid 1", 60.0), Holder("t2", "pid 2", 60.0)


def read(store: RedisReaderStore, count: int = 100) -> list[Entry]:
    store.begin_read(S, count, 0)
    return store.finish_read(S)


def reader_with(world: RedisWorld, *jobs: bytes) -> tuple[RedisReaderStore, list[bytes]]:
    store = world.reader("a")
    store.acquire([S])
    world.producer().add(S.stream, jobs)
    return store, [entry.id for entry in read(store)]


def retry_until_available(act: Callable[[], object]) -> None:
    """Repeat `act` while the store is unavailable, as a caller would."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            act()
            return
        except StoreUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # the caller's backoff


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
        [b"5", b"null", b"[1]", b'{"a": 1}', b"true"],
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
        store, ids = reader_with(redis_world, b"1", b"2")
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
        store, ids = reader_with(redis_world, b"1", b"2")
        redis_world.server.client.hset(DEATHS, ids[0], count)
        assert [entry.deaths for entry in store.own_pending(S, b"0-0", 10)] == [0, 0]
        (record,) = [one for one in caplog.records if one.message == "deaths.damaged"]
        assert (record.key, record.entry_id) == (DEATHS, ids[0].decode())  # type: ignore[attr-defined]

    @pytest.mark.parametrize("count", DAMAGED_COUNTS)
    def test_claiming_entries(self, redis_world: RedisWorld, count: bytes) -> None:
        _, ids = reader_with(redis_world, b"1")
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
        store, ids = reader_with(redis_world, b"1")
        client = redis_world.server.client
        client.hset(DEATHS, mapping={field: 1, ids[0].decode(): 1})
        client.delete(S.stream)
        assert read(store) == []
        assert not client.exists(DEATHS), "counts of entries that are gone are deleted"
        world_jobs = redis_world.producer().add(S.stream, [b"2"])
        assert (world_jobs, [entry.data for entry in read(store)]) == (1, [b"2"])


LAST_ID = "18446744073709551615-18446744073709551615"


class TestRefusals:
    def test_a_full_dead_letter_stream_is_named_and_its_repair_works(self, redis_world: RedisWorld) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        client = redis_world.server.client
        client.xadd("dlq:stream:test", {"data": "old"}, id=LAST_ID)
        (settled,) = store.settle([Settlement(S, [a], [], [Dead(b, b"dead")])])
        assert settled.unsettled == {b}
        ((key, _, repair, blocks),) = store.key_faults(S)
        assert (key, blocks) == ("dlq:stream:test", True)
        client.execute_command(*repair.split())
        assert settle(store, [Settlement(S, dead=[Dead(b, b"dead")])]) == set()

    def test_a_full_stream_is_still_read_but_takes_no_retry(self, redis_world: RedisWorld) -> None:
        store = redis_world.reader("a")
        store.acquire([S])
        redis_world.server.client.xadd(S.stream, {"data": "last"}, id=LAST_ID)
        (entry,) = read(store)
        assert settle(store, [Settlement(S, retries=[Retry(entry.id, 0, b"again")])]) == set()
        reaper = redis_world.reaper()
        with pytest.raises(StoreRefused, match="last possible ID"):
            reaper.promote(S.stream, 10)
        assert redis_world.waiting(S.stream) == [b"again"]
        ((key, _, repair, blocks),) = reaper.key_faults(S)
        assert (key, blocks) == (S.stream, False)
        client = redis_world.server.client
        client.execute_command(*repair.partition(": ")[2].split())
        store.begin_read(S, 10, 0)
        assert store.finish_read(S) == [], "the group is created again"
        assert reaper.promote(S.stream, 10).moved == 1
        assert [entry.data for entry in read(store)] == [b"again"]

    def test_a_forbidden_key_is_named(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        reader_with(redis_world, b"1")
        client.acl_setuser(
            "limited", enabled=True, nopass=True, commands=["+@all"], keys=["stream:*", "fence:*"]
        )
        url = redis_world.server.url.replace("//", "//limited:x@")
        store = RedisReaderStore(url, "a")
        store.acquire([S])
        with pytest.raises(StoreRefused):
            store.own_pending(S, b"0-0", 10)
        assert {fault.key for fault in store.key_faults(S)} == {
            "deaths:stream:test",
            "retry:stream:test",
            "dlq:stream:test",
            "ready:stream:test",
        }
        assert "ACL SETUSER <user> ~deaths:stream:test" in {fault.repair for fault in store.key_faults(S)}
        store.close()
        client.acl_setuser("limited", enabled=True, nopass=True, commands=["+@all", "-type"], keys=["*"])
        store = RedisReaderStore(url, "a")
        assert store.key_faults(S) == [], "unknown is no fault"
        store.close()
        client.acl_deluser("limited")

    def test_a_server_that_is_full_or_read_only_is_no_fault_of_a_stream(
        self, redis_world: RedisWorld
    ) -> None:
        store, (a,) = reader_with(redis_world, b"1")
        client = redis_world.server.client
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreUnavailable) as full:
                store.settle([Settlement(S, retries=[Retry(a, 0, b"x")])])
        finally:
            client.config_set("maxmemory", 0)
        assert not isinstance(full.value, StoreRefused)
        client.replicaof("127.0.0.1", free_port())
        try:
            with pytest.raises(StoreUnavailable) as replica:
                store.renew(S, [a])
        finally:
            client.replicaof("NO", "ONE")
        assert not isinstance(replica.value, StoreRefused)


class TestFormat:
    def test_keys_are_those_of_the_contract(self, redis_world: RedisWorld) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        settle(store, [Settlement(S, [], [Retry(a, 2.5, b"again")], [Dead(b, b"dead")])])
        client = redis_world.server.client
        (member, due), = client.zrange("retry:stream:test", 0, -1, withscores=True)  # fmt: skip
        now, us = client.time()
        assert member == b"again"
        assert due == pytest.approx(now + us / 1e6 + 2.5, abs=1)
        assert due % 1 != 0
        assert client.xrange("dlq:stream:test")[0][1] == {b"data": b"dead"}

    def test_settlement_removes_the_death_counts(self, redis_world: RedisWorld) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        store.set_deaths(S, {a: 1, b: 1})
        settle(store, [Settlement(S, [a], [Retry(b, 0, b"r")])])
        assert not redis_world.server.client.exists(keys.deaths_key(S.stream))

    def test_two_equal_jobs_differ_in_blanks_only(self, redis_world: RedisWorld) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        settle(store, [Settlement(S, [], [Retry(a, 0, b'{"x":1}'), Retry(b, 0, b'{"x":1}')])])
        one, other = redis_world.waiting(S.stream)
        assert one != other
        assert one.strip(b" \t") == other.strip(b" \t") == b'{"x":1}'

    def test_an_empty_read_costs_the_server_one_command(self, redis_world: RedisWorld) -> None:
        store, _ = reader_with(redis_world, b"1")
        client = redis_world.server.client
        client.config_resetstat()
        read(store)
        calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
        assert calls.pop("cmdstat_xreadgroup") == 1
        assert set(calls) <= {"cmdstat_config|resetstat", "cmdstat_info"}


class TestFailures:
    def test_scripts_forgotten_by_the_server_are_loaded_again(self, redis_world: RedisWorld) -> None:
        store, ids = reader_with(redis_world, b"1")
        redis_world.server.client.script_flush()
        assert settle(store, [Settlement(S, ids)]) == set()

    def test_a_stream_deleted_under_a_blocked_read_is_recreated_and_logged(
        self, redis_world: RedisWorld, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, _ = reader_with(redis_world, b"1")
        fd = store.begin_read(S, 10, 60_000)
        redis_world.server.client.delete(S.stream)
        redis_world.producer().add(S.stream, [b"2"])
        assert select.select([fd], [], [], SOON_S)[0]
        with caplog.at_level(logging.ERROR):
            assert store.finish_read(S) == []
        assert "group.recreated" in caplog.text
        assert [entry.data for entry in read(store)] == [b"2"]

    def test_deaths_go_with_a_deleted_stream_and_stay_with_a_deleted_group(
        self, redis_world: RedisWorld
    ) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        store.set_deaths(S, {a: 1, b: 2})
        client = redis_world.server.client
        client.xgroup_destroy(S.stream, S.group)
        assert store.renew(S, [a]) == {a}
        assert client.hgetall(keys.deaths_key(S.stream)) == {a: b"1", b: b"2"}
        client.delete(S.stream)
        assert store.renew(S, [a]) == {a}
        assert not client.exists(keys.deaths_key(S.stream))

    def test_the_reader_survives_a_flushed_server(self, redis_world: RedisWorld) -> None:
        store, ids = reader_with(redis_world, b"1")
        redis_world.server.client.flushall()
        assert settle(store, [Settlement(S, ids)]) == set(ids)
        redis_world.producer().add(S.stream, [b"2"])
        (entry,) = read(store)
        assert settle(store, [Settlement(S, [entry.id])]) == set()

    def test_killed_connections_are_replaced(self, redis_world: RedisWorld) -> None:
        store, ids = reader_with(redis_world, b"1")
        fd = store.begin_read(S, 10, 60_000)
        redis_world.server.client.client_kill_filter(_type="normal", skipme=True)
        assert select.select([fd], [], [], SOON_S)[0]
        with pytest.raises(StoreUnavailable):
            store.finish_read(S)
        assert not store.is_reading(S)
        assert settle(store, [Settlement(S, ids)]) == set()
        redis_world.producer().add(S.stream, [b"2"])
        assert [entry.data for entry in read(store)] == [b"2"]

    def test_an_answer_over_the_byte_budget_is_dropped_and_stays_pending(
        self, redis_world: RedisWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocking_read, "_ANSWER_BYTES", 200_000)
        store = redis_world.reader("a")
        store.acquire([S])
        jobs = [b"x" * 50_000] * 3 + [b"y" * 300_000] * 2
        redis_world.producer().add(S.stream, jobs)
        assert [entry.data for entry in read(store, 3)] == jobs[:3]
        with pytest.raises(AnswerTooLarge):
            read(store, 2)
        assert not store.is_reading(S)
        assert [entry.data for entry in store.own_pending(S, b"0-0", 10)] == jobs
        redis_world.producer().add(S.stream, jobs[3:])
        assert [entry.data for entry in read(store, 1)] == jobs[3:4], "one is taken however large it is"

    def test_entries_are_looked_up_in_few_commands_of_bounded_size(self, redis_world: RedisWorld) -> None:
        jobs = [b"%d" % number for number in range(2500)] + [b"x" * 5_000_000] * 3
        store = redis_world.reader("a")
        store.acquire([S])
        redis_world.producer().add(S.stream, jobs)
        ids = [entry.id for count in (2500, 1, 1, 1) for entry in read(store, count)]
        redis_world.server.client.xdel(S.stream, ids[1])
        nameless = redis_world.server.client.xadd(S.stream, {"other": "field"})
        store.fetch(S, ids[:1])  # the script is loaded
        redis_world.server.client.config_resetstat()
        expected: dict[bytes, bytes | None] = dict(zip(ids, jobs, strict=True)) | {nameless: None}
        del expected[ids[1]]
        assert store.fetch(S, [*ids, nameless, b"1-1"]) == expected
        stats = redis_world.server.client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 4, "1,000 entries or 8 MiB each"

    def test_settlements_survive_a_killed_server(self, redis_world: RedisWorld) -> None:
        store, (a, b, c, d) = reader_with(redis_world, b"1", b"2", b"3", b"4")
        store.set_deaths(S, {d: 2})
        settle(store, [Settlement(S, [a], [Retry(b, 60, b"b")], [Dead(c, b"c")])])
        redis_world.server.restart()
        retry_until_available(lambda: store.renew(S, [d]))
        assert [(e.id, e.data, e.deaths) for e in store.own_pending(S, b"0-0", 10)] == [(d, b"4", 2)]
        assert redis_world.waiting(S.stream) == [b"b"]
        assert redis_world.dead_letters(S.stream) == [b"c"]
        assert settle(store, [Settlement(S, [d])]) == set()

    def test_a_full_server_acknowledges_done_jobs_and_changes_nothing_else(
        self, redis_world: RedisWorld
    ) -> None:
        store, (a, b) = reader_with(redis_world, b"1", b"2")
        client = redis_world.server.client
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="OutOfMemory"):
                redis_world.producer().add(S.stream, [b"3"])
            with pytest.raises(StoreUnavailable, match="OutOfMemory"):
                settle(store, [Settlement(S, [], [Retry(b, 0, b"r")])])
            assert settle(store, [Settlement(S, [a])]) == set()
        finally:
            client.config_set("maxmemory", "0")
        assert [entry.id for entry in store.own_pending(S, b"0-0", 10)] == [b]

    def test_a_replica_refuses_until_it_is_promoted(self, redis_world: RedisWorld) -> None:
        store, ids = reader_with(redis_world, b"1")
        client = redis_world.server.client
        client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
        try:
            with pytest.raises(StoreUnavailable, match=r"(?i)read.?only"):
                settle(store, [Settlement(S, ids)])
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
        retry_until_available(lambda: settle(store, [Settlement(S, ids)]))
        assert store.own_pending(S, b"0-0", 10) == []

    def test_a_key_of_the_wrong_type_is_an_error_that_names_it(self, redis_world: RedisWorld) -> None:
        redis_world.server.client.set(S.stream, "a string")
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            redis_world.reader("a").acquire([S])

    def test_a_failing_settlement_leaves_each_job_settled_or_pending(self, redis_world: RedisWorld) -> None:
        store, (a, b, c) = reader_with(redis_world, b"1", b"2", b"3")
        dead_key = keys.dead_letter_key(S.stream)
        redis_world.server.client.set(dead_key, "a string")
        outcome = Settlement(S, [c], [Retry(a, 60, b"a")], [Dead(b, b"b")])
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            settle(store, [outcome])
        redis_world.server.client.delete(dead_key)
        assert settle(store, [outcome]) == {a, c}, "settled the first time"
        assert redis_world.waiting(S.stream) == [b"a"]
        assert redis_world.dead_letters(S.stream) == [b"b"]
        assert store.own_pending(S, b"0-0", 10) == []


class TestSilentServer:
    """A peer that accepts the connection and never answers, as behind a broken firewall."""

    def test_every_call_ends_in_time(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
            reader = RedisReaderStore(url, "a", timeout_s=0.2)
            for call in (
                lambda: reader.acquire([S]),
                lambda: RedisReaperStore(url, timeout_s=0.2).promote(S.stream, 1),
                lambda: RedisProducerStore(url, timeout_s=0.2).add(S.stream, [b"1"]),
            ):
                began = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    call()
                assert time.monotonic() - began < 2.0

    def test_a_read_of_a_stopped_server_ends_in_time(self, redis_world: RedisWorld) -> None:
        store = RedisReaderStore(redis_world.server.url, "a", timeout_s=0.2)
        store.acquire([S])
        store.begin_read(S, 10, 100)
        os.kill(redis_world.server.pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(StoreUnavailable):
                store.finish_read(S)
        finally:
            os.kill(redis_world.server.pid, signal.SIGCONT)
        assert time.monotonic() - began < 3.0
        assert not store.is_reading(S)
        retry_until_available(lambda: read(store))
        store.close()

    def test_a_refused_connection_is_unavailable(self) -> None:
        with pytest.raises(StoreUnavailable, match="refused"):
            RedisReaderStore(f"redis://127.0.0.1:{free_port()}/0", "a").acquire([S])


def run_one_job(url: str) -> None:
    """One job through every store, by a URL."""
    reader, reaper, producer = RedisReaderStore(url, "a"), RedisReaperStore(url), RedisProducerStore(url)
    try:
        reader.acquire([S])
        producer.add(S.stream, [b"1"])
        (entry,) = read(reader)
        assert settle(reader, [Settlement(S, [], [Retry(entry.id, 0, b"2")])]) == set()
        assert reaper.promote(S.stream, 10).moved == 1
        (again,) = read(reader)
        assert again.data == b"2"
        reader.set_deaths(S, {again.id: 1})
        assert settle(reader, [Settlement(S, [], [], [Dead(again.id, b"dead")])]) == set()
        assert reaper.depths(S)[:4] == (0, 0, 0, 1)
        assert reaper.trim(S.stream) == 2
    finally:
        for store in (reader, reaper, producer):
            store.close()


class TestUrls:
    def test_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "redis.sock"
        server = RedisServer(require("valkey"), tmp_path, options=["--unixsocket", str(path)]).start()
        try:
            run_one_job(f"unix://{path}?db=1")
        finally:
            server.stop()

    def test_tls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an answer over the budget, because the budget is counted on the encrypted connection too."""
        certificate, key, port = tmp_path / "cert.pem", tmp_path / "key.pem", free_port()
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl is not installed")
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
        options = ["--tls-port", str(port), "--tls-auth-clients", "no", *files]
        server = RedisServer(require("redis7"), tmp_path, options=options).start()
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        try:
            run_one_job(url)
            monkeypatch.setattr(blocking_read, "_ANSWER_BYTES", 100_000)
            store = RedisReaderStore(url, "b")
            store.acquire([S])
            RedisProducerStore(url).add(S.stream, [b"x" * 80_000] * 2)
            with pytest.raises(AnswerTooLarge):
                read(store, 2)
            assert len(store.own_pending(S, b"0-0", 10)) == 2
            store.close()
        finally:
            server.stop()

    def test_cluster_keeps_derived_keys_in_the_streams_slot(self, tmp_path: Path) -> None:
        # Its own bus port: the usual one is 10,000 higher, which no high port has room for.
        options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
        server = RedisServer(require("valkey"), tmp_path, options=options).start()
        try:
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            url = f"redis+cluster://127.0.0.1:{server.port}"
            retry_until_available(lambda: RedisProducerStore(url).add("stream:first", [b"1"]))
            run_one_job(url)
            assert server.client.xlen("dlq:{stream:test}") == 1
            store, two = RedisReaderStore(url, "a"), Source("stream:two", "cg")
            store.acquire([S, two])
            producer = RedisProducerStore(url)
            for source in (S, two):
                producer.add(source.stream, [b"x"])
                store.begin_read(source, 10, 0)
            ids = {source: [entry.id for entry in store.finish_read(source)] for source in (S, two)}
            assert settle(store, [Settlement(source, done) for source, done in ids.items()]) == set()
            producer.schedule("stream:delayed", b"{}", 60)
            operator = OperatorStore(url)
            found = operator.find_streams()
            assert found == (["stream:delayed", "stream:first", "stream:test", "stream:two"], True)
            for one in (operator, store, producer):
                one.close()
        finally:
            server.stop()

    def test_sentinel_leads_to_the_master(self, redis_world: RedisWorld, tmp_path: Path) -> None:
        config = tmp_path / "sentinel.conf"
        config.write_text(f"sentinel monitor mymaster 127.0.0.1 {redis_world.server.port} 1\n")
        sentinel = RedisServer(require("redis7"), tmp_path, options=[])
        sentinel.use_sentinel(config)
        sentinel.start()
        try:
            run_one_job(
                f"redis+sentinel://127.0.0.1:{sentinel.port}, 127.0.0.1:1/mymaster/0?pool_size=2&protocol=3"
            )
        finally:
            sentinel.stop()

    def test_password_and_a_wrong_one(self, tmp_path: Path) -> None:
        server = RedisServer(require("valkey"), tmp_path).start()
        try:
            server.client.config_set("requirepass", "s3cret/@%")
            at = f"127.0.0.1:{server.port}/0"
            run_one_job(f"redis://:s3cret%2F%40%25@{at}")
            with pytest.raises(StoreUnavailable) as caught:
                RedisReaderStore(f"redis://:guess@{at}", "a").acquire([S])
            assert "guess" not in str(caught.value)
            with pytest.raises(StoreUnavailable, match=r"(?i)auth"):
                RedisReaderStore(f"redis://{at}", "a").acquire([S])
        finally:
            server.stop()

    @pytest.mark.parametrize(
        "url",
        [
            "http://u:hunter2@h",
            "redis://u:hun/ter2@h:1",
            "redis+sentinel://:hunter2@h:26379",
            "redis+cluster://:hunter2@h:x",
            "nonsense",
        ],
    )
    def test_a_url_that_cannot_be_read_is_refused_without_its_password(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            RedisReaderStore(url, "a")
        assert "ter2" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost:6379/0", "redis://localhost:6379/0"),
            ("redis://user:pa@ss@localhost:6379/0", "redis://***@localhost:6379/0"),
            ("rediss://:pw@h:1/2?password=pw", "rediss://***@h:1/2"),
            ("redis://:p?w@h:1", "redis://***@h:1"),
            ("redis+sentinel://:pw@h:1,h2:2/mymaster/0", "redis+sentinel://***@h:1,h2:2/mymaster/0"),
            ("unix:///run/redis.sock?password=pw", "unix:///run/redis.sock"),
        ],
    )
    def test_a_url_is_shown_without_credentials_and_options(self, url: str, shown: str) -> None:
        assert without_credentials(url, "***@") == shown


class TestVersion:
    @pytest.mark.parametrize(
        "info",
        [
            b"redis_version:7.0.15\r\n",
            b"redis_version:8.2.0\r\n",
            b"redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.0.1\r\n",
        ],
    )
    def test_new_enough(self, info: bytes) -> None:
        require_version(b"# Server\r\n" + info)

    @pytest.mark.parametrize(
        "info", [b"redis_version:6.2.14\r\n", b"redis_version:7.2.4\r\nvalkey_version:7.2.5\r\n", b""]
    )
    def test_too_old(self, info: bytes) -> None:
        with pytest.raises(ConfigurationError, match="too old"):
            require_version(b"# Server\r\n" + info)

    def test_a_user_without_permission_for_info_is_accepted(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        client.acl_setuser("limited", enabled=True, passwords=["+pw"], keys="*", commands=["+@all", "-info"])
        try:
            store = RedisReaderStore(f"redis://limited:pw@127.0.0.1:{redis_world.server.port}/0", "a")
            store.acquire([S])
            client.acl_setuser("limited", commands=["-evalsha"])
            with pytest.raises(StoreUnavailable, match=r"(?i)permission"):
                store.renew(S, [b"1-1"])
            store.close()
        finally:
            client.acl_deluser("limited")


def test_the_store_opens_no_more_connections_than_it_needs(redis_world: RedisWorld) -> None:
    store, ids = reader_with(redis_world, b"1")
    settle(store, [Settlement(S, ids)])
    for _ in range(5):
        read(store)
    client: redis.Redis = redis_world.server.client
    assert len([c for c in client.client_list() if c["name"] == "jobworker"]) <= 3


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


class TestSearchForStreams:
    def test_streams_are_found_among_many_other_keys(self, redis_world: RedisWorld) -> None:
        client = redis_world.server.client
        client.mset({f"key-{number}": "text" for number in range(5000)})
        client.xadd("stream:typo", {"data": "{}"})
        client.zadd("retry:stream:delayed", {"{}": 1})
        client.zadd("retry", {"{}": 1})
        client.xadd("dlq:stream:gone", {"data": "{}"})
        operator = OperatorStore(redis_world.server.url)
        assert operator.find_streams() == (["stream:delayed", "stream:gone", "stream:typo"], True)
        operator.close()

    def test_a_user_who_may_not_scan_is_told(self, redis_world: RedisWorld) -> None:
        redis_world.server.client.acl_setuser(
            "narrow", enabled=True, passwords=["+pw"], commands=["+@all", "-scan"], keys=["*"]
        )
        operator = OperatorStore(redis_world.server.url.replace("//", "//narrow:pw@"))
        try:
            assert operator.find_streams() == ([], False)
        finally:
            operator.close()
            redis_world.server.client.acl_deluser("narrow")

    def test_the_search_is_bounded(self) -> None:
        calls = []

        def one(key: str, command: Any) -> Any:
            calls.append(command)
            return [b"7", [b"stream:%d" % len(calls)]]  # a cursor that never ends

        found = find_streams(lambda key: "one server", one, base_stream)
        assert (len(found.names), found.complete) == (200, False)
        assert len(calls) < 500
