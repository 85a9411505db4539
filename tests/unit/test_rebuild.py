"""A rebuild keeps every row and interrupts no search; what it refuses, and what it leaves alone."""

import contextlib
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.rebuild import handler as rebuild_handler
from jobworker.handlers.rebuild import rebuild
from jobworker.handlers.rebuild.handler import RebuildBusy, embedded_text
from jobworker.handlers.rebuild.memory import MemoryShadow
from jobworker.handlers.vectors.ports import Row, TransientStoreError
from jobworker.worker import PermanentError
from support.rebuild_world import ALIAS, NAME, OLD, SCOPE, Killed, World, kill_at

pytestmark = pytest.mark.usefixtures("small_pages")


def test_the_new_collection_holds_every_row_and_the_old_one_is_dropped() -> None:
    world = World(100)
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v2"
    world.check()
    world.rebuild(entry="2-0")
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v3"
    world.check()


def test_an_empty_collection_is_rebuilt_too() -> None:
    world = World(0)
    world.rebuild()
    world.check()


def test_names_used_by_other_programs_are_skipped() -> None:
    world = World(20)
    world.create_foreign(2)
    world.store._rows[f"{ALIAS}_v3"] = {}  # an alias
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v4"
    world.check(foreign=1)


@pytest.mark.parametrize("before", ["create", "upsert", "flush", "count"])
def test_a_foreign_collection_that_takes_the_target_name_meanwhile_is_kept(before: str) -> None:
    """Created between the check and the request, or instead of the half-filled collection."""
    world, once = World(50), [True]

    def around(name: str, is_before: bool) -> None:
        if name == before and is_before and world.fence.state(ALIAS).get("target") and once:
            once.clear()
            world.shadow._marks.pop(f"{ALIAS}_v2", None)
            world.shadow._rows[f"{ALIAS}_v2"] = {}
            world.shadow._dims[f"{ALIAS}_v2"] = 8
            if before != "create":
                raise TransientStoreError("outage")

    with contextlib.suppress(TransientStoreError):
        world.rebuild(around=around)
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v3"
    world.check(foreign=1)


def test_a_foreign_first_collection_is_not_used() -> None:
    world = World(5)
    world.create_foreign(1)
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v3"
    world.check(foreign=1)


def test_the_old_collection_is_kept_while_another_alias_names_it() -> None:
    world = World(20)
    world.shadow._live["another"] = world.shadow.live_collection(NAME)
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v2"
    world.check(foreign=1)


def test_a_finished_rebuild_is_not_repeated_for_the_same_delivery() -> None:
    world = World(10)
    world.rebuild()
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v2"


def test_rows_are_embedded_again_and_vectors_of_the_old_model_refused() -> None:
    world = World(30)
    seen = []

    def around(name: str, before: bool) -> None:
        if name == "upsert" and before and not seen:
            seen.append(name)
            world.write("r0007", text="meanwhile")

    world.rebuild(around=around, model="dummy:16")
    (row,) = world.store.get(NAME, ["r0007"], **SCOPE)
    assert np.array_equal(row.vector, DummyEncoder(16).encode(["meanwhile r0007"])[0])
    with pytest.raises(TransientStoreError, match="--model dummy:16"):
        world.write("x")
    world.write("x", model="dummy:16")
    world.write("r0001", model="dummy:16", text="second")
    assert world.store.count(NAME) == 31
    world.rebuild(entry="2-0")
    with pytest.raises(TransientStoreError, match="--model dummy:16"):
        world.write("y")


def test_a_slow_model_keeps_the_lease_and_gets_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model on a CPU needs minutes for a page: a kill must not repeat so much work, and no other
    rebuild may start meanwhile."""
    world, pages = World(60), []
    monkeypatch.setattr(rebuild, "PAGE_ROWS", 5000)
    monkeypatch.setattr(rebuild, "MIN_PAGE_ROWS", 8)
    monkeypatch.setattr(rebuild, "EMBED_CHARS", 20)
    taken: list[Any] = []

    def slow(encoder: Any, records: Any) -> Any:
        world.sleep(3.0 * len(records))
        taken.append(world.fence.begin(ALIAS, "s/9-9", 1000))
        return [{"vector": one} for one in OLD.encode([embedded_text(record) for record in records])]

    def around(name: str, before: bool) -> None:
        if name == "upsert" and before:
            pages.append(int(world.fence.state(ALIAS)["copied"]))

    monkeypatch.setattr(rebuild_handler, "embed_rows", slow)
    world.rebuild(model="dummy:8", around=around)
    assert set(taken) == {"s/1-0"}
    assert len(taken) == 60
    assert pages == list(range(0, 60, 8))


def test_a_rebuild_for_another_model_starts_over_and_drops_the_first_collection() -> None:
    world = World(50)
    with pytest.raises(Killed):
        world.rebuild(around=kill_at(30), model="dummy:16")
    world.now_s += 100
    world.rebuild(entry="2-0", id="other")
    assert world.store._dims[ALIAS] == 8
    world.check()


def test_only_one_rebuild_of_a_collection_runs_at_a_time() -> None:
    world = World(20)
    with pytest.raises(Killed):
        world.rebuild(around=kill_at(20))
    with pytest.raises(RebuildBusy, match="s/1-0"):
        world.rebuild(entry="2-0", id="other")
    world.rebuild()
    world.rebuild(entry="2-0", id="other")
    world.check()


def test_changes_without_admission_are_found_by_the_row_count() -> None:
    world, once = World(50), [True]

    def around(name: str, before: bool) -> None:
        if name == "unindexed_rows" and once:
            once.clear()
            world.store.delete(NAME, ["r0001"], **SCOPE)
            world.store.delete(NAME, ["r0002"], **SCOPE)
            world.store.upsert(NAME, [Row("zz", OLD.encode(["zz"])[0], "t", "p", text_content="zz")])

    world.rebuild(around=around)
    del world.expected["r0001"], world.expected["r0002"]
    world.expected["zz"] = "zz"
    world.check()


def test_an_index_with_low_recall_does_not_go_live(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(50)
    monkeypatch.setattr(
        MemoryShadow, "search", lambda self, collection, vectors, limit: [[] for _ in vectors]
    )
    with pytest.raises(PermanentError, match="recall"):
        world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v1"
    world.check()


def test_a_rebuild_in_place_pauses_writes_and_resumes_them() -> None:
    world, verdicts = World(10), []

    def around(name: str, before: bool) -> None:
        if name == "rebuild_index":
            verdicts.append(world.fence.admit([WriteIntent(ALIAS, "x", "x", ())])[0].verdict)

    world.rebuild(around=around, mode="in_place")
    assert verdicts == ["closed", "closed"]
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v1"
    world.check()


def test_progress_and_recall_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    world = World(50)
    with caplog.at_level("INFO"):
        world.rebuild()
    assert world.counters == {"rebuilds_done": 1, "rebuilt_rows": 50}
    events = {record.msg: vars(record) for record in reversed(caplog.records)}
    progress = events["rebuild.progress"]
    assert (progress["collection"], progress["copied"], progress["rows"], progress["percent"]) == (
        ALIAS,
        20,
        50,
        40,
    )
    assert "recall_at_10" in events["rebuild.verified"]
