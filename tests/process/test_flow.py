"""Flow control with real services: turns of tenants, and limits over several hosts that are killed."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.operator import run_json
from support.redis_servers import RedisServer
from support.service import STREAM, Service, ending, eventually, handlers

pytestmark = pytest.mark.process

#: Short, so that jobs of a killed host run again soon.
LEASE_S = 2.0


def host(folder: Path, server: RedisServer, name: str, **options: object) -> Service:
    (folder / name).mkdir()
    environment = {"TOYS_DIR": str(folder / name / "toys")}
    return Service(
        folder / name, handlers("Sleep", "Noop"), redis_url=server.url, instance=name, lease=LEASE_S,
        environment=environment, **options,
    )  # fmt: skip


@contextlib.contextmanager
def hosts(folder: Path, server: RedisServer, *names: str, **options: object) -> Iterator[list[Service]]:
    """Started services on one store, as if each had a machine of its own."""
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            one = host(folder, server, name, **options)
            stack.enter_context(ending(one))
            started.append(one.start())
        yield started


def starts(services: list[Service]) -> dict[str, float]:
    return {event.id: event.mono_s for one in services for event in one.events("start")}


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
        found = eventually(lambda: run_json(one, "explain", waiting)["found"])
        assert "ahead" in found[0]["why"]


def test_a_backlog_is_run_once_though_every_role_is_killed(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", "two") as services:
        jobs = services[0].enqueue_many(
            {"type": "sleep", "tenant_id": f"t{number % 7}", "payload": {"s": 0.005}}
            for number in range(1500)
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


def overlaps(services: list[Service], tenant_of: dict[str, str]) -> dict[str, int]:
    """Most jobs of each tenant that ran at once. A run without an end ended with its process."""
    changes: list[tuple[float, int, str]] = []
    for service in services:
        for event in service.events("start"):
            changes.append((event.mono_s, 1, tenant_of[event.id]))
        for event in service.events("end"):
            changes.append((event.mono_s, -1, tenant_of[event.id]))
    now: dict[str, int] = {}
    most: dict[str, int] = {}
    for _, change, tenant in sorted(changes):
        now[tenant] = now.get(tenant, 0) + change
        most[tenant] = max(most.get(tenant, 0), now[tenant])
    return most


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
