"""A worker that is killed while the service drains was killed under its job, which is charged with it."""

import signal
from pathlib import Path

import pytest

from support.service import STREAM, Service, ending, eventually, handlers

pytestmark = [pytest.mark.chaos, pytest.mark.process]


def test_a_death_while_draining_counts(tmp_path: Path) -> None:
    # Else a job that takes its worker along would get one free start with every restart of the service.
    with ending(Service(tmp_path, handlers("Gate"), procs=1, drain_timeout=30)) as one:
        one.start()
        job = one.enqueue("gate", {"gate": "0"})
        one.wait_for_start(job)
        one.send(signal.SIGTERM)
        eventually(lambda: one.logged("drain.begun"))
        one.kill_role("worker 0")
        assert one.wait() == 0
        one.start()
        one.wait_for_start(job, 2)
        assert one.client.hvals(f"deaths:{STREAM}") == [b"1"]
        one.open_gate("0")
        one.wait_until_drained()
        assert one.client.hvals(f"deaths:{STREAM}") == []
        assert one.terminate() == 0
        one.assert_nothing_left()
