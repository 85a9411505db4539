"""Rebuilds on real servers: Milvus Lite and Milvus 2.3.5, with readers and writers at work."""

import contextlib
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
from jobworker.handlers.rebuild import rebuild
from jobworker.handlers.rebuild.handler import IndexRebuild
from jobworker.handlers.rebuild.milvus import open_shadow
from jobworker.handlers.vectors import schema as scalars
from jobworker.handlers.vectors.milvus.store import Row, VectorStoreError, open_vectors
from jobworker.handlers.vectors.ports import PermanentStoreError, TransientStoreError
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter
from jobworker.worker import Job, PermanentError, Settings
from support.redis_servers import running

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
    """One collection of its own on the servers, and what a service does with it."""

    def __init__(self, uri: str, redis_url: str, partitions: Any = "key", *, ensure: bool = True) -> None:
        self.prefix = f"r{uuid.uuid4().hex[:8]}_"
        self.settings = Settings(
            redis_url=redis_url, milvus_uri=uri, milvus_prefix=self.prefix, milvus_partitions=partitions
        )
        self.partitions = partitions
        self.store = self.open()
        if ensure:
            self.store.ensure_collection(NAME, DIM)
        self.shadow = open_shadow(uri, token=None, prefix=self.prefix, named=partitions == "named")
        self.table = self.prefix + NAME

    def open(self) -> Any:
        return open_vectors(self.settings.milvus_uri, prefix=self.prefix, partitions=self.partitions)

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
        """As another program does, with the plain client."""
        return self.shadow._link.attempt("by hand", do)

    def by_hand(self, table: str, rows: int = 3) -> None:
        """Make a collection of one's own."""
        self.call(lambda client: client.create_collection(table, dimension=4, timeout=30))
        data = [{"id": number, "vector": [1.0, 0.0, 0.0, number]} for number in range(rows)]
        self.call(lambda client: client.insert(table, data, timeout=30))

    def ids(self, table: str) -> list[int]:
        """What a collection made by hand holds."""
        answer = self.call(
            lambda client: client.query(
                table, filter="id >= 0", output_fields=["id"], consistency_level="Strong", timeout=30
            )
        )
        return sorted(row["id"] for row in answer)

    def texts(self, ids: list[str]) -> dict[str, str]:
        return {row.id: row.text_content for row in self.store.get(NAME, ids, strong=True, **SCOPE)}

    def check(self, expected: dict[str, str]) -> None:
        """These rows are there and no others. Milvus 2.3.5 misses some for a second or two while it exchanges
        segments, without an error; what is lost never appears."""
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
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "OLD_SEARCHES_S", 1.0)
    monkeypatch.setattr(rebuild, "PAGE_ROWS", 100)
    monkeypatch.setattr(rebuild, "MIN_PAGE_ROWS", 100)


def test_pages_give_every_row_once_and_whole(world: World) -> None:
    rows = world.rows(0, 250)
    world.store.upsert(NAME, list(reversed(rows)))
    pages, after = [], ""
    while page := world.shadow.page(world.table, after, 100):
        pages.append(page)
        after = page[-1]["id"]
    records = [record for page in pages for record in page]
    assert [record["id"] for record in records] == [row.id for row in rows]
    for record, row in zip(records, rows, strict=True):
        vector = record.pop("vector")
        np.testing.assert_array_equal(np.asarray(vector, np.float32), row.vector)
        assert record == {field: value for field, value in row._asdict().items() if field != "vector"}
    assert [set(row) for row in world.shadow.page(world.table, "", 3, ("id",))] == [{"id"}] * 3


@contextlib.contextmanager
def users(world: World) -> Iterator[tuple[list[Exception], list[int], dict[str, str]]]:
    """One thread searches, another writes, until the block ends; gives what went wrong, how many searches
    there were, and the newest text of each row that was written."""
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


def test_a_rebuild_keeps_every_row_every_field_and_every_search(world: World) -> None:
    world.writer(world.store).write(NAME, [VersionedRows("first", world.rows(0, 600))])
    # A server lets a search that does not ask for more see rows some moments later.
    assert len(world.store.search(NAME, ENCODER.encode(["first 5"])[0], strong=True, **SCOPE)) == 5
    with users(world) as (faults, searches, newest):
        world.rebuild()
    expected = {row.id: row.text_content for row in world.rows(0, 600)} | newest
    assert not faults, faults[:3]
    assert searches[0] > 5
    assert len(newest) > 20
    world.check(expected)
    assert world.shadow.live(NAME) == f"{world.table}_v2"
    assert not world.shadow.exists(f"{world.table}_v1")


def test_rows_are_embedded_anew_with_another_dimension(world: World) -> None:
    world.writer(world.store, "dummy:16").write(NAME, [VersionedRows("first", world.rows(0, 120))])
    world.rebuild(model="dummy:24")
    assert world.shadow.dim(world.table) == 24
    (row,) = world.store.get(NAME, ["r000007"], strong=True, **SCOPE)
    np.testing.assert_allclose(row.vector, DummyEncoder(24).encode(["first 7"])[0], atol=1e-6)
    with pytest.raises(TransientStoreError, match="--model dummy:24"):
        world.writer(world.store, "dummy:16").write(NAME, [VersionedRows("late", world.rows(0, 1))])
    world.writer(world.store, "dummy:24").write(NAME, [VersionedRows("new", world.rows(0, 1, "new", 24))])
    assert world.texts(["r000000"]) == {"r000000": "new 0"}


