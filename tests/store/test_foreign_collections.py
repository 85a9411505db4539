"""Collections of other programs: a job that names one fails alone, on Milvus Lite and on a server."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors import schema as schemas
from jobworker.handlers.vectors.milvus.store import (
    MilvusVectors,
    PermanentStoreError,
    Row,
    VectorStoreError,
    open_vectors,
)
from jobworker.worker import Job, PermanentError

DIM = 8
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
INT, TEXT = {"datatype": "INT64"}, {"datatype": "VARCHAR", "max_length": 64}


def segment_fields() -> dict[str, dict[str, Any]]:
    """Options of the fields of `story_segments`, by name."""
    fields = {
        field.name: INT if field.max_bytes is None else TEXT | {"max_length": field.max_bytes}
        for field in schemas.SEGMENTS.fields
    }
    vector = {"datatype": "FLOAT_VECTOR", "dim": DIM}
    return fields | {"id": fields["id"] | {"is_primary": True}, "vector": vector}


#: What differs from `story_segments`: fields, and whether dynamic fields are on. None: the field is missing.
UNUSABLE: dict[str, tuple[dict[str, dict[str, Any] | None], bool, str]] = {
    "no_tenant": ({"tenant_id": None}, False, "no field `tenant_id`"),
    "no_project": ({"project_id": None}, False, "no field `project_id`"),
    "no_text": ({"text_content": None}, False, "no field `text_content`"),
    "numbers": ({"id": INT | {"is_primary": True}}, True, "primary key must be a VARCHAR"),
    "auto": ({"id": INT | {"is_primary": True, "auto_id": True}}, True, "without auto id"),
    "auto_text": ({"id": TEXT | {"is_primary": True, "auto_id": True}}, False, "without auto id"),
    "other_key": ({"id": None, "pk": TEXT | {"is_primary": True}}, True, "VARCHAR field `id`"),
    "wrong_text": ({"project_id": INT}, True, "field `project_id` is no VARCHAR"),
    "wrong_number": ({"story_time": TEXT}, True, "field `story_time` is no integer"),
    "wrong_version": ({"version": TEXT}, True, "field `version` is no INT64"),
    "needs_more": ({"language": TEXT}, True, "a row needs language"),
    "dim": ({"vector": {"datatype": "FLOAT_VECTOR", "dim": 2 * DIM}}, True, "16 dimensions"),
    "no_vector": (
        {"vector": None, "other": {"datatype": "FLOAT_VECTOR", "dim": DIM}},
        True,
        "no field `vector` of type",
    ),
    "bits": ({"vector": {"datatype": "BINARY_VECTOR", "dim": DIM}}, True, "FLOAT_VECTOR"),
}
USABLE: dict[str, tuple[dict[str, dict[str, Any] | None], bool]] = {
    "same": ({}, False),
    "dynamic_tenant": ({"tenant_id": None, "story_time": None}, True),
    "own_version": ({"version": INT}, False),
    "short_time": ({"story_time": {"datatype": "INT32"}}, False),
}


@pytest.fixture(params=["lite", "milvus-2.3.5"])
def uri(request: pytest.FixtureRequest, milvus: Callable[[str], str]) -> str:
    return milvus(str(request.param))


@pytest.fixture
def store(uri: str) -> Iterator[MilvusVectors]:
    """A store with a prefix of its own."""
    opened = open_vectors(uri, prefix=f"f{uuid.uuid4().hex[:8]}_")
    assert isinstance(opened, MilvusVectors)
    yield opened
    opened.close()


def make(store: MilvusVectors, name: str, changes: dict[str, dict[str, Any] | None], dynamic: bool) -> bool:
    """Make a collection as another program would; False if the server has no such collections."""
    from pymilvus import DataType, MilvusClient  # here: it takes half a second, and each process collects

    layout = MilvusClient.create_schema(enable_dynamic_field=dynamic)
    for field, options in (segment_fields() | changes).items():
        if options is not None:
            layout.add_field(field, **options | {"datatype": DataType[options["datatype"]]})
    full = store._prefix + name
    try:
        store._milvus.call("make", lambda client: client.create_collection(full, schema=layout, timeout=20))
    except VectorStoreError:
        return False
    return True


def test_a_collection_that_cannot_hold_the_rows_is_refused_before_a_write(store: MilvusVectors) -> None:
    made = [name for name, (changes, dynamic, _) in UNUSABLE.items() if make(store, name, changes, dynamic)]
    assert {"no_tenant", "numbers", "auto", "needs_more"} <= set(made)
    for name in made:
        with pytest.raises(PermanentStoreError) as refused:
            store.ensure_collection(name, DIM)
        assert UNUSABLE[name][2] in str(refused.value), name


def test_a_collection_that_can_hold_the_rows_is_used_as_it_is(store: MilvusVectors) -> None:
    for name, (changes, dynamic) in USABLE.items():
        assert make(store, name, changes, dynamic), name
        store.ensure_collection(name, DIM)
        row = Row(
            "a",
            np.ones(DIM, np.float32),
            "t",
            "p",
            story_time=7,
            text_content="text",
            version=5,
            created_us=9,
        )
        store.upsert(name, [row])
        (found,) = store.get(name, ["a"], strong=True, **SCOPE)
        takes_version = dynamic or "version" in changes
        assert (found[2:4], found[5], found[7:10]) == (
            ("t", "p"),
            7,
            ("text", 5 if takes_version else 0, 9 if dynamic else 0),
        )
        assert store.versions(name, ["a"], **SCOPE) == {"a": 5 if takes_version else 0}


def test_a_shorter_field_of_the_collection_is_the_limit_of_its_rows(store: MilvusVectors) -> None:
    assert make(store, "short", {"text_content": TEXT | {"max_length": 9}}, False)
    store.ensure_collection("short", DIM)
    fits = Row("a", np.ones(DIM, np.float32), "t", "p", text_content="\u5915" * 3)
    store.upsert("short", [fits])
    with pytest.raises(PermanentStoreError, match="text_content has 12 bytes, the limit is 9") as refused:
        store.upsert("short", [fits, fits._replace(id="b", text_content="\u5915" * 4)])
    assert refused.value.ids == ("b",)


def test_the_check_of_a_collection_leaves_no_trace(store: MilvusVectors) -> None:
    store.ensure_collection(schemas.DEFAULT_COLLECTION, DIM)
    store.check_writable(schemas.DEFAULT_COLLECTION)
    assert store.count(schemas.DEFAULT_COLLECTION) == 0
    with pytest.raises(VectorStoreError):
        store.check_writable("nowhere")


def job(number: int, collection: str) -> Job:
    payload = {"ids": [f"{number}"], "texts": [f"text {number}"], "collection": collection}
    return Job(f"job-{number}", "embedding_batch", "t", "p", payload, {}, "", "s", f"{number}-0", 0)


def test_a_job_with_such_a_collection_fails_alone(uri: str, store: MilvusVectors) -> None:
    embed = EmbeddingBatch(DummyEncoder(DIM))
    embed.setup(HandlerSettings(milvus_uri=uri, milvus_prefix=store._prefix))
    for name in ("no_tenant", "numbers"):
        assert make(store, name, *UNUSABLE[name][:2])
    names = ["no_tenant", "story_segments", "numbers", "notes", "no_tenant"]
    outcomes = embed.handle_batch([job(number, name) for number, name in enumerate(names)])
    assert [type(outcome) for outcome in outcomes] == [
        *(PermanentError, type(None), PermanentError, type(None), PermanentError)
    ]


def test_a_collection_that_another_program_replaced_fails_its_job_only(
    uri: str, store: MilvusVectors
) -> None:
    """The service has checked the collection, so the server is the first to see the fault."""
    embed = EmbeddingBatch(DummyEncoder(DIM))
    embed.setup(HandlerSettings(milvus_uri=uri, milvus_prefix=store._prefix))
    name = "no_tenant"
    assert make(store, name, {}, False)
    assert embed.handle_batch([job(1, name)]) == [None]
    full = store._prefix + name
    store._milvus.call("drop", lambda client: client.drop_collection(full, timeout=20))
    assert make(store, name, *UNUSABLE[name][:2])
    outcomes = embed.handle_batch([job(2, name), job(3, "story_segments"), job(4, name)])
    assert outcomes[1] is None
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome is not None
        assert not getattr(outcome, "transient", False), outcome
