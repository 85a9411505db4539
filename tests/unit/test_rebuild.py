"""A rebuild loses no row and interrupts no search, with kills and writes at any step."""

import contextlib
import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.handlers.embedding.payload import EmbedPayload
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.rebuild import handler as rebuild_handler
from jobworker.handlers.rebuild import rebuild
from jobworker.handlers.rebuild.handler import IndexRebuild, RebuildBusy, RebuildPayload, embedded_text
from jobworker.handlers.rebuild.memory import MemoryShadow
from jobworker.handlers.rebuild.ports import RawRow
from jobworker.handlers.rebuild.rebuild import Clock, next_collection, thin_sample
from jobworker.handlers.rebuild.recall import TrueScores
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors import versioned_writer
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import EntityRow, Row, TransientStoreError
from jobworker.handlers.vectors.schema import plain_name
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter
from jobworker.worker import Job, PermanentError

NAME, ALIAS = "story_segments", "z_novel_story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
OLD = DummyEncoder(8)


class Killed(BaseException):
    """Stands in for SIGKILL: no later call reaches a store."""


class World:
    """A store, its rebuilds and a clock that only `sleep` moves."""

    def __init__(self, rows: int, shadow: type[MemoryShadow] = MemoryShadow) -> None:
        self.now_s = 0.0
        self.store = MemoryVectors()
        self.store.ensure_collection(NAME, 8)
        self.fence = MemoryFence(lambda: self.now_s)
        self.shadow = shadow(self.store)
        self.expected: dict[str, str] = {}
        self.counters: dict[str, int] = {}
        self.write(*(f"r{number:04d}" for number in range(rows)))

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def write(self, *ids: str, text: str = "first", model: str = "dummy:8") -> None:
        """Write as a worker does; a write that would wait for admission fails at once."""
        own_s = itertools.count(0, versioned_writer.WAIT_S)
        dim = self.store._dims[ALIAS]
        vectors = DummyEncoder(dim).encode([f"{text} {id_}" for id_ in ids]) if ids else []
        rows = [
            Row(id_, vector, "t", "p", text_content=f"{text} {id_}")
            for id_, vector in zip(ids, vectors, strict=True)
        ]
        writer = VersionedWriter(
            self.store, self.fence, prefix="z_novel_", model=model,
            mono_s=lambda: next(own_s), sleep=lambda s: None,
        )  # fmt: skip
        writer.write(NAME, [VersionedRows("job", rows)])
        self.expected |= {row.id: row.text_content for row in rows}

    def remove(self, id_: str) -> None:
        """Delete as a worker does; does nothing while writes are paused."""
        intent = WriteIntent(ALIAS, "removal", "job", (id_,))
        if self.fence.admit([intent])[0].verdict == "in":
            self.store.delete(NAME, [id_], **SCOPE)
            self.fence.release([intent])
            self.expected.pop(id_, None)

    def rebuild(self, entry: str = "1-0", id: str = "job", around: Any = None, **payload: Any) -> None:
        """Run the handler; `around` is called before and after every call to a store or a rebuild's state."""
        wrap = (lambda target: target) if around is None else lambda target: Intercepted(target, around)
        handler = IndexRebuild(wrap(self.shadow), wrap(self.fence), Clock(lambda: self.now_s, self.sleep))
        handler.setup(HandlerSettings())
        self.counters = handler.counters
        payload = {"collection": NAME, **payload}
        handler.handle(Job(id, "index_rebuild", "", "", payload, {}, "", "s", entry, 0))

    def create_foreign(self, number: int) -> int:
        """Create a collection of another program if the name is free; returns how many were created."""
        name = f"{ALIAS}_v{number}"
        if self.shadow.exists(name):
            return 0
        self.shadow._rows[name], self.shadow._dims[name] = {}, 3
        return 1

    def check(self, foreign: int = 0) -> None:
        """Every row has the text that was written last; only the live collection and those of other programs
        are left."""
        found = self.store.get(NAME, list(self.expected), **SCOPE)
        assert {row.id: row.text_content for row in found} == self.expected
        assert self.store.count(NAME) == len(self.expected)
        assert len(self.shadow._rows) == 1 + foreign
        assert self.fence.admit([]) == []
        self.write("after")
        assert self.fence.changed(ALIAS, [], 10) == []


