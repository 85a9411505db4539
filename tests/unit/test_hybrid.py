"""Sparse vectors on their way: from jobs into rows and the cache, from a question into the ranking."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.rebuild.handler import embed_rows, sparse_of_rows
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.sparse_vector import NOTHING
from jobworker.handlers.vectors.fusion import fuse
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row, SparseKind
from jobworker.worker import Job
from support.api import DIM, World, in_world
from support.sparse_encoder import SparseDummy

NAME = "story_segments"
SCOPE = {"tenant_id": "t1", "project_id": "p1"}


def job(id_: str, text: str = "宝玉") -> Job:
    payload = {"ids": [id_], "texts": [text]}
    return Job("j", "embedding_batch", "t1", "p1", payload, {}, "", "stream:story:gen", "1-0", 0)


def written(store: MemoryVectors, id_: str) -> Any:
    """A row as it is stored; reading it through the port leaves the sparse vector out."""
    return store._rows[f"z_novel_{NAME}"][id_]


def embed(store: MemoryVectors, encoder: Any, **settings: Any) -> EmbeddingBatch:
    handler = EmbeddingBatch(encoder, store)
    handler.setup(HandlerSettings(**settings))
    return handler


def test_rows_get_the_sparse_vectors_of_their_texts_also_from_the_cache(tmp_path: Path) -> None:
    store, encoder = MemoryVectors(), SparseDummy(DIM)
    handler = embed(store, encoder, cache_bytes=1 << 28, data_dir=str(tmp_path))
    assert store.sparse_kind(NAME) == "model"
    for id_ in ("a", "b"):
        handler.handle(job(id_))
        assert written(store, id_).sparse.as_dict() == {ord("宝"): 1.0, ord("玉"): 1.0}
    assert encoder.both_passes == 1
    # Entries without sparse vectors are not taken for texts without weights.
    other = embed(MemoryVectors(), encoder, sparse="off", cache_bytes=1 << 28, data_dir=str(tmp_path))
    other.handle(job("a"))
    assert (encoder.both_passes, other.counters["embedding_cache_misses"]) == (1, 2)


def test_a_model_without_them_and_the_option_off_write_none() -> None:
    for settings in ({"sparse": "off"}, {}):
        store, encoder = MemoryVectors(), SparseDummy(DIM)
        encoder.has_sparse = bool(settings)
        embed(store, encoder, **settings).handle(job("a"))
        assert (written(store, "a").sparse, store.sparse_kind(NAME), encoder.both_passes) == (None, "none", 0)


def test_a_rebuild_adds_them_to_rows_and_keeps_the_dense_ones() -> None:
    row: Mapping[str, Any] = {"text_content": "宝", "vector": np.zeros(DIM)}
    (added,) = sparse_of_rows(SparseDummy(DIM), [dict(row)])
    assert {name: one.as_dict() for name, one in added.items()} == {"sparse": {ord("宝"): 1.0}}
    assert embed_rows(SparseDummy(DIM), [dict(row)])[0].keys() == {"vector", "sparse"}


def test_ranks_are_fused_by_their_reciprocals() -> None:
    assert fuse([["a", "b", "c"], ["c", "d"]], 3) == ["c", "a", "b"]
    assert fuse([["a"], []], 5) == ["a"]


def filled(encoder: SparseDummy, kind: SparseKind = "model") -> MemoryVectors:
    store = MemoryVectors(prefix="z_")
    store.ensure_collection(NAME, DIM, kind)
    texts = [f"text {number}" for number in range(40)] + ["宝玉"]
    vectors, sparse = encoder.forward_both(encoder.tokenize(texts))
    store.upsert(
        NAME,
        [
            Row(
                f"r{number}",
                vectors[number],
                "t1",
                "p1",
                text_content=text,
                sparse=(sparse or [NOTHING])[number],
            )
            for number, text in enumerate(texts)
        ],
    )
    return store


def test_a_name_in_a_question_is_found_by_its_words() -> None:
    encoder = SparseDummy(DIM)

    async def scenario(world: World) -> None:
        async def ask(**asked: Any) -> Any:
            answer = await world.post("/v1/search", {**SCOPE, "query": "谁是宝玉？", "limit": 5, **asked})
            assert answer.status == 200, answer
            return answer.json()

        found = await ask()
        assert (found["mode"], found.get("note")) == ("hybrid", None)
        assert found["results"][0]["id"] == "r40"
        assert -1 <= found["results"][0]["score"] <= 1
        dense = await ask(mode="dense")
        assert (dense["mode"], dense.get("note")) == ("dense", None)
        assert "give query" in (await ask(query="", vector=[1.0] * DIM, mode="hybrid"))["note"]
        assert (await world.post("/v1/search", {**SCOPE, "query": "x", "mode": "best"})).status == 400

    in_world(scenario, encoder=encoder, store=filled(encoder))


@pytest.mark.parametrize(
    ("sparse_model", "kind", "reason"),
    [(True, "none", "rebuild it"), (False, "none", "no BM25"), (False, "model", "gives no sparse")],
)
def test_a_dense_answer_says_why(sparse_model: bool, kind: SparseKind, reason: str) -> None:
    encoder = SparseDummy(DIM)
    store = filled(encoder, kind)
    encoder.has_sparse = sparse_model

    async def scenario(world: World) -> None:
        answer = (await world.post("/v1/search", {**SCOPE, "query": "宝玉", "mode": "hybrid"})).json()
        assert answer["mode"] == "dense"
        assert reason in answer["note"]

    in_world(scenario, encoder=encoder, store=store)
