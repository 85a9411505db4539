"""Several services on one store: a killed host is taken over, and none is idle while jobs wait on another."""

from collections import Counter
from pathlib import Path

import pytest

from support.redis_servers import RedisServer
from support.service import Service, ending, eventually, handlers

pytestmark = pytest.mark.process

LEASE_S = 2.0
#: Time in which all jobs of a lost host must have run: a lease and 5 s, on a busy machine four times that.
TAKEN_OVER_S = 4 * (LEASE_S + 5.0)
#: Where no host is lost, a host that gets no processor for a while must not lose its jobs.
LONG_LEASE_S = 60.0


def host(folder: Path, store: RedisServer, name: str, lease_s: float = LEASE_S) -> Service:
    (folder / name).mkdir()
    toys = handlers("Noop", "Gate")
    return Service(folder / name, toys, procs=1, redis_url=store.url, instance=name, lease=lease_s)


def long_and_short(one: Service, count: int) -> tuple[str, list[str]]:
    """A job that waits at a gate, and short ones before and behind it; returns its id and those of all."""
    ids = one.enqueue_many(
        {"type": "gate", "payload": {"gate": "go"}} if number == 300 else {"type": "noop"}
        for number in range(count)
    )
    one.wait_for_start(ids[300])
    return ids[300], ids


def test_jobs_behind_a_long_one_run_once_on_the_idle_host(tmp_path: Path, store: RedisServer) -> None:
    busy, idle = (host(tmp_path, store, name, LONG_LEASE_S) for name in ("busy", "idle"))
    with ending(busy), ending(idle):
        busy.start()
        gate, ids = long_and_short(busy, 360)
        idle.start()
        eventually(lambda: len(busy.events("end")) + len(idle.events("end")) == len(ids) - 1, TAKEN_OVER_S)
        assert not busy.events("end", gate), "while the long one runs"
        assert busy.logged("jobs.handed_back") or idle.events("end"), "they came from the other host"
        busy.open_gate("go")
        busy.wait_until_drained()
        starts = Counter(event.id for one in (busy, idle) for event in one.events("start"))
        assert starts == Counter(ids), "each started once"
        assert busy.terminate() == idle.terminate() == 0


def test_all_jobs_of_a_killed_host_run_soon_after_its_lease(tmp_path: Path, store: RedisServer) -> None:
    lost, other = host(tmp_path, store, "lost"), host(tmp_path, store, "other")
    with ending(lost), ending(other):
        lost.start()
        gate, ids = long_and_short(lost, 360)
        lost.kill()
        other.start()
        other.open_gate("go")
        eventually(lambda: not other.unfinished(), TAKEN_OVER_S)
        ended = Counter(event.id for one in (lost, other) for event in one.events("end"))
        assert ended.keys() == set(ids), "none is lost"
        assert len(other.events("end", gate)) == 1
        assert other.terminate() == 0
