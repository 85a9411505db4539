"""Cron in the reaper, on the store in memory: due and missed ticks, changed tables, faults, the harness."""

import logging
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from jobworker.worker.cron.enqueuer import CronEnqueuer
from jobworker.worker.cron.table import CronTable
from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.ipc.control import ControlSocket, SetCron
from jobworker.worker.keys import Source, cron_key
from jobworker.worker.reaper import Reaper
from jobworker.worker.settings import Settings
from jobworker.worker.store.cron import StoredTable, TakenTick, TickJob
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from jobworker.worker.testing import Harness

S = Source("stream:test", "cg-test")
START = 1_767_312_000  # 2026-01-02T00:00:00Z
HOUR = 3600
HOURLY = CronTable("hourly", "@hourly", "report", S.stream)
CATCH_UP = CronTable("hourly", "@hourly", "report", S.stream, missed="once")


class World:
    """A store and hosts whose time passes by hand."""

    def __init__(self) -> None:
        self.now_s = float(START)
        self.server = MemoryServer(lambda: self.now_s)
        self.metrics = MetricsBuffer()
        self.counts: dict[Any, float] = {}
        self.gauges: dict[Any, float] = {}

    def host(self, *tables: CronTable, name: str = "a", store: MemoryStore | None = None) -> CronEnqueuer:
        settings = Settings(
            streams=(S,), host=name, instance="x", cron=tables, handlers={"report": "module:Class"}
        )
        return CronEnqueuer(
            store or MemoryStore(self.server), settings, self.metrics, lambda: self.now_s - START + 1
        )

    def run(self, host: CronEnqueuer, for_s: float) -> None:
        """Let time pass; the host runs as often as it asks to."""
        end_s = self.now_s + for_s
        while True:
            wait_s = host.run_once()
            if self.now_s + wait_s > end_s:
                self.now_s = end_s
                return
            self.now_s += max(0.001, wait_s)

    def ids(self) -> list[str]:
        jobs = [orjson.loads(data or b"null") for data in self.server.entries(S.stream).values()]
        return [job["id"].removeprefix("cron:").removesuffix(":00:00Z") for job in jobs]

    def count(self, name: str, table: str = "hourly") -> float:
        delta = self.metrics.take()
        for metric, labels, by in delta.counts:
            self.counts[metric, labels] = self.counts.get((metric, labels), 0.0) + by
        self.gauges |= {(metric, labels): value for metric, labels, value in delta.gauges}
        return {**self.counts, **self.gauges}.get((f"z_novel_cron_{name}", (table,)), 0.0)


@pytest.fixture
def world() -> World:
    return World()


def test_each_tick_is_enqueued_once_by_one_of_two_hosts(world: World) -> None:
    hosts = [world.host(HOURLY), world.host(HOURLY, name="b")]
    for _ in range(3 * HOUR + 1):
        for host in hosts:
            host.run_once()
        world.now_s += 1
    assert world.ids() == [f"hourly:2026-01-02T0{hour}" for hour in (1, 2, 3)]
    assert world.count("enqueued_total") == 3
    assert world.count("missed_total") == 0
    assert world.count("late_seconds") == 0


@pytest.mark.parametrize(
    ("table", "expected", "missed"),
    [(HOURLY, ["T01", "T06"], 4), (CATCH_UP, ["T01", "T05", "T06"], 3)],
    ids=["skip", "once"],
)
def test_missed_ticks_after_a_down_time(
    world: World, table: CronTable, expected: list[str], missed: int, caplog: pytest.LogCaptureFixture
) -> None:
    world.run(world.host(table), HOUR + 10)
    world.now_s = START + 5.5 * HOUR
    with caplog.at_level(logging.WARNING):
        hosts = [world.host(table), world.host(table, name="b")]
        for host in hosts:
            host.run_once()
        world.run(hosts[1], HOUR)
    assert world.ids() == [f"hourly:2026-01-02{hour}" for hour in expected]
    assert world.count("missed_total") == missed
    assert [record.message for record in caplog.records] == ["cron.missed"]


def test_a_host_that_was_suspended_takes_no_tick_of_the_others_for_missed(world: World) -> None:
    suspended = world.host(CATCH_UP, name="b")
    suspended.run_once()
    world.run(world.host(CATCH_UP), 4 * HOUR - 1)
    world.now_s = START + 4 * HOUR
    suspended.run_once()
    assert len(world.ids()) == 4
    assert world.count("missed_total") == 0


def test_a_changed_table_is_followed_by_a_host_that_knows_the_old_one(world: World) -> None:
    old, new = world.host(HOURLY), world.host(HOURLY, name="b")
    old.run_once()
    new.run_once()
    new.set_tables([CronTable("hourly", "@every 2h", "report", S.stream)])
    new.run_once()
    world.run(old, 4 * HOUR + 1)
    assert world.ids() == ["hourly:2026-01-02T02", "hourly:2026-01-02T04"]
    new.set_tables([])
    new.run_once()
    world.run(old, 4 * HOUR)
    assert len(world.ids()) == 2


def test_a_tick_whose_answer_was_lost_is_not_enqueued_again(world: World) -> None:
    class Lossy(MemoryStore):
        losses = 1

        def cron_take(self, stream: str, version: bytes, tick: TickJob) -> TakenTick:
            taken = super().cron_take(stream, version, tick)
            self.losses -= 1
            if self.losses >= 0:
                raise StoreUnavailable("no answer")
            return taken

    host = world.host(HOURLY, store=Lossy(world.server))
    world.run(host, HOUR - 1)
    world.now_s += 2
    with pytest.raises(StoreUnavailable):
        host.run_once()
    world.run(host, HOUR)
    assert world.ids() == ["hourly:2026-01-02T01", "hourly:2026-01-02T02"]


