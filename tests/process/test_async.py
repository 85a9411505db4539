"""Async handlers in the running service: they run, are killed at their timeout, and finish before a stop."""

import signal
from pathlib import Path

import pytest

from support.service import Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process


def test_async_jobs_run_and_are_killed_and_tried_again_past_their_limit(tmp_path: Path) -> None:
    with service(tmp_path, handlers("AsyncGate", "AsyncHang"), procs=1, retry_initial=0.05) as one:
        one.open_gate("open")
        jobs = [one.enqueue("asyncgate", {"gate": "open"}) for _ in range(3)]
        for where in ("await", "c"):
            job = one.enqueue("asynchang", {"in": where})
            one.wait_for_end(job)
            first, second = one.events("start", job)
            assert (first.retry_count, second.retry_count) == (0, 1)
            assert first.pid != second.pid, "the worker was killed"
        for job in jobs:
            one.wait_for_end(job)
            assert [line["task_type"] for line in one.logged("passed the gate", job_id=job)] == ["asyncgate"]
        one.wait_until_drained()
        assert one.dead_letters() == []
        assert one.metric("z_novel_jobs_completed_total", task_type="asyncgate") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_running_async_job_end(tmp_path: Path, number: signal.Signals) -> None:
    with ending(Service(tmp_path, handlers("AsyncGate"), procs=1, drain_timeout=30)) as one:
        one.start()
        running = one.enqueue("asyncgate", {"gate": "0"})
        one.wait_for_start(running)
        one.send(number)
        one.kill_role("worker 0", number)  # a terminal or service manager signals every process
        eventually(lambda: one.logged("drain.begun"))
        one.open_gate("0")
        assert one.wait() == 0
        assert len(one.events("end", running)) == 1
        assert [e for e in one.log() if e["level"] in ("error", "critical")] == []
        one.assert_nothing_left()


def test_a_handler_that_yields_stops_the_start_with_a_message(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Yielding"))) as one:
        one.launch()
        assert one.wait() == 3
        assert "handler of yielding: handle contains `yield`" in one.log_text
        one.assert_nothing_left()
