"""The job store on real servers that fail, restart, refuse or fall silent."""

import logging
import os
import select
import signal
import socket
import time

import pytest

from jobworker.worker import keys
from jobworker.worker.errors import (
    AnswerTooLarge,
    StoreRefused,
    StoreUnavailable,
)
from jobworker.worker.store.ports import Dead, Retry, Settlement
from jobworker.worker.store.redis import blocking_read
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_store_steps import SOON_S, S, given, read, retry_until_available
from support.job_worlds import RedisWorld, settle
from support.redis_servers import free_port

#: Calls with a timeout of 0.2 s have ended by then; those without one never end.
LATE_S = 20.0
LAST_ID = "18446744073709551615-18446744073709551615"


class TestRefusals:
    def test_a_full_dead_letter_stream_is_named_and_its_repair_works(self, redis_world: RedisWorld) -> None:
        store, (a, b) = given(redis_world, b"1", b"2")
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
        given(redis_world, b"1")
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
            "shards:stream:test",
            "batches:stream:test/due",
            "batches:stream:test/jobs",
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
        store, (a,) = given(redis_world, b"1")
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


class TestFailures:
    def test_scripts_forgotten_by_the_server_are_loaded_again(self, redis_world: RedisWorld) -> None:
        store, ids = given(redis_world, b"1")
        redis_world.server.client.script_flush()
        assert settle(store, [Settlement(S, ids)]) == set()

    def test_a_stream_deleted_under_a_blocked_read_is_recreated_and_logged(
        self, redis_world: RedisWorld, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, _ = given(redis_world, b"1")
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
        store, (a, b) = given(redis_world, b"1", b"2")
        store.set_deaths(S, {a: 1, b: 2})
        client = redis_world.server.client
        client.xgroup_destroy(S.stream, S.group)
        assert store.renew(S, [a]) == {a}
        assert client.hgetall(keys.deaths_key(S.stream)) == {a: b"1", b: b"2"}
        client.delete(S.stream)
        assert store.renew(S, [a]) == {a}
        assert not client.exists(keys.deaths_key(S.stream))

    def test_the_reader_survives_a_flushed_server(self, redis_world: RedisWorld) -> None:
        store, ids = given(redis_world, b"1")
        redis_world.server.client.flushall()
        assert settle(store, [Settlement(S, ids)]) == set(ids)
        redis_world.producer().add(S.stream, [b"2"])
        (entry,) = read(store)
        assert settle(store, [Settlement(S, [entry.id])]) == set()

    def test_a_claim_of_keys_whose_reply_is_lost_may_be_repeated(self, redis_world: RedisWorld) -> None:
        store, (a, b) = given(redis_world, b"1", b"2")
        store.begin_claim(S, [(a, "key")], 60.0)
        store.backlog(S)  # its reply comes behind that to the claim
        redis_world.server.client.client_kill_filter(_type="normal", skipme=True)
        assert store.finish_claim(S) == {}, "the reply came before"
        store.begin_claim(S, [(a, "key"), (b, "key")], 60.0)
        for connection in store._connections.values():
            connection.close()  # as after another call that failed
        with pytest.raises(StoreUnavailable):
            store.finish_claim(S)
        assert store.finish_claim(S) == {}, "nothing is under way"
        assert store.claim_keys(S, [(a, "key"), (b, "key")], 60.0) == {b: a}

    def test_killed_connections_are_replaced(self, redis_world: RedisWorld) -> None:
        store, ids = given(redis_world, b"1")
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

    def test_a_claim_stops_at_its_bytes_and_continues_behind_them(self, redis_world: RedisWorld) -> None:
        jobs = [b"x" * 3_000_000] * 12 + [b"y"] * 30
        _, ids = given(redis_world, *jobs[:4], consumer="a")
        redis_world.producer().add(S.stream, jobs[4:])
        dead = redis_world.reader("a2")
        dead.acquire([S])
        ids += [entry.id for count in (4, 4, 30) for entry in read(dead, count)]
        store = redis_world.reader("b")
        store.acquire([S])
        cursor, pages = b"0-0", []
        while not pages or cursor != b"0-0":
            cursor, entries = store.claim(S, 0, 1000, cursor)
            pages.append(entries)
        assert [entry.id for page in pages for entry in page] == ids
        assert {entry.deliveries for page in pages for entry in page} == {2}
        assert max(sum(len(entry.data or b"") for entry in page) for page in pages) <= 24_000_000

    def test_a_claim_passes_over_many_entries_that_are_not_idle(self, redis_world: RedisWorld) -> None:
        fresh, ids = given(redis_world, *[b"%d" % number for number in range(3000)], consumer="a")
        fresh.own_pending(S, b"0-0", 10)
        more = [entry.id for count in [100] * 29 for entry in read(fresh, count)]
        (last,) = (ids + more)[-1:]
        fresh.release(S, [last])
        store = redis_world.reader("b")
        store.acquire([S])
        _, entries = store.claim(S, 3_600_000, 1000, b"0-0")
        assert [entry.id for entry in entries] == [last], "in one call"

    def test_settlements_survive_a_killed_server(self, redis_world: RedisWorld) -> None:
        store, (a, b, c, d) = given(redis_world, b"1", b"2", b"3", b"4")
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
        store, (a, b) = given(redis_world, b"1", b"2")
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
        store, ids = given(redis_world, b"1")
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
        store, (a, b, c) = given(redis_world, b"1", b"2", b"3")
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
                assert time.monotonic() - began < LATE_S

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
        assert time.monotonic() - began < LATE_S
        assert not store.is_reading(S)
        retry_until_available(lambda: read(store))
        store.close()

    def test_a_refused_connection_is_unavailable(self) -> None:
        with pytest.raises(StoreUnavailable, match="refused"):
            RedisReaderStore(f"redis://127.0.0.1:{free_port()}/0", "a").acquire([S])
