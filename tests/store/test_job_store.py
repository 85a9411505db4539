"""Suite of every job store: the one in memory and real servers."""

import select
import threading

import pytest

from jobworker.worker import keys
from jobworker.worker.errors import Fenced, NameHeld, StoreRefused
from jobworker.worker.keys import Holder, Source
from jobworker.worker.store.ports import Dead, Entry, ReaderStore, Retry, Settled, Settlement
from support.job_worlds import World, settle

S = Source("stream:test", "cg-test")
OTHER = Source("stream:other", "cg-other")
UNKNOWN = b"1-1"
#: How long a test waits for what should come at once.
SOON_S = 5.0


def read(store: ReaderStore, count: int = 100, source: Source = S) -> list[Entry]:
    store.begin_read(source, count, 0)
    return store.finish_read(source)


def given(
    world: World, *jobs: bytes, consumer: str = "a", source: Source = S
) -> tuple[ReaderStore, list[bytes]]:
    """A reader that was delivered the jobs, and their ids."""
    store = world.reader(consumer)
    store.acquire([source])
    world.producer().add(source.stream, jobs)
    return store, [entry.id for entry in read(store, source=source)]


def pending(store: ReaderStore, source: Source = S) -> list[bytes]:
    return [entry.id for entry in store.own_pending(source, b"0-0", 1000)]


def readable(fd: int, limit_s: float) -> bool:
    return bool(select.select([fd], [], [], limit_s)[0])


