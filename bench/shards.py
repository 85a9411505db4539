"""Shards: throughput of three masters beside one, and every job counted while masters fail and slots move.

``python bench/shards.py`` runs both parts and prints a table; ``--json`` prints the figures as JSON. It exits
with 1 if a job is lost.

pair: the jobs wait on a cluster of one master, then in the shards of a cluster of three, in turns. Each
server has the same CPU quota, which must be small enough for the service to keep up with three of them. The
CPU time of a job says what limits the rate.

moves: two services on a cluster of three masters with a replica each. A producer that knows of shards and
one that does not send jobs at a steady rate, while a slot of a shard and that of the stream move, a replica
is promoted, and a master is killed.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import options
from hosts import cpu_s, format_facts, host_facts, roles_of, table
from nodes import Nodes, cpu_quota, nodes
from redis.exceptions import RedisError
from rig import JOB_TYPE, LIMIT_S, NOOP, STAMP, job, say, service

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.producer import Producer
from jobworker.worker.safe_text import safe_json
from jobworker.worker.shards import shard_names, shard_number

_STREAM, _GROUP, _HOLD = "jobworker-bench:shards", "bench", "hold"
#: Enough that each shard gets about as many jobs.
_TENANTS = 1000
_AT_ONCE = 1000
_POLL_S = 0.02
_SHARDS = 3
#: Time between two events of the part ``moves``, and before the first (seconds).
_EVERY_S = 6.0


class Place(NamedTuple):
    """Stream and group of a service."""

    stream: str = _STREAM
    group: str = _GROUP


class Drain(NamedTuple):
    """One drain. CPU time in microseconds a job: of the service by role, of each master."""

    masters: int
    jobs: int
    jobs_per_s: float
    cpu_us: dict[str, float]
    master_us: list[float]


class Event(NamedTuple):
    """What happened, how long it took, and the longest time without the start of a job from then to the next
    event (seconds)."""

    name: str
    took: float
    silence: float


class Moves(NamedTuple):
    """Jobs that were acknowledged to the producer. ``unsure`` ones were sent again after an error: they may
    repeat."""

    jobs: int
    lost: int
    repeated: int
    unsure: int
    events: list[Event]


# -- pair


def drain(masters: int, jobs: int, procs: int, quota: float) -> Drain:
    """Let a service finish jobs that wait on ``masters`` servers, each with a shard if there are several."""
    shards = masters if masters > 1 else 0
    names = shard_names(_STREAM, shards) if shards else (_STREAM,)
    with nodes(masters) as cluster, ExitStack() as stack:
        client = stack.enter_context(cluster.client())
        _fill(client, names, jobs)
        settings = {"JOBWORKER_SHARDS": str(shards)}
        pid = stack.enter_context(service(cluster.url, Place(), NOOP, procs, **settings))  # type: ignore[arg-type]
        stack.enter_context(cpu_quota([node.process for node in cluster.masters], quota))
        roles = roles_of(pid)
        before = {role: cpu_s(pids) for role, pids in roles.items()}
        server_before = [node.cpu_s() for node in cluster.masters]
        began_s = time.monotonic()
        for name in names:
            client.xgroup_setid(name, _GROUP, "0", entries_read=0)
            client.xgroup_destroy(name, _HOLD)
        _wait(lambda: all(_is_done(client, name) for name in names), LIMIT_S)
        took_s = time.monotonic() - began_s
        if any(client.zcard(f"retry:{{{name}}}") + client.xlen(f"dlq:{{{name}}}") for name in names):
            raise RuntimeError("jobs failed: not a drain of no-op jobs")
        cpu_us = {role: round((cpu_s(pids) - before[role]) * 1e6 / jobs, 1) for role, pids in roles.items()}
        spent_s = [node.cpu_s() - was for node, was in zip(cluster.masters, server_before, strict=True)]
        return Drain(
            masters, jobs, round(jobs / took_s), cpu_us, [round(one * 1e6 / jobs, 1) for one in spent_s]
        )


def _fill(client: Any, names: tuple[str, ...], jobs: int) -> None:
    """Enqueue jobs out of the group's sight; a second group keeps a reaper from trimming them."""
    for name in names:
        client.xgroup_create(name, _HOLD, "0", mkstream=True)
    for at in range(0, jobs, _AT_ONCE):
        pipe = client.pipeline()
        for number in range(at, min(at + _AT_ONCE, jobs)):
            tenant = f"t{number % _TENANTS:04}"
            shard = names[shard_number(len(names), tenant, "", None)]
            pipe.xadd(shard, {"data": job(number).replace(b"t001", tenant.encode())})
        pipe.execute()
    for name in names:
        client.xgroup_create(name, _GROUP, "$")


