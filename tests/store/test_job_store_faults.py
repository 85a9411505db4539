"""What every job store refuses, and how it names a broken key."""

import pytest

from jobworker.worker import keys
from jobworker.worker.errors import StoreRefused
from jobworker.worker.store.ports import Dead, Retry, Settled, Settlement
from support.job_store_steps import OTHER, UNKNOWN, S, given, pending, read
from support.job_worlds import World


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
    "ready": keys.ready_key(S.stream),
    "stream": S.stream,
}


class TestBrokenKeys:
    """Keys of another type. Each call for the stream is refused or works; other streams continue."""

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
        world.schedule(S.stream, b"due", 0)
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
