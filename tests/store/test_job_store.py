"""Suite of every job store, the one in memory and real servers: reading, settling, retries, trimming."""

import select
import threading

import pytest

from jobworker.worker.keys import Holder, Source
from jobworker.worker.store.ports import Dead, Depths, Retry, Settlement
from support.job_store_steps import OTHER, SOON_S, UNKNOWN, S, given, pending, read, readable
from support.job_worlds import World, settle


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
    def test_the_caller_uses_the_store_while_it_settles(self, world: World) -> None:
        store, (a, b) = given(world, b"a", b"b")
        found: list[object] = []

        def meanwhile() -> None:
            world.producer().add(S.stream, [b"c"])
            found.extend(entry.data for entry in read(store))
            found.append(store.fetch(S, [b]))

        (settled,) = store.settle([Settlement(S, done=[a])], meanwhile)
        assert found == [b"c", {b: b"b"}]
        assert settled.refused == set()
        assert a not in pending(store)

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
        reaper = world.reaper()
        for job, delay_s in ((b"c", 0.6), (b"a", 0.2), (b"b", 0.4), (b"later", 60)):
            world.schedule(S.stream, job, delay_s)
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
        for i in range(50):
            world.schedule(S.stream, b"%d" % i, 0.0)
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

    def test_the_consumer_of_a_service_that_renewed_its_name_lately_is_kept(self, world: World) -> None:
        """An idle service whose lease ran out in a short stall: its consumer was idle for long before."""
        idle = world.reader("idle", Holder("t1", "pid 1", 0.1))
        idle.acquire([S])
        world.pass_time(0.5)
        idle.renew_name([S])
        world.pass_time(0.2)
        reaper = world.reaper()
        assert reaper.remove_idle_consumers(S, "me", 400) == 0
        world.pass_time(0.3)
        assert reaper.remove_idle_consumers(S, "me", 400) == 1

    def test_depths_count_entries_retries_and_dead_letters(self, world: World) -> None:
        store, (a, b, _c) = given(world, b"1", b"2", b"3")
        settle(store, [Settlement(S, [], [Retry(a, 60, b"r")], [Dead(b, b"d")])])
        world.producer().add(S.stream, [b"4", b"5"])
        world.pass_time(0.2)
        depths = world.reaper().depths(S)
        assert depths[:4] == (2, 1, 1, 1)
        assert depths.lag == 2
        assert 0.2 <= depths.oldest_age_s < 10

    def test_depths_name_the_other_groups(self, world: World) -> None:
        given(world, b"1")
        world.reader("stranger").acquire([Source(S.stream, "cg-stranger")])
        assert world.reaper().depths(S).other_groups == ("cg-stranger",)

    def test_depths_of_a_missing_stream(self, world: World) -> None:
        assert world.reaper().depths(S) == Depths(0, 0, 0, 0, 0.0, 0)


class TestProducing:
    def test_jobs_are_counted_and_kept_in_order(self, world: World) -> None:
        jobs = [b"%d" % i for i in range(1234)]
        assert world.producer().add(S.stream, iter(jobs)) == 1234
        store = world.reader("a")
        store.acquire([S])
        assert [e.data for e in read(store, count=5000)] == jobs

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
        assert (blue.service, blue.types, blue.sources) == ("host/blue", {"shout", "audit"}, (S, other))
        assert (green.service, green.types, green.streams) == ("host/green", {"类型"}, set())
        assert green.is_running(green.wall_renewed_s + 80)
        assert not green.is_running(green.wall_renewed_s + 100)
