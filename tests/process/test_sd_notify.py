"""Messages to systemd, received on a socket as systemd receives them."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.redis_servers import running
from support.service import SOON_S, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

#: A blocking read ends after 2 s at the latest, and the watchdog is fed by its end.
CYCLES_S = 4.0


class Manager:
    """The end of the socket that systemd has."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))

    def hear(self, within_s: float) -> dict[str, str] | None:
        """The next message; None where none comes in that time."""
        self._socket.settimeout(within_s)
        try:
            return dict(line.split("=", 1) for line in self._socket.recv(65536).decode().splitlines())
        except TimeoutError:
            return None

    def wait_for(self, wanted: Callable[[dict[str, str]], object], what: str) -> dict[str, str]:
        """The first message of this kind from now on."""
        give_up_at = time.monotonic() + SOON_S
        while (left_s := give_up_at - time.monotonic()) > 0:
            if (said := self.hear(left_s)) is not None and wanted(said):
                return said
        raise AssertionError(f"never heard: {what}")

    def forget(self) -> None:
        """What came until now."""
        while self.hear(0.01) is not None:
            pass

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path)
    yield one
    one.close()


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "service"
    folder.mkdir()
    return folder


def test_its_life_from_ready_over_reloading_to_stopping(tmp_path: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    with ending(Service(folder_of(tmp_path), handlers("Noop"), environment=environment)) as one:
        one.launch()
        why = manager.wait_for(lambda said: "STATUS" in said, "why it is not ready")
        assert "worker 0 is starting" in why["STATUS"]
        manager.wait_for(lambda said: said.get("READY") == "1", "ready")
        one.enqueue("noop")
        said = manager.wait_for(lambda said: "jobs/s" in said.get("STATUS", ""), "how it does")
        assert said["STATUS"].startswith("2 workers, ")
        assert said["STATUS"].endswith("0 retrying, 0 dead")
        manager.wait_for(lambda said: said.get("WATCHDOG") == "1", "the watchdog fed")
        one.send(signal.SIGHUP)
        said = manager.wait_for(lambda said: "RELOADING" in said, "reloading")
        assert abs(int(said["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < SOON_S
        manager.wait_for(lambda said: said.get("READY") == "1", "ready again")
        one.send(signal.SIGTERM)
        manager.wait_for(lambda said: "STOPPING" in said, "stopping")
        assert one.wait() == 0


def test_the_watchdog_hungers_while_nothing_is_read(tmp_path: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    with service(folder_of(tmp_path), handlers("Noop"), environment=environment) as one:
        pid = one.kill_role("reader", signal.SIGSTOP)
        try:
            time.sleep(0.5)  # for the last report on its way to be taken in
            manager.forget()
            give_up_at = time.monotonic() + CYCLES_S
            while (left_s := give_up_at - time.monotonic()) > 0:
                assert "WATCHDOG" not in (manager.hear(left_s) or {})
        finally:
            os.kill(pid, signal.SIGCONT)
        manager.wait_for(lambda said: said.get("WATCHDOG") == "1", "the watchdog fed again")


def test_a_store_that_is_away_does_not_starve_the_watchdog(tmp_path: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path)}
    folder = folder_of(tmp_path)
    with (
        running("valkey", tmp_path) as store,
        service(folder, handlers("Noop"), environment=environment, redis_url=store.url) as one,
    ):
        store.stop()
        said = manager.wait_for(lambda said: "did not answer" in said.get("STATUS", ""), "what is missing")
        assert "reader" in said["STATUS"]
        for _ in range(3):
            manager.forget()
            manager.wait_for(lambda said: said.get("WATCHDOG") == "1", "the watchdog fed all the same")
        store.start()
        eventually(one.is_ready)
        manager.wait_for(lambda said: "jobs/s" in said.get("STATUS", ""), "how it does")
