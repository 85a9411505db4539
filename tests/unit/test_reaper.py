"""The reaper on the store in memory: due retries, queue depths, trimming, an unavailable store, its end."""

import dataclasses
import logging
import random
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.flow import Lane
from jobworker.worker.ipc.control import ControlSocket, Drain, Message, Ready, Report
from jobworker.worker.keys import Source, retry_key
from jobworker.worker.reaper import Reaper
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Promotion, Settlement, WaitingJob

SOURCE = Source("stream:test", "cg-test")
SETTINGS = Settings(streams=(SOURCE,), host="here", instance="blue", lease_s=1.0)
WITHIN_S = 30.0


class World:
    """A reaper, the store that it works on, and the supervisor's end of its socket; time passes by hand."""

    def __init__(self) -> None:
        self.now_s = 1_767_345_600.0
        self.server = MemoryServer(lambda: self.now_s)
        self.control, theirs = ControlSocket.pair()
        self.reaper_end = ControlSocket(theirs)

    def reaper(self, store: MemoryStore | None = None, settings: Settings = SETTINGS) -> Reaper:
        store = store or MemoryStore(self.server)
        return Reaper(store, settings, self.reaper_end, mono_s=lambda: self.now_s, rng=random.Random(0))

    def read(self, consumer: str, count: int) -> MemoryStore:
        """Let a consumer take and finish entries."""
        store = MemoryStore(self.server, consumer)
        store.acquire([SOURCE])
        store.begin_read(SOURCE, count, 0)
        store.settle([Settlement(SOURCE, done=[entry.id for entry in store.finish_read(SOURCE)])])
        return store

    def close(self) -> None:
        self.control.close()
        self.reaper_end.close()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@contextmanager
def running(reaper: Reaper) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=reaper.run, daemon=True)
    thread.start()
    yield thread
    thread.join(WITHIN_S)
    assert not thread.is_alive()


def next_message(control: ControlSocket) -> Message:
    assert select.select([control], [], [], WITHIN_S)[0], "the reaper sent nothing"
    received = control.receive()
    assert received is not None
    return received[0]


def test_due_retries_return_to_the_stream_and_the_others_wait(world: World) -> None:
    reaper = world.reaper()
    world.server.schedule(SOURCE.stream, b"soon", 0.2)
    world.server.schedule(SOURCE.stream, b"later", 60)
    assert reaper.run_once(world.now_s) == pytest.approx(0.2), "it sleeps until the next is due"
    assert world.server.waiting(SOURCE.stream) == [b"soon", b"later"]
    world.now_s += 0.2
    assert reaper.run_once(world.now_s) == 0.5, "never longer: another host may schedule an earlier one"
    assert list(world.server.entries(SOURCE.stream).values()) == [b"soon"]
    assert world.server.waiting(SOURCE.stream) == [b"later"]


def test_a_long_backlog_of_due_retries_is_moved_in_one_cycle(world: World) -> None:
    for number in range(450):
        world.server.schedule(SOURCE.stream, b"%d" % number, 0)
    world.reaper().run_once(world.now_s)
    assert world.server.waiting(SOURCE.stream) == []
    assert len(world.server.entries(SOURCE.stream)) == 450


def test_finished_entries_and_idle_consumers_are_removed_in_time(world: World) -> None:
    for number in range(3):
        world.server.append(SOURCE.stream, b"%d" % number)
    world.read("here/blue", 1)
    world.read("elsewhere/gone", 1)
    reaper = world.reaper()
    world.now_s += 9
    reaper.run_once(world.now_s)
    assert len(world.server.entries(SOURCE.stream)) == 3, "not in every cycle"
    world.now_s += 60
    reaper.run_once(world.now_s)
    assert list(world.server.entries(SOURCE.stream).values()) == [b"2"]
    assert set(world.server.stream(SOURCE.stream).groups[SOURCE.group].consumers) == {"here/blue"}


def test_a_second_group_is_reported_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    MemoryStore(world.server, "a").acquire([SOURCE, Source(SOURCE.stream, "cg-stranger")])
    reaper = world.reaper()
    for _ in range(3):
        reaper.run_once(world.now_s)
        world.now_s += 10
    (record,) = caplog.records
    assert (record.message, record.__dict__["other"]) == ("stream.other_group", "cg-stranger")


def test_it_reports_depths_and_ends_when_told_to_drain(world: World) -> None:
    world.server.append(SOURCE.stream, b"1")
    world.server.schedule(SOURCE.stream, b"2", 60)
    with running(world.reaper()):
        assert next_message(world.control) == Ready()
        report = next_message(world.control)
        world.control.send(Drain())
    assert isinstance(report, Report)
    gauges = {name: value for name, _, value in report.gauges}
    assert gauges["z_novel_jobs_queued"] == 1
    assert gauges["z_novel_retry_scheduled"] == 1
    assert gauges["z_novel_dlq_length"] == 0


