"""Search of the HTTP API: tenants, filters, and the model of the collection that answers."""

import asyncio
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.api.errors import ApiError
from jobworker.handlers.api.models import KEPT_S
from jobworker.handlers.encoder.base import DummyEncoder, Plan, Purpose
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import EntityRow, Row, TransientStoreError
from jobworker.worker import ConfigurationError
from support.api import DIM, World, in_world

SCOPE = {"tenant_id": "t1", "project_id": "p1"}
COLLECTION = "z_story_segments"


class Other(DummyEncoder):
    """A model that gives other vectors of the same dimension."""

    def __init__(self, name: str) -> None:
        super().__init__(DIM)
        self.name = name

    def tokenize(self, texts: Any, purpose: Purpose = "document") -> Plan:
        return super().tokenize([f"{self.name} {text}" for text in texts], purpose)


class Store(MemoryVectors):
    """Rows in memory. The alias names the collection ``behind``; ``on_search`` runs before a search."""

    def __init__(self) -> None:
        super().__init__(prefix="z_")
        self.behind = f"{COLLECTION}_v1"
        self.on_search: Any = lambda: None

    def collection_behind(self, name: str) -> str:
        return self.behind

    def search(self, *arguments: Any, **more: Any) -> Any:
        self.on_search()
        return super().search(*arguments, **more)


def filled(encoder: DummyEncoder) -> Store:
    store = Store()
    store.ensure_collection("story_segments", DIM)
    fill(store, encoder)
    return store


def fill(store: Store, encoder: DummyEncoder) -> None:
    for tenant in ("t1", "t2"):
        vectors = encoder.encode(["one", "two", "three"])
        store.upsert(
            "story_segments",
            [
                Row(f"{tenant}:{n}", vectors[n], tenant, "p1", f"c{n}", n, "scene", text)
                for n, text in enumerate(("one", "two", "three"))
            ],
        )


async def search(world: World, **asked: Any) -> Any:
    answer = await world.post("/v1/search", {**SCOPE, **asked})
    assert answer.status == 200, answer
    return answer.json()


def test_rows_of_the_tenant_with_scores_the_nearest_first() -> None:
    encoder = DummyEncoder(DIM)

    async def scenario(world: World) -> None:
        found = await search(world, query="two")
        assert (found["collection"], found["model"]) == ("story_segments", "dummy:8")
        rows = found["results"]
        assert {row["id"] for row in rows} == {"t1:0", "t1:1", "t1:2"}
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert rows[0] == {
            "id": "t1:1", "score": pytest.approx(1), "text_content": "two", "chapter_id": "c1",
            "segment_type": "scene", "story_time": 1,
        }  # fmt: skip
        assert len((await search(world, query="two", limit=2))["results"]) == 2
        assert [row["id"] for row in (await search(world, query="two", min_score=0.99))["results"]] == [
            "t1:1"
        ]
        by_vector = await search(world, vector=[float(x) for x in encoder.encode(["three"])[0]], limit=1)
        assert [row["id"] for row in by_vector["results"]] == ["t1:2"]
        assert by_vector["model"] == ""
        assert (await search(world, query="two", collection="z_story_segments"))[
            "collection"
        ] == "story_segments"

    in_world(scenario, encoder=encoder, store=filled(encoder))


def test_filters_are_joined() -> None:
    encoder = DummyEncoder(DIM)

    async def scenario(world: World) -> None:
        async def ids(**where: Any) -> set[str]:
            return {row["id"] for row in (await search(world, query="x", **where))["results"]}

        assert await ids(chapter_ids=["c0", "c2"]) == {"t1:0", "t1:2"}
        assert await ids(chapter_ids=["c0", "c2"], story_time_from=1) == {"t1:2"}
        assert await ids(story_time_from=1, story_time_to=1) == {"t1:1"}
        assert await ids(segment_types=["dialogue"]) == set()

    in_world(scenario, encoder=encoder, store=filled(encoder))


