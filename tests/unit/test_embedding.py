"""Handler of `embedding_batch`: one row a text, idempotent, and a bad job fails alone."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.embedding.handler import BATCH_BYTES, CACHE_FILE, EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder, Plan, Purpose, Vectors
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import (
    AnyRow,
    CollectionUnavailable,
    PermanentStoreError,
    Row,
    SuspectStoreError,
    TransientStoreError,
    WriteRefused,
)
from jobworker.handlers.vectors.versioned_writer import Contended
from jobworker.worker import Job, PermanentError
from jobworker.worker.testing import Harness

SEGMENTS = "story_segments"


def job(payload: Any, *, id: str = "job-1", tenant: str = "t001", project: str = "p123") -> Job:
    return Job(id, "embedding_batch", tenant, project, payload, {}, "", "stream:story:gen", "1-0", 0)


def payload(*ids: str, **more: Any) -> dict[str, Any]:
    return {"ids": list(ids), "texts": [f"text of {id_}" for id_ in ids], **more}


class FailingStore(MemoryVectors):
    """Raises what `refusal` gives for the rows of an upsert, and counts the upserts."""

    def __init__(self, refusal: Any = lambda rows: None) -> None:
        super().__init__()
        self.refusal = refusal
        self.upserts = 0

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        self.upserts += 1
        if (error := self.refusal(rows)) is not None:
            raise error
        super().upsert(name, rows)

    def ping(self) -> None:
        if (error := self.refusal([])) is not None:
            raise error


class FailingEncoder(DummyEncoder):
    """Fails for any batch that holds the text `bad`, and counts the batches."""

    batches = 0
    texts = 0

    def forward(self, plan: Plan) -> Vectors:
        self.batches += 1
        self.texts += plan.texts
        if any("".join(map(chr, window)) == "bad" for window in plan.windows):
            raise RuntimeError("out of memory")
        return super().forward(plan)


def handler(encoder: Any = None, store: Any = None, **settings: Any) -> tuple[EmbeddingBatch, Any]:
    store = store or MemoryVectors()
    made = EmbeddingBatch(encoder or DummyEncoder(8), store)
    made.setup(HandlerSettings(**settings))
    return made, store


def rows(store: Any, *ids: str, tenant: str = "t001", project: str = "p123") -> list[Row]:
    found: list[Row] = store.get(SEGMENTS, list(ids), tenant_id=tenant, project_id=project, strong=True)
    return found


def test_every_field_of_the_payload_reaches_its_row() -> None:
    embed, store = handler()
    given_payload = payload(
        *("a", "b"),
        tenant_id="t001",
        project_id="p123",
        chapter_ids=["c1", ""],
        story_times=[-5, 2**63 - 1],
        segment_types=["scene", ""],
        version=7,
    )
    embed.handle(job(given_payload))
    first, second = rows(store, "a", "b")
    assert first[2:-2] == ("t001", "p123", "c1", -5, "scene", "text of a", 7)
    assert second[2:-2] == ("t001", "p123", "", 2**63 - 1, "", "text of b", 7)
    assert np.array_equal(first.vector, DummyEncoder(8).encode(["text of a"])[0])


def test_the_minimal_payload_of_the_go_producers_is_enough() -> None:
    embed, store = handler()
    embed.handle(job(payload("a", tenant_id="t001", project_id="p123", chapter_ids=None)))
    assert rows(store, "a")[0][4:-2] == ("", 0, "", "text of a", 0)


def test_running_a_job_twice_leaves_the_same_rows() -> None:
    embed, store = handler()
    embed.handle(job(payload("a", "b")))
    once = rows(store, "a", "b")
    embed.handle(job(payload("a", "b")))
    twice = rows(store, "a", "b")
    assert store.count(SEGMENTS) == 2
    assert [row[2:] for row in once] == [row[2:] for row in twice]
    assert all(np.array_equal(left.vector, right.vector) for left, right in zip(once, twice, strict=True))


@pytest.mark.parametrize("empty", [[], None])
def test_nothing_to_embed_is_a_success(empty: Any) -> None:
    store = FailingStore()
    embed, _ = handler(store=store)
    assert embed.handle_batch([job({"ids": empty, "texts": empty})]) == [None]
    assert store.upserts == 0


@pytest.mark.parametrize(
    "given",
    [
        {"ids": [], "texts": [], "chapter_ids": []},
        {"ids": None, "texts": None, "chapter_ids": []},
        {"ids": ["a"], "texts": ["x"], "chapter_ids": [""]},
        {"ids": ["a", "b"], "texts": ["x", "y"], "chapter_ids": ["", ""]},
    ],
)
def test_replace_without_a_chapter_is_refused(given: dict[str, Any]) -> None:
    """It would remove nothing and succeed."""
    embed, store = handler()
    with pytest.raises(PermanentError, match="names none: send at least one text of the chapter"):
        embed.handle(job(given | {"version": 3, "replace": True}))
    assert store.count(SEGMENTS) == 0
    embed.handle(job(given | {"version": 3, "replace": False}))


def test_several_jobs_share_one_forward_pass_and_one_upsert() -> None:
    store, encoder = FailingStore(), FailingEncoder(8)
    embed, _ = handler(encoder, store)
    jobs = [job(payload(f"a{number}", f"b{number}")) for number in range(5)]
    assert embed.handle_batch(jobs) == [None] * 5
    assert (encoder.batches, store.upserts) == (1, 1)
    assert [row.text_content for row in rows(store, "b3")] == ["text of b3"]
    assert embed.counters["embedded_tokens"] == 10 * len("text of a0")


def test_the_later_of_two_texts_under_one_id_wins() -> None:
    embed, store = handler()
    first = job({"ids": ["a", "a"], "texts": ["oldest", "older"]})
    assert embed.handle_batch([first]) == [None]
    assert rows(store, "a")[0].text_content == "older"
    assert embed.handle_batch([first, job({"ids": ["a"], "texts": ["new"]})]) == [None, None]
    assert rows(store, "a")[0].text_content == "new"


def test_a_collection_of_the_payload_is_created_on_demand() -> None:
    embed, store = handler()
    outcomes = embed.handle_batch([job(payload("a", collection="notes")), job(payload("b"))])
    assert outcomes == [None, None]
    assert (store.count("notes"), store.count(SEGMENTS)) == (1, 1)


def test_a_job_may_name_its_collection_with_or_without_the_prefix() -> None:
    embed, store = handler()
    names = ["notes", "z_novel_notes", "z_novel_" + SEGMENTS]
    outcomes = embed.handle_batch(
        [job(payload(str(place), collection=name)) for place, name in enumerate(names)]
    )
    assert outcomes == [None] * 3
    assert (store.count("notes"), store.count(SEGMENTS)) == (2, 1)


BAD_PAYLOADS = [
    (None, "payload must be an object"),
    (["ids"], "payload must be an object"),
    ({}, "lacks ids"),
    ({"ids": ["a"]}, "lacks texts"),
    ({"ids": "a", "texts": ["x"]}, "ids must be a list"),
    ({"ids": ["a"], "texts": []}, "texts has 0 entries, ids has 1"),
    ({"ids": ["a"] * 50_001, "texts": []}, "ids has 50001 entries, a job may have 50000: send several"),
    ({"ids": [1], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": [""], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": ["a" * 65], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": ["a\n"], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": ["宝"], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": ["a' or id != '"], "texts": ["x"]}, r"ids\[0\] must be"),
    ({"ids": ["a"], "texts": [None]}, r"texts\[0\] must be"),
    ({"ids": ["a"], "texts": ["\ud83d"]}, r"texts\[0\] must be a string without unpaired surrogates"),
    (payload("a", tenant_id="t002"), "tenant_id of the payload is 't002', of the job 't001'"),
    (payload("a", project_id=5), "project_id of the payload"),
    (payload("a", chapter_ids=["c", "d"]), "chapter_ids has 2 entries"),
    (payload("a", chapter_ids=["c c"]), r"chapter_ids\[0\] must be"),
    (payload("a", story_times=["1"]), r"story_times\[0\] must be a 64-bit integer"),
    (payload("a", story_times=[True]), r"story_times\[0\] must be"),
    (payload("a", story_times=[2**63]), r"story_times\[0\] must be"),
    (payload("a", segment_types=["字" * 11]), r"segment_types\[0\] must be a string of at most 32 bytes"),
    (payload("a", segment_types="scene"), "segment_types must be a list"),
    (payload("a", collection="drop it"), "collection must be"),
    (payload("a", collection=3), "collection must be"),
    (payload("a", collection="story_segments_v2"), "_v and digits"),
    (payload("a", collection="z_novel_story_segments_v1"), "_v and digits"),
    (payload("a", collection="z_novel_"), "prefix alone"),
    (payload("a", version="1"), "version must be"),
    (payload("a", version=1.5), "version must be"),
]


@pytest.mark.parametrize(("bad", "says"), BAD_PAYLOADS)
def test_an_invalid_payload_fails_its_job_only_and_permanently(bad: Any, says: str) -> None:
    embed, store = handler()
    before, wrong, after = embed.handle_batch([job(payload("x")), job(bad), job(payload("y"))])
    assert (before, after) == (None, None)
    assert store.count(SEGMENTS) == 2
    with pytest.raises(PermanentError, match=says):
        raise wrong or AssertionError("it was taken")


@pytest.mark.parametrize(("tenant", "project"), [("", "p"), ("t", ""), ("a b", "p"), ("t", "x" * 65)])
def test_a_job_needs_a_tenant_and_a_project(tenant: str, project: str) -> None:
    embed, _ = handler()
    with pytest.raises(PermanentError, match="of the job must match"):
        embed.handle(job(payload("a"), tenant=tenant, project=project))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["ids", "texts", "chapter_ids", "story_times", "segment_types", "collection", "version", "tenant_id"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_every_invalid_payload_fails_permanently(extra: dict[str, Any]) -> None:
    embed, _ = handler()
    (outcome,) = embed.handle_batch([job({**payload("a"), **extra})])
    assert outcome is None or isinstance(outcome, PermanentError)


def test_an_id_of_another_tenant_fails_its_job_only_and_keeps_the_row() -> None:
    embed, store = handler()
    jobs = [job(payload("a")), job(payload("a"), tenant="t002"), job(payload("b"))]
    first, foreign, last = embed.handle_batch(jobs)
    assert (first, last) == (None, None)
    assert isinstance(foreign, PermanentError)
    assert rows(store, "a") != []
    assert rows(store, "a", tenant="t002") == []


def test_a_row_that_the_store_rejects_fails_its_job_only() -> None:
    store = FailingStore(
        lambda rows: PermanentStoreError("too long", ["b"]) if "b" in [row.id for row in rows] else None
    )
    embed, _ = handler(store=store)
    outcomes = embed.handle_batch([job(payload("a")), job(payload("b")), job(payload("c"))])
    assert [type(outcome) for outcome in outcomes] == [type(None), PermanentError, type(None)]
    assert store.count(SEGMENTS) == 2


def test_an_unreachable_store_fails_every_job_transiently_after_one_upsert() -> None:
    store = FailingStore(lambda rows: TransientStoreError("away"))
    embed, _ = handler(store=store)
    outcomes = embed.handle_batch([job(payload("a")), job({}), job(payload("b"))])
    assert [type(outcome) for outcome in outcomes] == [
        TransientStoreError,
        PermanentError,
        TransientStoreError,
    ]
    assert store.upserts == 1


def test_a_failure_of_one_collection_leaves_the_other_jobs_alone() -> None:
    store = FailingStore(lambda rows: TransientStoreError("away") if rows and rows[0].id == "a" else None)
    embed, _ = handler(store=store)
    outcomes = embed.handle_batch([job(payload("a", collection="notes")), job(payload("b"))])
    assert [type(outcome) for outcome in outcomes] == [TransientStoreError, type(None)]


class BrokenCollections(FailingStore):
    """`check_writable` fails for the collections in `broken`; counts its calls."""

    def __init__(self, refusal: Any, *broken: str) -> None:
        super().__init__(refusal)
        self.broken = broken
        self.checks = 0

    def check_writable(self, name: str) -> None:
        self.checks += 1
        if name in self.broken:
            raise TransientStoreError("away")


def refuse(id_: str, error: Exception) -> Any:
    return lambda rows: error if id_ in [row.id for row in rows] else None


@pytest.mark.parametrize("collection", ["notes", SEGMENTS])
def test_an_unclear_error_of_one_job_is_a_failed_try_of_this_job(collection: str) -> None:
    store = BrokenCollections(refuse("b", SuspectStoreError("65535: field unknown")))
    embed, _ = handler(store=store)
    outcomes = embed.handle_batch([job(payload(id_, collection=collection)) for id_ in "abbc"])
    assert [type(outcome) for outcome in outcomes] == [type(None), WriteRefused, WriteRefused, type(None)]
    assert not getattr(outcomes[1], "transient", False), "it pauses no type"
    assert not isinstance(outcomes[1], PermanentError), "it is worth a retry"
    assert store.checks == 1
    assert store.count(collection) == 2


def test_an_unclear_error_of_a_store_in_trouble_is_transient_for_every_job() -> None:
    store = BrokenCollections(lambda rows: SuspectStoreError("65535: no node"), SEGMENTS)
    embed, _ = handler(store=store)
    outcomes = embed.handle_batch([job(payload(id_)) for id_ in "abcd"])
    assert all(getattr(outcome, "transient", False) for outcome in outcomes)
    assert (store.upserts, store.checks) == (2, 1), "the jobs do not each wait for the store"


def test_a_collection_that_cannot_be_used_fails_its_jobs_after_one_call() -> None:
    store = BrokenCollections(refuse("b", CollectionUnavailable("not loaded")))
    embed, _ = handler(store=store)
    jobs = [job(payload("b", collection="notes")) for _ in range(9)]
    outcomes = embed.handle_batch([*jobs, job(payload("a"))])
    assert [type(outcome) for outcome in outcomes] == [WriteRefused] * 9 + [type(None)]
    assert (store.upserts, store.checks) == (2, 1)


def test_a_default_collection_that_cannot_be_used_is_transient() -> None:
    store = BrokenCollections(refuse("b", CollectionUnavailable("not loaded")), SEGMENTS)
    embed, _ = handler(store=store)
    (outcome,) = embed.handle_batch([job(payload("b"))])
    assert getattr(outcome, "transient", False)


def test_a_failed_forward_pass_is_repeated_job_by_job() -> None:
    embed, store = handler(FailingEncoder(8))
    outcomes = embed.handle_batch(
        [job(payload("a")), job({"ids": ["b"], "texts": ["bad"]}), job(payload("c"))]
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), RuntimeError, type(None)]
    assert store.count(SEGMENTS) == 2


class SmallMemory(DummyEncoder):
    """Computes in batches, and has memory for `tokens` padded tokens at once."""

    tokens = 1000
    failed = 0

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        def embed(some: Sequence[list[int]]) -> Vectors:
            if len(some) * max(map(len, some)) > self.tokens:
                self.failed += 1
                raise MemoryError
            return super(SmallMemory, self)._embed(some, purpose)

        return self._embed_in_batches(windows, embed)


def test_a_batch_too_large_for_memory_is_divided_and_no_job_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = SmallMemory(8)
    embed, store = handler(encoder)
    jobs = [job({"ids": [f"{number}"], "texts": [f"{number:3}" * 50]}) for number in range(30)]
    assert embed.handle_batch(jobs) == [None] * 30
    failed = encoder.failed
    assert failed > 0
    assert "embed.batch_split" not in caplog.text
    expected = DummyEncoder(8).encode([text for one in jobs for text in one.payload["texts"]])
    stored = rows(store, *(f"{number}" for number in range(30)))
    assert all(np.array_equal(row.vector, vector) for row, vector in zip(stored, expected, strict=True))
    assert embed.handle_batch(jobs) == [None] * 30
    assert encoder.failed == failed, "the row limit is remembered"


def test_one_text_too_large_for_memory_fails_its_job_only_and_transiently() -> None:
    embed, store = handler(SmallMemory(8))
    jobs = [job(payload("a")), job({"ids": ["b"], "texts": ["x" * 2000]}), job(payload("c"))]
    outcomes = embed.handle_batch(jobs)
    assert [type(outcome) for outcome in outcomes] == [type(None), MemoryError, type(None)]
    assert store.count(SEGMENTS) == 2


def test_with_reject_a_too_long_text_fails_its_job_only() -> None:
    encoder = DummyEncoder(8, max_tokens=10, long_text="reject")
    embed, store = handler(encoder)
    long = job({"ids": ["b", "c"], "texts": ["short", "rather long text"]})
    outcomes = embed.handle_batch([job(payload("a")), long, job(payload("d"))])
    assert [type(outcome) for outcome in outcomes] == [type(None), PermanentError, type(None)]
    assert [row.id for row in rows(store, "a", "b", "c", "d")] == ["a", "d"]


def test_a_text_longer_than_its_field_is_clipped_between_characters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    embed, store = handler()
    text = "x" + "宝" * 30_000
    embed.handle(job({"ids": ["a"], "texts": [text]}))
    stored = rows(store, "a")[0]
    assert stored.text_content == text[: 1 + 65_534 // 3]
    (clipped,) = (record for record in caplog.records if record.msg == "embed.text_clipped")
    told = vars(clipped)
    assert (told["job_id"], told["row_id"], told["stored"], told["chars"]) == ("job-1", "a", 21845, 30001)
    assert np.array_equal(stored.vector, DummyEncoder(8).encode([text])[0])


def test_a_collection_of_another_dimension_stops_the_start() -> None:
    _, store = handler(DummyEncoder(8))
    with pytest.raises(PermanentStoreError, match=r"8 dimensions.* 16"):
        handler(DummyEncoder(16), store)


def test_health_is_that_of_the_store() -> None:
    embed, _ = handler(store=FailingStore(lambda rows: TransientStoreError("away")))
    with pytest.raises(TransientStoreError, match="away"):
        embed.healthy()
    handler()[0].healthy()


def test_a_dropped_collection_is_created_again() -> None:
    embed, store = handler()
    embed.handle(job(payload("a")))
    store._rows.clear()
    store._dims.clear()
    assert embed.handle_batch([job(payload("b"))]) == [None]
    assert store.count(SEGMENTS) == 1


def many(count: int, *, text: str = "字" * 1000) -> list[Job]:
    """More than one chunk."""
    return [
        job({"ids": [f"{number}"], "texts": [f"{number} {text}"]}, id=f"job-{number}")
        for number in range(count)
    ]


def test_a_large_batch_is_divided_and_every_job_gets_its_own_outcome() -> None:
    encoder, store = FailingEncoder(8), FailingStore()
    embed, _ = handler(encoder, store)
    jobs = many(40)
    jobs[7] = job({"ids": ["7"], "texts": ["bad"]})
    jobs[23] = job({})
    outcomes = embed.handle_batch(jobs)
    assert [type(outcome) for outcome in outcomes if outcome] == [RuntimeError, PermanentError]
    assert outcomes[7]
    assert outcomes[23]
    assert store.count(SEGMENTS) == 38
    assert 1 < store.upserts < encoder.batches < 40
    (row,) = rows(store, "39")
    assert np.array_equal(row.vector, DummyEncoder(8).encode([f"39 {'字' * 1000}"])[0])


def test_chunks_are_tokenised_and_stored_during_a_forward_pass() -> None:
    """Each stage waits until it has seen the two others at work beside it, else the barrier breaks."""
    together = threading.Barrier(3)
    calls = {"tokenize": 0, "forward": 0, "upsert": 0}

    def meet(name: str, *at: int) -> None:
        calls[name] += 1
        if calls[name] in at:
            together.wait(20)

    class Meeting(DummyEncoder):
        def tokenize(self, texts: Sequence[str], purpose: Any = "document") -> Plan:
            meet("tokenize", 3)
            return super().tokenize(texts, purpose)

        def forward(self, plan: Plan) -> Vectors:
            meet("forward", 2)
            return super().forward(plan)

    class Store(MemoryVectors):
        def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
            meet("upsert", 1)
            super().upsert(name, rows)

    embed, store = handler(Meeting(8), Store())
    assert embed.handle_batch(many(40)) == [None] * 40
    assert store.count(SEGMENTS) == 40


def test_only_one_chunk_of_a_batch_waits_for_an_unreachable_store() -> None:
    store = FailingStore(lambda rows: TransientStoreError("away"))
    embed, _ = handler(store=store)
    jobs = [*many(40), job(payload("a", collection="notes"))]
    outcomes = embed.handle_batch(jobs)
    assert {type(outcome) for outcome in outcomes} == {TransientStoreError}
    assert store.upserts == 2, "once for each collection"
    store.refusal = lambda rows: None
    assert embed.handle_batch(jobs) == [None] * 41


def test_the_batch_limit_follows_the_rate_of_the_model() -> None:
    embed, _ = handler()
    assert embed.max_batch_bytes == BATCH_BYTES[0]
    for _ in range(30):
        embed.handle_batch(many(40))
    assert BATCH_BYTES[0] < embed.max_batch_bytes <= BATCH_BYTES[1]


def test_an_edited_chapter_costs_only_its_edited_texts(tmp_path: Path) -> None:
    settings = {"cache_bytes": 1 << 24, "data_dir": str(tmp_path)}
    encoder, store = FailingEncoder(8), FailingStore()
    embed, _ = handler(encoder, store, **settings)
    ids, texts = [f"s{number}" for number in range(40)], [f"sentence {number}" for number in range(40)]
    embed.handle(job({"ids": ids, "texts": texts}))
    assert encoder.texts == 40
    texts[17] = "edited"
    embed.handle(job({"ids": ids, "texts": texts}))
    assert encoder.texts == 41
    assert (embed.counters["embedding_cache_hits"], embed.counters["embedding_cache_misses"]) == (39, 41)
    expected = DummyEncoder(8).encode(texts)
    stored = rows(store, *ids)
    assert [row.text_content for row in stored] == texts
    assert all(np.array_equal(row.vector, vector) for row, vector in zip(stored, expected, strict=True))
    embed.handle(job({"ids": ids, "texts": texts}))
    assert encoder.texts == 41, "all texts are cached: no forward pass"


def test_cached_vectors_are_shared_by_processes_but_not_by_tenants_or_models(
    tmp_path: Path,
) -> None:
    """Another process finds what was computed; another tenant, window or model does not."""
    settings = {"cache_bytes": 1 << 24, "data_dir": str(tmp_path)}

    def texts_computed(encoder: FailingEncoder, tenant: str = "t001", **more: Any) -> int:
        handler(encoder, **settings, **more)[0].handle(job(payload("a", "b"), tenant=tenant))
        return encoder.texts

    assert texts_computed(FailingEncoder(8)) == 2
    assert texts_computed(FailingEncoder(8)) == 0
    assert texts_computed(FailingEncoder(8), tenant="t002") == 2
    assert texts_computed(FailingEncoder(16)) == 2
    assert texts_computed(FailingEncoder(8, max_tokens=20)) == 2
    assert texts_computed(FailingEncoder(8), long_text="truncate") == 2
    other = FailingEncoder(8)
    other.revision = "2"
    assert texts_computed(other) == 2


def test_a_damaged_cache_fails_no_job_and_changes_no_vector(tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_bytes(b"\xff" * 100_000)
    embed, store = handler(cache_bytes=1 << 24, data_dir=str(tmp_path))
    embed.handle(job(payload("a")))
    (tmp_path / CACHE_FILE).write_bytes(b"\0" * 100_000)
    embed.handle(job(payload("a", "b")))
    assert np.array_equal(rows(store, "b")[0].vector, DummyEncoder(8).encode(["text of b"])[0])


def test_without_a_cache_no_file_is_written(tmp_path: Path) -> None:
    embed, _ = handler(cache_bytes=0, data_dir=str(tmp_path))
    embed.handle(job(payload("a")))
    assert list(tmp_path.iterdir()) == []


def test_with_reject_a_job_with_cached_and_too_long_texts_fails(tmp_path: Path) -> None:
    settings = {"cache_bytes": 1 << 24, "data_dir": str(tmp_path), "long_text": "reject"}
    embed, store = handler(DummyEncoder(8, max_tokens=10, long_text="reject"), **settings)
    known = job({"ids": ["a"], "texts": ["short"]})
    embed.handle(known)
    mixed = job({"ids": ["b", "c"], "texts": ["short", "rather long text"]})
    outcomes = embed.handle_batch([mixed, known, job({"ids": ["d"], "texts": ["other"]})])
    assert [type(outcome) for outcome in outcomes] == [PermanentError, type(None), type(None)]
    assert [row.id for row in rows(store, "a", "b", "c", "d")] == ["a", "d"]


class CountingEncoder(DummyEncoder):
    """Takes time, and is killed at pass `dies_at`."""

    passes = 0
    texts = 0
    dies_at = -1
    pass_s = 30.0

    def forward(self, plan: Plan) -> Vectors:
        self.passes += 1
        if self.passes == self.dies_at:
            raise SystemExit(1)
        if self.harness is not None:
            self.harness.advance(self.pass_s)
        self.texts += plan.texts
        return super().forward(plan)

    harness: Harness | None = None


def long_payload(count: int, **more: Any) -> dict[str, Any]:
    ids = [f"{number}" for number in range(count)]
    return {"ids": ids, "texts": [f"{id_} " + "字" * 200 for id_ in ids], **more}


def settings(tmp_path: Path) -> HandlerSettings:
    return HandlerSettings(data_dir=str(tmp_path), cache_bytes=1 << 24)


def test_a_job_that_takes_longer_than_its_timeout_runs_to_its_end(tmp_path: Path) -> None:
    encoder, store = CountingEncoder(8), MemoryVectors()
    with Harness({"embedding_batch": EmbeddingBatch(encoder, store)}, settings(tmp_path)) as harness:
        encoder.harness = harness
        harness.enqueue("embedding_batch", long_payload(400), tenant_id="t001", project_id="p123")
        harness.run()
        assert len(harness.completed) == 1
        assert harness.raised == []
    assert encoder.passes * encoder.pass_s > EmbeddingBatch.timeout
    assert store.count(SEGMENTS) == 400


@pytest.mark.parametrize("more", [{}, {"chapter_ids": ["c"] * 400, "version": 3, "replace": True}])
def test_a_retry_continues_where_the_killed_worker_was(tmp_path: Path, more: dict[str, Any]) -> None:
    encoder, store = CountingEncoder(8), MemoryVectors()
    encoder.dies_at = 8
    embed = EmbeddingBatch(encoder, store)
    embed.setup(settings(tmp_path))
    with pytest.raises(SystemExit):
        embed.handle_batch([job(long_payload(400, **more))])
    computed, written = encoder.texts, store.count(SEGMENTS)
    assert 0 < computed < 400
    assert written == 0 if more else written > computed / 2, "a chapter is replaced as a whole"
    again = EmbeddingBatch(encoder, store)
    again.setup(settings(tmp_path))
    assert again.handle_batch([job(long_payload(400, **more))]) == [None]
    reused = 400 - (encoder.texts - computed)
    assert computed / 2 < reused <= computed, "only the last parts may wait to be stored when a worker dies"
    expected = DummyEncoder(8).encode(long_payload(400)["texts"])
    stored = rows(store, *long_payload(400)["ids"])
    assert all(np.array_equal(row.vector, vector) for row, vector in zip(stored, expected, strict=True))


def test_a_long_job_that_is_refused_stops_at_once(tmp_path: Path) -> None:
    encoder, store = CountingEncoder(8), FailingStore(lambda rows: PermanentStoreError("foreign"))
    embed, _ = handler(encoder, store)
    outcomes = embed.handle_batch([job(long_payload(2000)), job(payload("a"))])
    assert [type(outcome) for outcome in outcomes] == [PermanentError, PermanentError]
    assert encoder.texts < 1500


def test_a_part_that_fails_fails_its_job_only_and_stays_its_outcome(tmp_path: Path) -> None:
    embed, store = handler(FailingEncoder(8))
    bad = long_payload(400)
    bad["texts"][200] = "bad"
    outcomes = embed.handle_batch([job(payload("x")), job(bad), job(payload("y"))])
    assert [type(outcome) for outcome in outcomes] == [type(None), RuntimeError, type(None)]
    assert [row.id for row in rows(store, "x", "y")] == ["x", "y"]


def test_only_the_job_whose_rows_another_job_holds_waits() -> None:
    now = [0.0]
    fence, store = MemoryFence(lambda: now[0]), MemoryVectors()
    embed = EmbeddingBatch(DummyEncoder(8), store, fence)
    embed.setup(HandlerSettings())
    fence.admit([WriteIntent("z_novel_story_segments", "x", "dead job", ("a",), ("i/a",))])
    now[0] = 3.0
    held = msgspec.structs.replace(job(payload("a", version=1)), entry_id="1-1")
    outcomes = embed.handle_batch([held, job(payload("b", version=1))])
    assert [type(outcome) for outcome in outcomes] == [Contended, type(None)]
    assert [row.id for row in rows(store, "a", "b")] == ["b"]


def test_a_later_text_of_one_id_wins_across_parts() -> None:
    embed, store = handler()
    long = long_payload(400)
    long["ids"][399] = "0"
    assert embed.handle_batch([job(long)]) == [None]
    assert rows(store, "0")[0].text_content.startswith("399 ")
    assert store.count(SEGMENTS) == 399
