"""Summary jobs: stored, searchable, never older than the newest version, also after kills."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobworker.handlers.encoder.base import DummyEncoder, Plan, Purpose
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.jobstore.open import open_fence, open_records
from jobworker.handlers.jobstore.records import RecordKey
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.handler import WriteBack, entity_id
from jobworker.handlers.summaries.sinks import (
    ChapterFindings,
    EntityUpdate,
    Event,
    Findings,
    NoSink,
    open_sink,
)
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.milvus.store import open_vectors
from jobworker.handlers.vectors.ports import EntityHit, Row, TransientStoreError
from jobworker.worker import ConfigurationError, Job, PermanentError, Unavailable
from support.milvus import lite_server
from support.redis_servers import running

DIM = 8
SEGMENTS, ENTITIES = "story_segments", "entity_profiles"
CHAPTER = "第七十七章　风雪夜归人。他推开门，愣住了。“你回来了？”她在灯下问。雪一直下到天亮才停。"


def job(
    version: int | None = None, *, chapter: str = "c1", tenant: str = "t1", project: str = "p1", **more: Any
) -> Job:
    payload = {"tenant_id": tenant, "project_id": project, "chapter_id": chapter, "content": CHAPTER}
    payload |= {} if version is None else {"chapter_version": version}
    return Job(
        f"{chapter}.{version}", "memory_update", tenant, project, payload | more, {}, "", "s", "1-1", 0
    )  # fmt: skip


class World:
    """Stores that outlive their handlers."""

    def __init__(self) -> None:
        self.store, self.records, self.fence = MemoryVectors(), MemoryRecords(), MemoryFence()

    def handler(self, **more: Any) -> WriteBack:
        given = {
            "store": self.store,
            "records": self.records,
            "fence": self.fence,
            "encoder": DummyEncoder(DIM),
        }
        made = WriteBack(**(given | more))
        made.setup(HandlerSettings(summary_chars=30))
        return made

    def summary(self, chapter: str = "c1", tenant: str = "t1", project: str = "p1") -> tuple[int, str]:
        """Version and text; the record and the row must agree."""
        record = self.records.get(RecordKey("summary", tenant, project, chapter))
        assert record is not None
        (row,) = self.store.get(
            SEGMENTS, [f"summary:{chapter}"], tenant_id=tenant, project_id=project, strong=True
        )
        assert isinstance(row, Row)
        assert (row.version, row.text_content) == (record.version, record.fields["summary"])
        assert np.allclose(row.vector, DummyEncoder(DIM).encode([row.text_content])[0], atol=1e-6)
        return row.version, row.text_content

    def entities(self) -> dict[str, tuple[str, str]]:
        near = DummyEncoder(DIM).encode(["x"])[0]
        scope: dict[str, Any] = {"tenant_id": "t1", "project_id": "p1", "limit": 50, "strong": True}
        rows = self.store.search(ENTITIES, near, **scope)
        return {row.name: (row.description, row.entity_type) for row in rows if isinstance(row, EntityHit)}


class Model:
    """Language model whose findings are a function of the chapter's text."""

    limit_s = 1.0

    def __init__(self, find: Callable[[str], Findings]) -> None:
        self.find, self.calls = find, 0
        self.counters: dict[str, int] = {"llm_requests": 0}

    def extract_findings(self, content: str) -> Findings:
        self.calls += 1
        return self.find(content)