@pytest.mark.parametrize("key", [S.stream, cron_key(S.stream)])
def test_a_damaged_key_is_reported_and_its_ticks_wait(
    world: World, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = world.host(HOURLY)
    world.run(host, HOUR - 10)
    world.server.broken.add(key)
    with caplog.at_level(logging.ERROR):
        world.run(host, 50)
    assert [record.message for record in caplog.records] == ["cron.refused"]
    assert host.warnings()
    assert 30 < world.count("late_seconds") <= 40
    world.server.broken.clear()
    world.run(host, 10)
    assert (world.ids(), host.warnings()) == (["hourly:2026-01-02T01"], [])
    assert world.count("late_seconds") == 0


def test_a_service_without_tables_says_nothing_of_a_key_that_it_may_not_use(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.server.broken.add(cron_key(S.stream))
    host = world.host()
    with caplog.at_level(logging.DEBUG):
        world.run(host, 60)
    assert (caplog.records, host.warnings()) == ([], [])


def test_tables_are_published_again_where_the_key_was_deleted(world: World) -> None:
    host = world.host(HOURLY)
    world.run(host, 10)
    world.server.stream(S.stream).cron.clear()
    world.run(host, 3)
    assert MemoryStore(world.server).cron_hash(S.stream).tables.keys() == {"hourly"}
    world.run(host, HOUR)
    assert world.ids() == ["hourly:2026-01-02T01"]


def test_a_table_without_its_last_tick_is_named_with_the_repair(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    host = world.host(HOURLY)
    host.run_once()
    del world.server.stream(S.stream).cron[b"last/hourly"]
    with caplog.at_level(logging.ERROR):
        world.run(host, HOUR + 10)
    (record,) = caplog.records
    assert "delete the key" in record.__dict__["error"]


def test_a_table_of_a_later_version_is_named_and_the_others_run(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    stored = [
        StoredTable("odd", "r", b'{"name":"odd"}'),
        StoredTable("lunar", "r", orjson.dumps({"name": "lunar", "schedule": "@moon", "type": "x",
                                                "stream": S.stream})),
    ]  # fmt: skip
    host = world.host(HOURLY)
    host.run_once()
    fields = world.server.stream(S.stream).cron
    for table in stored:
        fields |= {f"table/{table.name}".encode(): table.data, f"last/{table.name}".encode(): b"1"}
    fields[b"version"] = b"9"
    with caplog.at_level(logging.ERROR):
        world.run(host, HOUR + 1)
    assert {record.__dict__["cron"] for record in caplog.records} == {"odd", "lunar"}
    assert world.ids() == ["hourly:2026-01-02T01"]


def test_a_last_tick_in_the_far_future_is_corrected(world: World) -> None:
    host = world.host(HOURLY)
    host.run_once()
    world.server.stream(S.stream).cron[b"last/hourly"] = b"%d" % (START + 365 * 86400)
    world.run(world.host(HOURLY), HOUR + 60)
    assert world.ids() == ["hourly:2026-01-02T01"]


def test_a_type_that_the_service_does_not_run_is_named(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        world.host(CronTable("n", "@daily", "reprot", S.stream))
    assert [record.message for record in caplog.records] == ["cron.unknown_type"]


@pytest.fixture
def sockets() -> Iterator[tuple[ControlSocket, ControlSocket]]:
    ours, theirs = ControlSocket.pair()
    reaper_end = ControlSocket(theirs)
    yield ours, reaper_end
    ours.close()
    reaper_end.close()


def test_the_reaper_takes_new_tables_from_the_supervisor(
    world: World, sockets: tuple[ControlSocket, ControlSocket]
) -> None:
    settings = Settings(streams=(S,), host="a", instance="x", handlers={"report": "module:Class"})
    reaper = Reaper(MemoryStore(world.server), settings, sockets[1], mono_s=lambda: world.now_s)
    reaper.run_once(world.now_s)
    assert reaper.next_cron_s() is None
    sockets[0].send(SetCron((HOURLY,)))
    assert not reaper._drain_requested(0)
    reaper.run_once(world.now_s)
    assert reaper.next_cron_s() == START + HOUR


class Report:
    def handle(self, job: Any) -> None:
        pass


def test_the_harness_moves_its_clock_over_ticks() -> None:
    table = {"name": "n", "schedule": "0 3 * * *", "type": "report", "payload": [1], "tenant_id": "acme"}
    with Harness({"report": Report}, cron=[table]) as harness:
        harness.advance(2 * 86400)
        assert [job.id for job in harness.completed] == [
            "cron:n:2026-01-03T03:00:00Z",
            "cron:n:2026-01-04T03:00:00Z",
        ]
        (job, _) = harness.completed
        assert (job.payload, job.tenant_id) == ([1], "acme")
        assert job.created_at == "2026-01-03T03:00:00.000Z", "each at its time"
        assert harness.metric("z_novel_cron_enqueued_total", "n") == 2
    with pytest.raises(ValueError, match="Bad minute"):
        Harness({"report": Report}, cron=[{**table, "schedule": "61 * * * *"}])
