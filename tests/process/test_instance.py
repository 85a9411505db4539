"""Two services with one instance name on one job store: the holder keeps it, the other says who has it."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.redis_servers import RedisServer, require
from support.service import STREAM, Service, ending, eventually, handlers

pytestmark = pytest.mark.process

#: A lease that no test waits for.
LONG_S = 600
#: Far above the promised times, for other suites may be running, and far below the long lease.
AT_ONCE_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(require("valkey"), tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture
def url(server: RedisServer) -> str:
    server.client.flushall()
    return server.url


def another(folder: Path, name: str, url: str, **options: object) -> Service:
    """A service in a folder of its own; not started."""
    (folder / name).mkdir()
    options = {"lease": LONG_S, "procs": 1} | options
    return Service(folder / name, handlers("Noop"), redis_url=url, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def running(one: Service) -> Iterator[Service]:
    with ending(one):
        yield one.start()
        assert one.terminate() == 0
        one.assert_nothing_left()


def assert_refused(second: Service, first: Service) -> None:
    """The second service ends with 2 and names the first one, which continues with the same processes."""
    roles = {role: pid for role, pid in first.roles().items() if role != "forkserver"}
    with ending(second):
        second.launch()
        assert second.wait(AT_ONCE_S) == 2
        second.assert_nothing_left()
    assert f"pid {first.pid}" in second.log_text
    assert "--instance" in second.log_text
    first.wait_for_end(first.enqueue("noop"))
    assert first.is_ready()
    assert roles.items() <= first.roles().items()
    assert not first.logged("store.unavailable")


def test_the_second_of_two_services_loses_in_one_directory_and_however_the_url_is_spelt(
    tmp_path: Path, url: str
) -> None:
    with running(another(tmp_path, "first", url)) as first:
        assert_refused(another(tmp_path, "second", url, data_dir=first.data_dir), first)
        third = another(tmp_path, "third", url.replace("127.0.0.1", "localhost"))
        assert_refused(third, first)
        assert f"on host {socket.gethostname()}" in third.log_text


def test_a_killed_service_has_its_name_back_at_once(tmp_path: Path, url: str) -> None:
    with running(another(tmp_path, "one", url)) as one:
        started_s = time.monotonic()
        one.kill()
        one.start()
        one.wait_for_end(one.enqueue("noop"))
        assert time.monotonic() - started_s < AT_ONCE_S
        one.wait_for_successor("reader", one.kill_role("reader"))
        one.wait_for_end(one.enqueue("noop"), AT_ONCE_S)


def test_a_service_that_stopped_as_asked_leaves_its_name_to_any_other(tmp_path: Path, url: str) -> None:
    with running(another(tmp_path, "first", url)):
        pass
    with running(another(tmp_path, "second", url)) as second:
        second.wait_for_end(second.enqueue("noop"))


def test_a_name_whose_holder_cannot_be_proven_dead_is_waited_for(tmp_path: Path, url: str) -> None:
    first = another(tmp_path, "first", url, lease=8)
    with ending(first):
        first.start()
        first.kill()
        # The wait is longer than the time in which a store must answer, which this one does.
        with running(another(tmp_path, "second", url, lease=8, connect_timeout=4)) as second:
            (waited,) = second.logged("instance.name_lost")
            assert f"pid {first.pid}" in waited["error"]
            second.wait_for_end(second.enqueue("noop"))


def test_a_data_directory_that_cannot_be_used_keeps_no_service_from_running(tmp_path: Path, url: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with running(another(tmp_path, "one", url, data_dir=file / "below", lease=1)) as one:
        one.wait_for_end(one.enqueue("noop"))
        assert one.logged("instance.no_lock_file")


def test_a_service_that_lost_its_name_stays_says_who_has_it_and_takes_it_back(
    tmp_path: Path, url: str
) -> None:
    with running(another(tmp_path, "first", url, lease=2)) as first:
        reader = first.kill_role("reader", signal.SIGSTOP)
        with running(another(tmp_path, "second", url, lease=2)) as second:
            os.kill(reader, signal.SIGCONT)
            eventually(lambda: f"pid {second.pid}" in first.get("/readyz")[1], saying="told who has the name")
            assert first.get("/readyz")[0] == 503
            assert first.get("/healthz")[0] == 200
            second.wait_for_end(second.enqueue("noop"))
            assert second.is_ready()
        first.wait_until_ready()
        first.wait_for_end(first.enqueue("noop"))
        assert first.roles()["reader"] == reader, "no process was restarted for it"


def test_a_service_that_lost_its_name_stops_when_it_is_asked_to(tmp_path: Path, url: str) -> None:
    with running(another(tmp_path, "first", url, lease=2)) as first:
        reader = first.kill_role("reader", signal.SIGSTOP)
        with running(another(tmp_path, "second", url, lease=2)):
            os.kill(reader, signal.SIGCONT)
            eventually(lambda: first.get("/readyz")[0] == 503)
            stopped_s = time.monotonic()
            assert first.terminate(AT_ONCE_S) == 0
            assert time.monotonic() - stopped_s < AT_ONCE_S
            assert first.logged("supervisor.stopped")


def test_a_store_that_comes_back_with_an_older_snapshot_ends_no_service(
    tmp_path: Path, server: RedisServer, url: str
) -> None:
    with running(another(tmp_path, "one", url)) as one:
        snapshot = server.client.dump(f"fence:{STREAM}")
        one.wait_for_successor("reader", one.kill_role("reader"))
        eventually(
            lambda: len(one.logged("reader.connected")) == 2, saying="the next reader has a higher epoch"
        )
        # As a restart from the snapshot that no connection was open to notice.
        server.client.restore(f"fence:{STREAM}", 0, snapshot, replace=True)
        one.wait_for_end(one.enqueue("noop"))
        eventually(lambda: "OUTDATED" in one.log_text, saying="noticed")
        one.wait_until_ready()
        one.wait_until_drained()
        assert one.exit_code is None
