"""Supervisor: what its HTTP threads may read."""

import time
from collections.abc import Iterator

import pytest

from jobworker.supervisor import Supervisor
from jobworker.worker.settings import Settings
from jobworker.worker.supervision.embedded import Stores


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    settings = Settings(redis_url="redis://127.0.0.1:1", metrics_addr="127.0.0.1:0")
    made = Supervisor(settings, None, Stores(settings, None, []))
    yield made
    made._server.close()


def test_health_reads_no_channel_that_the_loop_may_close(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed() -> dict[str, int]:
        raise ValueError("operation forbidden on released memoryview object")

    monkeypatch.setattr(supervisor._processes, "states", closed)
    monkeypatch.setattr(supervisor._processes, "reasons", closed)
    health = supervisor.health()
    assert (health.live, health.ready) == (True, False)
    assert health.details["workers"]["idle"] == 0


def test_a_loop_that_does_not_run_is_neither_live_nor_ready(supervisor: Supervisor) -> None:
    supervisor._health = supervisor._health._replace(ready=True, reasons=[])
    supervisor._mono_last_tick_s = time.monotonic() - 60.0
    health = supervisor.health()
    assert (health.live, health.ready) == (False, False)
    assert "has not run for 60 s" in health.reasons[0]