def test_named_partitions_are_all_there_afterwards(uri: str, redis_url: str) -> None:
    world = World(uri, redis_url, "named")
    other = [row._replace(project_id="q", id=f"q{row.id}") for row in world.rows(0, 20)]
    world.store.upsert(NAME, [*world.rows(0, 150), *other])
    world.store.delete(NAME, [row.id for row in other], tenant_id="t", project_id="q")
    world.rebuild()
    assert world.store.count(NAME) == 150
    vector = ENCODER.encode(["first 5"])[0]
    assert world.store.search(NAME, vector, limit=1, strong=True, **SCOPE)[0].id == "r000005"
    # A process that knows the partition does not ask for it again.
    assert world.store.search(NAME, vector, tenant_id="t", project_id="q", strong=True) == []
    world.store.upsert(NAME, other)
    assert world.store.count(NAME) == 170
    world.close()


def test_in_place_leaves_rows_and_searches_as_they_were(world: World) -> None:
    world.store.upsert(NAME, world.rows(0, 200))
    world.rebuild(mode="in_place")
    vector = ENCODER.encode(["first 5"])[0]
    assert world.store.search(NAME, vector, limit=1, strong=True, **SCOPE)[0].id == "r000005"
    assert world.store.count(NAME) == 200
    assert world.shadow.live(NAME) == f"{world.table}_v1"
    world.writer(world.store).write(NAME, [VersionedRows("after", world.rows(0, 1))])


def test_a_collection_without_an_alias_is_rebuilt_in_place_only(world: World) -> None:
    world.by_hand(f"{world.prefix}by_hand")
    with pytest.raises(PermanentStoreError, match="in_place"):
        world.shadow.live("by_hand")
    with pytest.raises(PermanentError):
        world.rebuild(collection="absent")


def test_a_page_is_given_soon_after_many_rows(world: World, tmp_path: Path) -> None:
    """The cost of a page must not grow so that a rebuild never ends."""
    world.store.upsert(NAME, world.rows(0, 3000))
    started = time.monotonic()
    assert len(world.shadow.page(world.table, "r002000", 100)) == 100
    assert time.monotonic() - started < 5


def test_what_others_gave_the_next_names_is_kept(world: World) -> None:
    """A collection has the next name, an alias the one after."""
    world.store.upsert(NAME, world.rows(0, 20))
    theirs = [f"{world.table}_v2", f"{world.prefix}theirs"]
    for table in theirs:
        world.by_hand(table)
    world.call(lambda client: client.create_alias(theirs[1], f"{world.table}_v3", timeout=30))
    world.rebuild()
    assert [world.ids(table) for table in theirs] == [[0, 1, 2]] * 2
    assert world.shadow.live(NAME) == f"{world.table}_v4"
    assert not world.shadow.exists(f"{world.table}_v1")
    assert world.store.count(NAME) == 20


def test_the_old_collection_is_kept_where_another_alias_names_it(world: World) -> None:
    world.store.upsert(NAME, world.rows(0, 20))
    old, another = f"{world.table}_v1", f"{world.prefix}another"
    world.call(lambda client: client.create_alias(old, another, timeout=30))
    world.rebuild()
    assert world.shadow.live("another") == old
    assert world.shadow.count(another) == 20


def test_a_first_collection_of_others_is_not_taken_over(uri: str, redis_url: str) -> None:
    world = World(uri, redis_url, ensure=False)
    world.by_hand(f"{world.table}_v1")
    world.store.ensure_collection(NAME, DIM)
    assert world.shadow.live(NAME) == f"{world.table}_v2"
    assert world.ids(f"{world.table}_v1") == [0, 1, 2]
    world.close()


def test_a_first_collection_whose_maker_was_killed_is_used(uri: str, redis_url: str) -> None:
    """Killed before it made the alias."""
    world = World(uri, redis_url)
    world.call(lambda client: client.drop_alias(world.table, timeout=30))
    again = world.open()
    again.ensure_collection(NAME, DIM)
    assert world.shadow.live(NAME) == f"{world.table}_v1"
    again.close()
    world.close()


def test_a_collection_made_by_an_earlier_release_is_rebuilt_and_dropped(uri: str, redis_url: str) -> None:
    """It says nowhere who made it."""
    world = World(uri, redis_url, ensure=False)
    old = f"{world.table}_v4"
    world.shadow._tables.create(old, scalars.SEGMENTS, DIM, "")
    world.call(lambda client: client.create_alias(old, world.table, timeout=30))
    world.store.ensure_collection(NAME, DIM)
    world.store.upsert(NAME, world.rows(0, 20))
    world.rebuild()
    assert world.shadow.live(NAME) == f"{world.table}_v5"
    assert not world.shadow.exists(old)
    assert world.store.count(NAME) == 20
    world.close()


def test_what_a_rebuild_made_is_known_by_its_mark(world: World) -> None:
    target = f"{world.table}_v2"
    assert world.shadow.make(NAME, target, DIM, "mine")
    assert world.shadow.make(NAME, target, DIM, "mine")
    assert not world.shadow.make(NAME, target, DIM, "of another")
    assert world.shadow.mark(target) == "mine"
    assert world.shadow.mark(world.table) is None, "an alias"
    assert not world.shadow.drop(target, "of another")
    assert not world.shadow.drop(world.table, "mine")
    assert world.shadow.exists(target)
    assert world.shadow.drop(target, "mine")
    assert not world.shadow.exists(target)
    assert world.shadow.drop(target, "mine"), "gone already"
