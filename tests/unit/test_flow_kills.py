"""A reader, reaper or canceller that is killed at any call of its store, with all of flow control in use.

A script is atomic, so its caller can be killed in two places only: before the call, and after the store has
carried it out but before the answer is used. Each run of the scenario kills one process in one such place.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from jobworker.worker.batches import BatchFinisher, find_batch
from jobworker.worker.cancel import Canceller, JobFilter
from jobworker.worker.cron.enqueuer import CronEnqueuer
from jobworker.worker.cron.table import CronTable
from jobworker.worker.flow import FlowConfig, Limit
from jobworker.worker.outcome import Failure
from jobworker.worker.producer import Producer
from jobworker.worker.results import decode_result
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.telemetry.metrics import MetricsBuffer
from support.reader_rig import SOURCE, WALL_START_S, FakeWorker, ReaderRig

STREAM = SOURCE.stream
#: The calls of each process that change the store.
CALLS = {
    "reader": ("acquire", "finish_read", "register_batches", "claim_keys", "screen", "sort", "take", "settle",
               "end_cancels"),
    "reaper": ("promote", "cron_publish", "cron_take", "batch_sweep", "batch_finish", "batch_seen",
               "batch_seal"),
    "canceller": ("cancel",),
}  # fmt: skip
#: Those that are called all the time. Without a result they changed nothing.
_OFTEN_IDLE = frozenset({"finish_read", "take", "promote", "batch_sweep"})
#: Length of a step, and the time after which everything has ended (s).
STEP_S, LENGTH_S = 1.0, 15.0
LEASE_S = 2.0
TICK = CronTable("tick", "@every 4s", "b", STREAM)
LIMIT = Limit("a/tenant", "a", "tenant", concurrency=1)
ASKS = {"keep_result": "true"}
#: Jobs of the limited tenant; c1 waits behind the first when it is cancelled.
LIMITED = ["l1", "l2", "c1", "l3"]
#: Jobs that run, beside one of u1 and u2, and the ticks of cron.
RUN = {"l1", "l2", "l3", "s2", "delayed", "m1", "p", "batch:B"}


class Killed(BaseException):
    """The process is killed."""


class Doom:
    """Kills one process at its call of a number: before it (even), or after it (odd); at none if that is -1.

    ``places`` collects the numbers of calls that had something to do.
    """

    def __init__(self, role: str, number: int) -> None:
        self.killed = False
        self.places: list[int] = []
        self._role = role
        self._number = number
        self._numbers = itertools.count(0, 2)

    def await_(self, role: str, store: MemoryStore) -> MemoryStore:
        """Kill the process of this store, if it has the role."""
        for name in CALLS[role] if role == self._role else ():
            setattr(store, name, partial(self._call, name, getattr(store, name)))
        return store

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **more: Any) -> Any:
        place = next(self._numbers)
        if place == self._number:
            self.killed = True
            raise Killed
        result = method(*args, **more)
        if place + 1 == self._number:
            self.killed = True
            raise Killed
        if name not in _OFTEN_IDLE or (any(result) if isinstance(result, tuple) else result):
            self.places += (place, place + 1)
        return result


class World:
    """A service, on a simulated clock; a process that was killed gets a successor in the next step."""

    def __init__(self, doom: Doom, successor_host: str) -> None:
        self.ran: list[str] = []
        self.appended: Counter[str] = Counter()
        self._doom = doom
        self._successor_host = successor_host
        self._now_s = 0.0
        self.server = MemoryServer(lambda: WALL_START_S + self._now_s, blocking=False)
        self._watch_appends()
        self.store = MemoryStore(self.server, "test")
        self.rigs: list[ReaderRig] = []
        self._failed: set[str] = set()
        self._held: set[str] = set()
        self._reaper: tuple[MemoryStore, CronEnqueuer, BatchFinisher] | None = None
        self._cancels = False
        self._most_done = 0
        assert self.store.configure(SOURCE, FlowConfig(0, (LIMIT,), {}))
        self._start_reader("one")

    def _watch_appends(self) -> None:
        append = self.server.append

        def watched(name: str, data: bytes | None) -> bytes:
            self.appended[json.loads(data or b"{}").get("id", "")] += 1
            return append(name, data)

        self.server.append = watched  # type: ignore[method-assign]

    def _start_reader(self, host: str) -> None:
        rig = ReaderRig(self.server, host, lease_s=LEASE_S)
        rig.now_s = self._now_s
        self.rigs.append(rig)
        self._doom.await_("reader", rig.store)
        rig.attach()
        if not self._guarded(rig.sync):
            rig.crash()
            self._start_reader(self._successor_host)

    def _start_reaper(self) -> None:
        store = self._doom.await_("reaper", MemoryStore(self.server, "reaper"))
        settings, metrics = self.rigs[0].settings, MetricsBuffer()
        cron = CronEnqueuer(store, settings, metrics, lambda: 1000.0 + self._now_s)
        cron.set_tables([TICK])
        finisher = BatchFinisher(
            store, settings, metrics, lambda: 1000.0 + self._now_s, lambda: WALL_START_S + self._now_s
        )
        self._reaper = store, cron, finisher

    @property
    def worker(self) -> FakeWorker:
        return self.rigs[-1].workers[0]

    def _guarded(self, act: Callable[[], None]) -> bool:
        """Whether it came to its end."""
        try:
            act()
        except Killed:
            return False
        return True

    def send(self) -> None:
        """All jobs of the scenario."""
        producer = Producer(store=MemoryStore(self.server, "producer"))
        self._add("a", "t1", *LIMITED)
        self._add("a", "t2", "u1", "u2", metadata={"idempotency_key": "k", **ASKS})
        self._add("a", "t2", "s1", "s2", metadata={"supersede_key": "s"})
        self._add("a", "t2", "delayed", metadata={"not_before": str(WALL_START_S + 2)})
        self._add("b", "t3", "c2", "p")
        once = {"idempotency_key": "m"}
        with producer.batch("t4", on_complete={"type": "b", "stream": STREAM}, id="B") as batch:
            for id, metadata in (("m1", once), ("m2", {}), ("m3", once)):
                batch.enqueue("b", None, id=id, stream=STREAM, metadata=metadata)
        producer.close()

    def _add(self, type: str, tenant: str, *ids: str, metadata: object = None) -> None:
        for id in ids:
            job = {"id": id, "type": type, "tenant_id": tenant, "metadata": metadata}
            self.server.append(STREAM, json.dumps(job).encode())

    def run(self) -> None:
        """All steps: each process acts, then what must hold at every instant is looked at."""
        while self._now_s < LENGTH_S:
            self._now_s += STEP_S
            self._cancels = self._cancels or self._now_s == 2.0
            self._step_reader()
            self._step_reaper()
            if self._cancels:
                self._cancels = not self._guarded(self._cancel)
            self._look()

    def _step_reader(self) -> None:
        rig = self.rigs[-1]

        def act() -> None:
            rig.now_s = self._now_s
            rig.tick(4)
            self._work(self.worker)
            rig.tick(3)

        if not self._guarded(act):
            rig.crash()
            self._held.clear()
            self._start_reader(self._successor_host)

    def _work(self, worker: FakeWorker) -> None:
        """Run what the worker has; l1 and c2 run until the cancellation."""
        self._held.update(worker.take())
        running = Counter(id[0] for id in self._held if id in LIMITED)
        assert running["l"] + running["c"] <= 1, "more at once than the limit allows"
        for id in sorted(self._held):
            if id in ("l1", "c2") and self._now_s < 4.0:
                worker.start(id)
                continue
            self._held.discard(id)
            if id == "c2":
                worker.fail(id, Failure("it failed after it was cancelled"))
            elif id == "m2":
                worker.fail(id, Failure("never", permanent=True))
            elif id in ("l2", "p") and id not in self._failed:
                self._failed.add(id)
                worker.fail(id, Failure("wait", wait_s=1.0) if id == "p" else Failure("once"))
            else:
                self.ran.append(id)
                worker.succeed(id)

    def _step_reaper(self) -> None:
        def act() -> None:
            if self._reaper is None:
                self._start_reaper()
            assert self._reaper is not None
            store, cron, finisher = self._reaper
            store.promote(STREAM, 100)
            cron.run_once()
            finisher.run_once(STREAM)
            store.mend_slots(SOURCE)
            store.mend_batches(SOURCE, b"0")
            store.forget_keys(STREAM)

        if not self._guarded(act):
            self._reaper = None

    def _cancel(self) -> None:
        store = self._doom.await_("canceller", MemoryStore(self.server, "canceller"))
        for _ in Canceller(store, [STREAM], JobFilter(frozenset(["c1", "c2"])), by="test").run():
            pass

    def _look(self) -> None:
        batch = find_batch(self.store, [STREAM], "B")
        assert batch is not None
        ended = batch.done + batch.dead
        assert self._most_done <= ended <= batch.total == 3, "the counts of the batch are wrong in between"
        self._most_done = ended

    def check(self) -> None:
        """What must hold in the end."""
        ticks = {id for id in self.appended if id.startswith("cron:")}
        assert len(set(self.ran) & {"u1", "u2"}) == 1, "of two jobs with one key one runs"
        assert set(self.ran) - {"u1", "u2"} - ticks - {"s1"} == RUN
        assert ticks <= set(self.ran)
        self._check_cron(ticks)
        letters = [(letter["task"]["id"], letter["reason"]) for letter in self.rigs[-1].letters]
        assert sorted(letters) == [("c1", "cancelled"), ("c2", "cancelled"), ("m2", "permanent")]
        batch = find_batch(self.store, [STREAM], "B")
        assert batch is not None
        assert (batch.total, batch.done, batch.dead, batch.state) == (3, 2, 1, "finished")
        assert self.appended["batch:B"] == 1, "the callback is enqueued once"
        (loser,) = {"u1", "u2"} - set(self.ran)
        record = self.store.result(STREAM, loser)
        assert record is not None
        assert decode_result(record).state == "duplicate"
        assert self.store.depths(SOURCE).pending == 0
        assert self.server.waiting(STREAM) == []
        assert sum(self.store.backlog(SOURCE).waiting.values()) == 0
        assert self.store.mend_slots(SOURCE) == 0, "no slot is left"
        repeated = {id: count for id, count in Counter(self.ran).items() if count > 1}
        assert self._doom.killed or not repeated

    def _check_cron(self, ticks: set[str]) -> None:
        last_s = self.store.cron_hash(STREAM).cursors_s["tick"]
        first_s = int(WALL_START_S + STEP_S) + 1
        expected = {TICK.job_id(tick_s) for tick_s in range(first_s, last_s + 1) if tick_s % 4 == 0}
        assert ticks == expected
        assert {self.appended[id] for id in ticks} == {1}, "each tick is enqueued once"

    def close(self) -> None:
        for rig in self.rigs:
            rig.close()


def places_after_run(role: str, number: int, successor_host: str = "one") -> list[int]:
    """Run the scenario with a kill at a place; returns the places of the calls that had something to do."""
    doom = Doom(role, number)
    one = World(doom, successor_host)
    try:
        one.send()
        one.run()
        one.check()
    except AssertionError as error:
        error.add_note(f"{role} killed at place {number}")
        raise
    finally:
        one.close()
    assert doom.killed == (number >= 0)
    return doom.places


@pytest.mark.parametrize(
    ("role", "successor", "least"),
    [("reader", "one", 60), ("reader", "two", 60), ("reaper", "one", 20), ("canceller", "one", 2)],
)
def test_a_kill_at_any_call_breaks_no_promise(role: str, successor: str, least: int) -> None:
    places = places_after_run(role, -1)
    assert len(places) >= least
    for number in places:
        places_after_run(role, number, successor)
