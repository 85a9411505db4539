"""Trials of failover: a master is lost or replaced while two services work and a producer adds jobs.

The servers are those of the tests (``tests/support/topologies.py``), on this machine.
"""

import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from rig import STAMP, job
from topology_rig import Trial, read_starts, recording_service, wait

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.store.redis.producer import RedisProducerStore

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support.topologies import (  # type: ignore[import-not-found] # tests are not checked
    MASTER_NAME,
    Cluster,
    SentinelGroup,
    cluster,
    sentinel_group,
    silent_server,
)

_NEW_PER_S = 200
#: Load before and after the event (seconds).
_BEFORE_S, _AFTER_S = 3.0, 12.0
#: Longest silence: where a server is lost, and where one no longer answers.
_BAR_S, _HUNG_BAR_S = 5.0, 10.0


class Stream(NamedTuple):
    """The stream of a trial and its group."""

    stream: str = "jobworker-bench:failover"
    group: str = "bench"


class _Load:
    """A producer at a steady rate. It adds a job again until the store has acknowledged it."""

    def __init__(self, url: str) -> None:
        self._store = RedisProducerStore(url)
        self._stop = threading.Event()
        self.acknowledged_ns: dict[int, int] = {}
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        number, due_s = 0, time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            try:
                self._store.add(Stream().stream, [job(number)])
            except StoreUnavailable:
                due_s = time.monotonic() + 1 / _NEW_PER_S
                continue
            self.acknowledged_ns[number] = time.monotonic_ns()
            number, due_s = number + 1, due_s + 1 / _NEW_PER_S

    def stop(self) -> None:
        """End the production."""
        self._stop.set()
        self._thread.join()
        self._store.close()


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        (servers := Path(name) / "servers").mkdir()
        yield servers


def _trial(name: str, url: str, event: Callable[[], object], bar_s: float, lease_s: float) -> Trial:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = [folder / one for one in ("a", "b")]
        for path in paths:
            stack.enter_context(recording_service(url, Stream(), STAMP, 1, path, lease_s))
        load = _Load(url)
        time.sleep(_BEFORE_S)  # jobs run before the event
        event_ns = time.monotonic_ns()
        event()
        time.sleep(_AFTER_S)  # and after it
        end_ns = time.monotonic_ns()  # a producer that got no answer since the event is silence too
        load.stop()
        added = load.acknowledged_ns
        wait(lambda: added.keys() <= read_starts(paths).counts.keys(), 3 * lease_s + _AFTER_S)
        starts = read_starts(paths)
    waits = [
        max(0, starts.first_ns[one] - added_ns) / 1e9
        for one, added_ns in added.items()
        if one in starts.first_ns
    ]
    return Trial(
        name,
        len(added),
        len(added.keys() - starts.counts.keys()),
        starts.repeated,
        silence=starts.longest_gap_s(event_ns - 10**9, end_ns),
        done=round((max(starts.all_ns) - event_ns) / 1e9, 2),
        per_s=round(len(added) / (_BEFORE_S + _AFTER_S)),
        new_p50=round(statistics.median(waits), 4),
        new_max=round(max(waits), 3),
        shares=starts.shares,
        bar=bar_s,
    )


def _kill(group: SentinelGroup) -> None:
    group.master.kill()


def _failover(group: SentinelGroup) -> None:
    group.sentinels[0].client.execute_command("SENTINEL", "FAILOVER", MASTER_NAME)


def _hang(group: SentinelGroup) -> None:
    os.kill(group.master.pid, signal.SIGSTOP)


def _cut_off(group: SentinelGroup) -> None:
    """The old master runs on without replicas and does not hear of its successor."""
    for sentinel in group.sentinels:
        sentinel.client.execute_command("SENTINEL", "SET", MASTER_NAME, "down-after-milliseconds", "1")
    group.master.client.config_set("min-replicas-to-write", 1)
    group.master.client.config_set("min-replicas-max-lag", 1)
    _failover(group)


def _sentinel(
    name: str, event: Callable[[SentinelGroup], None], bar_s: float, hung: int = 0
) -> Callable[[float], Trial]:
    def run(lease_s: float) -> Trial:
        with ExitStack() as stack:
            group = stack.enter_context(sentinel_group(stack.enter_context(_folder()), "valkey"))
            url = group.url(*(stack.enter_context(silent_server()) for _ in range(hung)))
            return _trial(name, url, lambda: event(group), bar_s, lease_s)

    return run


def _kill_owner(made: Cluster) -> None:
    made.owner(Stream().stream).kill()


def _replace_owner(made: Cluster) -> None:
    made.fail_over(made.replicas[made.masters.index(made.owner(Stream().stream))])


def _move_slot(made: Cluster) -> None:
    stream = Stream().stream
    target = next(one for one in made.masters if one is not made.owner(stream))
    with made.moving_slot(stream, target):
        time.sleep(1.0)  # all keys have moved, and their slot has not


def _cluster(name: str, event: Callable[[Cluster], None]) -> Callable[[float], Trial]:
    def run(lease_s: float) -> Trial:
        with ExitStack() as stack:
            made = stack.enter_context(cluster(stack.enter_context(_folder()), "valkey", 3, 1))
            return _trial(name, made.url(), lambda: event(made), _BAR_S, lease_s)

    return run


#: Trials by name; each gets the lease (seconds).
TRIALS: dict[str, Callable[[float], Trial]] = {
    "sentinel: kill of the master": _sentinel("sentinel: kill of the master", _kill, _BAR_S),
    "sentinel: failover": _sentinel("sentinel: failover", _failover, _BAR_S),
    "sentinel: hung sentinels": _sentinel("sentinel: hung sentinels", _kill, _BAR_S, hung=2),
    "sentinel: hung master": _sentinel("sentinel: hung master", _hang, _HUNG_BAR_S),
    "sentinel: no replicas": _sentinel("sentinel: no replicas", _cut_off, _BAR_S),
    "cluster: kill of a master": _cluster("cluster: kill of a master", _kill_owner),
    "cluster: failover": _cluster("cluster: failover", _replace_owner),
    "cluster: slot move": _cluster("cluster: slot move", _move_slot),
}
