"""Cron tables in every job store: publication, ticks that are taken once, pauses, damaged keys."""

import threading
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest

from jobworker.worker.cron.enqueuer import CronEnqueuer
from jobworker.worker.cron.table import CronTable, digest, encode_table
from jobworker.worker.errors import StoreRefused
from jobworker.worker.keys import Source, cron_key
from jobworker.worker.settings import Settings
from jobworker.worker.store.cron import CronStore, StoredTable, Taken, TickJob
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from support.doomed_store import DoomedStore, Killed
from support.job_worlds import RedisWorld, World
from support.service import SOON_S, eventually
from support.topologies import cluster

S = Source("stream:test", "cg-test")
NIGHTLY = CronTable("nightly", "0 3 * * *", "report", S.stream)
SECONDLY = CronTable("secondly", "@every 1s", "report", S.stream)


def publish(store: CronStore, service: str, *tables: CronTable) -> bool:
    stored = [StoredTable(table.name, table.rule, encode_table(table)) for table in tables]
    return store.cron_publish(S.stream, service, digest(tables), stored)


def names(store: CronStore) -> set[str]:
    return set(store.cron_hash(S.stream).tables)


class TestPublication:
    def test_the_last_change_of_a_file_wins(self, world: World) -> None:
        store = world.reaper()
        assert publish(store, "a", NIGHTLY)
        assert not publish(store, "b", NIGHTLY), "b has the same"
        assert publish(store, "a", NIGHTLY, SECONDLY)
        assert not publish(store, "b", NIGHTLY), "b starts again with its old file"
        assert names(store) == {"nightly", "secondly"}
        assert publish(store, "b", SECONDLY)
        assert names(store) == {"secondly"}
        found = store.cron_hash(S.stream)
        assert found.digest == found.hosts["b"].digest != found.hosts["a"].digest

    def test_a_service_that_never_had_tables_changes_nothing(self, world: World) -> None:
        store = world.reaper()
        assert not publish(store, "none")
        assert store.cron_clock(S.stream)[0] == b""
        assert world.length(S.stream) == 0
        publish(store, "a", NIGHTLY)
        assert not publish(store, "none")
        assert names(store) == {"nightly"}
        assert publish(store, "a"), "a had some, and its file has none now"
        assert names(store) == set()

    def test_only_a_changed_rule_starts_from_now(self, world: World) -> None:
        store = world.reaper()
        publish(store, "a", SECONDLY)
        version, _ = store.cron_clock(S.stream)
        first = store.cron_hash(S.stream).cursors_s["secondly"]
        world.pass_time(2.1)
        publish(store, "a", CronTable("secondly", "@every 1s", "report", S.stream, payload="1"))
        assert store.cron_hash(S.stream).cursors_s["secondly"] == first
        assert store.cron_clock(S.stream)[0] != version
        publish(store, "a", CronTable("secondly", "@every 2s", "report", S.stream, payload="1"))
        assert store.cron_hash(S.stream).cursors_s["secondly"] >= first + 2


class TestTaking:
    def test_a_tick_is_taken_once_with_its_job(self, world: World) -> None:
        store, other = world.reaper(), world.reaper()
        publish(store, "a", SECONDLY)
        world.pass_time(2.1)
        version = store.cron_clock(S.stream)[0]
        cursor_s = store.cron_hash(S.stream).cursors_s["secondly"]
        tick = TickJob("secondly", cursor_s + 1, "id", b'"job"')
        assert store.cron_take(S.stream, version, tick) == (Taken.DONE, cursor_s + 1)
        assert other.cron_take(S.stream, version, tick) == (Taken.LATE, cursor_s + 1)
        assert world.length(S.stream) == 1
        run = store.cron_hash(S.stream).runs["secondly"]
        assert (run.tick_s, run.job_id) == (cursor_s + 1, "id")

    def test_a_tick_of_replaced_tables_is_refused(self, world: World) -> None:
        store = world.reaper()
        publish(store, "a", SECONDLY)
        world.pass_time(1.1)
        version = store.cron_clock(S.stream)[0]
        tick = TickJob("secondly", store.cron_hash(S.stream).cursors_s["secondly"] + 1, "id", b"{}")
        publish(store, "a", SECONDLY, NIGHTLY)
        assert store.cron_take(S.stream, version, tick).outcome is Taken.OUTDATED
        version = store.cron_clock(S.stream)[0]
        publish(store, "a", NIGHTLY)
        assert store.cron_take(S.stream, version, tick).outcome is Taken.OUTDATED
        assert world.length(S.stream) == 0

    def test_a_tick_is_not_taken_before_the_clock_of_the_store_says_so(self, world: World) -> None:
        store = world.reaper()
        publish(store, "a", SECONDLY)
        version, wall_now_s = store.cron_clock(S.stream)
        tick = TickJob("secondly", int(wall_now_s) + 100, "id", b"{}")
        assert store.cron_take(S.stream, version, tick).outcome is Taken.EARLY

    def test_ticks_of_a_pause_are_dropped(self, world: World) -> None:
        store = world.reaper()
        publish(store, "a", SECONDLY)
        store.cron_pause(S.stream, "secondly", "why")
        assert store.cron_hash(S.stream).pauses["secondly"].note == "why"
        world.pass_time(2.1)
        version = store.cron_clock(S.stream)[0]
        cursor_s = store.cron_hash(S.stream).cursors_s["secondly"]
        tick = TickJob("secondly", cursor_s + 1, "id", b"{}")
        assert store.cron_take(S.stream, version, tick).outcome is Taken.PAUSED
        assert world.length(S.stream) == 0
        assert store.cron_resume(S.stream, "secondly")
        assert not store.cron_resume(S.stream, "secondly")
        assert store.cron_hash(S.stream).cursors_s["secondly"] >= cursor_s + 2, "those of the pause too"

    @pytest.mark.parametrize("key", [S.stream, cron_key(S.stream)])
    def test_a_damaged_key_refuses_and_loses_no_tick(self, world: World, key: str) -> None:
        store = world.reaper()
        publish(store, "a", SECONDLY)
        world.pass_time(1.1)
        version = store.cron_clock(S.stream)[0]
        cursor_s = store.cron_hash(S.stream).cursors_s["secondly"]
        tick = TickJob("secondly", cursor_s + 1, "id", b"{}")
        world.break_key(key)
        with pytest.raises(StoreRefused):
            store.cron_take(S.stream, version, tick)
        world.repair_key(key)
        assert store.cron_take(S.stream, version, tick).outcome is Taken.DONE


