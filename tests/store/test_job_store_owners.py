"""Who owns what in every job store: fences, instance names, deaths, leases."""

import pytest

from jobworker.worker.errors import Fenced, NameHeld
from jobworker.worker.keys import Holder
from jobworker.worker.store.ports import Settlement
from support.job_store_steps import OTHER, UNKNOWN, S, given, pending, read
from support.job_worlds import World, settle


class TestFence:
    def test_a_newer_reader_of_the_name_fences_off_the_older_one(self, world: World) -> None:
        old, (a,) = given(world, b"1")
        new = world.reader("a")
        new.acquire([S])
        for act in (
            lambda: settle(old, [Settlement(S, [a])]),
            lambda: old.set_deaths(S, {a: 1}),
            lambda: old.renew(S, [a]),
            lambda: old.release(S, [a]),
            lambda: old.claim(S, 0, 10, b"0-0"),
        ):
            with pytest.raises(Fenced):
                act()
        assert pending(new) == [a]
        assert settle(new, [Settlement(S, [a])]) == set()

    def test_a_reader_of_another_name_is_not_fenced(self, world: World) -> None:
        one, (a,) = given(world, b"1")
        other = world.reader("b")
        other.acquire([S])
        assert settle(one, [Settlement(S, [a])]) == set()


#: Three starts of services. Their lease is short: on real servers the tests wait for its end.
FIRST = Holder("t1", "pid 1 on host h", 0.5)
SECOND = Holder("t2", "pid 2 on host h", 0.5)
HEIR = Holder("t3", "pid 3 on host h", 0.5, predecessors=("t0", "t1"))


class TestName:
    def test_another_service_is_refused_and_the_error_names_the_holder(self, world: World) -> None:
        first, second = world.reader("a", FIRST), world.reader("a", SECOND)
        first.acquire([S])
        with pytest.raises(NameHeld, match="pid 1 on host h") as refused:
            second.acquire([S])
        assert 0 < refused.value.left_s <= FIRST.lease_s
        assert refused.value.stream == S.stream
        first.renew_name([S])

    def test_renewing_keeps_the_name_and_shows_that_its_holder_is_alive(self, world: World) -> None:
        first, second = world.reader("a", FIRST), world.reader("a", SECOND)
        first.acquire([S])
        renewals = []
        for _ in range(3):
            with pytest.raises(NameHeld) as refused:
                second.acquire([S])
            renewals.append(refused.value.renewal)
            world.pass_time(0.25)
            first.renew_name([S])
        assert len(set(renewals)) == 3

    def test_a_name_that_is_not_renewed_is_free_after_the_lease(self, world: World) -> None:
        first, second = world.reader("a", FIRST), world.reader("a", SECOND)
        first.acquire([S])
        world.producer().add(S.stream, [b"1"])
        a = read(first)[0].id
        world.pass_time(FIRST.lease_s + 0.1)
        second.acquire([S])
        for act in (lambda: first.renew_name([S]), lambda: settle(first, [Settlement(S, [a])])):
            with pytest.raises(Fenced):
                act()
        with pytest.raises(NameHeld, match="pid 2"):
            first.acquire([S])
        assert settle(second, [Settlement(S, [a])]) == set()

    def test_the_next_reader_of_one_service_takes_the_name_at_once(self, world: World) -> None:
        for _ in range(2):
            world.reader("a", FIRST).acquire([S])

    def test_the_name_of_a_predecessor_that_is_over_is_free_at_once(self, world: World) -> None:
        world.reader("a", FIRST).acquire([S])
        world.reader("a", HEIR).acquire([S])
        with pytest.raises(NameHeld, match="pid 3"):
            world.reader("a", SECOND).acquire([S])

    def test_a_released_name_is_free_at_once(self, world: World) -> None:
        first, second = world.reader("a", FIRST), world.reader("a", SECOND)
        second.release_name([S])
        first.acquire([S])
        first.release_name([S])
        second.acquire([S])
        first.release_name([S])
        second.renew_name([S])
        with pytest.raises(Fenced):
            first.renew_name([S])

    def test_a_service_that_is_refused_one_name_keeps_none(self, world: World) -> None:
        world.reader("a", FIRST).acquire([OTHER])
        with pytest.raises(NameHeld):
            world.reader("a", SECOND).acquire([S, OTHER])
        world.reader("a", HEIR).acquire([S])

    def test_another_consumer_is_another_name(self, world: World) -> None:
        world.reader("a", FIRST).acquire([S])
        world.reader("b", SECOND).acquire([S])


