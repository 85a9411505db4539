"""Flow control with real services: turns of tenants, and limits over several hosts that are killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from support.hosts import hosts, overlaps, starts
from support.operator import run_json
from support.redis_servers import RedisServer
from support.service import STREAM, eventually

pytestmark = pytest.mark.process


def test_another_tenant_does_not_wait_for_a_flood(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one") as (one,):
        one.enqueue_many({"type": "sleep", "tenant_id": "flood", "payload": {"s": 0.01}} for _ in range(3000))
        eventually(lambda: store.client.hget(f"ready:{STREAM}", "n"), saying="sorted")
        job = one.enqueue("sleep", {"s": 0.0}, tenant_id="small")
        one.wait_for_start(job)
        assert int(store.client.hget(f"ready:{STREAM}", "n")) > 500, "the flood still waits"
        (stats,) = [row for row in run_json(one, "stats")["streams"] if row["stream"] == STREAM]
        assert stats["waiting"] > 0
        waiting = one.enqueue("sleep", {"s": 0.0}, tenant_id="flood")
        # The reader has it for a moment before it sorts it.
        eventually(lambda: "ahead" in str(run_json(one, "explain", waiting)["found"]), saying="it waits")


def test_a_backlog_is_run_once_though_every_role_is_killed(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", "two") as services:
        jobs = services[0].enqueue_many(
            {"type": "sleep", "tenant_id": f"t{number % 7}", "payload": {"s": 0.005}}
            for number in range(3000)
        )
        eventually(lambda: store.client.hget(f"ready:{STREAM}", "n"), saying="sorted")
        for service in services:
            for role in ("reader", "worker 0", "reader"):
                pid = service.kill_role(role)
                service.wait_for_successor(role, pid)
        os.kill(services[1].pid, signal.SIGKILL)
        one = services[0]
        eventually(lambda: starts(services).keys() >= set(jobs), 60.0, "all started")
        one.wait_until_drained(60.0)
        assert store.client.exists(f"ready:{STREAM}", f"ready:{STREAM}/heads", f"ready:{STREAM}/slots") == 0
        assert one.dead_letters() == []


def test_a_limit_of_the_file_holds_over_two_hosts_whose_readers_are_killed(
    tmp_path: Path, store: RedisServer
) -> None:
    config = tmp_path / "jobworker.toml"
    config.write_text('[[limit]]\ntype = "sleep"\nkey = "tenant"\nconcurrency = 1\n')
    rng = random.Random(1)
    with hosts(tmp_path, store, "one", "two", config=config, procs=3) as services:
        one = services[0]
        jobs = [
            {"type": "sleep", "tenant_id": f"t{number % 3}", "payload": {"s": 0.02}} for number in range(120)
        ]
        ids = one.enqueue_many(jobs)
        tenant_of = {id: f"t{number % 3}" for number, id in enumerate(ids)}
        killed = 0
        while not starts(services).keys() >= set(ids):
            service = rng.choice(services)
            service.wait_for_successor("reader", service.kill_role("reader"))
            killed += 1
            time.sleep(rng.uniform(0.0, 0.3))  # jobs run meanwhile
            assert killed < 100
        one.wait_until_drained(60.0)
        assert overlaps(services, tenant_of) == {"t0": 1, "t1": 1, "t2": 1}


def test_limits_change_by_hup_and_by_command_without_a_restart(tmp_path: Path, store: RedisServer) -> None:
    config = tmp_path / "jobworker.toml"
    config.write_text('[[limit]]\ntype = "noop"\nrate = "1/day"\n')
    with hosts(tmp_path, store, "one", config=config) as (one,):
        first, second = one.enqueue("noop"), one.enqueue("noop")
        eventually(lambda: len(one.events("end")) == 1)
        blocked = first if one.events("end")[0].id == second else second
        reached = "limit noop/global is reached"
        eventually(
            lambda: any(reached in place["why"] for place in run_json(one, "explain", blocked)["found"])
        )
        config.write_text('[[limit]]\ntype = "noop"\nrate = "2/day"\n')
        one.send(signal.SIGHUP)
        one.wait_for_end(blocked)
        third = one.enqueue("noop")
        run_json(one, "limit", "clear", "noop/global")
        one.wait_for_end(third)
        limits = run_json(one, "limit", "list")["streams"][STREAM]["limits"]
        assert limits == []
