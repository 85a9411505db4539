"""Faults of the chaos test: what is done to which process or connection, and which jobs show recovery."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from chaos_events import EventLog
from chaos_load import GROUP, PROBE_STREAM, STREAM, Ledger, probe
from chaos_proxy import Proxy
from chaos_world import LIMIT_S, POLL_S, Server, Service, is_alive
from hosts import cpu_s

#: Share of each kind in 268 faults, and the promised limit of its recovery in seconds. A swallowed connection
#: adds the 8 s after which a silent connection is closed.
KINDS: dict[str, tuple[int, float]] = {
    "worker": (135, 2.0), "reader": (20, 2.0), "reaper": (15, 2.0), "supervisor": (15, 5.0),
    "forkserver": (10, 3.0), "guard": (5, 2.0),
    "pair": (10, 5.0), "stop": (10, 2.0), "redis": (10, 3.0), "cut": (6, 3.0), "stall": (3, 3.0),
    "swallow": (3, 10.0), "slow": (3, 3.0), "client-kill": (5, 3.0), "script-flush": (2, 3.0),
    "busy": (3, 3.0), "readonly": (3, 3.0), "oom": (2, 3.0), "hup": (4, 2.0), "term": (4, 5.0),
}  # fmt: skip
#: Loss of a host for longer than the lease; needs a second service. The promised limit is lease + 5 s.
HOST = "host"
#: Kinds that only kill processes of a service.
KILLS = frozenset({"worker", "reader", "reaper", "supervisor", "forkserver", "guard", "pair"})
HOST_MARGIN_S = 5.0
#: Opt-in faults that break promises by their nature, with these promises and the limit in seconds. A
#: recreated group delivers its whole stream again; the entries of a deleted stream are lost.
_REDELIVERED = frozenset({"letters_repeated", "poison_starts_over", "retries_early"})
DESTRUCTIVE = {
    "group-delete": (_REDELIVERED, 10.0),
    "stream-delete": (_REDELIVERED | {"lost", "letters_missing"}, 10.0),
}


#: CPU time has a resolution of 10 ms, so it is measured only for faults of at least this length.
_MIN_MEASURED_S = 1.0


@dataclass
class InjectedFault:
    """Injected fault; recovery is complete when each awaited job has started after ``mono_s``."""

    kind: str
    mono_s: float
    awaited: frozenset[str]
    took_s: float | None = None
    detail: str = ""
    #: CPU use of the busiest of supervisor, reader and reaper during the fault, as a share of a core.
    busiest: float | None = None

    @property
    def ends_supervisor(self) -> bool:
        """Whether a supervisor was killed."""
        return self.kind in ("supervisor", HOST) or (self.kind == "pair" and "supervisor" in self.detail)


@dataclass
class World:
    """Targets of the faults."""

    server: Server
    proxy: Proxy
    services: list[Service]
    event_log: EventLog
    ledger: Ledger
    rng: random.Random
    lease_s: float
    probes: int = 0
    #: Begin and end of each time in which the server had no memory (monotonic seconds).
    oom: list[tuple[float, float]] = field(default_factory=list)

    def probe(self, *, by_retry: bool = False) -> frozenset[str]:
        """Send a job that no other job delays: on a stream of its own, or as a due retry."""
        self.probes += 1
        job = probe(self.probes)
        self.ledger.planned[job.id] = job
        give_up_at = time.monotonic() + LIMIT_S
        while True:
            try:
                if by_retry:
                    self.server.client.zadd(f"retry:{PROBE_STREAM}", {job.fields[b"data"]: time.time()})
                    self.ledger.confirmed[job.id] = ""
                else:
                    self.ledger.confirmed[job.id] = self.server.client.xadd(PROBE_STREAM, job.fields).decode()
                return frozenset({job.id})
            except redis.ResponseError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(POLL_S)  # the server still refuses writes after the last fault

    def wait_and_measure_cpu(self, length_s: float) -> float | None:
        """Wait for `length_s`; returns the busiest role's share of a core, None after a short fault."""
        pids = [pid for service in self.services for pid in service.control_pids()]
        before = _spent_s(pids)
        time.sleep(length_s)  # the fault is a length of time
        after = _spent_s(pids)
        if not before or not after or length_s < _MIN_MEASURED_S:
            return None
        return max(late - early for early, late in zip(before, after, strict=True)) / length_s

    def service(self) -> Service:
        """A random service."""
        return self.rng.choice(self.services)

    def pids(self, role: str) -> tuple[Service, list[int]]:
        """A service that runs the role, and the process ids; waits for one."""
        give_up_at = time.monotonic() + LIMIT_S
        while True:
            service = self.service()
            if pids := service.roles().get(role):
                return service, pids
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"no {role} within {LIMIT_S:.0f} s")
            time.sleep(POLL_S)

    def pending(self, service: Service) -> set[str]:
        """Pending jobs of a service that were never retried and must succeed."""
        ids = {entry: id for id, entry in self.ledger.confirmed.items()}
        found = set()
        for consumer in self.server.client.xinfo_consumers(STREAM, GROUP):
            if consumer["name"].decode().endswith(f"/{service.name}") and consumer["pending"]:
                rows = self.server.client.xpending_range(STREAM, GROUP, "-", "+", 1000, consumer["name"])
                found |= {ids.get(row["message_id"].decode(), "") for row in rows}
        return {id for id in found if id and self.ledger.planned[id].must_run}

    def kill(self, role: str) -> int:
        """SIGKILL a process of a role and wait for its end; returns its process id."""
        service, pids = self.pids(role)
        if role == "supervisor":
            service.kill_supervisor()
            return pids[0]
        busy = [pid for pid in pids if pid in self.event_log.running()]
        pid = self.rng.choice(busy if busy and self.rng.random() < 0.7 else pids)
        _send(pid, signal.SIGKILL)
        _await_end(pid)
        return pid


