"""Lua scripts compared with a model: after any sequence of calls each job is where the model has it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jobworker.worker import keys
from jobworker.worker.errors import Fenced
from jobworker.worker.keys import Source
from jobworker.worker.store.ports import Dead, Entry, Kept, Retry, Settlement
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.job_worlds import schedule
from support.redis_servers import RedisServer, running

S = Source("stream:model", "cg-model")
NAMES = st.sampled_from(["a", "b"])
#: Few different jobs, so that equal ones meet.
JOBS = st.lists(st.integers(0, 4).map(lambda n: b'{"n":%d}' % n), min_size=1, max_size=6)
#: A retry is due at once or not while the test runs.
DELAYS = st.sampled_from([0.0, 1e6])
HOUR_MS = 3_600_000


class Held:
    """What the model knows of a pending entry."""

    def __init__(self, owner: str, job: bytes) -> None:
        self.owner = owner
        self.job = job
        self.deaths = 0
        self.deliveries = 1
        self.released = False


class ScriptsMachine(RuleBasedStateMachine):
    """Two consumers and a reaper on a real server, beside a model in plain Python."""

    server: RedisServer

    @initialize()
    def begin(self) -> None:
        self.client = self.server.client
        self.client.flushall()
        self.readers = {name: RedisReaderStore(self.server.url, name) for name in ("a", "b")}
        self.reaper, self.producer = RedisReaperStore(self.server.url), RedisProducerStore(self.server.url)
        for reader in self.readers.values():
            reader.acquire([S])
        self.new: list[bytes] = []
        self.held: dict[bytes, Held] = {}
        self.due: list[bytes] = []
        self.later: list[bytes] = []
        self.dead: list[bytes] = []
        self.past: list[bytes] = [b"1-1"]
        # Not from nothing: most of what may go wrong needs something pending and something new.
        self.add([b'{"n":%d}' % (n % 5) for n in range(10)])
        self.read("a", 3)
        self.read("b", 3)

    def teardown(self) -> None:
        for store in (*self.readers.values(), self.reaper, self.producer):
            store.close()

    def some_ids(self, data: st.DataObject) -> list[bytes]:
        """Ids that are pending for one or the other, settled long ago, or never were."""
        known = sorted(self.held) + self.past[-3:]
        return data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1, max_size=8), label="ids")

    def mine(self, name: str, id: bytes) -> bool:
        return id in self.held and self.held[id].owner == name

    @rule(jobs=JOBS)
    def add(self, jobs: list[bytes]) -> None:
        assert self.producer.add(S.stream, jobs) == len(jobs)
        self.new += jobs

    @rule(job=JOBS, delay_s=DELAYS)
    def schedule(self, job: list[bytes], delay_s: float) -> None:
        schedule(self.client, S.stream, job[0], delay_s)
        (self.later if delay_s else self.due).append(job[0])

    @precondition(lambda self: self.new)
    @rule(name=NAMES, count=st.integers(1, 6))
    def read(self, name: str, count: int) -> None:
        reader = self.readers[name]
        reader.begin_read(S, count, 0)
        entries = reader.finish_read(S)
        assert [stripped(e) for e in entries] == self.new[:count]
        del self.new[:count]
        self.held.update((e.id, Held(name, stripped(e))) for e in entries)

    @precondition(lambda self: self.held)
    @rule(name=NAMES, delay_s=DELAYS, data=st.data())
    def settle(self, name: str, delay_s: float, data: st.DataObject) -> None:
        ids = self.some_ids(data)
        kinds = data.draw(
            st.lists(st.sampled_from("DRXK"), min_size=len(ids), max_size=len(ids)), label="kinds"
        )
        of = {kind: [id for id, k in zip(ids, kinds, strict=True) if k == kind] for kind in "DRXK"}
        job_of = {id: self.held[id].job if id in self.held else b"none" for id in ids}
        settlement = Settlement(
            S,
            of["D"],
            [Retry(id, delay_s, job_of[id]) for id in of["R"]],
            [Dead(id, job_of[id], None, id.decode(), b"dead") for id in of["X"]],
            kept=[Kept(id, id.decode(), b"kept") for id in of["K"]],
        )
        self.client.delete(*(keys.result_key(S.stream, id.decode()) for id in ids))
        ((refused, unsettled, *_),) = self.readers[name].settle([settlement])
        assert not unsettled
        not_mine = {id for id in ids if not self.mine(name, id)}
        assert refused == not_mine
        results = {id: self.client.get(keys.result_key(S.stream, id.decode())) for id in ids}
        assert results == {
            id: None if id in not_mine or kind in "DR" else b"dead" if kind == "X" else b"kept"
            for id, kind in zip(ids, kinds, strict=True)
        }
        for id in set(ids) - not_mine:
            self.forget(id)
        (self.later if delay_s else self.due).extend(job_of[id] for id in of["R"] if id not in refused)
        self.dead += [job_of[id] for id in of["X"] if id not in refused]

    @precondition(lambda self: self.held)
    @rule(name=NAMES, data=st.data())
    def charge(self, name: str, data: st.DataObject) -> None:
        deaths = {id: self.held[id].deaths + 1 if id in self.held else 1 for id in self.some_ids(data)}
        expected = {id: count for id, count in deaths.items() if self.mine(name, id)}
        assert self.readers[name].set_deaths(S, deaths) == expected
        for id, count in expected.items():
            self.held[id].deaths = count

    @precondition(lambda self: self.held)
    @rule(name=NAMES, data=st.data())
    def renew(self, name: str, data: st.DataObject) -> None:
        ids = self.some_ids(data)
        assert self.readers[name].renew(S, ids) == {id for id in ids if not self.mine(name, id)}
        for id in ids:
            if self.mine(name, id):
                self.held[id].released = False

    @precondition(lambda self: self.held)
    @rule(name=NAMES, data=st.data())
    def release(self, name: str, data: st.DataObject) -> None:
        ids = self.some_ids(data)
        self.readers[name].release(S, ids)
        for id in ids:
            if self.mine(name, id):
                self.held[id].released = True
                self.held[id].deliveries = max(0, self.held[id].deliveries - 1)

    @precondition(lambda self: self.held)
    @rule(name=NAMES, min_idle_ms=st.sampled_from([0, HOUR_MS]), count=st.integers(1, 4))
    def claim(self, name: str, min_idle_ms: int, count: int) -> None:
        expected = {id for id, held in self.held.items() if held.released or min_idle_ms == 0}
        cursor, taken = self.readers[name].claim(S, min_idle_ms, count, b"0-0")
        entries = list(taken)
        while cursor != b"0-0":
            cursor, taken = self.readers[name].claim(S, min_idle_ms, count, cursor)
            entries += taken
        assert {e.id for e in entries} == expected
        for entry in entries:
            held = self.held[entry.id]
            held.owner, held.released, held.deliveries = name, False, held.deliveries + 1
            assert (stripped(entry), entry.deaths, entry.deliveries) == (
                held.job,
                held.deaths,
                held.deliveries,
            )

    @rule(limit=st.integers(1, 5))
    def promote(self, limit: int) -> None:
        last = self.client.xinfo_stream(S.stream)["last-generated-id"]
        moved, next_due_s = self.reaper.promote(S.stream, limit)
        arrived = [fields[b"data"].rstrip() for _, fields in self.client.xrange(S.stream, b"(" + last)]
        assert moved == len(arrived) == min(limit, len(self.due))
        for job in arrived:
            self.due.remove(job)
        self.new += arrived
        assert (next_due_s is None) == (not self.due and not self.later)
        assert next_due_s is None or (next_due_s == 0) == bool(self.due)

    @rule()
    def trim(self) -> None:
        self.reaper.trim(S.stream)
        if not self.new and not self.held:
            assert self.client.xlen(S.stream) == 0

    @rule(name=NAMES)
    def restart(self, name: str) -> None:
        old, new = self.readers[name], RedisReaderStore(self.server.url, name)
        new.acquire([S])
        with pytest.raises(Fenced):
            old.settle([Settlement(S, [*sorted(self.held), b"1-1"])])
        old.close()
        self.readers[name] = new
        mine = [(id, held) for id, held in sorted(self.held.items(), key=order) if held.owner == name]
        pending = new.own_pending(S, b"0-0", 1000)
        assert [(e.id, stripped(e), e.deaths) for e in pending] == [(id, h.job, h.deaths) for id, h in mine]

    @rule()
    def lose_scripts(self) -> None:
        self.client.script_flush()

    def forget(self, id: bytes) -> None:
        del self.held[id]
        self.past.append(id)

    @invariant()
    def every_job_is_where_the_model_says(self) -> None:
        group = self.client.xinfo_groups(S.stream)[0]
        entries = dict(self.client.xrange(S.stream))
        rows = self.client.xpending_range(S.stream, S.group, "-", "+", 10_000)
        pending = {row["message_id"]: row["consumer"].decode() for row in rows}
        assert pending == {id: held.owner for id, held in self.held.items()}
        assert all(entries[id][b"data"].rstrip() == held.job for id, held in self.held.items())
        undelivered = self.client.xrange(S.stream, b"(" + group["last-delivered-id"])
        assert [fields[b"data"].rstrip() for _, fields in undelivered] == self.new
        waiting = self.client.zrange(keys.retry_key(S.stream), 0, -1)
        assert Counter(job.rstrip() for job in waiting) == Counter(self.due + self.later)
        letters = self.client.xrange(keys.dead_letter_key(S.stream))
        assert [fields[b"data"].rstrip() for _, fields in letters] == self.dead
        assert self.reaper.depths(S)[:4] == (len(self.new), len(pending), len(waiting), len(letters))
        deaths = self.client.hgetall(keys.deaths_key(S.stream))
        assert deaths == {id: b"%d" % held.deaths for id, held in self.held.items() if held.deaths}


def stripped(entry: Entry) -> bytes:
    assert entry.data is not None
    return entry.data.rstrip()


def order(item: tuple[bytes, Any]) -> tuple[int, int]:
    ms, _, sequence = item[0].partition(b"-")
    return int(ms), int(sequence)


@pytest.fixture(scope="module", params=["redis7", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.mark.timeout(600)  # a failing run is made shorter first, which may take minutes
def test_scripts_agree_with_the_model(server: RedisServer) -> None:
    class Machine(ScriptsMachine):
        pass

    Machine.server = server
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, suppress_health_check=list(HealthCheck), deadline=None
        ),
    )
