"""Filters as a server receives them: template parameters from Milvus 2.5 on, quoted ids before."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.rebuild.milvus import open_shadow
from jobworker.handlers.vectors import filters
from jobworker.handlers.vectors import schema as schemas
from jobworker.handlers.vectors.milvus.client import collection_options
from jobworker.handlers.vectors.milvus.store import PermanentStoreError, VectorStore, open_vectors
from jobworker.handlers.vectors.ports import SearchFilter
from support.recent_milvus import DIM, recent_milvus

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t:1", "project_id": "p.2"}
WHOSE = {"tenant_id": "t:1", "project_id": "p.2"}
CALLS: list[tuple[Callable[[VectorStore], object], str, dict[str, Any]]] = [
    (
        lambda store: store.search(NAME, np.ones(DIM, np.float32), **SCOPE),
        "tenant_id == {tenant_id} and project_id == {project_id}",
        WHOSE,
    ),
    (
        lambda store: store.get(NAME, ["a", "b-1"], **SCOPE),
        "id in {id} and tenant_id == {tenant_id} and project_id == {project_id}",
        {"id": ["a", "b-1"], **WHOSE},
    ),
    (lambda store: store.versions(NAME, ["a"], **SCOPE), "id in {id}", {"id": ["a"]}),
    (
        lambda store: store.chapter_versions(NAME, "c1", **SCOPE),
        "chapter_id == {chapter_id} and tenant_id == {tenant_id} and project_id == {project_id}",
        {"chapter_id": "c1", **WHOSE},
    ),
    (
        lambda store: store.delete(NAME, ["a"], **SCOPE),
        "id in {id} and tenant_id == {tenant_id} and project_id == {project_id}",
        {"id": ["a"], **WHOSE},
    ),
]


def filter_of(request: Any) -> str:
    """Where each kind of request has it."""
    return str(getattr(request, "dsl", "") or request.expr)


def values_of(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in request.expr_template_values.items():
        kind = value.WhichOneof("val")
        found[name] = value.string_val if kind == "string_val" else list(value.array_val.string_data.data)
    return found


@pytest.mark.parametrize(("call", "text", "values"), CALLS)
def test_values_go_beside_the_text_where_the_server_takes_them(
    call: Callable[[VectorStore], object], text: str, values: dict[str, Any]
) -> None:
    with recent_milvus("v2.5.4") as (uri, server):
        store = open_vectors(uri, timeout_s=5)
        call(store)
        store.close()
    (request,) = server.requests
    assert filter_of(request) == text
    assert values_of(request) == values


def test_both_parts_of_a_hybrid_search_are_kept_to_the_tenant() -> None:
    with recent_milvus("v2.5.4") as (uri, server):
        server.bm25 = True
        store = open_vectors(uri, timeout_s=5)
        assert store.sparse_kind(NAME) == "bm25"
        store.hybrid_search(NAME, np.ones(DIM, np.float32), "谁是宝玉", **SCOPE)
        store.close()
    dense, words = server.requests
    for request in (dense, words):
        assert filter_of(request) == "tenant_id == {tenant_id} and project_id == {project_id}"
        assert values_of(request) == WHOSE
    assert "谁是宝玉".encode() in words.placeholder_group
    params = [{pair.key: pair.value for pair in one.search_params} for one in (dense, words)]
    assert [(one["anns_field"], one["metric_type"]) for one in params] == [
        ("vector", "COSINE"),
        ("sparse", "BM25"),
    ]
    (fused,) = server.rank_params
    assert (fused["strategy"], json.loads(fused["params"])) == ("rrf", {"k": 60})


@pytest.mark.parametrize("name", ["story_segments", "entity_profiles"])
def test_a_new_collection_has_words_where_the_server_splits_them(name: str) -> None:
    schema = schemas.schema_of(name)
    options = collection_options(schema, DIM, partition_key=True, mark="m", lite=False, sparse="bm25")
    layout = options["schema"].to_dict()
    (function,) = layout["functions"]
    assert (function["input_field_names"], function["output_field_names"]) == ([schema.named_in], ["sparse"])
    (named,) = [field for field in layout["fields"] if field.get("params", {}).get("enable_analyzer")]
    assert (named["name"], json.loads(named["params"]["analyzer_params"])) == (
        schema.named_in,
        {"type": "chinese"},
    )


def test_an_older_server_gets_quoted_ids() -> None:
    with recent_milvus("v2.4.15") as (uri, server):
        store = open_vectors(uri, timeout_s=5)
        store.get(NAME, ["a", "b-1"], **SCOPE)
        store.close()
    (request,) = server.requests
    assert filter_of(request) == 'id in ["a", "b-1"] and tenant_id == "t:1" and project_id == "p.2"'
    assert values_of(request) == {}


def test_a_rebuild_reads_pages_counts_and_removes_likewise() -> None:
    with recent_milvus("2.6.1") as (uri, server):
        shadow = open_shadow(uri, token=None, prefix="", named=False, timeout_s=5)
        assert shadow.page("t_v1", "", 10) == shadow.page("t_v1", "r5", 10) == []
        shadow.delete("t_v1", ["r1", "r2"])
        with pytest.raises(IndexError):  # this one has no rows to count
            shadow.count("t_v1")
        shadow.close()
    told = [(filter_of(request), values_of(request)) for request in server.requests]
    assert told == [
        ("id > {id}", {"id": ""}),
        ("id > {id}", {"id": "r5"}),
        ("id in {id}", {"id": ["r1", "r2"]}),
        ("", {}),
    ]


@pytest.mark.parametrize("text", ['"] or id != "', "{id}", "x y", "", "x\n", "夜", "x" * 65])
def test_what_is_no_id_makes_no_filter(text: str) -> None:
    makers: list[Callable[[], object]] = [
        lambda: filters.of_ids(["a", text]),
        lambda: filters.of_scope(text, "p"),
        lambda: filters.of_scope("t", text),
        lambda: filters.of_chapter(text),
    ]
    for make in makers:
        with pytest.raises(PermanentStoreError):
            make()
    if text:
        with pytest.raises(PermanentStoreError):
            filters.after(text)


WHERE = SearchFilter(("c1", "c2"), ("scene",), 1, 9)


def test_a_search_filter_in_both_forms() -> None:
    where = filters.of_search(WHERE)
    assert where.arguments(templates=False) == {
        "filter": 'chapter_id in ["c1", "c2"] and segment_type in ["scene"] '
        "and story_time >= 1 and story_time <= 9"
    }
    assert where.arguments(templates=True) == {
        "filter": "chapter_id in {chapter_id} and segment_type in {segment_type} "
        "and story_time >= {story_time_from} and story_time <= {story_time_to}",
        "filter_params": {
            "chapter_id": ["c1", "c2"], "segment_type": ["scene"], "story_time_from": 1, "story_time_to": 9,
        },
    }  # fmt: skip
    assert filters.of_search(SearchFilter()) == filters.EVERYTHING


@pytest.mark.parametrize(
    "where",
    [
        SearchFilter(chapter_ids=('c" or id > "',)),
        SearchFilter(segment_types=('x" or id > "',)),
        SearchFilter(segment_types=("x\\",)),
        SearchFilter(segment_types=("{x}",)),
        SearchFilter(segment_types=("",)),
        SearchFilter(story_time_from=1 << 63),
        SearchFilter(story_time_to=True),
    ],
)
def test_a_value_that_could_leave_its_place_is_refused(where: SearchFilter) -> None:
    with pytest.raises(PermanentStoreError):
        filters.of_search(where)
