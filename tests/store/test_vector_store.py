"""One suite for every vector store: the one in memory, our Milvus Lite server, and a real Milvus 2.3.5."""

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.jobstore.erasures import Scope
from jobworker.handlers.sparse_vector import SparseVector
from jobworker.handlers.vectors import schema as schemas
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.milvus.errors import Verdict, classify
from jobworker.handlers.vectors.milvus.server_info import Server
from jobworker.handlers.vectors.milvus.store import (
    EntityRow,
    MilvusVectors,
    PermanentStoreError,
    Row,
    TransientStoreError,
    Vector,
    VectorStore,
    open_vectors,
)
from jobworker.handlers.vectors.ports import SearchFilter, StoredRow
from jobworker.worker import PermanentError
from support.milvus import lite_server, wait_until
from support.redis_servers import free_port

DIM = 8
NAME = "story_segments"
BACKENDS = ("memory", "lite", "milvus-2.3.5")
SERVERS = BACKENDS[1:]


class Backends:
    """Stores on the servers of this session."""

    def __init__(self, uri: Callable[[str], str]) -> None:
        self.uri = uri
        self._stores: dict[tuple[str, str], VectorStore] = {}

    def open(self, backend: str, *, prefix: str, partitions: Any = "key") -> VectorStore:
        if backend == "memory":
            return MemoryVectors(prefix=prefix, partitions=partitions)
        return open_vectors(self.uri(backend), prefix=prefix, partitions=partitions)

    def store(self, backend: str, partitions: str) -> VectorStore:
        """A store whose `story_segments` is there already: making one takes Milvus three seconds."""
        if (backend, partitions) not in self._stores:
            store = self.open(backend, prefix=f"t_{partitions}_", partitions=partitions)
            store.ensure_collection(NAME, DIM)
            self._stores[backend, partitions] = store
        return self._stores[backend, partitions]

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


@pytest.fixture(scope="session")
def backends(milvus: Callable[[str], str]) -> Iterator[Backends]:
    opened = Backends(milvus)
    yield opened
    opened.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(backends: Backends, backend: str) -> VectorStore:
    return backends.store(backend, "key")


@pytest.fixture
def tenant() -> str:
    """A tenant of this test alone, since all tests share one collection."""
    return f"t{uuid.uuid4().hex[:12]}"


def vectors(count: int, seed: int = 1) -> Any:
    """`count` unit vectors, float32, shape (count, DIM)."""
    made = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def rows_of(tenant: str, count: int, **fields: Any) -> list[Row]:
    made = vectors(count)
    return [
        Row(f"{tenant}:{i}", made[i], tenant, "p", text_content=f"text {i}")._replace(**fields)
        for i in range(count)
    ]


