"""A rebuild loses no row, with kills, outages and writes at any step."""

import contextlib
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.erasure.erase import Busy
from jobworker.handlers.erasure.handler import VectorsDelete
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors.ports import Row, TransientStoreError
from jobworker.worker import Fenced, Job, Unavailable
from support.rebuild_world import ALIAS, NAME, OLD, Killed, LaggingReads, World, count_steps, kill_at

pytestmark = pytest.mark.usefixtures("small_pages")


@pytest.mark.parametrize("until_s", [0, 60])
def test_a_rebuild_resumes_after_a_kill_at_any_step(until_s: float) -> None:
    """At once, while writes may still be paused, and after they have resumed and rows were written."""
    total = count_steps(World(50))
    assert total > 40
    for step in range(total):
        world = World(50)
        with pytest.raises(Killed):
            world.rebuild(around=kill_at(step))
        world.sleep(until_s)
        with contextlib.suppress(TransientStoreError) if not until_s else contextlib.nullcontext():
            world.write("r0000", "r0030", "new", text=f"after the kill at {step}")
        world.rebuild()  # the same entry is delivered again
        world.check()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("until_s", [0, 60])
def test_a_kill_never_drops_a_collection_of_another_program(number: int, until_s: float) -> None:
    """The foreign collection takes the old name, the target's name or the name after it."""
    total = count_steps(World(20))
    assert total > 40
    for step in range(0, total, 2):
        world = World(20)
        world.shadow.live_collection(NAME)
        with pytest.raises(Killed):
            world.rebuild(around=kill_at(step))
        made = world.create_foreign(number)
        world.sleep(until_s)
        world.rebuild()
        world.rebuild(entry="2-0", id="other")
        world.check(foreign=made)


@pytest.mark.parametrize("payload", [{"mode": "in_place"}, {"model": "dummy:16"}, {}])
@pytest.mark.parametrize("kill", range(8))
def test_the_next_job_completes_an_interrupted_switch_to_another_model(
    kill: int, payload: dict[str, str]
) -> None:
    """No collection mixes vectors of two models, writes resume, nothing of the first rebuild is left."""
    world, calls = World(20), itertools.count()

    def around(name: str, before: bool) -> None:
        if world.fence.state(ALIAS).get("phase") in ("switch", "drop") and next(calls) >= kill:
            raise Killed

    with pytest.raises(Killed):
        world.rebuild(around=around, model="dummy:24")
    world.sleep(100)
    late = DummyEncoder(world.store._dims[ALIAS]).encode(["late"])[0]
    world.store.upsert(NAME, [Row("late", late, "t", "p", text_content="late")])
    world.rebuild(entry="2-0", id="other", **payload)
    dim = world.store._dims[ALIAS]
    rows = world.shadow._rows[world.shadow.live_collection(NAME)].values()
    assert {row.vector.shape for row in rows} == {(dim,)}
    assert len(world.shadow._rows) == 1
    world.write("after", model=f"dummy:{dim}")


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 120), max_size=4))
def test_writes_and_kills_at_any_step_lose_no_row(seed: int, kills: list[int]) -> None:
    shuffle, world = random.Random(seed), World(60)
    numbers = itertools.count()

    def write(name: str, before: bool) -> None:
        if shuffle.random() < 0.3:
            ids = [f"r{shuffle.randrange(70):04d}" for _ in range(shuffle.randint(1, 3))]
            # While writes are paused; a job would be retried.
            with contextlib.suppress(TransientStoreError):
                world.write(*dict.fromkeys(ids), text=f"write {next(numbers)}")

    for kill in kills:
        die = kill_at(kill)

        def around(name: str, before: bool, die: Any = die) -> None:
            die(name, before)
            write(name, before)

        try:
            world.rebuild(around=around)
        except Killed:
            write("between", True)
    world.rebuild(around=write)
    world.check()


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_rows_that_reads_miss_for_some_seconds_are_not_lost(seed: int) -> None:
    shuffle, world, numbers = random.Random(seed), World(60, LaggingReads), itertools.count()
    shadow = world.shadow
    assert isinstance(shadow, LaggingReads)
    shadow.world, shadow.shuffle = world, shuffle

    def write(name: str, before: bool) -> None:
        if shuffle.random() < 0.1:
            with contextlib.suppress(TransientStoreError):  # writes are paused; a job would be retried
                world.write(f"r{shuffle.randrange(70):04d}", text=f"write {next(numbers)}")
        if shuffle.random() < 0.05:
            world.remove(f"r{shuffle.randrange(70):04d}")

    world.rebuild(around=write)
    world.check()