class LaggingReads(MemoryShadow):
    """Misses rows for some seconds at random, as Milvus does while it replaces segments."""

    world: World
    shuffle: random.Random
    until_s, share = -10.0, 0.0

    def max_read_lag_s(self) -> float:
        return 5.0

    def _visible(self, ids: Iterable[str]) -> list[str]:
        # Between two such times, reads are complete for longer than the pause between two polls.
        if self.world.now_s >= self.until_s + 1.5 and self.shuffle.random() < 0.3:
            self.until_s, self.share = self.world.now_s + self.shuffle.uniform(0, 3), self.shuffle.random()
        blind = self.world.now_s < self.until_s
        return [id_ for id_ in ids if not (blind and zlib.crc32(id_.encode()) / 2**32 < self.share)]

    def page(self, collection: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[RawRow]:
        return self.fetch(collection, sorted(id_ for id_ in self._rows[collection] if id_ > after)[:limit])

    def fetch(self, collection: str, ids: Sequence[str]) -> list[RawRow]:
        return super().fetch(collection, self._visible(ids))

    def count(self, collection: str) -> int:
        return len(self._visible(self._rows[collection]))


class Intercepted:
    """Calls `around(name, before)` before and after each call to the target."""

    def __init__(self, target: Any, around: Callable[[str, bool], None]) -> None:
        self._target, self._around = target, around

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self._around(name, True)
            answer = getattr(self._target, name)(*args, **named)
            self._around(name, False)
            return answer

        return call


def kill_at(step: int) -> Callable[[str, bool], None]:
    """Kill at that step (two a call) and every later one: code in `finally` reaches no store either."""
    count = itertools.count()

    def around(name: str, before: bool) -> None:
        if next(count) >= step:
            raise Killed

    return around


def count_steps(world: World) -> int:
    """How many steps a whole rebuild has."""
    count = itertools.count()
    world.rebuild(around=lambda name, before: next(count))
    return next(count)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "PAGE_ROWS", 20)
    monkeypatch.setattr(rebuild, "MIN_PAGE_ROWS", 20)
    monkeypatch.setattr(rebuild, "CHANGED_ROWS", 7)
    monkeypatch.setattr(rebuild, "REMAINING_ROWS", 3)


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


def test_a_finished_rebuild_is_not_repeated_for_the_same_delivery() -> None:
    world = World(10)
    world.rebuild()
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{ALIAS}_v2"


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
        return OLD.encode([embedded_text(record) for record in records])

    def around(name: str, before: bool) -> None:
        if name == "upsert" and before:
            pages.append(int(world.fence.state(ALIAS)["copied"]))

    monkeypatch.setattr(rebuild_handler, "embed_rows", slow)
    world.rebuild(model="dummy:8", around=around)
    assert set(taken) == {"s/1-0"}
    assert len(taken) == 60
    assert pages == list(range(0, 60, 8))


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_rows_are_split_by_text_size_in_order(sizes: list[int], most: int) -> None:
    records = [{"id": f"{number:02}", "text_content": "x" * size} for number, size in enumerate(sizes)]
    cut = list(rebuild.split_by_chars(records, most))
    assert [record for part in cut for record in part] == records
    for part in cut:
        assert len(part) <= 1 or sum(2 + len(record["text_content"]) for record in part) <= most


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


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (None, "payload must be an object"),
        ({}, "collection must be"),
        ({"collection": 'x" or'}, "collection must be"),
        ({"collection": "story_segments_v2"}, "_v and digits"),
        ({"collection": "z_novel_story_segments_v2"}, "_v and digits"),
        ({"collection": "z_novel_"}, "prefix alone"),
        ({"collection": "a" * 200}, "does not match"),
        ({"collection": "a", "mode": "fast"}, "mode must be"),
        ({"collection": "a", "mode": ["shadow"]}, "mode must be"),
        ({"collection": "a", "model": 5}, "model must be"),
        ({"collection": "a", "model": "m", "mode": "in_place"}, "model needs mode shadow"),
    ],
)
def test_a_bad_payload_is_refused(payload: Any, says: str) -> None:
    with pytest.raises(PermanentError, match=says):
        RebuildPayload.parse(payload, "z_novel_")