def ids_of(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


def plain(row: Any) -> dict[str, Any]:
    """The row without its vector, which has no truth value."""
    return {field: value for field, value in row._asdict().items() if field != "vector"}


def read(store: VectorStore, ids: list[str], tenant: str, project: str = "p") -> list[Any]:
    return store.get(NAME, ids, tenant_id=tenant, project_id=project, strong=True)


def find(store: VectorStore, vector: Vector, tenant: str, project: str = "p", limit: int = 5) -> list[Any]:
    return store.search(NAME, vector, tenant_id=tenant, project_id=project, limit=limit, strong=True)


def test_what_was_upserted_is_read_back(store: VectorStore, tenant: str) -> None:
    made = vectors(2)
    rows = [
        Row(f"{tenant}.a:1_-", made[0], tenant, "p-1", "ch:1", -(2**63), "dialogue", "夜色\n\t\0\"'\\🌒", 7),
        Row(f"{tenant}.b", made[1], tenant, "p-1"),
    ]
    store.upsert(NAME, rows)
    found = read(store, [rows[1].id, "absent", rows[0].id, rows[1].id], tenant, "p-1")
    assert [plain(row) for row in found] == [plain(row) for row in reversed(rows)]
    for row, expected in zip(found, reversed(rows), strict=True):
        assert row.vector.dtype == np.float32
        np.testing.assert_array_equal(row.vector, expected.vector)


def test_search_gives_the_nearest_first(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 20, chapter_id="c1", segment_type="summary")
    store.upsert(NAME, rows)
    hits = find(store, rows[3].vector, tenant, limit=4)
    cosines = {row.id: float(row.vector @ rows[3].vector) for row in rows}
    assert [hit.id for hit in hits] == sorted(cosines, key=cosines.__getitem__, reverse=True)[:4]
    assert [hit.score for hit in hits] == pytest.approx([cosines[hit.id] for hit in hits], abs=1e-5)
    assert hits[0][2:] == ("text 3", "c1", "summary", 0)


def test_a_second_upsert_replaces(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 3)
    store.upsert(NAME, rows)
    store.upsert(NAME, rows)
    store.upsert(NAME, [rows[1]._replace(text_content="new", version=2)])
    assert [row.text_content for row in read(store, ids_of(rows), tenant)] == ["text 0", "new", "text 2"]
    assert len(find(store, rows[0].vector, tenant, limit=100)) == 3


def test_of_duplicate_ids_the_last_wins(store: VectorStore, tenant: str) -> None:
    row = rows_of(tenant, 1)[0]
    store.upsert(NAME, [row._replace(text_content=text) for text in ("first", "second", "last")])
    assert [hit.text_content for hit in find(store, row.vector, tenant)] == ["last"]


def test_no_rows_are_no_error(store: VectorStore, tenant: str) -> None:
    store.upsert(NAME, [])
    store.delete(NAME, [], tenant_id=tenant, project_id="p")
    assert read(store, [], tenant) == []


def test_tenants_and_projects_are_apart(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 2)
    store.upsert(NAME, rows)
    for other in ((f"{tenant}x", "p"), (tenant, "p2")):
        assert read(store, ids_of(rows), *other) == []
        assert find(store, rows[0].vector, *other) == []
        store.delete(NAME, ids_of(rows), tenant_id=other[0], project_id=other[1])
    assert len(read(store, ids_of(rows), tenant)) == 2


def test_the_id_of_another_tenant_is_refused(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 2)
    store.upsert(NAME, rows)
    read(store, ids_of(rows), tenant)  # a Milvus server lets the check see them no later than this
    thief = [row._replace(tenant_id=f"{tenant}x", text_content="stolen") for row in rows_of(tenant, 1)]
    fresh = rows_of(f"{tenant}x", 1)
    with pytest.raises(PermanentStoreError, match="another tenant") as refused:
        store.upsert(NAME, [*fresh, *thief])
    assert refused.value.ids == (rows[0].id,)
    assert isinstance(refused.value, PermanentError)
    assert tenant not in str(refused.value).replace(rows[0].id, "")
    assert read(store, ids_of(rows), tenant)[0].text_content == "text 0"
    assert read(store, ids_of(fresh), f"{tenant}x") == []


def test_two_tenants_with_one_id_in_one_call_are_refused(store: VectorStore, tenant: str) -> None:
    row = rows_of(tenant, 1)[0]
    with pytest.raises(PermanentStoreError) as refused:
        store.upsert(NAME, [row, row._replace(project_id="p2")])
    assert refused.value.ids == (row.id,)
    assert read(store, [row.id], tenant) == []


def test_delete_takes_only_what_it_names(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 4)
    store.upsert(NAME, rows)
    store.delete(NAME, [rows[1].id, "absent", rows[2].id], tenant_id=tenant, project_id="p")
    assert [row.id for row in read(store, ids_of(rows), tenant)] == [rows[0].id, rows[3].id]
    assert rows[1].id not in [hit.id for hit in find(store, rows[1].vector, tenant)]


def test_pages_have_all_rows_of_a_project_in_the_order_of_ids(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 7, chapter_id="c1", version=3)
    rows[6] = rows[6]._replace(project_id="q")
    store.upsert(NAME, rows[::-1])

    def paged(project: str, *, vectors: bool) -> list[Any]:
        found: list[Any] = []
        scope = {"tenant_id": tenant, "project_id": project, "after": ""}
        while page := store.page(NAME, **scope, limit=4, vectors=vectors):
            found += page
            scope["after"] = page[-1].id
        return found

    plain_rows = [plain(row) for row in paged("p", vectors=False)]
    assert plain_rows == [plain(row) for row in rows[:6]]
    assert all(row.vector.shape == (0,) for row in paged("p", vectors=False))
    assert np.allclose([row.vector for row in paged("p", vectors=True)], [row.vector for row in rows[:6]])
    assert ids_of(paged("q", vectors=False)) == [rows[6].id]
    assert paged("r", vectors=False) == []


def test_a_deletion_finds_the_rows_of_its_scope_page_by_page(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 7, chapter_id="c1", created_us=2**50)
    rows[5] = rows[5]._replace(chapter_id="c2", created_us=0)
    rows[6] = rows[6]._replace(project_id="q")
    store.upsert(NAME, rows)
    ids = ids_of(rows)

    def scan(*of: Any) -> list[StoredRow]:
        found: list[StoredRow] = []
        while page := store.scan(NAME, Scope(tenant, *of), found[-1].id if found else "", 2):
            found += page
        return found

    assert scan("p", ("c1",)) == [StoredRow(id_, "p", "c1", "", 2**50) for id_ in ids[:5]]
    assert [row.id for row in scan("p")] == ids[:6]
    assert scan()[5:] == [StoredRow(ids[5], "p", "c2", "", 0), StoredRow(ids[6], "q", "c1", "", 2**50)]
    assert [row.id for row in scan("p", (), (ids[3], "absent", ids[0], ids[4], ids[6]))] == [
        ids[0],
        ids[3],
        ids[4],
    ]
    assert scan("r") == []
    assert NAME in store.collections()


def test_versions_are_read_by_id_and_by_chapter_of_one_project_only(store: VectorStore, tenant: str) -> None:
    rows = rows_of(tenant, 4, chapter_id="c1")
    rows = [row._replace(version=version) for row, version in zip(rows, (0, -3, 2**63 - 1, 5), strict=True)]
    rows[3] = rows[3]._replace(chapter_id="c2")
    store.upsert(NAME, rows)
    scope: dict[str, Any] = {"tenant_id": tenant, "project_id": "p"}
    expected = {row.id: row.version for row in rows}
    assert store.versions(NAME, [*expected, "absent"], **scope) == expected
    assert store.versions(NAME, [], **scope) == {}
    del expected[rows[3].id]
    assert store.chapter_versions(NAME, "c1", **scope) == expected
    for other in ({"tenant_id": f"{tenant}x"}, {"project_id": "q"}):
        assert store.versions(NAME, list(expected), **scope | other) == {}
        assert store.chapter_versions(NAME, "c1", **scope | other) == {}
    with pytest.raises(PermanentStoreError):
        store.chapter_versions(NAME, 'c1" or id != "', **scope)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"text_content": "夜" * 21846}, "text_content has 65538 bytes"),
        ({"segment_type": "夜" * 11}, "segment_type has 33 bytes"),
        ({"chapter_id": "c" * 65}, "chapter_id has 65 bytes"),
        ({"text_content": "\ud800"}, "surrogate"),
        ({"text_content": None}, "text_content is not text"),
        ({"story_time": 2**63}, "story_time is not a 64-bit"),
        ({"story_time": 1.5}, "story_time is not a 64-bit"),
        ({"vector": np.full(DIM, np.nan, np.float32)}, "NaN"),
        ({"vector": np.full(DIM, -np.inf, np.float32)}, "NaN or infinity"),
        ({"vector": np.ones(DIM + 1, np.float32)}, r"shape \(9,\)"),
        ({"vector": np.ones((1, DIM), np.float32)}, "shape"),
        ({"id": ""}, "id '' does not match"),
        ({"id": "x" * 65}, "does not match"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_nothing_written(
    store: VectorStore, tenant: str, fault: dict[str, Any], words: str
) -> None:
    good, bad = rows_of(tenant, 2)
    bad = bad._replace(**fault)
    with pytest.raises(PermanentStoreError, match=words) as refused:
        store.upsert(NAME, [good, bad])
    assert refused.value.ids == (bad.id,)
    assert "夜夜" not in str(refused.value)
    assert find(store, good.vector, tenant) == []


def test_the_longest_text_fits(store: VectorStore, tenant: str) -> None:
    row = rows_of(tenant, 1, text_content="夜" * 21845, segment_type="夜" * 10 + "xy", chapter_id="c" * 64)[0]
    store.upsert(NAME, [row])
    assert read(store, [row.id], tenant)[0].text_content == row.text_content


INJECTIONS = [
    '" or id != "',
    'x" or tenant_id != "x',
    "x' or '1' == '1",
    '"] or id in ["',
    'x\\" or 1==1 or tenant_id == \\"',
    "%",
    "x\n",
    "x\0",
    "x y",
    "{x}",
    "x/*",
    "x) or (1 == 1",
    "夜",
    "１",
    "",
    "x" * 65,
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_untrusted_text_gets_into_a_filter(store: VectorStore, tenant: str, text: str) -> None:
    row, neighbour = rows_of(tenant, 1)[0], rows_of(f"{tenant}n", 1)[0]
    store.upsert(NAME, [neighbour])
    for bad in (row._replace(id=text), row._replace(tenant_id=text), row._replace(project_id=text)):
        with pytest.raises(PermanentStoreError):
            store.upsert(NAME, [bad])
        for call in (store.get, store.delete):
            with pytest.raises(PermanentStoreError):
                call(NAME, [bad.id], tenant_id=bad.tenant_id, project_id=bad.project_id)
    for scope in ((text, "p"), (tenant, text)):
        with pytest.raises(PermanentStoreError):
            find(store, row.vector, *scope)
    with pytest.raises(PermanentStoreError):
        store.chapter_versions(NAME, text, tenant_id=tenant, project_id="p")
    (left,) = read(store, [neighbour.id], neighbour.tenant_id)
    assert plain(left) == plain(neighbour)
    assert find(store, row.vector, tenant) == []


def test_hostile_texts_are_stored_unchanged(store: VectorStore, tenant: str) -> None:
    rows = [
        row._replace(text_content=text) for row, text in zip(rows_of(tenant, 16), INJECTIONS, strict=True)
    ]
    store.upsert(NAME, rows)
    assert [row.text_content for row in read(store, ids_of(rows), tenant)] == INJECTIONS


def test_more_rows_than_one_request_holds(store: VectorStore, tenant: str) -> None:
    before = store.count(NAME)
    rows = rows_of(tenant, 1203)
    store.upsert(NAME, rows)
    assert store.count(NAME) - before == 1203
    assert len(read(store, ids_of(rows), tenant)) == 1203
    store.delete(NAME, ids_of(rows), tenant_id=tenant, project_id="p")
    assert store.count(NAME) == before


def test_a_limit_beyond_that_of_the_server_is_rejected(store: VectorStore, tenant: str) -> None:
    for limit in (0, -1, 16385):
        with pytest.raises(PermanentStoreError, match="limit"):
            find(store, vectors(1)[0], tenant, limit=limit)


def test_another_dimension_is_named_in_the_error(store: VectorStore) -> None:
    store.ensure_collection(NAME, DIM)
    with pytest.raises(PermanentStoreError, match=r"t_key_story_segments holds vectors of 8 dimensions.* 9"):
        store.ensure_collection(NAME, DIM + 1)


def test_a_missing_collection_is_permanent(store: VectorStore, tenant: str) -> None:
    with pytest.raises(PermanentStoreError):
        store.upsert("nowhere", rows_of(tenant, 1))
    with pytest.raises(PermanentStoreError):
        store.count("nowhere")


@pytest.mark.parametrize("name", ["a-b", "a b", "x" * 201, 'x"', "夜"])
def test_an_invalid_collection_name_is_rejected(store: VectorStore, name: str) -> None:
    with pytest.raises(PermanentStoreError):
        store.count(name)


def test_ping_answers(store: VectorStore) -> None:
    store.ping()


def test_entities_have_their_own_shape_and_many_may_make_the_collection(
    backends: Backends, backend: str, tenant: str
) -> None:
    prefix = f"e_{tenant}_"
    shared = backends.open(backend, prefix=prefix)
    stores = (
        [shared] * 4 if backend == "memory" else [backends.open(backend, prefix=prefix) for _ in range(4)]
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda store: store.ensure_collection("entity_profiles", DIM), stores))
    row = EntityRow("e:1", vectors(1)[0], tenant, "p", "hero", "person", "名" * 85, "a hero", 3)
    stores[0].upsert("entity_profiles", [row])
    scope: dict[str, Any] = {"tenant_id": tenant, "project_id": "p"}
    found = stores[1].get("entity_profiles", ["e:1"], strong=True, **scope)
    assert plain(found[0]) == plain(row)
    assert stores[1].scan("entity_profiles", Scope(tenant), "", 5) == [StoredRow("e:1", "p", "", "hero", 0)]
    assert stores[3].collections() == ["entity_profiles"]
    hits = stores[2].search("entity_profiles", row.vector, strong=True, **scope)
    assert hits[0][2:] == ("名" * 85, "a hero", "hero", "person")
    with pytest.raises(PermanentStoreError, match="name has 258 bytes"):
        stores[3].upsert("entity_profiles", [row._replace(name="名" * 86)])
    for each in stores:
        each.close()


def test_named_partitions_keep_tenants_apart(backends: Backends, backend: str, tenant: str) -> None:
    store = backends.store(backend, "named")
    rows = rows_of(tenant, 3)
    assert find(store, rows[0].vector, tenant) == []
    store.upsert(NAME, [*rows[:2], rows[2]._replace(project_id="q")])
    assert len(find(store, rows[0].vector, tenant)) == 2
    assert [hit.id for hit in find(store, rows[0].vector, tenant, "q")] == [rows[2].id]
    with pytest.raises(PermanentStoreError, match="another tenant"):
        store.upsert(NAME, [rows[2]])
    with pytest.raises(PermanentStoreError, match="cannot name a Milvus partition"):
        store.upsert(NAME, rows_of(f"{tenant}-x", 1))


# ---- on servers only


def full(store: VectorStore, backend_prefix: str = "t_key_") -> tuple[MilvusVectors, str]:
    assert isinstance(store, MilvusVectors)
    return store, f"{backend_prefix}{NAME}"


def test_a_released_collection_is_loaded_again(backends: Backends, server: str, tenant: str) -> None:
    store, alias = full(backends.store(server, "key"))
    rows = rows_of(tenant, 1)
    store.upsert(NAME, rows)
    store._milvus.call("release", lambda client: client.release_collection(alias, timeout=20))
    assert len(find(store, rows[0].vector, tenant)) == 1


def test_a_dropped_collection_is_created_again(backends: Backends, server: str, tenant: str) -> None:
    store = backends.open(server, prefix=f"d_{tenant}_")
    assert isinstance(store, MilvusVectors)
    store.ensure_collection(NAME, DIM)
    alias = f"d_{tenant}_{NAME}"
    store._milvus.call("drop", lambda client: client.drop_alias(alias, timeout=20))
    store._milvus.call("drop", lambda client: client.drop_collection(f"{alias}_v1", timeout=20))
    store.upsert(NAME, rows_of(tenant, 2))
    assert store.count(NAME) == 2
    store.close()


def make_foreign(store: MilvusVectors, name: str, *, key: bool) -> None:
    """Make a collection as another program would: no alias, no room for further fields."""
    from pymilvus import DataType, MilvusClient

    layout = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    for field in schemas.SEGMENTS.fields:
        if field.max_bytes is None:
            layout.add_field(field.name, datatype=DataType.INT64)
            continue
        layout.add_field(
            field.name,
            datatype=DataType.VARCHAR,
            max_length=field.max_bytes,
            is_primary=field.name == "id",
            is_partition_key=key and field.name == "tenant_id",
        )
    layout.add_field("vector", datatype=DataType.FLOAT_VECTOR, dim=DIM)
    store._milvus.call("make", lambda client: client.create_collection(name, schema=layout, timeout=20))


def test_a_collection_made_by_others_is_used_as_it_is(backends: Backends, server: str, tenant: str) -> None:
    store = backends.open(server, prefix=f"f_{tenant}_")
    assert isinstance(store, MilvusVectors)
    make_foreign(store, f"f_{tenant}_{NAME}", key=False)
    store.ensure_collection(NAME, DIM)
    store.upsert(NAME, rows_of(tenant, 2, version=5))
    assert [row.version for row in read(store, [f"{tenant}:1"], tenant)] == [0]
    store.close()


@pytest.mark.parametrize("server", ["milvus-2.3.5"])
def test_a_partition_key_on_a_server_with_the_fault_is_rejected(
    backends: Backends, server: str, tenant: str
) -> None:
    store = backends.open(server, prefix=f"k_{tenant}_")
    assert isinstance(store, MilvusVectors)
    make_foreign(store, f"k_{tenant}_{NAME}", key=True)
    with pytest.raises(PermanentStoreError, match="misplaces rows"):
        store.ensure_collection(NAME, DIM)
    store.close()


def test_names_on_a_collection_with_a_key_are_refused(backends: Backends) -> None:
    store = backends.open("lite", prefix="t_key_", partitions="named")
    backends.store("lite", "key")
    with pytest.raises(PermanentStoreError, match="--milvus-partitions key"):
        store.ensure_collection(NAME, DIM)
    store.close()


def answered(store: VectorStore) -> bool:
    try:
        store.ping()
    except TransientStoreError:
        return False
    return True


def test_a_dead_server_is_transient_and_its_restart_is_survived(tmp_path: Path, tenant: str) -> None:
    port = free_port()
    with lite_server(tmp_path / "lite", port=port) as first:
        store = open_vectors(first.uri, timeout_s=3)
        store.ensure_collection(NAME, DIM)
        store.upsert(NAME, rows_of(tenant, 2))
    started = time.monotonic()
    for call in (store.ping, lambda: store.upsert(NAME, rows_of(tenant, 3)), lambda: store.count(NAME)):
        with pytest.raises(TransientStoreError):
            call()
    assert time.monotonic() - started < 3 * 3 + 15
    with lite_server(tmp_path / "lite", port=port):
        # The client's channel tries again at its own pace, at most 1 s apart.
        wait_until(lambda: answered(store), 30, "the store to answer after the restart")
        assert store.count(NAME) == 2
        store.upsert(NAME, rows_of(tenant, 3))
        assert store.count(NAME) == 3
        store.close()


def test_a_closed_port_is_transient_within_the_timeout() -> None:
    store = open_vectors(f"http://127.0.0.1:{free_port()}", timeout_s=1)
    started = time.monotonic()
    for call in (store.ping, lambda: store.ensure_collection(NAME, DIM)):
        with pytest.raises(TransientStoreError):
            call()
    assert time.monotonic() - started < 20


def test_an_invalid_address_is_permanent() -> None:
    with pytest.raises(PermanentStoreError):
        open_vectors("ftp://nowhere").ping()


# ---- the pure parts


@pytest.mark.parametrize(
    ("names", "code", "message", "lite", "verdict"),
    [
        (["MilvusException"], 2, "Fail connecting", False, Verdict.TRANSIENT),
        (["MilvusException"], 101, "not loaded", False, Verdict.NOT_LOADED),
        (["DescribeCollectionException", "MilvusException"], 100, "", False, Verdict.NO_COLLECTION),
        (["DataNotMatchException", "MilvusException"], 1, "", False, Verdict.PERMANENT),
        (["MilvusException"], 1, "not ready", False, Verdict.TRANSIENT),
        (["MilvusException"], 1, "already exists", True, Verdict.PERMANENT),
        (["MilvusException"], 1, "[Errno 28] No space left", True, Verdict.TRANSIENT),
        (["MilvusException"], 1, "[upsert] Retry timeout: 3s", True, Verdict.TRANSIENT),
        (["MilvusException"], 1100, "", False, Verdict.PERMANENT),
        (["MilvusException"], 65535, "", False, Verdict.SUSPECT),
        (
            ["MilvusException"],
            65535,
            "partition number (4096) exceeds max configuration (4096), collection: c",
            False,
            Verdict.PERMANENT,
        ),
        (["MilvusException"], 424242, "", False, Verdict.SUSPECT),
        (["RpcError"], "UNAVAILABLE", "", False, Verdict.TRANSIENT),
        (["RpcError"], "UNAUTHENTICATED", "", False, Verdict.REFUSED),
        (["RpcError"], "PERMISSION_DENIED", "", False, Verdict.REFUSED),
        (["MilvusException"], 1401, "", False, Verdict.REFUSED),
        (["RpcError"], "RESOURCE_EXHAUSTED", "Received message larger than max", False, Verdict.PERMANENT),
        (["RpcError"], "RESOURCE_EXHAUSTED", "quota", False, Verdict.TRANSIENT),
    ],
)
def test_errors_are_classified(
    names: list[str], code: int | str, message: str, lite: bool, verdict: Verdict
) -> None:
    assert classify(names, code, message, lite=lite) is verdict


@pytest.mark.parametrize(
    ("version", "keeps"),
    [
        ("v2.3.5-lite", False),
        ("2.3.22", False),
        ("v2.4.0", True),
        ("v2.6.3", True),
        ("3.0.1", True),
        ("cloud", True),
    ],
)
def test_old_servers_get_no_partition_key(version: str, keeps: bool) -> None:
    assert Server(version, lite=False).keeps_partition_keys is keeps


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 9), st.integers(300, 3000))
def test_requests_keep_both_limits_and_the_order(sizes: list[int], max_rows: int, max_bytes: int) -> None:
    vector = np.zeros(2, np.float32)
    rows = [Row(str(i), vector, "t", "p", text_content="夜" * size) for i, size in enumerate(sizes)]
    cut = list(schemas.requests(rows, max_rows, max_bytes))
    assert [row.id for batch in cut for row in batch] == [row.id for row in rows]
    for batch in cut:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or sum(map(schemas.row_bytes, batch)) <= max_bytes
    for left, right in pairwise(cut):
        assert len(left) == max_rows or sum(map(schemas.row_bytes, [*left, right[0]])) > max_bytes