def test_a_write_that_started_before_the_journal_is_not_lost() -> None:
    world, state = World(50), {"writes": 0}

    def around(name: str, before: bool) -> None:
        # The rebuild starts and copies everything in the middle of a worker's write.
        if name == "flush" and before and not state["writes"]:
            state["writes"] = 1
            world.store.upsert(NAME, late)
            world.fence.release([intent])

    late = [Row("r0001", OLD.encode(["late"])[0], "t", "p", text_content="late")]
    intent = WriteIntent(ALIAS, "token", "owner", ("r0001",))
    world.fence.admit([intent])
    world.rebuild(around=around)
    world.expected["r0001"] = "late"
    world.check()


def test_writes_continue_while_the_lease_of_a_dead_writer_runs() -> None:
    world = World(20)
    world.fence.admit([WriteIntent(ALIAS, "dead", "owner", ("r0001",))])
    open_at = []

    def around(name: str, before: bool) -> None:
        if name == "writers" and world.now_s > 20:
            open_at.append(world.now_s)

    world.rebuild(around=around)
    assert 90 < world.now_s < 120
    world.check()


def test_a_retry_resumes_after_an_outage() -> None:
    world, broken = World(50), [True]

    def around(name: str, before: bool) -> None:
        if name == "upsert" and world.fence.state(ALIAS).get("copied") == "20" and broken:
            broken.clear()
            raise TransientStoreError("outage")

    with pytest.raises(TransientStoreError):
        world.rebuild(around=around)
    copied: list[str] = []
    world.rebuild(
        entry="2-0",
        around=lambda name, before: (
            copied.append(world.fence.state(ALIAS)["copied"]) if name == "upsert" else None
        ),
    )
    assert copied[0] == "20"
    world.check()


def erase(world: World) -> None:
    """Delete the rows whose job was created long ago: all but those of `keep`."""
    handler = VectorsDelete(
        world.store, world.fence, world.fence, MemoryRecords(), lambda: world.now_s, world.sleep
    )
    handler.setup(HandlerSettings())
    job = Job("e", "vectors_delete", "t", "p", {"all": True}, {}, "", "s", "1-0", 0)
    handler.handle(job)
    world.expected.clear()


def rows_anywhere(world: World) -> int:
    return sum(map(len, world.shadow._rows.values())) + sum(map(len, world.store._rows.values()))


def test_rows_deleted_at_any_step_of_a_rebuild_do_not_come_back() -> None:
    """The rebuild is suspended at that step, until the deletion is done."""
    for step in range(0, count_steps(World(30)), 2):
        world, count = World(30), itertools.count()

        def around(name: str, before: bool, world: World = world, count: Any = count, at: int = step) -> None:
            if next(count) == at:
                with contextlib.suppress(Busy, Unavailable):
                    erase(world)

        with contextlib.suppress(Fenced):
            world.rebuild(around=around)
        with contextlib.suppress(Busy, Unavailable):
            erase(world)
        assert rows_anywhere(world) == 0, step


def test_a_deletion_after_the_kill_of_a_rebuild_empties_its_copy_at_once() -> None:
    for step in range(count_steps(World(30))):
        world = World(30)
        with pytest.raises(Killed):
            world.rebuild(around=kill_at(step))
        if world.fence.state(ALIAS).get("phase") == "switch":
            continue  # the next try of the rebuild, or of the deletion, comes first
        erase(world)
        assert rows_anywhere(world) == 0, step
        world.rebuild()
        world.check()