def _spent_s(pids: Sequence[int]) -> list[float]:
    """CPU time of each; empty if one has ended, since the start of its successor would be included."""
    try:
        return [cpu_s([pid]) for pid in pids]
    except OSError:
        return []


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile


def _await_end(pid: int) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while is_alive(pid) and time.monotonic() < give_up_at:
        time.sleep(0.001)  # not a child of this process: no event


def _worker(world: World) -> InjectedFault:
    """Kill a worker. Its running jobs are awaited, without those that must fail: this may be the last try."""
    mono_s = time.monotonic()
    pid = world.kill("worker")
    held = world.event_log.running().get(pid, set())
    awaited = {id for id in held if id in world.ledger.planned and world.ledger.planned[id].must_run}
    return InjectedFault("worker", mono_s, frozenset(awaited), detail="" if awaited else "idle")


def _role(role: str) -> Callable[[World], InjectedFault]:
    def fault(world: World) -> InjectedFault:
        mono_s = time.monotonic()
        world.kill(role)
        return InjectedFault(role, mono_s, world.probe(by_retry=role == "reaper"))

    return fault


def _pair(world: World) -> InjectedFault:
    """Kill two roles within 0.1 s."""
    first, second = world.rng.sample(["worker", "reader", "reaper", "supervisor", "forkserver", "worker"], 2)
    mono_s = time.monotonic()
    world.kill(first)
    time.sleep(world.rng.uniform(0, 0.1))  # the interval is part of the fault
    world.kill(second)
    return InjectedFault(
        "pair", mono_s, world.probe() | world.probe(by_retry=True), detail=f"{first}+{second}"
    )


def _stop(world: World) -> InjectedFault:
    """SIGSTOP and SIGCONT; a worker is at times stopped past its job's timeout, and so killed."""
    role = world.rng.choice(["worker", "reader", "reaper", "supervisor", "forkserver"])
    _, pids = world.pids(role)
    pid = world.rng.choice(pids)
    _send(pid, signal.SIGSTOP)
    time.sleep(world.rng.uniform(0.2, 4.0))  # the fault is a length of time
    _send(pid, signal.SIGCONT)
    return InjectedFault("stop", time.monotonic(), world.probe() | world.probe(by_retry=True), detail=role)


def _hup(world: World) -> InjectedFault:
    """Rolling restart: workers are replaced one by one while others work."""
    mono_s = time.monotonic()
    _send(world.service().pid, signal.SIGHUP)
    return InjectedFault("hup", mono_s, world.probe() | world.probe(by_retry=True))


def _term(world: World) -> InjectedFault:
    """Graceful stop and restart; measured from the exit."""
    world.service().restart()
    return InjectedFault("term", time.monotonic(), world.probe() | world.probe(by_retry=True))


def _redis(world: World) -> InjectedFault:
    """Kill the server and restart it on its data; at times a role is killed meanwhile."""
    world.server.kill()
    away_s = world.rng.uniform(0.1, 2.0)
    detail = ""
    if world.rng.random() < 0.2:
        detail = world.rng.choice(["worker", "reader", "reaper"])
        world.kill(detail)
    busiest = world.wait_and_measure_cpu(away_s)
    world.server.start()
    mono_s = time.monotonic()
    awaited = world.probe() | world.probe(by_retry=True)
    return InjectedFault("redis", mono_s, awaited, detail=detail, busiest=None if detail else busiest)


def _cut(world: World) -> InjectedFault:
    mono_s = time.monotonic()
    world.proxy.cut()
    return InjectedFault("cut", mono_s, world.probe() | world.probe(by_retry=True))