class TestReading:
    def test_jobs_sent_before_the_group_existed_are_read_in_order(self, world: World) -> None:
        world.producer().add(S.stream, [b"1", b"2", b"3"])
        store = world.reader("a")
        store.acquire([S])
        assert [entry.data for entry in read(store)] == [b"1", b"2", b"3"]

    def test_acquiring_again_keeps_the_position_of_the_group(self, world: World) -> None:
        store, ids = given(world, b"1")
        store.acquire([S])
        assert read(store) == []
        assert pending(store) == ids

    def test_a_read_returns_at_most_count_entries(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        world.producer().add(S.stream, [b"1", b"2", b"3"])
        assert [e.data for e in read(store, count=2)] == [b"1", b"2"]
        assert [e.data for e in read(store, count=2)] == [b"3"]

    def test_a_blocked_read_wakes_its_descriptor_when_a_job_comes(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        fd = store.begin_read(S, 10, 60_000)
        assert store.is_reading(S)
        assert not readable(fd, 0)
        world.producer().add(S.stream, [b"late"])
        assert readable(fd, SOON_S)
        assert [e.data for e in store.finish_read(S)] == [b"late"]
        assert not store.is_reading(S)

    def test_a_blocked_read_ends_empty_when_its_time_is_over(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        fd = store.begin_read(S, 10, 50)
        assert readable(fd, SOON_S)
        assert store.finish_read(S) == []
        assert store.finish_read(S) == []

    def test_reads_of_two_streams_are_under_way_at_once(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S, OTHER])
        first, second = store.begin_read(S, 10, 60_000), store.begin_read(OTHER, 10, 60_000)
        world.producer().add(OTHER.stream, [b"x"])
        assert select.select([first, second], [], [], SOON_S)[0] == [second]
        assert [e.data for e in store.finish_read(OTHER)] == [b"x"]
        assert store.is_reading(S)

    def test_beginning_a_second_read_of_a_stream_is_a_bug(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        store.begin_read(S, 1, 1000)
        with pytest.raises(RuntimeError):
            store.begin_read(S, 1, 1000)

    def test_entries_of_an_abandoned_read_stay_pending(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        fd = store.begin_read(S, 10, 60_000)
        world.producer().add(S.stream, [b"1"])
        assert readable(fd, SOON_S)
        store.abandon_reads()
        assert not store.is_reading(S)
        assert [e.data for e in store.own_pending(S, b"0-0", 10)] == [b"1"]
        world.producer().add(S.stream, [b"2"])
        assert [e.data for e in read(store)] == [b"2"]

    def test_an_entry_without_the_field_has_no_data(self, world: World) -> None:
        world.add_without_data(S.stream)
        store = world.reader("a")
        store.acquire([S])
        assert [e.data for e in read(store)] == [None]

    def test_any_bytes_are_returned_unchanged(self, world: World) -> None:
        jobs = [b"", b"\x00\xff\r\n$1\r\n", "小说".encode(), b"x" * 3_000_000]
        world.producer().add(S.stream, jobs)
        store = world.reader("a")
        store.acquire([S])
        assert [e.data for e in read(store)] == jobs

    def test_a_blocked_reader_does_not_block_others(self, world: World) -> None:
        store, ids = given(world, b"1")
        store.begin_read(S, 10, 60_000)
        assert settle(store, [Settlement(S, done=ids)]) == set()
        assert store.renew(S, ids) == set(ids)


class TestPauses:
    def test_every_reader_sees_the_paused_types(self, world: World) -> None:
        a, b = world.reader("a"), world.reader("b")
        assert a.paused_types() == set()
        world.pause("audit")
        world.pause("长篇")
        assert a.paused_types() == b.paused_types() == {"audit", "长篇"}


class TestSettling:
    def test_done_retried_and_dead_jobs_each_go_to_their_key(self, world: World) -> None:
        store, (a, b, c, d) = given(world, b"a", b"b", b"c", b"d")
        refused = settle(store, [Settlement(S, [a], [Retry(b, 60, b"b again")], [Dead(c, b"c is dead")])])
        assert refused == set()
        assert pending(store) == [d]
        assert world.waiting(S.stream) == [b"b again"]
        assert world.dead_letters(S.stream) == [b"c is dead"]

    def test_a_second_settlement_is_refused_and_changes_nothing(self, world: World) -> None:
        store, (a, b, c) = given(world, b"a", b"b", b"c")
        outcome = Settlement(S, [a], [Retry(b, 60, b"b")], [Dead(c, b"c")])
        settle(store, [outcome])
        assert settle(store, [outcome]) == {a, b, c}
        assert len(world.waiting(S.stream)) == len(world.dead_letters(S.stream)) == 1

    def test_only_the_unknown_ids_of_many_are_refused(self, world: World) -> None:
        store, ids = given(world, *[b"%d" % i for i in range(2500)])
        ids += [entry.id for _ in range(24) for entry in read(store)]
        other = world.reader("b")
        other.acquire([S])
        world.producer().add(S.stream, [b"theirs"])
        assert len(read(other)) == 1
        odd = [b"%s9" % id for id in ids[::100]]
        assert settle(store, [Settlement(S, done=[*odd, *ids[5:]])]) == set(odd)
        assert pending(store) == ids[:5]

    def test_unsorted_ids_that_lie_far_apart_are_settled(self, world: World) -> None:
        store, ids = given(world, *[b"%d" % i for i in range(100)])
        some = [ids[77], ids[3], ids[50], ids[99], ids[0]]
        assert settle(store, [Settlement(S, done=some)]) == set()
        assert set(pending(store)) == set(ids) - set(some)

    def test_several_streams_are_settled_in_one_call(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S, OTHER])
        for source in (S, OTHER):
            world.producer().add(source.stream, [b"1"])
        ids = {source: read(store, source=source)[0].id for source in (S, OTHER)}
        refused = settle(store, [Settlement(S, [ids[S], UNKNOWN]), Settlement(OTHER, [ids[OTHER]])])
        assert refused <= {UNKNOWN}
        assert pending(store) == pending(store, OTHER) == []

    def test_a_job_of_another_consumer_is_refused(self, world: World) -> None:
        mine, (a,) = given(world, b"1", consumer="a")
        theirs = world.reader("b")
        theirs.acquire([S])
        assert settle(theirs, [Settlement(S, [], [Retry(a, 0, b"again")])]) == {a}
        assert world.waiting(S.stream) == []
        assert pending(mine) == [a]

    def test_two_equal_jobs_are_both_retried(self, world: World) -> None:
        store, (a, b) = given(world, b"{}", b"{}")
        settle(store, [Settlement(S, retries=[Retry(a, 0, b"{}")])])
        settle(store, [Settlement(S, retries=[Retry(b, 0, b"{}")])])
        assert [job.strip() for job in world.waiting(S.stream)] == [b"{}", b"{}"]
        assert world.reaper().promote(S.stream, 10).moved == 2

    def test_an_empty_settlement_is_allowed(self, world: World) -> None:
        store, _ = given(world, b"1")
        assert settle(store, []) == set()
        assert settle(store, [Settlement(S)]) == set()

    def test_settlements_of_more_than_one_step(self, world: World) -> None:
        store, ids = given(world, *[b"%d" % i for i in range(40)])
        big = b"x" * 1_000_000
        retries = [Retry(id, 60, big + b"%d" % i) for i, id in enumerate(ids[:20])]
        assert settle(store, [Settlement(S, ids[20:], retries)]) == set()
        assert len(world.waiting(S.stream)) == 20
        assert pending(store) == []


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


class TestPromotion:
    def test_a_retry_returns_when_it_is_due_and_not_before(self, world: World) -> None:
        store, (a,) = given(world, b"1")
        settle(store, [Settlement(S, retries=[Retry(a, 0.3, b"again")])])
        reaper = world.reaper()
        early = reaper.promote(S.stream, 10)
        assert early.moved == 0
        assert early.next_due_s == pytest.approx(0.3, abs=0.25)
        assert read(store) == []
        world.pass_time(0.31)
        assert reaper.promote(S.stream, 10) == (1, None)
        assert [e.data for e in read(store)] == [b"again"]

    def test_the_soonest_retries_are_promoted_first_up_to_the_limit(self, world: World) -> None:
        producer, reaper = world.producer(), world.reaper()
        for job, delay_s in ((b"c", 0.6), (b"a", 0.2), (b"b", 0.4), (b"later", 60)):
            producer.schedule(S.stream, job, delay_s)
        world.pass_time(0.8)
        assert reaper.promote(S.stream, 2).moved == 2
        rest = reaper.promote(S.stream, 50)
        assert rest.moved == 1
        assert rest.next_due_s == pytest.approx(60, abs=1)
        store = world.reader("a")
        store.acquire([S])
        assert [e.data for e in read(store)] == [b"a", b"b", b"c"]

    def test_no_retry_is_scheduled(self, world: World) -> None:
        assert world.reaper().promote(S.stream, 10) == (0, None)

    def test_two_reapers_move_each_job_once(self, world: World) -> None:
        producer = world.producer()
        for i in range(50):
            producer.schedule(S.stream, b"%d" % i, 0.0)
        moved: list[int] = []
        reapers = [world.reaper(), world.reaper()]
        threads = [
            threading.Thread(target=lambda r=r: moved.append(r.promote(S.stream, 40).moved)) for r in reapers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
        assert sum(moved) == 50
        assert world.length(S.stream) == 50


class TestTrimming:
    def test_entries_that_every_group_has_finished_are_trimmed(self, world: World) -> None:
        store, ids = given(world, b"1", b"2", b"3")
        world.producer().add(S.stream, [b"4"])
        reaper = world.reaper()
        assert reaper.trim(S.stream) == 0
        settle(store, [Settlement(S, [ids[0], ids[2]])])
        assert reaper.trim(S.stream) == 1
        assert pending(store) == [ids[1]]
        settle(store, [Settlement(S, [ids[1]])])
        assert reaper.trim(S.stream) == 2
        assert [e.data for e in read(store)] == [b"4"]

    def test_the_entry_right_behind_the_last_delivered_stays(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S])
        world.producer().add(S.stream, [b"%d" % i for i in range(200)])  # many within one millisecond
        reaper = world.reaper()
        for i in range(20):
            (entry,) = read(store, count=1)
            assert entry.data == b"%d" % i
            settle(store, [Settlement(S, [entry.id])])
            assert reaper.trim(S.stream) == 1

    def test_entries_that_another_group_needs_are_not_trimmed(self, world: World) -> None:
        store, ids = given(world, b"1")
        second = Source(S.stream, "cg-second")
        slow = world.reader("slow")
        slow.acquire([second])
        settle(store, [Settlement(S, ids)])
        assert world.reaper().trim(S.stream) == 0
        assert [e.data for e in read(slow, source=second)] == [b"1"]
        assert world.reaper().trim(S.stream) == 0
        settle(slow, [Settlement(second, ids)])
        assert world.reaper().trim(S.stream) == 1

    def test_a_stream_without_a_group_is_not_trimmed(self, world: World) -> None:
        world.producer().add(S.stream, [b"1"])
        assert world.reaper().trim(S.stream) == 0
        assert world.reaper().trim("stream:missing") == 0
        assert world.length(S.stream) == 1

    def test_a_long_stream_is_trimmed_completely(self, world: World) -> None:
        store, _ids = given(world)
        world.producer().add(S.stream, [b"%d" % i for i in range(3456)])
        while entries := read(store, count=1000):
            settle(store, [Settlement(S, [e.id for e in entries])])
        reaper = world.reaper()
        assert reaper.trim(S.stream) + reaper.trim(S.stream) == 3456
        assert world.length(S.stream) == 0

    def test_only_consumers_that_own_nothing_and_are_idle_are_removed(self, world: World) -> None:
        owner, _ = given(world, b"1", consumer="owner")
        readers = {name: world.reader(name) for name in ("me", "gone", "held")}
        for reader in readers.values():
            reader.acquire([S])
        readers["gone"].release_name([S])
        reaper = world.reaper()
        assert reaper.remove_idle_consumers(S, "me", 60_000) == 0
        world.pass_time(0.02)
        assert reaper.remove_idle_consumers(S, "me", 10) == 1
        assert reaper.remove_idle_consumers(S, "me", 10) == 0
        assert len(pending(owner)) == 1
        readers["held"].renew_name([S])

    def test_depths_count_entries_retries_and_dead_letters(self, world: World) -> None:
        store, (a, b, _c) = given(world, b"1", b"2", b"3")
        settle(store, [Settlement(S, [], [Retry(a, 60, b"r")], [Dead(b, b"d")])])
        world.producer().add(S.stream, [b"4", b"5"])
        world.pass_time(0.2)
        depths = world.reaper().depths(S)
        assert depths[:4] == (2, 1, 1, 1)
        assert depths.lag == 2
        assert 0.2 <= depths.oldest_age_s < 10

    def test_depths_of_a_missing_stream(self, world: World) -> None:
        assert world.reaper().depths(S) == (0, 0, 0, 0, 0.0, 0, 0)


class TestProducing:
    def test_jobs_are_counted_and_kept_in_order(self, world: World) -> None:
        jobs = [b"%d" % i for i in range(1234)]
        assert world.producer().add(S.stream, iter(jobs)) == 1234
        store = world.reader("a")
        store.acquire([S])
        assert [e.data for e in read(store, count=5000)] == jobs

    def test_equal_jobs_can_wait_side_by_side(self, world: World) -> None:
        producer = world.producer()
        for _ in range(3):
            producer.schedule(S.stream, b"{}", 0.0)
        assert world.reaper().promote(S.stream, 10).moved == 3

    def test_a_deleted_stream_is_read_again_from_its_start(self, world: World) -> None:
        store, ids = given(world, b"1")
        world.delete_stream(S.stream)
        world.producer().add(S.stream, [b"2"])
        assert settle(store, [Settlement(S, ids)]) == set(ids)
        assert [e.data for e in read(store) or read(store)] == [b"2"]


class TestAnnouncements:
    def test_producers_see_what_each_service_handles(self, world: World) -> None:
        producer, reaper = world.producer(), world.reaper()
        assert producer.announcements() == []
        other = Source("other", "cg-other")
        reaper.announce("host/blue", ["old"], [S])
        reaper.announce("host/blue", ["shout", "audit"], [S, other])
        reaper.announce("host/green", ["类型"], [])
        blue, green = sorted(producer.announcements())
        assert (blue.service, blue.types, blue.sources) == ("host/blue", {"shout", "audit"}, {S, other})
        assert (green.service, green.types, green.streams) == ("host/green", {"类型"}, set())
        assert green.is_running(green.wall_renewed_s + 80)
        assert not green.is_running(green.wall_renewed_s + 100)


class TestRefused:
    @pytest.mark.parametrize("others_pending", [False, True])
    def test_every_id_that_is_no_longer_ours_is_named(self, world: World, others_pending: bool) -> None:
        """Claimed by another consumer, perhaps finished there; finished here before; or never delivered."""
        store, ids = given(world, *(b"%d" % number for number in range(6)))
        other = world.reader("b")
        other.acquire([S])
        other.claim(S, 0, 2, b"0-0")
        other.settle([Settlement(S, done=ids[: 1 if others_pending else 2])])
        store.settle([Settlement(S, done=ids[2:3])])
        (settled,) = store.settle([Settlement(S, done=[*ids, UNKNOWN])])
        assert settled.refused == {*ids[:3], UNKNOWN}
        assert pending(store) == []


DERIVED = {
    "fence": keys.fence_key(S.stream),
    "deaths": keys.deaths_key(S.stream),
    "retry": keys.retry_key(S.stream),
    "dead letters": keys.dead_letter_key(S.stream),
    "stream": S.stream,
}


class TestBrokenKeys:
    """Keys of another type. Each call for the stream is refused or works; other streams go on."""

    @pytest.mark.parametrize("key", DERIVED.values(), ids=DERIVED)
    def test_the_key_and_its_repair_are_named(self, world: World, key: str) -> None:
        store, _ = given(world, b"1")
        assert store.key_faults(S) == []
        world.break_key(key)
        for faults in (store.key_faults(S), world.reaper().key_faults(S)):
            ((named, _, repair, _),) = faults
            assert named == key
            assert repair == f"RENAME {key} {key}:damaged"
        world.repair_key(key)
        assert store.key_faults(S) == []

    @pytest.mark.parametrize("key", DERIVED.values(), ids=DERIVED)
    def test_entries_are_settled_or_remain_pending(self, world: World, key: str) -> None:
        store, ids = given(world, b"1", b"2", b"3")
        world.producer().add(OTHER.stream, [b"x"])
        store.acquire([OTHER])
        (x,) = (entry.id for entry in read(store, source=OTHER))
        world.break_key(key)
        mixed = Settlement(S, ids[:1], [Retry(ids[1], 60, b"r")], [Dead(ids[2], b"d")])
        broken, other = store.settle([mixed, Settlement(OTHER, [x])])
        assert other == Settled(set(), set())
        assert broken.unsettled == {
            "retry": {ids[1]},
            "dead letters": {ids[2]},
        }.get(next(name for name in DERIVED if DERIVED[name] == key), set(ids))
        assert isinstance(broken.error, StoreRefused)
        world.repair_key(key)
        assert pending(store) == [id for id in ids if id in broken.unsettled]
        assert store.settle([mixed])[0].unsettled == set()
        assert (world.waiting(S.stream), world.dead_letters(S.stream)) == ([b"r"], [b"d"])
        assert pending(store) == []

    def test_a_stream_of_another_type_refuses_every_call(self, world: World) -> None:
        store, ids = given(world, b"1")
        world.producer().schedule(S.stream, b"due", 0)
        world.break_key(S.stream)
        for call in (
            lambda: store.acquire([S]),
            lambda: read(store),
            lambda: store.own_pending(S, b"0-0", 1),
            lambda: store.claim(S, 0, 1, b"0-0"),
            lambda: store.renew(S, ids),
            lambda: store.set_deaths(S, {ids[0]: 1}),
            lambda: store.fetch(S, ids),
            lambda: world.reaper().promote(S.stream, 1),
            lambda: world.reaper().trim(S.stream),
            lambda: world.reaper().depths(S),
        ):
            with pytest.raises(StoreRefused):
                call()

    def test_a_claim_that_cannot_read_the_deaths_takes_nothing(self, world: World) -> None:
        _, ids = given(world, b"1")
        other = world.reader("b")
        other.acquire([S])
        world.break_key(keys.deaths_key(S.stream))
        with pytest.raises(StoreRefused):
            other.claim(S, 0, 10, b"0-0")
        world.repair_key(keys.deaths_key(S.stream))
        assert pending(other) == []
        assert [entry.id for entry in other.claim(S, 0, 10, b"0-0")[1]] == ids

    def test_depths_are_counted_without_the_derived_keys(self, world: World) -> None:
        given(world, b"1")
        for name in ("retry", "dead letters", "deaths", "fence"):
            world.break_key(DERIVED[name])
        assert world.reaper().depths(S)[:4] == (0, 1, 0, 0)
        with pytest.raises(StoreRefused):
            world.reaper().promote(S.stream, 1)

    def test_paused_types_of_another_type_are_refused_and_named(self, world: World) -> None:
        store = world.reader("a")
        world.break_key(keys.PAUSED_KEY)
        with pytest.raises(StoreRefused):
            store.paused_types()
        ((key, _, repair, _),) = store.pause_faults()
        assert (key, repair) == (keys.PAUSED_KEY, f"RENAME {key} {key}:damaged")

    def test_a_read_of_one_stream_is_abandoned_alone(self, world: World) -> None:
        store = world.reader("a")
        store.acquire([S, OTHER])
        store.begin_read(S, 1, 60_000)
        store.begin_read(OTHER, 1, 60_000)
        store.abandon_read(S)
        store.abandon_read(S)
        assert (store.is_reading(S), store.is_reading(OTHER)) == (False, True)