def test_the_collection_may_be_named_with_or_without_prefix() -> None:
    assert RebuildPayload.parse({"collection": ALIAS}, "z_novel_").collection == NAME
    assert RebuildPayload.parse({"collection": NAME}, "z_novel_") == (NAME, "shadow", "")


@given(
    st.sampled_from(["", "z_novel_", "story_", "x_v1_"]),
    st.sampled_from(["story_segments", "entity_profiles", "notes", "z_novel_notes", "v2", "a_v2", "story_"]),
    st.booleans(),
)
def test_all_job_types_accept_the_same_collection_names(prefix: str, name: str, prefixed: bool) -> None:
    """Both job types read a name as the same collection, or both refuse it."""
    name = prefix * prefixed + name
    answers = []
    for read in (
        lambda: RebuildPayload.parse({"collection": name}, prefix).collection,
        lambda: (
            EmbedPayload.parse(
                Job(
                    "j",
                    "embedding_batch",
                    "t",
                    "p",
                    {"ids": [], "texts": [], "collection": name},
                    {},
                    "",
                    "s",
                    "1",
                    0,
                ),
                prefix,
            ).collection
        ),
    ):
        try:
            answers.append(read())
        except PermanentError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_builtin_collection_names_work_with_every_prefix() -> None:
    assert plain_name("story_segments", "story_") == "story_segments"
    assert plain_name("story_story_segments", "story_") == "story_segments"


def test_an_unknown_collection_or_model_is_a_permanent_error() -> None:
    world = World(0)
    with pytest.raises(PermanentError):
        world.rebuild(collection="nothing")
    with pytest.raises(PermanentError):
        world.rebuild(model="/no/such/model")


def test_an_entity_is_embedded_from_its_name_and_description() -> None:
    entity = EntityRow("e", OLD.encode(["x"])[0], "t", "p", name="Bao", description="a poet")
    assert embedded_text(entity._asdict()) == "Bao\na poet"
    assert embedded_text(entity._replace(description="")._asdict()) == "Bao"


# ---- pure functions


@pytest.mark.parametrize(("source", "target"), [("a_v1", "a_v2"), ("a_v9", "a_v10"), ("other", "a_v2")])
def test_the_version_in_the_name_is_incremented(source: str, target: str) -> None:
    assert next_collection("a", source, lambda name: False) == target


def test_existing_names_are_skipped() -> None:
    assert next_collection("a", "a_v1", {"a_v2", "a_v3", "a_v5"}.__contains__) == "a_v4"


@given(st.integers(1, 2000))
def test_a_sample_stays_small_and_spread(pages: int) -> None:
    sample: list[str] = []
    for page in range(pages):
        sample = thin_sample([*sample, str(page)])
    assert min(pages, rebuild.SAMPLE_ROWS // 2) <= len(sample) <= rebuild.SAMPLE_ROWS
    assert int(sample[-1]) >= pages // 2 - 1


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32))
def test_recall_equals_that_of_an_exact_search(rows: int, queries: int, limit: int, seed: int) -> None:
    random_ = np.random.default_rng(seed)
    vectors = random_.normal(size=(rows, 4)).astype(np.float32)
    asked = random_.normal(size=(queries, 4)).astype(np.float32)
    true = TrueScores(list(asked), limit)
    for start in range(0, rows, 7):
        true.add(list(vectors[start : start + 7]))
    norms = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)[None]
    scores = asked @ vectors.T / norms
    best = [[(str(row), float(line[row])) for row in np.argsort(-line)[:limit]] for line in scores]
    assert true.recall(best) == 1.0
    if rows > limit:
        worst = [[(str(row), float(line[row])) for row in np.argsort(line)[:1]] for line in scores]
        assert true.recall(worst) == 0.0
    if rows >= 2:
        assert true.recall([hits[:1] for hits in best]) == pytest.approx(1 / min(limit, rows), abs=0.5)