class TestDeaths:
    def test_deaths_are_set_and_returned_with_the_entry(self, world: World) -> None:
        store, (a, b) = given(world, b"a", b"b")
        assert store.set_deaths(S, {a: 1}) == {a: 1}
        assert store.set_deaths(S, {a: 2, b: 1, UNKNOWN: 1}) == {a: 2, b: 1}
        assert store.set_deaths(S, {a: 2}) == {a: 2}
        assert [(e.id, e.deaths) for e in store.own_pending(S, b"0-0", 10)] == [(a, 2), (b, 1)]

    def test_deaths_survive_the_reader_and_follow_the_job_to_another(self, world: World) -> None:
        store, (a,) = given(world, b"a")
        store.set_deaths(S, {a: 1})
        other = world.reader("b")
        other.acquire([S])
        _, entries = other.claim(S, 0, 10, b"0-0")
        assert [(e.id, e.deaths) for e in entries] == [(a, 1)]
        assert store.set_deaths(S, {a: 2}) == {}

    def test_settled_entries_get_no_deaths(self, world: World) -> None:
        store, (a,) = given(world, b"a")
        store.set_deaths(S, {a: 1})
        settle(store, [Settlement(S, [a])])
        assert store.set_deaths(S, {a: 2}) == {}


class TestLeases:
    def test_idle_entries_are_claimed_and_the_delivery_is_counted(self, world: World) -> None:
        old, ids = given(world, b"1", b"2", consumer="a")
        new = world.reader("b")
        new.acquire([S])
        assert new.claim(S, 60_000, 10, b"0-0") == (b"0-0", [])
        _, entries = new.claim(S, 0, 10, b"0-0")
        assert [(e.id, e.data, e.deliveries) for e in entries] == [(ids[0], b"1", 2), (ids[1], b"2", 2)]
        assert settle(old, [Settlement(S, ids)]) == set(ids)
        assert settle(new, [Settlement(S, ids)]) == set()

    def test_a_long_list_is_claimed_page_by_page(self, world: World) -> None:
        _, ids = given(world, *[b"%d" % i for i in range(7)], consumer="a")
        new = world.reader("b")
        new.acquire([S])
        taken: list[bytes] = []
        cursor, first = b"0-0", True
        while first or cursor != b"0-0":
            cursor, entries = new.claim(S, 0, 3, cursor)
            taken += [e.id for e in entries]
            first = False
        assert taken == ids

    def test_a_service_is_lost_once_its_name_and_its_leases_have_expired(self, world: World) -> None:
        old, _ = given(world, b"1", consumer="a")
        assert not old.has_lost(S, 0), "its own entries are not lost"
        new = world.reader("b")
        new.acquire([S])
        assert not new.has_lost(S, 0), "it holds its name"
        old.release_name([S])
        assert not new.has_lost(S, 60_000), "it may still run its jobs"
        assert new.has_lost(S, 0)

    def test_a_service_that_released_its_jobs_is_lost_at_once(self, world: World) -> None:
        old, ids = given(world, b"1", b"2", consumer="a")
        new = world.reader("b")
        new.acquire([S])
        old.release(S, ids)
        old.release_name([S])
        assert new.has_lost(S, 3_600_000)
        new.claim(S, 3_600_000, 10, b"0-0")
        assert not new.has_lost(S, 0), "it has no jobs left"

    def test_where_no_stream_is_nothing_is_lost(self, world: World) -> None:
        store, _ = given(world, b"1")
        world.delete_stream(S.stream)
        assert not store.has_lost(S, 0)

    def test_handed_back_entries_are_read_by_another_at_once(self, world: World) -> None:
        old, (a, b, c) = given(world, b"1", b"2", b"3", consumer="a")
        settle(old, [Settlement(S, [c])])
        assert old.hand_back(S, {a: b"1", c: b"3", UNKNOWN: b"x"}) == 1
        assert pending(old) == [b]
        new = world.reader("b")
        new.acquire([S])
        assert [(entry.data, entry.deliveries) for entry in read(new)] == [(b"1", 1)]
        assert settle(old, [Settlement(S, [a])]) == {a}, "it is under a new id"

    def test_a_fenced_reader_hands_nothing_back(self, world: World) -> None:
        old, (a,) = given(world, b"1", consumer="a")
        world.reader("a").acquire([S])
        with pytest.raises(Fenced):
            old.hand_back(S, {a: b"1"})
        assert world.length(S.stream) == 1

    def test_no_reader_is_idle_while_the_stream_has_work_for_it(self, world: World) -> None:
        busy, _ = given(world, b"1", consumer="a")
        other = world.reader("b")
        other.acquire([S])
        world.producer().add(S.stream, [b"2"])
        assert busy.idle_readers(S) == 0
        settle(other, [Settlement(S, [entry.id for entry in read(other)])])
        assert busy.idle_readers(S) == 1

    def test_a_living_reader_without_entries_is_idle(self, world: World) -> None:
        busy, _ = given(world, b"1", consumer="a")
        other = world.reader("b", Holder("t1", "pid 1", 0.3))
        assert busy.idle_readers(S) == 0
        other.acquire([S])
        assert busy.idle_readers(S) == 1
        assert other.idle_readers(S) == 0
        world.pass_time(0.4)
        assert busy.idle_readers(S) == 0, "its service is gone"

    def test_renewed_entries_cannot_be_claimed(self, world: World) -> None:
        old, (a, b) = given(world, b"1", b"2", consumer="a")
        new = world.reader("b")
        new.acquire([S])
        world.pass_time(0.4)
        assert old.renew(S, [a]) == set()
        _, entries = new.claim(S, 300, 10, b"0-0")
        assert [e.id for e in entries] == [b]
        assert [e.deliveries for e in old.own_pending(S, b"0-0", 10)] == [1]

    def test_renewing_returns_lost_entries(self, world: World) -> None:
        old, (a, b) = given(world, b"1", b"2", consumer="a")
        settle(old, [Settlement(S, [a])])
        assert old.renew(S, [a, b, UNKNOWN]) == {a, UNKNOWN}

    def test_renewing_takes_no_entry_of_another_consumer(self, world: World) -> None:
        old, (a,) = given(world, b"1", consumer="a")
        new = world.reader("b")
        new.acquire([S])
        assert new.renew(S, [a]) == {a}
        assert pending(old) == [a]

    def test_renewing_returns_deleted_entries_as_lost(self, world: World) -> None:
        store, (a, b) = given(world, b"1", b"2")
        world.delete_entry(S.stream, a)
        assert store.renew(S, [a, b]) == {a}

    def test_released_entries_can_be_claimed_at_once(self, world: World) -> None:
        old, (a, b) = given(world, b"1", b"2", consumer="a")
        new = world.reader("b")
        new.acquire([S])
        old.release(S, [a, UNKNOWN])
        _, entries = new.claim(S, 3_600_000, 10, b"0-0")
        assert [(e.id, e.deliveries) for e in entries] == [
            (a, 1)
        ]  # handed back unharmed: no strike against it
        assert pending(old) == [b]

    def test_an_entry_deleted_while_pending_is_dropped(self, world: World) -> None:
        store, (a, b, c) = given(world, b"1", b"2", b"3")
        world.delete_entry(S.stream, a)
        assert pending(store) == [b, c]
        world.delete_entry(S.stream, b)
        assert store.claim(S, 0, 10, b"0-0")[1][0].id == c
        assert world.reaper().depths(S).pending == 1

    def test_own_pending_comes_in_pages(self, world: World) -> None:
        store, ids = given(world, *[b"%d" % i for i in range(5)])
        assert [e.id for e in store.own_pending(S, b"0-0", 2)] == ids[:2]
        assert [e.id for e in store.own_pending(S, ids[1], 2)] == ids[2:4]
        assert [e.id for e in store.own_pending(S, ids[4], 2)] == []
        assert store.own_ids(S, b"0-0", 2) == ids[:2]
        assert store.own_ids(S, ids[1], 9) == ids[2:]

    def test_fetch_leaves_out_deleted_entries(self, world: World) -> None:
        store, (a, b) = given(world, b"1", b"2")
        world.delete_entry(S.stream, a)
        assert store.fetch(S, [a, b, UNKNOWN]) == {b: b"2"}
