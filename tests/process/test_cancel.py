"""Cancellation and results with real services: jobs that wait or run, two hosts, and killed roles."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.worker import Producer
from support.operator import run, run_json
from support.redis_servers import RedisServer
from support.service import STREAM, Service, ending, eventually, handlers

pytestmark = pytest.mark.process

TOYS = handlers("Sleep", "Noop", "Gate", "Watchful", "AsyncWatchful", "Answer", "Crowd")
#: Short, so that jobs of a killed host run again soon.
LEASE_S = 2.0


@contextlib.contextmanager
def hosts(folder: Path, server: RedisServer, *names: str, **options: object) -> Iterator[list[Service]]:
    """Started services on one store, as if each had a machine of its own."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            (folder / name).mkdir()
            environment = {"TOYS_DIR": str(folder / name / "toys")}
            one = Service(
                folder / name, TOYS, redis_url=server.url, instance=name, lease=LEASE_S,
                environment=environment, **options,
            )  # fmt: skip
            stack.enter_context(ending(one))
            started.append(one.start())
        yield started


# -- results


def test_results_of_jobs_are_read_by_producers_and_operators(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one") as (one,), Producer(store.url) as producer:
        job = producer.enqueue("answer", {"answer": [1, "two"]}, stream=STREAM, keep_result=True)
        assert producer.result(job, 20).value == [1, "two"]
        assert run_json(one, "result", job) == {
            "id": job, "state": "succeeded", "value": [1, "two"], "error": "", "reason": "",
        }  # fmt: skip
        bad = run(one, "enqueue", "answer", "--payload", '{"error":"never"}', "--keep-result").stdout.strip()
        found = run_json(one, "result", bad, "--wait", "20s", code=1)
        assert (found["state"], found["reason"]) == ("dead", "permanent")
        assert "PermanentError: never" in found["error"]
        large = producer.enqueue("answer", {"answer": "x" * 300_000}, stream=STREAM, keep_result=True)
        kept = producer.result(large, 20)
        assert (kept.state, kept.value) == ("succeeded", None)
        assert "more than 262144" in kept.error
        plain = producer.enqueue("answer", {"answer": 1}, stream=STREAM)
        one.wait_for_end(plain)
        assert "no result" in run(one, "result", plain, code=1).output
        one.wait_until_drained()
        assert len(store.client.keys("result:*")) == 3


def test_each_job_has_its_result_though_roles_are_killed(tmp_path: Path, store: RedisServer) -> None:
    rng = random.Random(1)
    with hosts(tmp_path, store, "one", "two") as services, Producer(store.url) as producer:
        ids = [
            producer.enqueue("answer", {"answer": number}, stream=STREAM, keep_result=True)
            for number in range(600)
        ]
        for _ in range(12):
            service, role = rng.choice(services), rng.choice(["reader", "worker 0", "worker 1"])
            service.wait_for_successor(role, service.kill_role(role))
        values = [producer.result(id, 60, stream=STREAM).value for id in ids]
        assert values == list(range(600))
        services[0].wait_until_drained(60.0)
        assert services[0].dead_letters() == []


# -- jobs that run


@pytest.mark.parametrize("kind", ["watchful", "asyncwatchful"])
def test_a_handler_that_sees_the_cancellation_ends_its_job(
    tmp_path: Path, store: RedisServer, kind: str
) -> None:
    with hosts(tmp_path, store, "one") as (one,):
        job = one.enqueue(kind, {"gate": "never"}, metadata={"keep_result": "true"})
        started = one.wait_for_start(job)
        assert "asked to end it" in run(one, "cancel", job).output
        letter = one.dead_letter(job)
        assert letter["reason"] == "cancelled"
        assert [event.pid for event in one.events("saw", job)] == [started.pid]
        assert run_json(one, "result", job, code=1)["state"] == "cancelled"
        eventually(lambda: one.metric("z_novel_jobs_cancelled_total", task_type=kind) == 1)
        assert one.roles()["worker 0"], "no worker was killed"
        assert one.logged("child.exited") == []
        assert one.logged("job.cancelled")
        found = run_json(one, "explain", job)["found"]
        assert "dead-lettered (cancelled)" in found[0]["why"]
        again = run_json(one, "cancel", job, code=1)
        assert again["outcomes"] == {job: "ended"}


def test_a_worker_whose_job_runs_on_is_ended_after_the_grace_time(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", procs=1, cancel_grace=0.5) as (one,):
        job, behind = one.enqueue("gate", {"gate": "never"}), one.enqueue("noop")
        pid = one.wait_for_start(job).pid
        run(one, "cancel", job, "--discard")
        ended = one.wait_for_end(behind)
        assert ended.pid != pid
        one.wait_until_drained()
        assert (one.dead_letters(), one.events("start", job)) == ([], one.events("start", job)[:1])
        (exited,) = one.logged("child.exited")
        assert exited["cause"] == "cancelled"
        assert store.client.exists(f"ready:{STREAM}/cancels") == 0


def test_a_prefetched_job_is_not_started(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", procs=1) as (one,):
        running = one.enqueue("gate", {"gate": "open"})
        one.wait_for_start(running)
        waiting = [one.enqueue("noop") for _ in range(4)]
        eventually(lambda: store.client.xpending(STREAM, "cg-gen-worker")["pending"] > 1)
        run_json(one, "cancel", *waiting)
        eventually(
            lambda: store.client.xlen(f"dlq:{STREAM}") >= 3 or store.client.exists(f"ready:{STREAM}/cancels")
        )
        time.sleep(1.5)  # the reader looks each second; what it cannot settle yet has no other sign
        one.open_gate("open")
        one.wait_for_end(running)
        for id in waiting:
            assert one.dead_letter(id)["reason"] == "cancelled"
        assert one.events("start", waiting[0]) == []


def test_jobs_that_share_a_batch_with_a_cancelled_one_run_on(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", procs=1, cancel_grace=0.1, linger=1) as (one,):
        jobs = one.enqueue_many({"type": "crowd", "payload": {"gate": "crowd"}} for _ in range(3))
        for job in jobs:
            one.wait_for_start(job)
        run_json(one, "cancel", jobs[0])
        time.sleep(2.0)  # longer than the reader needs to notice, and the grace time
        one.open_gate("crowd")
        for job in jobs:
            one.wait_for_end(job)
        one.wait_until_drained()
        assert one.logged("child.exited") == []


# -- many jobs, several hosts, kills


def test_a_filter_ends_jobs_wherever_they_are(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", "two", procs=1, cancel_grace=0.3) as services:
        one = services[0]
        kept = one.enqueue_many({"type": "noop", "tenant_id": "keep"} for _ in range(20))
        jobs = [{"type": "sleep", "tenant_id": "stop", "payload": {"s": 30}} for _ in range(800)]
        one.enqueue_many(jobs)
        one.enqueue("sleep", {"s": 30}, tenant_id="stop")
        Producer(store.url).enqueue("noop", {}, tenant_id="stop", stream=STREAM, delay=600)
        eventually(lambda: store.client.hget(f"ready:{STREAM}", "n"), saying="sorted")
        eventually(lambda: store.client.zcard(f"retry:{STREAM}") == 1, saying="delayed")
        would = run_json(one, "cancel", "--tenant", "stop", "--dry-run")
        assert would["cancelled"] + would["requested"] == 802
        run(one, "cancel", "--tenant", "stop", code=2)
        done = run_json(one, "cancel", "--tenant", "stop", "--discard", "--yes")
        assert done["cancelled"] + done["requested"] == 802
        assert done["requested"] >= 2
        one.wait_until_drained(30.0)
        assert one.dead_letters() == []
        eventually(lambda: all(any(s.events("end", id) for s in services) for id in kept))
        assert store.client.zcard(f"retry:{STREAM}") == 0


def test_a_cancelled_job_never_runs_again_though_every_role_is_killed(
    tmp_path: Path, store: RedisServer
) -> None:
    rng = random.Random(2)
    with hosts(tmp_path, store, "one", "two", cancel_grace=0.5) as services:
        one = services[0]
        ids = one.enqueue_many({"type": "gate", "payload": {"gate": "never"}} for _ in range(30))
        eventually(lambda: sum(len(service.events("start")) for service in services) >= 4)
        run_json(one, "cancel", *ids)
        for _ in range(6):
            service, role = rng.choice(services), rng.choice(["reader", "worker 0", "worker 1"])
            with contextlib.suppress(KeyError, ProcessLookupError):
                service.wait_for_successor(role, service.kill_role(role))
        os.kill(services[1].pid, signal.SIGKILL)
        eventually(lambda: store.client.xlen(f"dlq:{STREAM}") >= 30, 60.0, "all are dead letters")
        one.wait_until_drained(60.0)
        letters = one.dead_letters()
        assert sorted(letter["task"]["id"] for letter in letters) == sorted(ids)
        assert {letter["reason"] for letter in letters} == {"cancelled"}
        assert sum(len(service.events("end")) for service in services) == 0