def test_entities_have_no_chapter_to_filter_by() -> None:
    store, encoder = Store(), DummyEncoder(DIM)
    store.ensure_collection("entity_profiles", DIM)
    vector = encoder.encode(["Bao"])[0]
    store.upsert("entity_profiles", [EntityRow("e1", vector, "t1", "p1", "e1", "person", "Bao", "a boy")])

    async def scenario(world: World) -> None:
        (row,) = (await search(world, query="Bao", collection="entity_profiles"))["results"]
        assert (row["name"], row["entity_type"]) == ("Bao", "person")
        refused = await world.post(
            "/v1/search", {**SCOPE, "query": "Bao", "collection": "entity_profiles", "chapter_ids": ["c"]}
        )
        assert refused.status == 400

    in_world(scenario, encoder=encoder, store=store)


WRONG = {
    "tenant_id": 't1" or tenant_id != "', "project_id": "", "query": " \n", "vector": [0.0] * DIM,
    "limit": 201, "chapter_ids": ["c0", 'c"] or true or chapter_id in ["'], "segment_types": ["{x}"],
    "collection": "no such", "story_time_from": 1 << 70, "story_time_to": -(1 << 64), "min_score": 1.01,
    "chapter_id": "c0",
}  # fmt: skip


def test_null_counts_as_absent_where_a_field_is_optional() -> None:
    encoder = DummyEncoder(DIM)
    optional = (
        "vector", "collection", "limit", "chapter_ids", "segment_types", "story_time_from", "story_time_to",
        "min_score", "mode",
    )  # fmt: skip

    async def scenario(world: World) -> None:
        assert await search(world, query="two", **dict.fromkeys(optional)) == await search(world, query="two")
        for field in ("tenant_id", "project_id", "unknown"):
            answer = await world.post("/v1/search", {**SCOPE, "query": "x", field: None})
            assert (answer.status, answer.json()["error"]["param"]) == (400, field), answer

    in_world(scenario, encoder=encoder, store=filled(encoder))


def test_a_wrong_field_is_named() -> None:
    encoder = DummyEncoder(DIM)

    async def scenario(world: World) -> None:
        for field, value in WRONG.items():
            question = {} if field == "vector" else {"query": "x"}
            answer = await world.post("/v1/search", {**SCOPE, **question, field: value})
            assert (answer.status, answer.json()["error"]["param"]) == (400, field), answer
        for vector in ([], [1.0] * (DIM + 1)):
            answer = await world.post("/v1/search", {**SCOPE, "vector": vector})
            assert (answer.status, answer.json()["error"]["param"]) == (400, "vector"), answer

    in_world(scenario, encoder=encoder, store=filled(encoder))


@pytest.mark.parametrize("length", [1e-300, 1e-40, 1e39, 1e300])
def test_the_length_of_a_vector_does_not_matter(length: float) -> None:
    encoder = DummyEncoder(DIM)

    async def scenario(world: World) -> None:
        vector = [float(x) * length for x in encoder.encode(["three"])[0]]
        (row,) = (await search(world, vector=vector, limit=1))["results"]
        assert (row["id"], row["score"]) == ("t1:2", pytest.approx(1))

    in_world(scenario, encoder=encoder, store=filled(encoder))


def test_a_service_without_a_store_says_so() -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/v1/search", {**SCOPE, "query": "a"})
        assert (answer.status, answer.json()["error"]["code"]) == (404, "no_store")

    in_world(scenario)


def test_a_store_that_does_not_answer_gets_503() -> None:
    class Down(Store):
        def sparse_kind(self, name: str, *, fresh: bool = False) -> Any:
            return "none"

        def search(self, *arguments: Any, **more: Any) -> Any:
            raise TransientStoreError("secret-host: connection refused")

    async def scenario(world: World) -> None:
        answer = await world.post("/v1/search", {**SCOPE, "query": "a"})
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert b"secret-host" not in answer.body

    in_world(scenario, store=Down())


OLD = {"source": f"{COLLECTION}_v1", "target": f"{COLLECTION}_v2"}