# ---- sparse vectors


def sparse_row(id_: str, tenant: str, axis: int, weights: dict[int, float], **more: Any) -> Row:
    vector = np.zeros(DIM, np.float32)
    vector[axis] = 1
    sparse = SparseVector.of(weights)
    return Row(id_, vector, tenant, "p", "c1", 1, "scene", id_, sparse=sparse)._replace(**more)


@pytest.mark.parametrize("backend", ["memory", "lite"])
def test_a_hybrid_search_fuses_the_ranks_of_both_vectors(
    backends: Backends, backend: str, tenant: str
) -> None:
    store: Any = MemoryVectors(prefix="s_")
    if backend != "memory":
        store = open_vectors(backends.uri(backend), prefix="s_", sparse_on_lite=True)
    store.ensure_collection(NAME, DIM, "model")
    assert store.sparse_kind(NAME) == "model"
    rows = [
        sparse_row("named", tenant, 3, {7: 0.9, 8: 0.1}),
        sparse_row("near", tenant, 0, {9: 0.5}),
        sparse_row("both", tenant, 0, {7: 0.2}, vector=np.array([0.9, 0.4, *[0] * 6], np.float32)),
        sparse_row("silent", tenant, 5, {}),
        sparse_row("unweighed", tenant, 6, {}, sparse=None),
        sparse_row("elsewhere", tenant, 0, {7: 1.0}, project_id="q"),
    ]
    store.upsert(NAME, [row._replace(id=f"{tenant}:{row.id}") for row in rows])
    question, scope = rows[1].vector, {"tenant_id": tenant, "project_id": "p"}
    asked = SparseVector.of({7: 1.0})
    wait_until(lambda: len(store.search(NAME, question, **scope, limit=9, strong=True)) == 5, 20, "rows")
    hits = store.hybrid_search(NAME, question, asked, **scope, limit=9)
    found = [hit.id.removeprefix(f"{tenant}:") for hit in hits]
    assert (set(found[:2]), found[2]) == ({"both", "named"}, "near")
    assert "elsewhere" not in found
    assert {hit.id: pytest.approx(hit.score, abs=1e-5) for hit in hits} == {
        hit.id: hit.score for hit in store.search(NAME, question, **scope, limit=9)
    }
    assert store.hybrid_search(NAME, question, SparseVector.of({}), **scope, limit=1)[0].id.endswith("near")
    assert [row.id for row in store.get(NAME, [f"{tenant}:silent"], **scope)] == [f"{tenant}:silent"]
    only = store.hybrid_search(NAME, question, asked, **scope, where=SearchFilter(chapter_ids=("c2",)))
    assert only == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_sparse_vectors_fit_a_collection_without_them(
    backends: Backends, backend: str, tenant: str
) -> None:
    store = backends.store(backend, "key")
    assert store.sparse_kind(NAME) == "none"
    store.upsert(NAME, [sparse_row(f"{tenant}:x", tenant, 0, {7: 0.9})])
    (row,) = store.get(NAME, [f"{tenant}:x"], tenant_id=tenant, project_id="p", strong=True)
    assert row.sparse is None
    with pytest.raises(PermanentStoreError):
        store.hybrid_search(NAME, row.vector, SparseVector.of({7: 1.0}), tenant_id=tenant, project_id="p")


@pytest.mark.parametrize(
    ("version", "lite", "kinds"),
    [("v2.3.5", False, "none none"), ("v2.4.1", False, "model none"), ("v2.6.0", False, "model bm25"),
     ("milvus_lite 3.2.2", True, "none none"), ("cloud", False, "model bm25")],
)  # fmt: skip
def test_a_server_has_the_kinds_of_its_version(version: str, lite: bool, kinds: str) -> None:
    server = Server(version, lite=lite)
    assert " ".join([server.sparse("model"), server.sparse("bm25")]) == kinds
