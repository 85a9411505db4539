"""Kills while jobs run: nothing is lost, innocent jobs are not charged, and work continues."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from support.service import GROUP, STREAM, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

ROLES = {"supervisor", "forkserver", "guard", "reader", "reaper", "worker 0", "worker 1", "valkey"}

#: Two seconds are promised for a machine that has the time.
#: This one may be running other suites. A lease is 30 s.
RECOVERED_WITHIN_S = 20.0
#: Five are promised between a restart and the jobs that the killed supervisor left being run again.
RESTARTED_WITHIN_S = 25.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    toys = handlers("Gate", "Noop", "Sleep", "Permanent", "Flaky")
    folder = tmp_path_factory.mktemp("shared")
    with service(folder, toys, retry_initial=0.3, retry_jitter=0) as running:
        yield running


@pytest.fixture
def one(shared: Service) -> Service:
    """Ready, without a job and without a memory of earlier tests."""
    shared.wait_until_ready()
    shared.wait_until_drained()
    shared.forget()
    return shared


def started(one: Service) -> Counter[str]:
    """How often each job was begun."""
    return Counter(event.id for event in one.events("start"))


def ended(one: Service) -> Counter[str]:
    """How often each job was finished."""
    return Counter(event.id for event in one.events("end"))


def hold_all_workers(one: Service) -> list[str]:
    """Occupy both workers with a job each, that waits at the gate ``0`` or ``1``; returns the jobs."""
    jobs = [one.enqueue("gate", {"gate": gate}) for gate in ("0", "1")]
    for job in jobs:
        one.wait_for_start(job)
    return jobs


def wait_for_pending(one: Service, count: int) -> None:
    """Wait until `count` jobs were dispatched and not finished."""
    eventually(lambda: one.client.xpending(STREAM, GROUP)["pending"] == count, saying=f"{count} given out")


def wait_for_ends(one: Service, count: int) -> None:
    """Wait until `count` jobs have finished."""
    eventually(lambda: len(one.events("end")) >= count, saying=f"{count} finished")


def wait_for_retry(one: Service, retry_count: int) -> None:
    """Wait until some job is run with that count."""
    eventually(lambda: any(event.retry_count == retry_count for event in one.events("start")))


def reader_restarts(one: Service) -> float:
    return one.metric("z_novel_worker_restarts_total", role="reader", cause="SIGKILL")


def deaths(one: Service) -> list[int]:
    """What the store says of workers that died, one number for each job that any died under."""
    return [int(count) for count in one.client.hvals(f"deaths:{STREAM}")]


def test_what_a_killed_worker_had_not_begun_runs_elsewhere_at_once_and_free_of_charge(one: Service) -> None:
    victim, bystander = hold_all_workers(one)
    queued = one.enqueue_many({"type": "noop"} for _ in range(2))  # one behind each of the two
    entries = eventually(lambda: len(one.client.xpending_range(STREAM, "cg-gen-worker", "-", "+", 9)) == 4)
    assert entries
    killed_s = time.monotonic()
    os.kill(one.wait_for_start(victim).pid, signal.SIGKILL)
    again = one.wait_for_start(victim, 2)
    assert again.mono_s - killed_s < RECOVERED_WITHIN_S
    assert again.retry_count == 0
    assert deaths(one) == [1], "only the job that was running is charged"
    one.open_gate("0")
    one.open_gate("1")
    for job in (victim, bystander, *queued):
        one.wait_for_end(job)
    one.wait_until_drained()
    assert started(one) == {victim: 2, bystander: 1, **dict.fromkeys(queued, 1)}
    assert deaths(one) == []
    assert one.dead_letters() == []


def test_one_poisonous_job_does_not_take_its_31_batch_mates_along(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Batch"), procs=1) as one:
        jobs = [{"type": "batch", "id": f"job-{n}", "payload": {}} for n in range(32)]
        jobs[13]["payload"] = {"how": "SIGKILL"}
        others = [{"type": "batch", "id": f"earlier-{n}", "payload": {}} for n in range(32)]
        one.enqueue_many(others)  # reads grow from small ones
        one.wait_until_drained(within_s=40)
        one.enqueue_many(jobs)
        letter = one.dead_letter("job-13", within_s=40)
        one.wait_until_drained(within_s=40)
        assert (letter["reason"], letter["deaths"]) == ("poison", 3)
        assert len(one.dead_letters()) == 1
        innocent = {job["id"] for job in others + jobs} - {"job-13"}
        assert ended(one) == dict.fromkeys(innocent, 1)
        counts = started(one)
        assert counts.pop("job-13") == 3
        assert set(counts.values()) <= {1, 2}
        batches = Counter(event.mono_s for event in one.events("start") if event.id.startswith("job"))
        assert max(batches.values()) == 32, "they did share a batch at first"


def test_a_row_of_poisonous_jobs_does_not_hold_up_what_stands_behind_it(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Die", "Noop"), procs=1) as one:
        # Two deaths are known already, so that each job costs one worker only.
        poison = {"type": "die", "payload": {"how": "SIGKILL"}, "deaths": 2}
        one.enqueue_many([poison] * 5)  # the third opens the breaker
        while len(one.dead_letters()) < 5:  # slower and slower, for they are one tenant's
            one.wait_for_end(one.enqueue("noop"), RECOVERED_WITHIN_S)
        assert one.metric("z_novel_crash_circuits_open", task_type="die") >= 1


def test_killing_the_reader_again_and_again_under_load_repeats_and_loses_nothing(one: Service) -> None:
    running = one.enqueue("gate", {"gate": "0"})
    one.wait_for_start(running)
    jobs = one.enqueue_many({"type": "sleep", "payload": {"s": 0.002}} for _ in range(1500))
    restarts = reader_restarts(one)
    for goal in (100, 400, 800):
        wait_for_ends(one, goal)
        one.wait_for_successor("reader", one.kill_role("reader"))
    one.open_gate("0")
    one.wait_until_drained()
    assert ended(one) == dict.fromkeys([running, *jobs], 1)
    assert started(one) == dict.fromkeys([running, *jobs], 1), "the workers lived: nothing runs twice"
    assert one.dead_letters() == []
    assert reader_restarts(one) == restarts + 3


def test_outcomes_of_jobs_that_end_while_there_is_no_reader_are_not_lost(one: Service) -> None:
    jobs = hold_all_workers(one)
    failing = one.enqueue("permanent")  # waits in a worker's ring, behind a gate
    wait_for_pending(one, 3)
    time.sleep(0.3)  # from the reader into the ring: nothing outside shows that
    reader = one.kill_role("reader", signal.SIGSTOP)  # it settles nothing from here on
    one.open_gate("0")
    one.open_gate("1")
    for job in jobs:
        one.wait_for_end(job)
    one.wait_for_start(failing)
    os.kill(reader, signal.SIGKILL)
    assert one.dead_letter(failing)["reason"] == "permanent"
    one.wait_until_drained()
    assert started(one) == dict.fromkeys([*jobs, failing], 1)


def test_killing_the_reaper_makes_no_retry_early_lost_or_double(one: Service) -> None:
    jobs = one.enqueue_many({"type": "flaky", "payload": {"times": 2}} for _ in range(50))
    for retrying in (0, 1):
        wait_for_retry(one, retrying)
        one.wait_for_successor("reaper", one.kill_role("reaper"))
    for job in jobs:
        one.wait_for_end(job)
    one.wait_until_drained()
    assert started(one) == dict.fromkeys(jobs, 3)
    for job in jobs:
        for before, after in pairwise(one.events("start", job)):
            assert after.mono_s - before.mono_s >= 0.3 * 2**after.retry_count
    assert one.dead_letters() == []


def test_a_killed_supervisor_takes_all_along_and_its_successor_goes_on(tmp_path: Path) -> None:
    with ending(Service(tmp_path, handlers("Sleep", "Gate"))) as one:
        one.start()
        running = one.enqueue("gate", {"gate": "0"})
        one.wait_for_start(running)
        jobs = one.enqueue_many({"type": "sleep", "payload": {"s": 0.005}} for _ in range(300))
        wait_for_ends(one, 20)
        eventually(lambda: one.roles().keys() == ROLES, saying="all of them, so that all are killed")
        one.kill()  # sees to it that all of them are gone within two seconds
        restarted_s = time.monotonic()
        one.start()
        assert one.wait_for_start(running, 2).mono_s - restarted_s < RESTARTED_WITHIN_S
        one.open_gate("0")
        one.wait_until_drained()
        assert ended(one).keys() == {running, *jobs}
        assert ended(one)[running] == 1
        assert one.dead_letters() == []
        assert one.terminate() == 0
        one.assert_nothing_left()


def test_a_killed_embedded_store_comes_back_with_everything_and_consuming_goes_on(one: Service) -> None:
    running = one.enqueue("gate", {"gate": "0"})
    one.wait_for_start(running)
    jobs = one.enqueue_many({"type": "sleep", "payload": {"s": 0.005}} for _ in range(300))
    wait_for_ends(one, 20)
    ready = len(one.logged("embedded.ready"))
    url, valkey = one.redis_url, one.kill_role("valkey")
    one.wait_for_successor("valkey", valkey)
    eventually(lambda: len(one.logged("embedded.ready")) == ready + 1)
    one.wait_until_ready()
    assert one.redis_url == url, "producers keep their address"
    late = one.enqueue("gate", {"gate": "0"})
    one.open_gate("0")
    one.wait_for_end(late)
    one.wait_until_drained()
    assert ended(one) == dict.fromkeys([running, late, *jobs], 1)
    assert started(one) == dict.fromkeys([running, late, *jobs], 1)
    assert one.dead_letters() == []


def test_a_reader_that_stood_still_does_not_hurt_a_job_that_ran_meanwhile(one: Service) -> None:
    jobs = hold_all_workers(one)
    reader = one.kill_role("reader", signal.SIGSTOP)
    one.open_gate("0")
    one.wait_for_end(jobs[0])
    os.kill(reader, signal.SIGCONT)
    one.open_gate("1")
    one.wait_until_drained()
    assert started(one) == dict.fromkeys(jobs, 1)
    assert one.roles()["reader"] == reader