class _DoomedReaper(DoomedStore, RedisReaperStore):
    """A reaper's."""


def _live_and_die(url: str, settings: Settings, done: threading.Event, kills: list[str]) -> None:
    """A host that starts again whenever it was killed."""
    while not done.is_set():
        store = _DoomedReaper(url)
        host = CronEnqueuer(store, settings, MetricsBuffer(), time.monotonic)
        try:
            while not done.wait(min(0.01, host.run_once())):
                pass
        except Killed:
            kills.append(settings.host)
        finally:
            store.close()


def test_two_hosts_that_are_killed_between_all_commands_take_each_tick_once(redis_world: RedisWorld) -> None:
    """The clock of the server is real, so the ticks are those of a hundred tables in a few seconds."""
    tables = tuple(CronTable(f"t{number}", "@every 1s", "report", S.stream) for number in range(100))
    store = redis_world.reaper()
    publish(store, "a/x", *tables)
    first = store.cron_hash(S.stream).cursors_s
    done, kills, url = threading.Event(), list[str](), redis_world.server.url
    hosts = [
        threading.Thread(
            target=_live_and_die,
            args=(url, Settings(streams=(S,), host=host, instance="x", cron=tables), done, kills),
        )
        for host in "ab"
    ]
    for thread in hosts:
        thread.start()
    eventually(lambda: redis_world.length(S.stream) >= 400)
    done.set()
    for thread in hosts:
        thread.join(SOON_S)
        assert not thread.is_alive()
    entries = redis_world.server.client.xrange(S.stream)
    times = Counter(orjson.loads(fields[b"data"])["id"] for _, fields in entries)
    cursors_s = store.cron_hash(S.stream).cursors_s
    assert times == Counter(
        table.job_id(tick_s)
        for table in tables
        for tick_s in range(first[table.name] + 1, cursors_s[table.name] + 1)
    )
    assert len(kills) > 10
    assert set(kills) == {"a", "b"}


def test_on_a_cluster_the_tables_are_in_the_slot_of_their_stream(tmp_path: Path) -> None:
    with cluster(tmp_path, masters=1) as nodes:
        (server,) = nodes.servers
        url = nodes.url()
        streams = (S, Source("stream:two", "cg"))
        tables = tuple(CronTable(one.stream[-3:], "@every 1s", "report", one.stream) for one in streams)
        store = RedisReaperStore(url)
        settings = Settings(streams=streams, host="a", instance="x", cron=tables)
        host = CronEnqueuer(store, settings, MetricsBuffer(), time.monotonic)

        def every_stream_has_jobs() -> bool:
            host.run_once()
            return all(server.client.xlen(one.stream) >= 2 for one in streams)

        eventually(every_stream_has_jobs)
        operator = OperatorStore(url)
        assert operator.find_streams().names == [one.stream for one in streams]
        assert operator.cron_hash("stream:two").runs.keys() == {"two"}
        operator.cron_pause("stream:two", "two", "")
        assert operator.cron_resume("stream:two", "two")
        for one in (operator, store):
            one.close()
