"""TERM, INT and HUP on the running service: graceful stop, rolling restart, and no job is lost."""

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from support.redis_servers import RedisServer, require
from support.service import STREAM, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

#: How soon "at once" is on a machine that may be busy with other suites.
AT_ONCE_S = 15.0
#: Within this time the same signal again is a copy; a little longer than the service says.
COPY_S = 0.4


def started(one: Service) -> Counter[str]:
    """How often each job was begun."""
    return Counter(event.id for event in one.events("start"))


def assert_run_after_restart(one: Service, *jobs: str) -> None:
    """Start again on the same data: the jobs run unharmed, as if nothing had been."""
    one.start()
    for job in jobs:
        one.open_gate("0")
        assert one.wait_for_end(job).retry_count == 0
    one.wait_until_drained()
    assert_unharmed(one)
    assert one.terminate() == 0
    one.assert_nothing_left()


def assert_unharmed(one: Service) -> None:
    """No job was charged with a death or given up."""
    assert one.client.hgetall(f"deaths:{STREAM}") == {}
    assert one.dead_letters() == []


def test_a_stop_lets_the_running_job_end_and_keeps_the_others(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Gate", "Noop"), procs=1, drain_timeout=30)) as one:
        one.start()
        jobs = []
        # A terminal sends INT to the whole group, and systemd by default TERM to every process of the unit.
        for number, to_all in ((signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)):
            gate = f"{number}-{to_all}"
            running = one.enqueue("gate", {"gate": gate})
            one.wait_for_start(running)
            jobs += [running, *one.enqueue_many({"type": "noop"} for _ in range(200))]
            stop_while_a_job_runs(one, number, to_all, gate)
            assert len(one.events("end", running)) == 1
            one.start()  # on the same data
            one.wait_until_drained()
            assert started(one) == dict.fromkeys(jobs, 1), gate
            assert_unharmed(one)
        assert one.terminate() == 0
        one.assert_nothing_left()


def stop_while_a_job_runs(one: Service, number: signal.Signals, to_all: bool, gate: str) -> None:
    """It drains until the job at the gate has ended, and exits with 0."""
    ours = [pid for role, pid in one.roles().items() if role != "valkey"]
    for pid in ours if to_all else [one.pid]:
        with suppress(ProcessLookupError):  # the supervisor was first: some may have stopped
            os.kill(pid, number)
    eventually(lambda: one.logged("drain.begun"))
    # The port answers for the supervisor, which may have written its line and not yet told it.
    eventually(lambda: one.get("/readyz")[0] == 503)
    assert one.get("/healthz")[0] == 200
    assert one.exit_code is None
    one.open_gate(gate)
    assert one.wait() == 0
    one.assert_nothing_left()
    assert [e for e in one.log() if e["level"] in ("error", "critical")] == []


def test_a_job_too_long_for_the_drain_limit_goes_back_unharmed(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Gate"), drain_timeout=0.5)) as one:
        one.start()
        job = one.enqueue("gate", {"gate": "0"})
        one.wait_for_start(job)
        told_s = time.monotonic()
        assert one.terminate() == 0
        assert 0.5 <= time.monotonic() - told_s < 0.5 + AT_ONCE_S
        one.assert_nothing_left()
        assert_run_after_restart(one, job)
        assert len(one.events("start", job)) == 2


def test_a_second_signal_stops_at_once_and_loses_nothing(tmp_path: Path) -> None:
    term, interrupt = signal.SIGTERM, signal.SIGINT
    with ending(Service(tmp_path, handlers("Gate"), drain_timeout=60)) as one:
        for first, second in ((term, term), (interrupt, interrupt), (term, interrupt)):
            one.start()
            job = one.enqueue("gate", {"gate": job_gate(first, second)})
            one.wait_for_start(job)
            one.send(first)
            eventually(lambda: one.logged("drain.begun"))
            if second == first:
                time.sleep(COPY_S)  # before, it is a copy
            told_s = time.monotonic()
            one.send(second)
            assert one.wait() == 0
            assert time.monotonic() - told_s < AT_ONCE_S
            one.assert_nothing_left()
            one.open_gate(job_gate(first, second))
        one.start()
        one.wait_until_drained()
        assert {event.retry_count for event in one.events("end")} == {0}
        assert len(one.events("end")) == 3
        assert_unharmed(one)
        assert one.terminate() == 0
        one.assert_nothing_left()


def job_gate(first: signal.Signals, second: signal.Signals) -> str:
    return f"{first}-{second}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_copy_of_the_signal_does_not_end_the_drain(tmp_path: Path, number: signal.Signals) -> None:
    # `timeout` of GNU signals the process and then its group; a terminal and `make` send two INT.
    with ending(Service(tmp_path, handlers("Gate"), drain_timeout=60)) as one:
        one.start()
        job = one.enqueue("gate", {"gate": "0"})
        one.wait_for_start(job)
        one.send(number)
        eventually(lambda: one.logged("drain.begun"))
        one.send(number)
        eventually(lambda: one.logged("stop.copy_ignored"))
        assert one.exit_code is None
        one.open_gate("0")
        assert one.wait() == 0
        assert len(one.events("end", job)) == 1
        assert one.logged("stop.immediate") == []
        one.assert_nothing_left()


def test_a_stop_while_it_is_still_starting_exits_0(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Noop"))) as one:
        one.launch()
        eventually(lambda: one.logged("health.listening"))
        assert one.terminate() == 0
        one.assert_nothing_left()


@pytest.mark.parametrize("to_all", [False, True], ids=["HUP", "HUP to everyone"])
def test_hup_exchanges_every_worker_without_dropping_or_repeating_a_job(tmp_path: Path, to_all: bool) -> None:
    with service(tmp_path, handlers("Sleep", "Gate")) as one:
        running = one.enqueue("gate", {"gate": "0"})
        one.wait_for_start(running)
        before = one.roles()
        jobs = one.enqueue_many({"type": "sleep", "payload": {"s": 0.004}} for _ in range(800))
        for pid in before.values() if to_all else [one.pid]:  # as when a terminal is closed
            os.kill(pid, signal.SIGHUP)
        eventually(lambda: one.logged("restart.begun"))
        eventually(lambda: len(one.events("end")) > 600)
        one.open_gate("0")
        one.wait_until_drained()
        eventually(lambda: not {before["worker 0"], before["worker 1"]} & one.everyone().keys())
        one.wait_until_ready()
        after = one.roles()
        assert all(after[role] == before[role] for role in ("supervisor", "reader", "reaper", "valkey"))
        assert started(one) == dict.fromkeys([running, *jobs], 1)
        assert len(one.events("end")) == 801
        assert [e for e in one.log() if e["level"] in ("error", "critical")] == []
        assert one.client.hgetall(f"deaths:{STREAM}") == {}


@pytest.mark.parametrize("how", ["ignore", "block", "raise"])
def test_a_handler_that_is_deaf_to_term_holds_up_neither_hup_nor_a_stop(tmp_path: Path, how: str) -> None:
    with service(tmp_path, handlers("Deaf", "Noop"), procs=1, drain_timeout=60) as one:
        for _ in range(2):
            one.wait_for_end(one.enqueue("deaf", {"how": how}))
            worker = one.roles()["worker 0"]
            one.send(signal.SIGHUP)
            eventually(lambda pid=worker: pid not in one.everyone())
            one.wait_until_ready()
        one.wait_for_end(one.enqueue("deaf", {"how": how}))
        assert one.terminate() == 0
        assert one.logged("child.exited") == []


def test_a_recycled_worker_may_be_deaf_to_term(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Deaf"), procs=1, max_jobs=1) as one:
        worker = one.wait_for_end(one.enqueue("deaf", {"how": "ignore"})).pid
        eventually(lambda: worker not in one.everyone())
        one.wait_for_end(one.enqueue("deaf", {"how": "block"}))


def test_a_service_that_was_started_with_blocked_signals_stops_as_asked(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD})
    try:
        with ending(Service(tmp_path, handlers("Noop"), procs=1)) as one:
            one.start()
            one.wait_for_end(one.enqueue("noop"))
            assert one.terminate() == 0
            one.assert_nothing_left()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("silent", [False, True], ids=["gone", "silent"])
def test_a_stop_without_the_store_does_not_wait_if_nothing_runs(tmp_path: Path, silent: bool) -> None:
    for folder in ("redis", "service"):
        (tmp_path / folder).mkdir()
    server = RedisServer(require("valkey"), tmp_path / "redis").start()
    try:
        options = {"redis_url": server.url, "procs": 2, "drain_timeout": 120}
        with ending(Service(tmp_path / "service", handlers("Noop"), **options)) as one:  # type: ignore[arg-type]
            one.start()
            one.wait_for_end(one.enqueue("noop"))
            one.wait_until_drained()
            os.kill(server.pid, signal.SIGSTOP if silent else signal.SIGKILL)
            eventually(lambda: one.logged("store.unavailable", role="reader"))
            assert one.terminate(within_s=60) == 0
            assert one.logged("drain.incomplete") == []
            one.assert_nothing_left()
    finally:
        server.stop()