class Sink:
    """Sink that fails the first `failures` calls and records the others."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.stored: list[ChapterFindings] = []

    def store(self, chapter: ChapterFindings) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable("the sink does not answer")
        self.stored.append(chapter)


@pytest.fixture
def world() -> World:
    return World()


class Counting(DummyEncoder):
    """Records the lengths of the texts that it embeds."""

    def __init__(self) -> None:
        super().__init__(DIM)
        self.lengths: list[int] = []

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        self.lengths += map(len, texts)
        return super().tokenize(texts, purpose)


@pytest.mark.parametrize(
    "unit",
    [
        "雪",
        "snow ",
        "雪一直下，",
        "雪。",
        "a. " + "b" * 400,
        "雪👨\u200d👩\u200d👧 ",
        "“雪",
        "Mr. ",
        "雪" * 499 + "。雪。",
    ],
)
def test_the_work_for_a_chapter_is_bounded(world: World, unit: str) -> None:
    encoder = Counting()
    content = (unit * (1_000_000 // len(unit)))[:1_000_000]
    world.handler(encoder=encoder).handle(job(content=content))
    assert max(encoder.lengths) <= 500
    assert sum(encoder.lengths) <= 200_000 + 30
    assert len(encoder.lengths) <= 5001
    assert world.summary()[1]


def test_the_vector_of_a_given_summary_covers_what_its_row_holds(world: World) -> None:
    encoder = Counting()
    world.handler(encoder=encoder).handle(job(summary="雪" * 1_000_000))
    assert encoder.lengths == [65_535 // 3]


def test_a_given_summary_is_stored_unchanged_and_searchable(world: World) -> None:
    text = "  他回来了。\n " + "长" * 50
    world.handler().handle(job(3, summary=text))
    assert world.summary() == (3, text)
    (row,) = world.store.get(SEGMENTS, ["summary:c1"], tenant_id="t1", project_id="p1")
    assert isinstance(row, Row)
    assert (row.chapter_id, row.segment_type) == ("c1", "summary")
    (hit,) = world.store.search(
        SEGMENTS, DummyEncoder(DIM).encode([text])[0], tenant_id="t1", project_id="p1", limit=1
    )
    assert hit.id == "summary:c1"


def test_a_missing_summary_is_extracted_from_the_chapter(world: World) -> None:
    world.handler().handle(job(1))
    _, text = world.summary()
    assert 0 < len(text) <= 30
    assert text in CHAPTER or all(part in CHAPTER for part in text.replace("。", "。|").split("|"))
    first = text
    world.handler().handle(job(2))
    assert world.summary() == (2, first), "the same chapter has the same summary"


def test_a_long_summary_is_clipped_in_the_row_but_not_in_the_record(world: World) -> None:
    text = "雪" * 30_000
    world.handler().handle(job(1, summary=text))
    record = world.records.get(RecordKey("summary", "t1", "p1", "c1"))
    (row,) = world.store.get(SEGMENTS, ["summary:c1"], tenant_id="t1", project_id="p1")
    assert record is not None
    assert isinstance(row, Row)
    assert (record.fields["summary"], row.text_content) == (text, "雪" * 21_845)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"chapter_id": None}, "chapter_id"), ({"chapter_id": "a/b"}, "chapter_id"),
        ({"chapter_id": "x" * 57}, "has 57 characters"), ({"chapter_version": "3"}, "chapter_version"),
        ({"chapter_version": 2**63}, "chapter_version"), ({"chapter_version": True}, "chapter_version"),
        ({"content": 7}, "content must be"), ({"summary": ["x"]}, "summary must be"),
        ({"content": " \n"}, "neither"), ({"content": "", "summary": "  "}, "neither"),
        ({"content": "……——"}, "no sentence"), ({"content": "x" * 1_000_001}, "limit is 1000000"),
        ({"tenant_id": "t2"}, "tenant_id"), ({"project_id": "p2"}, "project_id"),
    ],
)  # fmt: skip
def test_a_bad_payload_is_a_permanent_error_with_its_reason(
    world: World, payload: dict[str, Any], says: str
) -> None:
    with pytest.raises(PermanentError, match=says):
        world.handler().handle(job(1, **payload))
    assert world.store.count(SEGMENTS) == 0


def test_a_payload_without_tenant_or_that_is_no_object_is_a_permanent_error(world: World) -> None:
    for bad in (job(1, tenant=""), job(1, project="a b")):
        with pytest.raises(PermanentError):
            world.handler().handle(bad)
    with pytest.raises(PermanentError, match="object"):
        world.handler().handle(Job("j", "audit", "t1", "p1", [1], {}, "", "s", "1-1", 0))


def test_a_stale_version_changes_nothing_and_calls_no_model(world: World) -> None:
    model = Model(lambda content: Findings("from the model"))
    handler = world.handler(model=model)
    handler.handle(job(20, summary="newest"))
    handler.handle(job(19))
    handler.handle(job(None, summary="without a version is the oldest"))
    assert world.summary() == (20, "newest")
    assert model.calls == 0
    assert handler.counters == {"summaries_stored": 1, "summaries_outdated": 2, "llm_requests": 0}


def test_without_versions_the_last_job_wins(world: World) -> None:
    for text in ("first", "second"):
        world.handler().handle(job(None, summary=text))
    assert world.summary() == (0, "second")


def test_the_same_chapter_id_in_another_project_is_refused_and_not_searchable(
    world: World,
) -> None:
    world.handler().handle(job(1, summary="mine"))
    with pytest.raises(PermanentError, match="belongs to another tenant or project"):
        world.handler().handle(job(9, project="p2", summary="theirs"))
    assert world.summary() == (1, "mine")
    assert world.store.get(SEGMENTS, ["summary:c1"], tenant_id="t1", project_id="p2") == []


def test_findings_of_a_model_reach_record_rows_and_sink(world: World) -> None:
    found = Findings(
        "他在雪夜回家，她在灯下等他，两人相对无言，天亮了雪才停。之后的事以后再说。",
        [EntityUpdate("林黛玉", "person", "住在潇湘馆"), EntityUpdate("Lin", "person", "x")],
        [Event("回家", ["他"])],
    )
    sink = Sink()
    world.handler(model=Model(lambda content: found), sink=sink).handle(job(4))
    version, text = world.summary()
    assert (version, text) == (4, "他在雪夜回家，她在灯下等他，两人相对无言，天亮了雪才停。")
    assert world.entities() == {"林黛玉": ("住在潇湘馆", "person"), "Lin": ("x", "person")}
    (stored,) = sink.stored
    assert (stored.chapter_id, stored.chapter_version, stored.findings.new_events) == (
        "c1",
        4,
        found.new_events,
    )
    assert stored.findings.summary == text


def test_entities_are_identified_by_name_and_project(world: World) -> None:
    assert entity_id("Lin  Daiyu") == entity_id("ＬＩＮ daiyu") != entity_id("Lin")
    describe = Model(lambda content: Findings("s", [EntityUpdate("Lin", "person", content)]))
    handler = world.handler(model=describe)
    handler.handle(job(1, content="of p1"))
    handler.handle(job(1, content="of p2", project="p2", chapter="c2"))
    assert world.entities() == {"Lin": ("of p1", "person")}
    assert world.store.count(ENTITIES) == 2


def test_an_entity_has_the_profile_of_the_last_chapter_in_its_newest_version(world: World) -> None:
    describe = Model(lambda content: Findings("s", [EntityUpdate("Lin", "", content)]))
    handler = world.handler(model=describe)
    for chapter, version, content in (("c1", 2, "c1 v2"), ("c1", 1, "c1 v1"), ("c2", 1, "c2 v1")):
        handler.handle(job(version, chapter=chapter, content=content))
    assert world.entities() == {"Lin": ("c2 v1", "")}


@pytest.mark.parametrize("text", ['" or id != "', "x\\' or 1 == 1", "{id}", "%\0|", "夜" * 9, "../../x"])
def test_hostile_names_from_a_model_are_plain_text_and_reach_no_other_tenant(world: World, text: str) -> None:
    def find(content: str) -> Findings:
        return Findings(content, entity_updates=[EntityUpdate(text, description=content)])

    handler = world.handler(model=Model(find))
    handler.handle(job(1, chapter="theirs", tenant="t2", content="theirs"))
    handler.handle(job(1, content=text))
    assert world.summary() == (1, text)
    assert world.entities() == {text: (text, "")}
    assert world.summary("theirs", tenant="t2") == (1, "theirs")
    near = DummyEncoder(DIM).encode(["x"])[0]
    (hit,) = world.store.search(ENTITIES, near, tenant_id="t2", project_id="p1", limit=9)
    assert isinstance(hit, EntityHit)
    assert (hit.name, hit.description) == (text, "theirs")
    with pytest.raises(PermanentError, match="chapter_id must be"):
        handler.handle(job(1, chapter=text))


def test_long_names_are_clipped_to_their_fields(world: World) -> None:
    long = EntityUpdate("名" * 256, "类" * 32, "述" * 20_000)
    world.handler(model=Model(lambda content: Findings("s", [long]))).handle(job(1))
    ((name, (description, kind)),) = world.entities().items()
    assert (len(name.encode()), len(kind.encode()), len(description)) == (255, 30, 20_000)


def test_a_retry_after_a_sink_outage_does_not_call_the_model_again(world: World) -> None:
    model, sink = Model(lambda content: Findings("s")), Sink(failures=2)
    handler = world.handler(model=model, sink=sink)
    for _ in range(2):
        with pytest.raises(Unavailable):
            handler.handle(job(1))
    handler.handle(job(1))
    assert (model.calls, len(sink.stored)) == (1, 1)


def test_a_job_store_that_is_down_is_unavailable(world: World) -> None:
    handler = world.handler(records=open_records("redis://127.0.0.1:1/0"))
    with pytest.raises(Unavailable):
        handler.handle(job(1))


def test_a_collection_rebuilt_with_another_model_refuses_summaries(world: World) -> None:
    handler = world.handler()
    taken = world.fence.begin(f"z_novel_{SEGMENTS}", "s/9-0", 1000)
    world.fence.save(f"z_novel_{SEGMENTS}", taken.epoch, {"live_model": "another"}, lease_ms=1000)
    with pytest.raises(TransientStoreError, match="start it with --model another"):
        handler.handle(job(1))
    assert world.store.get(SEGMENTS, ["summary:c1"], tenant_id="t1", project_id="p1") == []


def test_a_sink_is_loaded_by_its_class_name() -> None:
    assert isinstance(open_sink(HandlerSettings()), NoSink)
    made = open_sink(HandlerSettings(summary_sink="jobworker.handlers.summaries.sinks:NoSink"))
    assert isinstance(made, NoSink)
    for bad in ("nothing", "jobworker.handlers.summaries.sinks:Missing", "no.such:Thing"):
        with pytest.raises(ConfigurationError, match="--summary-sink"):
            open_sink(HandlerSettings(summary_sink=bad))


# ---- concurrent writers and kills


class Killed(BaseException):
    """Simulates SIGKILL."""


class Chaotic:
    """Store proxy: before and after each call, another job may run or the process may be killed."""

    def __init__(self, real: Any, happen: Callable[[], None]) -> None:
        self._real, self._happen = real, happen

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)

        def call(*args: Any, **named: Any) -> Any:
            self._happen()
            result = method(*args, **named)
            self._happen()
            return result

        return call


def run_chaotically(world: World, jobs: list[Job], rng: random.Random, model: Model) -> None:
    """Run all jobs, at most three nested in each other; killed ones run again."""
    waiting = deque(jobs)
    depth = 0

    def run_one() -> None:
        nonlocal depth
        one = waiting.popleft()
        depth += 1
        try:
            world.handler(
                store=Chaotic(world.store, happen), records=Chaotic(world.records, happen), model=model
            ).handle(one)
        except Killed:
            waiting.append(one)
        finally:
            depth -= 1

    def happen() -> None:
        if depth == 0:
            return
        if waiting and depth < 3 and rng.random() < 0.2:
            run_one()
        if rng.random() < 0.03:
            raise Killed

    while waiting:
        run_one()


@settings(max_examples=300)
@given(st.randoms(use_true_random=True))
def test_the_newest_version_wins_in_any_order_and_with_any_kills(rng: random.Random) -> None:
    # Few versions, because a later job of the chapter corrects the rows of an earlier one.
    chapters, versions = 2, rng.randint(2, 3)
    jobs = [
        job(
            version,
            chapter=f"c{chapter}",
            content=f"Chapter {chapter} in its version {version}, told once more.",
        )
        for chapter in range(chapters)
        for version in range(1, versions + 1)
    ]
    rng.shuffle(jobs)
    world = World()
    model = Model(lambda content: Findings(content, [EntityUpdate(content[:9], "", content)]))
    run_chaotically(world, jobs, rng, model)
    for chapter in range(chapters):
        version, text = world.summary(f"c{chapter}")
        assert version == versions
        assert text.startswith(f"Chapter {chapter} in its")
    described = {name: description for name, (description, _) in world.entities().items()}
    assert described == {
        f"Chapter {n}": f"Chapter {n} in its version {versions}, told once more." for n in range(chapters)
    }


def test_a_retry_corrects_the_row_of_a_job_killed_before_it_read_the_record_again(world: World) -> None:
    """Version 1 writes its row after version 2 has finished, and is killed before it can notice."""
    second_is_done = False

    def happen() -> None:
        nonlocal second_is_done
        if not second_is_done:
            second_is_done = True
            world.handler().handle(job(2, summary="second"))

    class LateStore(MemoryVectors):
        def upsert(self, name: str, rows: Any) -> None:
            happen()
            world.store.upsert(name, rows)
            raise Killed

        def __getattribute__(self, name: str) -> Any:
            if name == "upsert":
                return super().__getattribute__(name)
            return getattr(world.store, name)

    with pytest.raises(Killed):
        world.handler(store=LateStore()).handle(job(1, summary="first"))
    (row,) = world.store.get(SEGMENTS, ["summary:c1"], tenant_id="t1", project_id="p1")
    assert isinstance(row, Row)
    assert row.text_content == "first", "the row must be outdated first"
    world.handler().handle(job(1, summary="first"))
    assert world.summary() == (2, "second")


# ---- on real stores


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("real")
    with lite_server(folder / "milvus") as milvus, running("valkey", _made(folder / "valkey")) as server:
        world = World()
        world.store = open_vectors(milvus.uri)  # type: ignore[assignment]
        world.records, world.fence = open_records(server.url), open_fence(server.url)
        yield world
        for opened in (world.store, world.records, world.fence):
            opened.close()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_real_stores_hold_the_newest_of_shuffled_versions(real: World) -> None:
    rng = random.Random(7)
    model = Model(lambda content: Findings(content, [EntityUpdate(content[:9], "person", content)]))
    jobs = [
        job(version, chapter=f"r{chapter}", content=f"Chapter {chapter} version {version}.")
        for chapter in range(4)
        for version in range(1, 7)
    ]
    rng.shuffle(jobs)
    handler = real.handler(model=model)
    for one in jobs:
        handler.handle(one)
    assert [real.summary(f"r{n}") for n in range(4)] == [(6, f"Chapter {n} version 6.") for n in range(4)]
    assert real.entities() == {f"Chapter {n}": (f"Chapter {n} version 6.", "person") for n in range(4)}
