"""Suite of the lanes in which jobs wait: the store in memory and real servers decide alike."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from jobworker.worker.errors import Fenced
from jobworker.worker.flow import FlowConfig, Lane, LaneRules, Limit, read_flow_header, tenant_key
from jobworker.worker.keys import Source
from jobworker.worker.store.ports import Dead, Entry, PutBack, ReaderStore, Retry, Settlement, WaitingJob
from support.job_worlds import World, settle

S = Source("stream:test", "cg-test")
TYPES = ["a", "b"]


def job(
    id: str, tenant: str = "t1", type: str = "a", priority: str = "5", size: int = 0, **more: Any
) -> bytes:
    fields = {"id": id, "type": type, "tenant_id": tenant, "metadata": {"priority": priority}, **more}
    return json.dumps(fields | {"payload": "x" * size}).encode()


def reader(world: World, name: str = "one") -> ReaderStore:
    store = world.reader(name)
    store.acquire([S])
    return store


def read(store: ReaderStore) -> list[Entry]:
    store.begin_read(S, 10_000, 0)
    return store.finish_read(S)


def sort(store: ReaderStore, entries: Iterable[Entry], config: FlowConfig | None = None) -> set[bytes]:
    config = config or store.flow_config(S)
    lanes = LaneRules(config.limits)
    by_lane: dict[bytes, list[WaitingJob]] = {}
    for entry in entries:
        data = entry.data or b""
        name = lanes.name_of(read_flow_header(data))
        by_lane.setdefault(name, []).append(WaitingJob(entry.id, len(data)))
    return store.sort(S, config.version, by_lane)


def add(world: World, store: ReaderStore, *jobs: bytes) -> None:
    """Add jobs, read and sort them."""
    world.producer().add(S.stream, jobs)
    assert sort(store, read(store)) == set()


def take(store: ReaderStore, count: int = 1000, types: Sequence[str] = TYPES) -> list[Entry]:
    return store.take(S, types, count).entries


def names(entries: Iterable[Entry]) -> list[str]:
    return [json.loads(entry.data or b"")["id"] for entry in entries]


def pending(store: ReaderStore) -> list[str]:
    return names(store.own_pending(S, b"0-0", 10_000))


def limit(world: World, store: ReaderStore, *limits: Limit, weights: dict[str, float] | None = None) -> None:
    assert store.configure(S, FlowConfig(store.flow_config(S).version, limits, weights or {}))


def done(store: ReaderStore, entries: Iterable[Entry]) -> None:
    assert settle(store, [Settlement(S, done=[entry.id for entry in entries])]) == set()


def waiting(store: ReaderStore) -> int:
    return sum(store.backlog(S).waiting.values())


class TestMoves:
    def test_a_sorted_job_waits_and_is_not_pending(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1"), job("2"))
        assert pending(store) == []
        assert waiting(store) == 2
        depths = world.reaper().depths(S)
        assert (depths.queued, depths.lag, depths.waiting, depths.pending) == (2, 0, 2, 0)

    def test_a_taken_job_is_pending_with_its_bytes(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1"), job("2"))
        taken = store.take(S, TYPES, 1)
        assert names(taken.entries) == pending(store) == ["1"]
        assert taken.entries[0] == Entry(taken.entries[0].id, job("1"), 1, 0)
        assert taken.waiting == 1

    def test_taking_from_no_lanes_gives_nothing(self, world: World) -> None:
        assert reader(world).take(S, TYPES, 10) == ([], [], 0, None, {})

    def test_each_job_is_taken_once_by_two_hosts(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        add(world, one, *(job(str(number)) for number in range(100)))
        taken = [names(take(store, 7)) for _ in range(8) for store in (one, two)]
        assert sorted(itertools.chain(*taken), key=int) == [str(number) for number in range(100)]

    def test_an_entry_of_another_consumer_is_refused(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        world.producer().add(S.stream, [job("1")])
        entries = read(one)
        assert sort(two, entries) == {entries[0].id}
        assert waiting(two) == 0
        assert pending(one) == ["1"]

    def test_sorting_again_after_a_lost_answer_changes_nothing(self, world: World) -> None:
        store = reader(world)
        world.producer().add(S.stream, [job("1")])
        entries = read(store)
        sort(store, entries)
        assert sort(store, entries) == {entries[0].id}
        assert waiting(store) == 1

    def test_a_fenced_reader_moves_nothing(self, world: World) -> None:
        old = reader(world)
        add(world, old, job("1"))
        new = reader(world)
        world.producer().add(S.stream, [job("2")])
        entries = read(new)
        with pytest.raises(Fenced):
            sort(old, entries)
        with pytest.raises(Fenced):
            take(old)
        assert names(take(new)) == ["1"]

    def test_a_job_deleted_from_the_stream_is_dropped(self, world: World) -> None:
        store = reader(world)
        world.producer().add(S.stream, [job("1"), job("2")])
        entries = read(store)
        sort(store, entries)
        world.delete_entry(S.stream, entries[0].id)
        assert names(take(store)) == ["2"]
        assert waiting(store) == 0

    def test_the_oldest_job_of_each_of_the_ten_largest_tenants_is_known(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(f"{tenant}", f"t{tenant}") for tenant in range(12)))
        world.pass_time(0.05)
        add(world, store, *(job(f"{tenant}-2", f"t{tenant}", priority="9") for tenant in range(2, 12)))
        ages_s = world.reaper().depths(S).tenant_ages_s
        assert sorted(ages_s) == sorted(f"t{tenant}" for tenant in range(2, 12))
        assert min(ages_s.values()) >= 0.04, "the oldest job of a tenant counts"
        done(store, take(store))
        assert world.reaper().depths(S).tenant_ages_s == {}

    def test_jobs_out_of_order_in_their_lane_are_not_trimmed(self, world: World) -> None:
        """A reader that was lost had old entries; they are sorted behind younger ones."""
        store = reader(world)
        world.producer().add(S.stream, [job(f"old {n}") for n in range(3)])
        old = read(store)
        world.pass_time(0.05)
        add(world, store, *(job(f"young {n}") for n in range(2)))
        world.pass_time(0.05)
        sort(store, old)
        world.pass_time(0.05)
        add(world, store, job("last"))
        ran = []
        for _ in range(6):
            taken = take(store, 1)
            done(store, taken)
            world.reaper().trim(S.stream)
            ran += names(taken)
        assert ran == ["young 0", "young 1", "old 0", "old 1", "old 2", "last"]

    def test_a_job_that_was_put_back_is_not_trimmed(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(f"{n}") for n in range(3)))
        world.pass_time(0.05)
        add(world, store, *(job(f"{n}") for n in range(3, 6)))
        first = take(store, 3)
        lane = Lane("a", 5, "t1").encode()
        for entry in first:
            put_back = PutBack(WaitingJob(entry.id, 1), lane, tenant_key("b", "t1"), 60.0)
            version = store.flow_config(S).version
            assert settle(store, [Settlement(S, put_back=[put_back], version=version)]) == set()
        ran = []
        for _ in range(6):
            world.reaper().trim(S.stream)
            taken = take(store, 1)
            done(store, taken)
            ran += names(taken)
        assert sorted(ran) == [f"{n}" for n in range(6)]

    def test_a_job_that_another_host_runs_is_not_taken_from_it(self, world: World) -> None:
        """A group that was created again delivers entries that wait in lanes, too."""
        one, two = reader(world, "one"), reader(world, "two")
        world.producer().add(S.stream, [job("1")])
        entries = read(one)
        sort(one, entries)
        first = take(two)
        sort(one, first)  # refused
        assert take(one) == []
        assert pending(two) == ["1"]

    def test_a_waiting_job_is_not_trimmed(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1"), job("2"), job("3"))
        done(store, take(store, 1))
        world.reaper().trim(S.stream)
        assert names(take(store)) == ["2", "3"]

    def test_finished_entries_are_deleted_while_others_wait(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1", "slow"), *(job(str(number), "fast") for number in range(2, 50)))
        finished = take(store, 20)
        done(store, finished[1:])
        world.reaper().trim(S.stream)
        assert world.length(S.stream) <= 31
        settle(store, [Settlement(S, retries=[Retry(finished[0].id, 0.0, b"{}")])])
        assert waiting(store) == 29

    def test_a_refused_outcome_deletes_no_waiting_job(self, world: World) -> None:
        store = reader(world)
        world.producer().add(S.stream, [job("1")])
        (entry,) = read(store)
        sort(store, [entry])
        assert settle(store, [Settlement(S, done=[entry.id])]) == {entry.id}
        assert names(take(store)) == ["1"]


class TestTurns:
    def test_jobs_of_one_flow_are_taken_in_order(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(str(number)) for number in range(20)))
        assert names(take(store)) == [str(number) for number in range(20)]

    def test_another_tenant_comes_next_whatever_waits(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(str(number), "flood") for number in range(500)))
        take(store, 10)
        add(world, store, job("other", "t2"))
        assert "other" in names(take(store, 2))

    def test_a_more_urgent_job_comes_first(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("low", priority="0"), job("mid"), job("high", priority="10"))
        assert names(take(store)) == ["high", "mid", "low"]

    def test_no_priority_starves(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("low", priority="0"), *(job(str(n), priority="10") for n in range(3000)))
        taken = 0
        while "low" not in names(some := take(store, 100)):
            taken += len(some)
        assert taken < 3000

    def test_shares_are_equal_by_cost(self, world: World) -> None:
        store = reader(world)
        sizes = {f"t{number}": 40 * (number + 1) for number in range(8)}
        jobs = [job(f"{n}", tenant, size=size) for tenant, size in sizes.items() for n in range(1000)]
        for start in range(0, len(jobs), 1000):
            add(world, store, *jobs[start : start + 1000])
        cost: Counter[str] = Counter()
        for entry in itertools.chain(take(store, 1000), take(store, 1000)):
            cost[json.loads(entry.data or b"")["tenant_id"]] += len(entry.data or b"")
        assert all(abs(share / cost.total() - 1 / 8) < 0.05 / 8 for share in cost.values()), cost

    def test_a_weight_multiplies_the_share(self, world: World) -> None:
        store = reader(world)
        limit(world, store, weights={"t1": 3.0})
        add(world, store, *(job(f"{n}", tenant) for n in range(400) for tenant in ("t1", "t2")))
        taken = Counter(json.loads(entry.data or b"")["tenant_id"] for entry in take(store, 400))
        assert taken["t1"] == pytest.approx(300, abs=3)

    def test_a_tenant_that_paused_gets_no_credit_for_it(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(f"{n}", "t1") for n in range(300)))
        take(store, 200)
        add(world, store, *(job(f"{n}", "t2") for n in range(300)))
        taken = Counter(json.loads(entry.data or b"")["tenant_id"] for entry in take(store, 100))
        assert taken["t1"] == pytest.approx(50, abs=2)

    def test_two_types_of_a_tenant_share_its_turn(self, world: World) -> None:
        store = reader(world)
        own = [job(f"{n}", "t1", type) for n in range(200) for type in TYPES]
        add(world, store, *own, *(job(f"{n}", "t2") for n in range(400)))
        taken = Counter(json.loads(entry.data or b"")["tenant_id"] for entry in take(store, 200))
        assert taken["t1"] == pytest.approx(100, abs=2)

    def test_a_type_that_is_not_wanted_stays_and_holds_up_no_other(self, world: World) -> None:
        store = reader(world)
        add(world, store, *(job(f"{n}", type="a") for n in range(50)), job("b", type="b"))
        assert names(take(store, types=["b"])) == ["b"]
        assert waiting(store) == 50
        assert len(take(store, types=["a"])) == 50

    def test_any_names_are_kept_apart(self, world: World) -> None:
        store = reader(world)
        odd = ["", "t", "t/", '"', "长", "=", "\u0000", "a b", "{x}", "05/t"]
        jobs = [job(f"{tenant} {type}", tenant, type) for tenant in odd for type in ["a", "a/05", '"']]
        add(world, store, *jobs)
        taken = take(store, types=["a", "a/05", '"'])
        assert sorted(names(taken)) == sorted(
            f"{tenant} {type}" for tenant in odd for type in ["a", "a/05", '"']
        )


ONE_A_TENANT = Limit("a/tenant", "a", "tenant", concurrency=1)


class TestConcurrency:
    def test_a_key_at_its_limit_waits_and_others_go_on(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT)
        add(world, store, job("1"), job("2"), job("3", "t2"), job("4", type="b"))
        first = take(store)
        assert sorted(names(first)) == ["1", "3", "4"]
        assert take(store) == []
        done(store, [entry for entry in first if names([entry]) == ["1"]])
        assert names(take(store)) == ["2"]

    def test_a_job_that_waited_for_a_limit_is_counted_once(self, world: World) -> None:
        store = reader(world)
        limit(world, store, Limit("a/tenant", "a", "tenant", concurrency=2))
        add(world, store, *(job(f"{n}", tenant) for tenant in ("t1", "t2", "t3") for n in range(2)))
        add(world, store, job("2", "t1"), job("3", "t1"), job("1", type="b"))
        taken = store.take(S, TYPES, 100)
        assert (len(taken.entries), dict(taken.limited)) == (7, {})
        counted = Counter[str]()
        entries = taken.entries
        while entries:
            done(store, entries)
            again = store.take(S, TYPES, 1)
            entries = again.entries
            counted.update(again.limited)
        assert counted == {"a": 2}, "the third and fourth job of the first tenant"
        add(world, store, job("5", "t1"))
        assert store.take(S, TYPES, 1).limited == {}, "its lane was empty"

    @pytest.mark.parametrize("outcome", ["retry", "dead", "put back", "sort"])
    def test_each_end_of_a_job_gives_its_slot_back(self, world: World, outcome: str) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT)
        add(world, store, job("1"), job("2"))
        (entry,) = take(store)
        assert store.slot_holders(S, [entry.id, b"1-1"]) == {entry.id}
        lane = Lane("a", 5, "t1", ("a/tenant=t1",)).encode()
        put_back = PutBack(WaitingJob(entry.id, 1), lane, tenant_key("b", "t1"), 60.0)
        if outcome == "sort":
            sort(store, [entry])
        else:
            settlement = {
                "retry": Settlement(S, retries=[Retry(entry.id, 60.0, b"{}")]),
                "dead": Settlement(S, dead=[Dead(entry.id, b"{}")]),
                "put back": Settlement(S, put_back=[put_back], version=store.flow_config(S).version),
            }
            assert settle(store, [settlement[outcome]]) == set()
        assert store.slot_holders(S, [entry.id]) == set()
        assert names(take(store)) == (["1"] if outcome == "put back" else ["2"])
        assert take(store) == []

    def test_several_hosts_share_a_limit(self, world: World) -> None:
        stores = [reader(world, name) for name in ("one", "two", "three")]
        limit(world, stores[0], Limit("a", "a", "global", concurrency=4))
        add(world, stores[0], *(job(f"{n}", f"t{n % 3}") for n in range(30)))
        running: list[tuple[ReaderStore, Entry]] = []
        ran = []
        for turn in range(200):
            store = stores[turn % 3]
            running += [(store, entry) for entry in take(store, 3)]
            assert len(running) <= 4
            if running:
                owner, entry = running.pop(turn % len(running))
                done(owner, [entry])
                ran += names([entry])
        assert len(ran) == 30

    def test_a_claimed_job_keeps_its_slot(self, world: World) -> None:
        one, two = reader(world, "one"), reader(world, "two")
        limit(world, one, ONE_A_TENANT)
        add(world, one, job("1"), job("2"))
        take(one)
        _, claimed = two.claim(S, 0, 10, b"0-0")
        assert names(claimed) == ["1"]
        assert take(two) == []
        done(two, claimed)
        assert names(take(two)) == ["2"]

    def test_two_limits_of_one_type_both_count(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT, Limit("all", "a", "global", concurrency=2))
        add(world, store, *(job(f"{tenant}{n}", tenant) for tenant in ("x", "y", "z") for n in range(3)))
        ran, rounds = [], 0
        while entries := take(store):
            assert len(entries) <= 2
            assert len({name[0] for name in names(entries)}) == len(entries)
            done(store, entries)
            ran += names(entries)
            rounds += 1
        assert len(ran) == 9

    def test_tenants_behind_one_key_take_turns(self, world: World) -> None:
        store = reader(world)
        limit(world, store, Limit("all", "a", "global", concurrency=1))
        add(world, store, *(job(f"{n}", "flood") for n in range(50)))
        done(store, take(store))
        add(world, store, job("other", "t2"))
        ran: list[str] = []
        for _ in range(3):
            ran += names(entries := take(store))
            done(store, entries)
        assert "other" in ran

    def test_a_slot_of_a_deleted_entry_is_mended(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT)
        add(world, store, job("1"), job("2"))
        (entry,) = take(store)
        world.delete_entry(S.stream, entry.id)
        assert world.reaper().mend_slots(S) == 0
        store.renew(S, [entry.id])  # drops it from the pending list
        world.reaper().mend_slots(S)
        assert names(take(store)) == ["2"]


class TestRates:
    RATE = Limit("a", "a", "global", starts=3, per_ms=400)

    def test_no_more_starts_than_the_rate_in_any_period(self, world: World) -> None:
        store = reader(world)
        limit(world, store, self.RATE)
        add(world, store, *(job(f"{n}", f"t{n}") for n in range(8)))
        first = store.take(S, TYPES, 100)
        assert len(first.entries) == 3
        assert first.due_s is not None
        assert 0 < first.due_s < 0.401
        done(store, first.entries)
        assert take(store) == []
        world.pass_time(0.5)
        assert len(take(store)) == 3
        world.pass_time(0.5)
        assert len(take(store)) == 2

    def test_a_key_that_must_wait_waits_and_its_job_comes_first(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1"), job("2"), job("3", "t2"))
        (entry, *_) = [one for one in take(store) if names([one]) == ["1"]]
        back = PutBack(WaitingJob(entry.id, 1), Lane("a", 5, "t1").encode(), tenant_key("a", "t1"), 0.3)
        assert settle(store, [Settlement(S, put_back=[back])]) == set()
        add(world, store, job("4"), job("5", "t2"))
        taken = store.take(S, TYPES, 100)
        assert names(taken.entries) == ["5"]
        assert taken.due_s is not None
        world.pass_time(0.4)
        assert names(take(store)) == ["1", "4"]


class TestChanges:
    def test_a_new_limit_holds_for_jobs_that_wait_already(self, world: World) -> None:
        store = reader(world)
        add(world, store, job("1"), job("2"), job("3", type="b"))
        limit(world, store, ONE_A_TENANT)
        taken = store.take(S, TYPES, 100)
        assert names(taken.entries) == ["3"]
        assert names(taken.outdated) == ["1", "2"]
        sort(store, taken.outdated)
        assert names(take(store)) == ["1"]

    def test_a_removed_limit_lets_waiting_jobs_run(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT)
        add(world, store, job("1"), job("2"), job("3"))
        first = take(store)
        limit(world, store)
        sort(store, store.take(S, TYPES, 0).outdated)
        assert names(take(store)) == ["2", "3"]
        done(store, first)

    def test_a_higher_limit_wakes_waiting_jobs(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT)
        add(world, store, job("1"), job("2"), job("3"))
        assert len(take(store)) == 1
        assert len(take(store)) == 0
        limit(world, store, Limit("a/tenant", "a", "tenant", concurrency=2))
        assert names(take(store)) == ["2"]

    def test_jobs_sorted_by_old_limits_are_sorted_again(self, world: World) -> None:
        store = reader(world)
        old = store.flow_config(S)
        limit(world, store, ONE_A_TENANT)
        world.producer().add(S.stream, [job("1"), job("2")])
        sort(store, read(store), old)
        taken = store.take(S, TYPES, 100)
        assert taken.entries == []
        sort(store, taken.outdated)
        assert names(take(store)) == ["1"]

    def test_only_the_present_version_can_be_replaced(self, world: World) -> None:
        store = reader(world)
        limit(world, store, ONE_A_TENANT, weights={"t1": 2.0})
        assert not store.configure(S, FlowConfig(0))
        assert store.flow_config(S) == FlowConfig(1, (ONE_A_TENANT,), {"t1": 2.0})
        assert store.backlog(S).version == 1


def test_the_types_that_were_asked_to_wait_are_known_until_then(world: World) -> None:
    store = reader(world)
    add(world, store, job("1"))
    (entry,) = take(store)
    back = PutBack(WaitingJob(entry.id, 1), Lane("a", 5, "t1").encode(), tenant_key("a", "t1"), 0.2)
    settle(store, [Settlement(S, put_back=[back])])
    assert store.backlog(S).asked_types == {"a"}
    world.pass_time(1.5)
    assert store.backlog(S).asked_types == set()


class Killed(Exception):
    """The reader's process ends here."""