@pytest.mark.parametrize(
    ("state", "behind", "model"),
    [
        ({}, 1, "dummy:8"),
        ({**OLD, "phase": "fill", "model": "new", "live_model": ""}, 1, "dummy:8"),
        ({**OLD, "phase": "settle", "model": "new", "live_model": "old", "model_before": "old"}, 1, "old"),
        ({**OLD, "phase": "switch", "model": "new", "live_model": "new", "model_before": ""}, 1, "dummy:8"),
        ({**OLD, "phase": "switch", "model": "new", "live_model": "new", "model_before": "old"}, 1, "old"),
        ({**OLD, "phase": "switch", "model": "new", "live_model": "new", "model_before": "old"}, 2, "new"),
        ({**OLD, "phase": "switch", "model": "", "live_model": "old", "model_before": "old"}, 2, "old"),
        ({**OLD, "phase": "drop", "model": "new", "live_model": "new", "model_before": "old"}, 2, "new"),
        ({**OLD, "phase": "done", "model": "new", "live_model": "new"}, 2, "new"),
        ({**OLD, "phase": "done", "model": "", "live_model": ""}, 2, "dummy:8"),
    ],
)
def test_the_model_is_that_of_the_collection_that_answers(
    state: dict[str, str], behind: int, model: str
) -> None:
    others = {"old": Other("old"), "new": Other("new")}
    own = DummyEncoder(DIM)
    store = filled(others.get(model, own))
    store.behind = f"{COLLECTION}_v{behind}"

    async def scenario(world: World) -> None:
        world.states[COLLECTION] = state
        while (answer := await world.post("/v1/search", {**SCOPE, "query": "two"})).status == 503:
            assert answer.json()["error"]["code"] == "model_loading"
            await asyncio.sleep(0.01)  # the model is loaded in a thread
        found = answer.json()
        assert found["model"] == model
        assert found["results"][0]["id"] == "t1:1"
        assert found["results"][0]["score"] == pytest.approx(1)

    in_world(scenario, encoder=own, store=store, others=others)


def test_a_search_during_which_the_collection_is_switched_is_repeated() -> None:
    own, new = DummyEncoder(DIM), Other("new")
    store = filled(own)

    async def scenario(world: World) -> None:
        world.states[COLLECTION] = {**OLD, "phase": "settle", "model": "new", "live_model": ""}
        world.models.preload("new")
        while "new" not in world.models._batchers:
            await asyncio.sleep(0.01)  # the model is loaded in a thread

        def switch() -> None:
            if world.states[COLLECTION]["phase"] == "settle":
                world.states[COLLECTION] = {**OLD, "phase": "drop", "model": "new", "live_model": "new"}
                fill(store, new)

        store.on_search = switch
        found = await search(world, query="two")
        assert found["model"] == "new"
        assert found["results"][0]["score"] == pytest.approx(1)

    in_world(scenario, encoder=own, store=store, others={"new": new})


def test_at_most_two_models_are_kept_and_take_turns() -> None:
    others = {name: Other(name) for name in ("a", "b", "c")}

    async def scenario(world: World) -> None:
        now = [1000.0]
        world.models._mono_s = lambda: now[0]
        for name in others:
            with pytest.raises(ApiError, match="is being loaded"):
                world.models.of_collection(name)
            while name not in world.models._batchers:
                await asyncio.sleep(0.01)  # the model is loaded in a thread
            world.models.preload("d")
            now[0] += KEPT_S / 2
            world.models.of_collection(name)
            with pytest.raises(ApiError, match="in use") as refused:
                world.models.of_collection("d")
            assert (refused.value.code, refused.value.retry_after_s) == ("models_full", KEPT_S / 2)
            assert set(world.models._batchers) == {"dummy:8", name}, "no model in use makes room"
            now[0] += KEPT_S
        vectors = (await world.models.of_collection("c").embed(["one"], "query")).vectors
        assert np.allclose(vectors, others["c"].encode(["one"], "query"))

    in_world(scenario, others=others)


def test_a_model_that_cannot_be_loaded_is_not_tried_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Missing(dict[str, Other]):
        def __missing__(self, name: str) -> Other:
            tried.append(name)
            raise ConfigurationError("the folder does not exist")

    async def scenario(world: World) -> None:
        world.states[COLLECTION] = {**OLD, "phase": "done", "model": "gone", "live_model": "gone"}

        async def code() -> str:
            answer = await world.post("/v1/search", {**SCOPE, "query": "two"})
            assert answer.status == 503
            return str(answer.json()["error"]["code"])

        assert await code() == "model_loading"
        while await code() == "model_loading":
            await asyncio.sleep(0.01)  # the model is loaded in a thread
        assert (await code(), tried) == ("model_failed", ["gone"])
        monkeypatch.setattr("jobworker.handlers.api.models.FAILED_RETRY_S", 0.0)
        assert await code() == "model_loading"

    in_world(scenario, store=Store(), others=Missing())
