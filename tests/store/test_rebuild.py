"""Rebuilds on Milvus Lite and Milvus 2.3.5 while clients search and write."""

import contextlib
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.open import open_fence
from jobworker.handlers.rebuild import handler as rebuild_handler
from jobworker.handlers.rebuild import rebuild
from jobworker.handlers.rebuild.handler import IndexRebuild
from jobworker.handlers.rebuild.milvus import open_shadow
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.sparse_vector import SparseVector
from jobworker.handlers.vectors import schema as scalars
from jobworker.handlers.vectors.milvus.store import Row, VectorStoreError, open_vectors
from jobworker.handlers.vectors.ports import PermanentStoreError, TransientStoreError
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter
from jobworker.worker import Job, PermanentError
from support.redis_servers import running
from support.sparse_encoder import SparseDummy

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
DIM = 16
ENCODER = DummyEncoder(DIM)


@pytest.fixture(scope="module", params=["lite", "milvus-2.3.5"])
def uri(request: pytest.FixtureRequest, milvus: Callable[[str], str]) -> str:
    return milvus(request.param)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("valkey", tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


class World:
    """A collection with a prefix of its own, and the calls that a service makes."""

    def __init__(self, uri: str, redis_url: str, partitions: Any = "key", *, ensure: bool = True) -> None:
        self.prefix = f"r{uuid.uuid4().hex[:8]}_"
        self.settings = HandlerSettings(
            redis_url=redis_url, milvus_uri=uri, milvus_prefix=self.prefix, milvus_partitions=partitions
        )
        self.partitions = partitions
        self.store = self.open()
        if ensure:
            self.store.ensure_collection(NAME, DIM)
        self.shadow = open_shadow(uri, token=None, prefix=self.prefix, named=partitions == "named")
        self.alias = self.prefix + NAME

    def open(self, **more: Any) -> Any:
        return open_vectors(self.settings.milvus_uri, prefix=self.prefix, partitions=self.partitions, **more)

    def writer(self, store: Any, model: str = "") -> VersionedWriter:
        return VersionedWriter(store, open_fence(self.settings.redis_url), prefix=self.prefix, model=model)

    def rows(self, first: int, count: int, text: str = "first", dim: int = DIM) -> list[Row]:
        texts = [f"{text} {number}" for number in range(first, first + count)]
        vectors = DummyEncoder(dim).encode(texts)
        return [
            Row(f"r{first + n:06d}", vectors[n], "t", "p", f"c{n % 9}", n, "scene", texts[n], version=1)
            for n in range(count)
        ]

    def rebuild(self, **payload: Any) -> None:
        handler = IndexRebuild()
        handler.setup(self.settings)
        entry = uuid.uuid4().hex
        handler.handle(
            Job("j", "index_rebuild", "", "", {"collection": NAME, **payload}, {}, "", "s", entry, 0)
        )
        handler._shadow.close()

    def call(self, do: Callable[[Any], Any]) -> Any:
        """A request of another program, with the plain client."""
        return self.shadow._milvus.call("by hand", do)

    def create_foreign(self, table: str, rows: int = 3) -> None:
        """Create a collection as another program does."""
        self.call(lambda client: client.create_collection(table, dimension=4, timeout=30))
        data = [{"id": number, "vector": [1.0, 0.0, 0.0, number]} for number in range(rows)]
        self.call(lambda client: client.insert(table, data, timeout=30))

    def ids(self, table: str) -> list[int]:
        """Ids in a foreign collection."""
        answer = self.call(
            lambda client: client.query(
                table, filter="id >= 0", output_fields=["id"], consistency_level="Strong", timeout=30
            )
        )
        return sorted(row["id"] for row in answer)

    def texts(self, ids: list[str]) -> dict[str, str]:
        return {row.id: row.text_content for row in self.store.get(NAME, ids, strong=True, **SCOPE)}

    def check(self, expected: dict[str, str]) -> None:
        """The collection holds exactly these rows. Milvus 2.3.5 misses some for a second or two while it
        replaces segments, without an error; a lost row never appears."""
        deadline = time.monotonic() + 20
        while self.texts(list(expected)) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
        assert self.texts(list(expected)) == expected
        assert self.store.count(NAME) == len(expected)

    def close(self) -> None:
        self.store.close()
        self.shadow.close()


@pytest.fixture
def world(uri: str, redis_url: str) -> Iterator[World]:
    made = World(uri, redis_url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "OLD_SEARCHES_S", 1.0)
    monkeypatch.setattr(rebuild, "PAGE_ROWS", 100)
    monkeypatch.setattr(rebuild, "MIN_PAGE_ROWS", 100)


def test_pages_return_every_row_once_with_all_fields(world: World) -> None:
    rows = world.rows(0, 250)
    world.store.upsert(NAME, list(reversed(rows)))
    pages, after = [], ""
    while page := world.shadow.page(world.alias, after, 100):
        pages.append(page)
        after = page[-1]["id"]
    records = [record for page in pages for record in page]
    assert [record["id"] for record in records] == [row.id for row in rows]
    for record, row in zip(records, rows, strict=True):
        vector = record.pop("vector")
        np.testing.assert_array_equal(np.asarray(vector, np.float32), row.vector)
        assert record == {
            field: value for field, value in row._asdict().items() if field not in ("vector", "sparse")
        }
    assert [set(row) for row in world.shadow.page(world.alias, "", 3, ("id",))] == [{"id"}] * 3


@contextlib.contextmanager
def users(world: World) -> Iterator[tuple[list[Exception], list[int], dict[str, str]]]:
    """One thread searches and one writes until the block ends. Yields their errors, the number of searches
    and the newest text of each row written."""
    stop = threading.Event()
    faults: list[Exception] = []
    searches, newest = [0], dict[str, str]()

    def search() -> None:
        store = world.open()
        while not stop.is_set():
            try:
                hits = store.search(NAME, ENCODER.encode(["first 5"])[0], **SCOPE)
                assert len(hits) == 5
                searches[0] += 1
            except (VectorStoreError, AssertionError) as error:
                faults.append(error)
        store.close()

    def write() -> None:
        store = world.open()
        writer = world.writer(store)
        for number in range(10_000):
            if stop.is_set():
                break
            rows = world.rows(number * 7 % 590, 5, f"write {number}")
            writer.write(NAME, [VersionedRows(f"w{number}", rows)])
            newest.update((row.id, row.text_content) for row in rows)
        store.close()

    threads = [threading.Thread(target=work) for work in (search, write)]
    for thread in threads:
        thread.start()
    try:
        yield faults, searches, newest
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_rebuild_loses_no_row_and_fails_no_search(world: World) -> None:
    world.writer(world.store).write(NAME, [VersionedRows("first", world.rows(0, 600))])
    # Without strong consistency, a server shows rows to searches some moments later.
    assert len(world.store.search(NAME, ENCODER.encode(["first 5"])[0], strong=True, **SCOPE)) == 5
    with users(world) as (faults, searches, newest):
        world.rebuild()
    expected = {row.id: row.text_content for row in world.rows(0, 600)} | newest
    assert not faults, faults[:3]
    assert searches[0] > 5
    assert len(newest) > 20
    world.check(expected)
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v2"
    assert not world.shadow.exists(f"{world.alias}_v1")


def test_a_rebuild_adds_sparse_vectors_while_clients_search_and_write(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = SparseDummy(DIM)
    monkeypatch.setattr(rebuild_handler, "load_from_settings", lambda settings, model: encoder)
    monkeypatch.setattr(IndexRebuild, "_has_head", lambda handler, model: True)
    world.settings = dataclasses.replace(world.settings, sparse="on")
    kind = world.open(sparse_on_lite=True).supported_sparse("model")
    world.writer(world.store).write(NAME, [VersionedRows("first", world.rows(0, 600))])
    assert len(world.store.search(NAME, ENCODER.encode(["first 5"])[0], strong=True, **SCOPE)) == 5
    with users(world) as (faults, searches, newest):
        world.rebuild()
    assert not faults, faults[:3]
    assert min(searches[0], len(newest)) > 5
    world.check({row.id: row.text_content for row in world.rows(0, 600)} | newest)
    # It knows the collection as it was.
    vectors, sparse = encoder.forward_both(encoder.tokenize(["宝玉"]))
    assert sparse
    world.store.upsert(NAME, [Row("late", -vectors[0], "t", "p", text_content="宝玉", sparse=sparse[0])])
    assert world.store.sparse_kind(NAME, fresh=True) == kind
    if kind == "model":
        found = world.store.hybrid_search(NAME, vectors[0], sparse[0], **SCOPE, limit=60)
        assert "late" in [hit.id for hit in found]
        old = SparseVector.of({ord("t"): 1.0, ord("9"): 1.0})
        found = world.store.hybrid_search(NAME, vectors[0], old, **SCOPE, limit=100)
        assert sum("9" in hit.text_content for hit in found) > 50


def test_rows_are_embedded_again_with_another_dimension(world: World) -> None:
    world.writer(world.store, "dummy:16").write(NAME, [VersionedRows("first", world.rows(0, 120))])
    world.rebuild(model="dummy:24")
    assert world.shadow.dim(world.alias) == 24
    (row,) = world.store.get(NAME, ["r000007"], strong=True, **SCOPE)
    np.testing.assert_allclose(row.vector, DummyEncoder(24).encode(["first 7"])[0], atol=1e-6)
    with pytest.raises(TransientStoreError, match="--model dummy:24"):
        world.writer(world.store, "dummy:16").write(NAME, [VersionedRows("late", world.rows(0, 1))])
    world.writer(world.store, "dummy:24").write(NAME, [VersionedRows("new", world.rows(0, 1, "new", 24))])
    assert world.texts(["r000000"]) == {"r000000": "new 0"}


def test_a_rebuild_keeps_named_partitions(uri: str, redis_url: str) -> None:
    world = World(uri, redis_url, "named")
    other = [row._replace(project_id="q", id=f"q{row.id}") for row in world.rows(0, 20)]
    world.store.upsert(NAME, [*world.rows(0, 150), *other])
    world.store.delete(NAME, [row.id for row in other], tenant_id="t", project_id="q")
    world.rebuild()
    assert world.store.count(NAME) == 150
    vector = ENCODER.encode(["first 5"])[0]
    assert world.store.search(NAME, vector, limit=1, strong=True, **SCOPE)[0].id == "r000005"
    # A process caches existing partitions and does not check them again.
    assert world.store.search(NAME, vector, tenant_id="t", project_id="q", strong=True) == []
    world.store.upsert(NAME, other)
    assert world.store.count(NAME) == 170
    world.close()


def test_a_rebuild_in_place_keeps_rows_and_search_results(world: World) -> None:
    world.store.upsert(NAME, world.rows(0, 200))
    world.rebuild(mode="in_place")
    vector = ENCODER.encode(["first 5"])[0]
    assert world.store.search(NAME, vector, limit=1, strong=True, **SCOPE)[0].id == "r000005"
    assert world.store.count(NAME) == 200
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v1"
    world.writer(world.store).write(NAME, [VersionedRows("after", world.rows(0, 1))])


def test_a_collection_without_an_alias_needs_mode_in_place(world: World) -> None:
    world.create_foreign(f"{world.prefix}by_hand")
    with pytest.raises(PermanentStoreError, match="in_place"):
        world.shadow.live_collection("by_hand")
    with pytest.raises(PermanentError):
        world.rebuild(collection="absent")


def test_an_alias_of_a_collection_with_numbers_as_ids_is_refused(world: World) -> None:
    """A server would report it like an outage, which pauses the type."""
    table, alias = f"{world.prefix}numbers_1", f"{world.prefix}numbers"
    world.create_foreign(table)
    world.call(lambda client: client.create_alias(table, alias, timeout=30))
    with pytest.raises(PermanentError, match="VARCHAR field `id`"):
        world.rebuild(collection="numbers")


def test_a_late_page_is_not_slow(world: World, tmp_path: Path) -> None:
    """The cost of a page must not grow so that a rebuild never ends."""
    world.store.upsert(NAME, world.rows(0, 3000))
    started = time.monotonic()
    assert len(world.shadow.page(world.alias, "r002000", 100)) == 100
    assert time.monotonic() - started < 20


def test_names_used_by_other_programs_are_skipped(world: World) -> None:
    """A collection uses the next name, an alias the one after."""
    world.store.upsert(NAME, world.rows(0, 20))
    theirs = [f"{world.alias}_v2", f"{world.prefix}theirs"]
    for table in theirs:
        world.create_foreign(table)
    world.call(lambda client: client.create_alias(theirs[1], f"{world.alias}_v3", timeout=30))
    world.rebuild()
    assert [world.ids(table) for table in theirs] == [[0, 1, 2]] * 2
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v4"
    assert not world.shadow.exists(f"{world.alias}_v1")
    assert world.store.count(NAME) == 20


def test_the_old_collection_is_kept_while_another_alias_names_it(world: World) -> None:
    world.store.upsert(NAME, world.rows(0, 20))
    old, another = f"{world.alias}_v1", f"{world.prefix}another"
    world.call(lambda client: client.create_alias(old, another, timeout=30))
    world.rebuild()
    assert world.shadow.live_collection("another") == old
    assert world.shadow.count(another) == 20


def test_a_foreign_first_collection_is_not_used(uri: str, redis_url: str) -> None:
    world = World(uri, redis_url, ensure=False)
    world.create_foreign(f"{world.alias}_v1")
    world.store.ensure_collection(NAME, DIM)
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v2"
    assert world.ids(f"{world.alias}_v1") == [0, 1, 2]
    world.close()


def test_a_first_collection_is_used_if_its_creator_was_killed(uri: str, redis_url: str) -> None:
    """Killed before it created the alias."""
    world = World(uri, redis_url)
    world.call(lambda client: client.drop_alias(world.alias, timeout=30))
    again = world.open()
    again.ensure_collection(NAME, DIM)
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v1"
    again.close()
    world.close()


def test_a_collection_made_by_an_earlier_release_is_rebuilt_and_dropped(uri: str, redis_url: str) -> None:
    """Such a collection has no mark."""
    world = World(uri, redis_url, ensure=False)
    old = f"{world.alias}_v4"
    world.shadow._admin.create(old, scalars.SEGMENTS, DIM, "")
    world.call(lambda client: client.create_alias(old, world.alias, timeout=30))
    world.store.ensure_collection(NAME, DIM)
    world.store.upsert(NAME, world.rows(0, 20))
    world.rebuild()
    assert world.shadow.live_collection(NAME) == f"{world.alias}_v5"
    assert not world.shadow.exists(old)
    assert world.store.count(NAME) == 20
    world.close()


def test_only_the_mark_allows_reuse_and_drop_of_a_collection(world: World) -> None:
    target = f"{world.alias}_v2"
    assert world.shadow.create(NAME, target, DIM, "mine")
    assert world.shadow.create(NAME, target, DIM, "mine")
    assert not world.shadow.create(NAME, target, DIM, "of another")
    assert world.shadow.mark(target) == "mine"
    assert world.shadow.mark(world.alias) is None, "an alias"
    assert not world.shadow.drop(target, "of another")
    assert not world.shadow.drop(world.alias, "mine")
    assert world.shadow.exists(target)
    assert world.shadow.drop(target, "mine")
    assert not world.shadow.exists(target)
    assert world.shadow.drop(target, "mine"), "gone already"
