"""A service whose stderr is a full pipe that no process reads: it runs its jobs and stops as asked."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.service import STREAM, Service, ending, eventually, handlers

pytestmark = pytest.mark.process


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe in which no byte has room."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(theirs, False)
    os.write(theirs, b"x" * 4096)
    os.set_blocking(theirs, True)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_a_log_that_is_not_read_stops_neither_jobs_nor_the_stop(
    tmp_path: Path, full_pipe: tuple[int, int]
) -> None:
    one = Service(tmp_path, handlers("Noop", "Flaky"), procs=1, retry_initial=0.01, log_level="debug")
    with ending(one):
        one.launch(stderr=full_pipe[1])
        eventually((one.data_dir / "endpoints.json").exists)
        address = json.loads((one.data_dir / "endpoints.json").read_text())["metrics_url"]
        eventually(lambda: one.get("/readyz", address)[0] == 200)
        jobs = one.enqueue_many({"type": "flaky", "payload": {"times": 1}} for _ in range(100))
        for job in jobs:
            one.wait_for_end(job)
        one.wait_until_drained()
        assert one.client.xlen(f"dlq:{STREAM}") == 0
        assert one.terminate() == 0
        one.assert_nothing_left()