class Steps:
    """Lets a reader make a number of calls of its store, and kills it at the next one."""

    def __init__(self, store: ReaderStore, calls: int, *, answered: bool) -> None:
        self._store = store
        self._left = calls
        self._answered = answered

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **more: Any) -> Any:
            if self._left == 0:
                if not self._answered:
                    method(*args, **more)  # the store carries it out, and the answer is lost
                raise Killed
            self._left -= 1
            return method(*args, **more)

        return call


def work(store: Any, ran: list[str], *, rounds: int = 30) -> None:
    """What a reader does: recovers its pending entries, then reads, sorts, takes and settles."""
    for entry in store.own_pending(S, b"0-0", 100):
        if entry.id in store.slot_holders(S, [entry.id]):
            ran += names([entry])
            store.settle([Settlement(S, done=[entry.id])])
        else:
            sort(store, [entry])
    for _ in range(rounds):
        store.begin_read(S, 3, 0)
        if entries := store.finish_read(S):
            sort(store, entries)
        for entry in store.take(S, TYPES, 2).entries:
            ran += names([entry])
            store.settle([Settlement(S, done=[entry.id])])


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("calls", range(1, 40))
def test_a_kill_at_any_call_loses_no_job_and_leaves_no_slot(world: World, calls: int, answered: bool) -> None:
    store = reader(world)
    limit(world, store, Limit("a", "a", "tenant", concurrency=1))
    world.producer().add(S.stream, [job(str(number), f"t{number % 2}") for number in range(8)])
    ran: list[str] = []
    with pytest.raises(Killed):
        work(Steps(store, calls, answered=answered), ran)
    successor = reader(world)
    before = len(ran)
    work(successor, ran)
    assert set(ran) == {str(number) for number in range(8)}
    assert len(ran) - 8 <= 1, "only the job that was running may run again"
    assert before <= 8
    assert waiting(successor) == 0
    assert pending(successor) == []
    assert world.reaper().mend_slots(S) == 0