def test_it_reports_how_long_the_largest_tenants_wait_until_they_do_not(world: World) -> None:
    store = MemoryStore(world.server, "one")
    store.acquire([SOURCE])
    world.server.append(SOURCE.stream, b"{}")
    store.begin_read(SOURCE, 1, 0)
    (entry,) = store.finish_read(SOURCE)
    lane = Lane("shout", 5, "t" * 200)
    assert store.sort(SOURCE, 0, {lane.encode(): [WaitingJob(entry.id, 2)]}) == set()
    reaper = world.reaper()
    world.now_s += 7
    assert tenant_gauges(world, reaper) == [((SOURCE.stream,), None), ((SOURCE.stream, "t" * 128), 7.0)]
    store.take(SOURCE, ["shout"], 1)
    world.now_s += 7
    assert tenant_gauges(world, reaper) == [((SOURCE.stream,), None)]


def tenant_gauges(world: World, reaper: Reaper) -> list[tuple[tuple[str, ...], float | None]]:
    reaper.run_once(world.now_s)
    reaper.report()
    report = next_message(world.control)
    assert isinstance(report, Report)
    return [gauge[1:] for gauge in report.gauges if gauge[0] == "z_novel_tenant_waiting_seconds"]


def test_it_ends_with_the_supervisor(world: World) -> None:
    with running(world.reaper()):
        assert next_message(world.control) == Ready()
        world.control.close()


def test_an_unavailable_store_is_logged_once_reported_and_survived(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Flaky(MemoryStore):
        failures = 3

        def promote(self, stream: str, limit: int) -> Promotion:
            self.failures -= 1
            if self.failures >= 0:
                raise StoreUnavailable("refused")
            return super().promote(stream, limit)

    world.server.schedule(SOURCE.stream, b"1", 0)
    with caplog.at_level(logging.ERROR), running(world.reaper(Flaky(world.server))):
        report = next_message(world.control)
        assert next_message(world.control) == Ready(), "it says the same once"
        last = next_message(world.control)
        world.control.send(Drain())
    assert getattr(report, "trouble", None) == "refused"
    assert isinstance(last, Report)
    assert last.trouble is None
    assert [record.message for record in caplog.records] == ["store.unavailable"]
    assert list(world.server.entries(SOURCE.stream).values()) == [b"1"]


def test_it_says_when_it_is_connected_and_when_it_is_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(MemoryStore):
        calls = 0

        def promote(self, stream: str, limit: int) -> Promotion:
            self.calls += 1
            if self.calls == 2:
                raise StoreUnavailable("refused")
            return super().promote(stream, limit)

    with caplog.at_level(logging.INFO), running(world.reaper(Interrupted(world.server))):
        troubles = [getattr(next_message(world.control), "trouble", None) for _ in range(4)]
        world.control.send(Drain())
    assert troubles == [None, None, "refused", None]
    assert [record.message for record in caplog.records] == [
        "reaper.connected", "store.unavailable", "reaper.connected",
    ]  # fmt: skip


def test_the_service_announces_its_types_and_streams_and_renews_them(world: World) -> None:
    reaper = world.reaper()
    store = MemoryStore(world.server)
    reaper.run_once(world.now_s)
    (first,) = store.announcements()
    assert (first.service, first.streams) == ("here/blue", {SOURCE.stream})
    world.now_s += 29
    reaper.run_once(world.now_s)
    assert store.announcements() == [first]
    world.now_s += 2
    reaper.run_once(world.now_s)
    assert store.announcements()[0].wall_renewed_s == pytest.approx(world.now_s)


@pytest.mark.parametrize("key", [SOURCE.stream, retry_key(SOURCE.stream)])
def test_a_stream_that_is_refused_stops_no_other(
    world: World, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = Source("stream:other", "cg-test")
    reaper = world.reaper(settings=dataclasses.replace(SETTINGS, streams=(SOURCE, other)))
    for source in (SOURCE, other):
        world.server.schedule(source.stream, b"1", 0)
    world.server.broken.add(key)
    for _ in range(60):
        reaper.run_once(world.now_s)
        world.now_s += 1.0
    assert list(world.server.entries(other.stream).values()) == [b"1"]
    assert world.server.waiting(SOURCE.stream) == [b"1"]
    (record,) = [record for record in caplog.records if record.message == "stream.isolated"]
    assert key in record.hint  # type: ignore[attr-defined]
    world.server.broken.clear()
    world.now_s += 12.0
    reaper.run_once(world.now_s)
    assert list(world.server.entries(SOURCE.stream).values()) == [b"1"]


def test_a_stream_that_takes_no_entries_is_still_counted(world: World) -> None:
    world.server.append(SOURCE.stream, b"queued")
    world.server.schedule(SOURCE.stream, b"1", 0)
    world.server.broken.add(retry_key(SOURCE.stream))
    with running(world.reaper()):
        assert next_message(world.control) == Ready()
        report = next_message(world.control)
        world.control.send(Drain())
    assert isinstance(report, Report)
    gauges = {(name, *labels): value for name, labels, value in report.gauges}
    assert gauges["z_novel_jobs_queued", SOURCE.stream] == 1
    assert gauges["z_novel_stream_isolated", SOURCE.stream, "reaper"] == 1
    assert retry_key(SOURCE.stream) in report.warnings[0]