def _temporary(
    kind: str, min_s: float, max_s: float, switch: Callable[[World, bool], None]
) -> Callable[[World], InjectedFault]:
    def fault(world: World) -> InjectedFault:
        length_s = world.rng.uniform(min_s, max_s)
        switch(world, True)
        try:
            busiest = world.wait_and_measure_cpu(length_s)
        finally:
            switch(world, False)
        mono_s = time.monotonic()
        if kind == "oom":
            world.oom.append((mono_s - length_s, mono_s))
        awaited = world.probe() | world.probe(by_retry=True)
        return InjectedFault(kind, mono_s, awaited, detail=f"{length_s:.1f} s", busiest=busiest)

    return fault


def _readonly(world: World, on: bool) -> None:
    # A replica of a missing host keeps its data and refuses writes.
    world.server.client.replicaof(*(("127.0.0.1", 1) if on else ("NO", "ONE")))


def _out_of_memory(world: World, on: bool) -> None:
    world.server.client.config_set("maxmemory", "1" if on else "0")


def _busy(world: World) -> InjectedFault:
    """An endless script of another client, killed after a while."""
    connection: Any = redis.Redis.from_url(world.server.url, protocol=2).connection_pool.make_connection()
    connection.connect()
    connection.send_command("EVAL", "while true do end", 0)
    time.sleep(world.rng.uniform(0.3, 1.5))  # the fault is a length of time
    world.server.client.execute_command("SCRIPT", "KILL")
    connection.disconnect()
    return InjectedFault("busy", time.monotonic(), world.probe() | world.probe(by_retry=True))


def _command(kind: str, *command: str) -> Callable[[World], InjectedFault]:
    def fault(world: World) -> InjectedFault:
        mono_s = time.monotonic()
        world.server.client.execute_command(*command)
        return InjectedFault(kind, mono_s, world.probe() | world.probe(by_retry=True))

    return fault


def _host(world: World) -> InjectedFault:
    """A service is down for longer than its lease; another claims its jobs."""
    service = world.service()
    service.pause_restarts(True)
    mono_s = time.monotonic()
    service.kill_supervisor()
    awaited = world.pending(service)
    time.sleep(world.lease_s + HOST_MARGIN_S)  # the fault is a length of time
    service.pause_restarts(False)
    return InjectedFault(HOST, mono_s, frozenset(awaited), detail="" if awaited else "idle")


FAULTS: dict[str, Callable[[World], InjectedFault]] = {
    "worker": _worker,
    "reader": _role("reader"),
    "reaper": _role("reaper"),
    "supervisor": _role("supervisor"),
    "forkserver": _role("forkserver"),
    "guard": _role("guard"),
    "pair": _pair,
    "stop": _stop,
    "redis": _redis,
    "cut": _cut,
    "stall": _temporary("stall", 0.5, 7.0, lambda world, on: world.proxy.stall(on)),
    "swallow": _temporary("swallow", 0.5, 3.0, lambda world, on: world.proxy.swallow(on)),
    "slow": _temporary("slow", 1.0, 3.0, lambda world, on: world.proxy.delay(0.2 if on else 0.0)),
    "client-kill": _command("client-kill", "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
    "script-flush": _command("script-flush", "SCRIPT", "FLUSH"),
    "busy": _busy,
    "hup": _hup,
    "term": _term,
    "readonly": _temporary("readonly", 0.2, 2.0, _readonly),
    "oom": _temporary("oom", 0.2, 2.0, _out_of_memory),
    HOST: _host,
    "group-delete": _command("group-delete", "XGROUP", "DESTROY", "chaos:jobs", "chaos"),
    "stream-delete": _command("stream-delete", "DEL", "chaos:jobs"),
}


def schedule(kinds: Sequence[str], total: int, rng: random.Random) -> list[str]:
    """`total` faults in random order: each kind at least once, otherwise in the shares of `KINDS`."""
    weights = [KINDS[kind][0] if kind in KINDS else 5 for kind in kinds]
    counts = [max(1, total * weight // sum(weights)) for weight in weights]
    while sum(counts) > max(total, len(kinds)):
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < total:
        counts[weights.index(max(weights))] += 1
    order = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    rng.shuffle(order)
    return order


def limit_s(kind: str, lease_s: float) -> float:
    """The promised limit of a recovery, in seconds."""
    if kind == HOST:
        return lease_s + HOST_MARGIN_S
    return KINDS[kind][1] if kind in KINDS else DESTRUCTIVE[kind][1]


def excused_promises(kinds: Iterable[str]) -> set[str]:
    """Promises that faults of these kinds break by their nature."""
    return {promise for kind in kinds if kind in DESTRUCTIVE for promise in DESTRUCTIVE[kind][0]}