def _is_done(client: Any, name: str) -> bool:
    group = next(one for one in client.xinfo_groups(name) if one["name"] == _GROUP.encode())
    return bool(group["lag"] == 0 and group["pending"] == 0) and not client.zcard(f"ready:{{{name}}}/heads")


# -- moves


class Load:
    """Two producers at a steady rate each. A send that fails is repeated with the same id."""

    def __init__(self, cluster: Nodes, per_s: int) -> None:
        self._per_s = per_s
        self.sent: list[str] = []
        self.unsure: set[str] = set()
        self._stop = threading.Event()
        self._client, self._producer = cluster.client(), Producer(cluster.url)
        sends = (("plain", self._send_plain), ("direct", self._send_direct))
        self._threads = [threading.Thread(target=self._run, args=one, daemon=True) for one in sends]
        for thread in self._threads:
            thread.start()

    def _run(self, kind: str, send: Callable[[str, str], None]) -> None:
        number = 0
        while not self._stop.wait(1 / self._per_s):
            number += 1
            id, tenant = f"{kind}-{number}", f"t{number % _TENANTS:04}"
            while not self._sends(send, id, tenant):
                self.unsure.add(id)
                time.sleep(0.05)  # as a producer that waits for the failover
            self.sent.append(id)

    def _sends(self, send: Callable[[str, str], None], id: str, tenant: str) -> bool:
        with suppress(StoreUnavailable, RedisError, OSError):
            send(id, tenant)
            return True
        return False

    def _send_plain(self, id: str, tenant: str) -> None:
        self._client.xadd(_STREAM, {"data": f'{{"id":"{id}","type":"{JOB_TYPE}","tenant_id":"{tenant}"}}'})

    def _send_direct(self, id: str, tenant: str) -> None:
        self._producer.enqueue(JOB_TYPE, None, tenant_id=tenant, id=id, stream=_STREAM)

    def stop(self) -> None:
        """End the load."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._producer.close()
        self._client.close()


def moves(per_s: int, limit_s: float) -> Moves:
    """Count the jobs while masters fail and slots move."""
    with nodes(_SHARDS, 1) as cluster, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [folder / name for name in ("a", "b")]
        for path in paths:
            settings = {"JOBWORKER_SHARDS": str(_SHARDS), "JOBWORKER_INSTANCE": path.name}
            more = {"BENCH_STAMPS": str(path), "JOBWORKER_LEASE": "3"}
            stack.enter_context(
                service(cluster.url, Place(), STAMP, 1, **settings, **more)  # type: ignore[arg-type]
            )
        load = Load(cluster, per_s)
        times: list[tuple[str, float, float]] = []
        time.sleep(_EVERY_S)  # a steady state before the first event
        for name, act in _events(cluster):
            began_s = time.monotonic()
            act()
            times.append((name, began_s, time.monotonic() - began_s))
            time.sleep(_EVERY_S)  # what follows from the event shows by itself
        ended_s = time.monotonic()
        load.stop()
        _wait(lambda: not set(load.sent) - {id for id, _ in _stamps(paths)}, limit_s)
        time.sleep(1.0)  # a job that repeats would start now
        return _judge(load, list(_stamps(paths)), times, ended_s)


def _events(cluster: Nodes) -> Iterator[tuple[str, Callable[[], None]]]:
    first, second, third = shard_names(_STREAM, _SHARDS)
    yield "slot of a shard moves", lambda: cluster.move(second, cluster.owner(third))
    other = next(node for node in cluster.masters if node is not cluster.owner(_STREAM))
    yield "slot of the stream moves", lambda: cluster.move(_STREAM, other)
    replica = cluster.replica_of(cluster.owner(first))
    yield "CLUSTER FAILOVER", lambda: replica.client.execute_command("CLUSTER", "FAILOVER")
    yield "kill -9 of a master", cluster.owner(third).kill


def _stamps(paths: list[Path]) -> Iterator[tuple[str, float]]:
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            id, mono_ns = line.split()
            yield id, int(mono_ns) / 1e9


def _judge(
    load: Load, stamps: list[tuple[str, float]], times: list[tuple[str, float, float]], ended_s: float
) -> Moves:
    runs = Counter(id for id, _ in stamps)
    starts = sorted(mono_s for _, mono_s in stamps)
    ends = [began_s for _, began_s, _ in times[1:]] + [ended_s]
    events = []
    for (name, began_s, took_s), end_s in zip(times, ends, strict=True):
        inside = [began_s, *(one for one in starts if began_s < one < end_s), end_s]
        silence_s = max(after - one for one, after in pairwise(inside))
        events.append(Event(name, round(took_s, 2), round(silence_s, 2)))
    lost = set(load.sent) - runs.keys()
    repeated = [id for id, count in runs.items() if count > 1 and id not in load.unsure]
    return Moves(len(load.sent), len(lost), len(repeated), len(load.unsure), events)


def _wait(is_over: Callable[[], bool], limit_s: float) -> None:
    give_up_at = time.monotonic() + limit_s
    while not is_over():
        if time.monotonic() > give_up_at:
            say("not done in time")
            return
        time.sleep(_POLL_S)  # the state of a stream sends no event


# -- report


def pair(jobs: int, procs: int, quota: float, repeat: int) -> dict[str, Any]:
    """Both drains in turns; the ratio is that of the medians."""
    found: dict[int, list[Drain]] = {1: [], _SHARDS: []}
    for _ in range(repeat):
        for masters, drains in found.items():
            drains.append(drain(masters, jobs, procs, quota))
            say(str(drains[-1]))
    rates, busiest = {}, {}
    for masters, drains in found.items():
        rates[masters] = statistics.median(one.jobs_per_s for one in drains)
        busiest[masters] = statistics.median(max(one.master_us) for one in drains)
    return {
        "quota": quota,
        "jobs_per_s": rates,
        "ratio": round(rates[_SHARDS] / rates[1], 2),
        "busiest_master_us": busiest,
        "ratio_by_cpu": round(busiest[1] / busiest[_SHARDS], 2),
        "drains": [one._asdict() for drains in found.values() for one in drains],
    }


def _print_pair(measured: dict[str, Any]) -> None:
    rows = [("masters", "jobs/s", "busiest master us/job", "reader us/job", "worker us/job")]
    for one in measured["drains"]:
        figures = (one["masters"], one["jobs_per_s"], max(one["master_us"]))
        roles = (one["cpu_us"][role] for role in ("reader", "worker"))
        rows.append(tuple(map(str, [*figures, *roles])))  # type: ignore[arg-type]
    print(table(rows))
    say(f"three masters : one, by rate {measured['ratio']}, by CPU time {measured['ratio_by_cpu']}")


def _print_moves(found: Moves) -> None:
    rows = [(one.name, str(one.took), str(one.silence)) for one in found.events]
    print(table([("event", "took s", "silence s"), *rows]))
    say(f"{found.jobs} jobs, lost {found.lost}, repeated {found.repeated}, sent again {found.unsure}")


@click.command(context_settings={"show_default": True})
@click.option("--part", type=click.Choice(["all", "pair", "moves"]), default="all", help="What to run.")
@click.option("--jobs", default=30_000, help="Jobs of a drain.")
@click.option("--procs", default=1, help="Workers of the service that drains.")
@click.option("--quota", default=0.0, help="Cores of each master, such as 0.05; 0: no limit.")
@click.option("--repeat", default=3, help="Drains of each kind.")
@click.option("--rate", "per_s", default=200, help="Jobs per second of each producer of the part moves.")
@click.option("--limit", "limit_s", default=60.0, help="How long the last jobs may take (seconds).")
@options.as_json
def main(
    part: str, jobs: int, procs: int, quota: float, repeat: int, per_s: int, limit_s: float, as_json: bool
) -> None:
    """Measure shards on clusters of this machine."""
    with nodes(1) as cluster:
        facts = host_facts(cluster.masters[0].client)
    measured = pair(jobs, procs, quota, repeat) if part != "moves" else None
    found = moves(per_s, limit_s) if part != "pair" else None
    if as_json:
        print(safe_json({"host": facts, "pair": measured, "moves": found and found._asdict()}))
    else:
        say(format_facts(facts))
        if measured:
            _print_pair(measured)
        if found:
            _print_moves(found)
    sys.exit(1 if found and found.lost else 0)


if __name__ == "__main__":
    main()
