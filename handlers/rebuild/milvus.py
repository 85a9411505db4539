"""Rebuilds on a Milvus server: whole rows from one collection to another, aliases, and the index in place."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..vectors import filters
from ..vectors import schema as scalars
from ..vectors.filters import EVERYTHING, Filter
from ..vectors.milvus.collections import CollectionAdmin, milvus_client, once
from ..vectors.milvus.errors import NoCollection, NotLoaded
from ..vectors.milvus.server_info import collection_info_of
from ..vectors.ports import PermanentStoreError, Vector, VectorStoreError
from .ports import Record

if TYPE_CHECKING:
    from ..vectors.milvus.client import MilvusClientHandle

T = TypeVar("T")

# As the vector store's requests.
MAX_REQUEST_ROWS = 500
# As for searches in the vector store: what is measured is what users get.
SEARCH_EF = 128
STRONG = {"consistency_level": "Strong"}
# An index of some 100,000 rows took a real server 100 s; the caller's lease is longer.
BUILD_TIMEOUT_S = 600.0
# While Milvus puts a sealed segment in the place of a growing one, reads miss rows, even if they ask for the
# newest state: on 2.3.5 for up to some 2 s, and then up to 19 rows of 20.
BLIND_S = 5.0
# Milvus has its proxies forget an alias before it alters it (rootcoord's alterAliasTask): who asks in between
# has them remember the old collection, and what is then written goes there and is lost with it (seen on 2.3.5
# in 1 of 11 rebuilds under load). The second time they forget it, the new one is what they learn; an answer
# that was on its way has come by then.
STALE_ALIAS_S = 1.0
# Another process that searches loads the collection again, which makes the drop of its index fail.
IN_PLACE_TRIES = 5


class MilvusShadow:
    """`ShadowStore` on a Milvus server."""

    def __init__(self, link: "MilvusClientHandle", *, prefix: str, named: bool) -> None:
        self._link, self._prefix, self._named = link, prefix, named
        self._timeout_s = link.timeout_s
        self._tables = CollectionAdmin(link, named=named)

    def blind_s(self) -> float:
        """See `ShadowStore.blind_s`."""
        return 0.0 if self._link.server().lite else BLIND_S

    def live(self, name: str) -> str:
        """See `ShadowStore.live`."""
        alias = self._full(name)
        table = str(self._described(alias)["collection_name"])
        if table == alias:
            raise PermanentStoreError(
                f"{alias} is a collection and no alias, so none can take its place: use the mode in_place"
            )
        return table

    def exists(self, table: str) -> bool:
        """See `ShadowStore.exists`."""
        return self._tables.describe(table) is not None

    def mark(self, table: str) -> str | None:
        """See `ShadowStore.mark`."""
        return self._tables.mark(table)

    def dim(self, table: str) -> int:
        """See `ShadowStore.dim`."""
        return collection_info_of(self._described(table)).dim

    def make(self, name: str, table: str, dim: int, mark: str) -> bool:
        """See `ShadowStore.make`."""
        if not self._tables.create(table, scalars.schema_of(name), dim, mark):
            return False
        if self._named:
            for partition in self._partitions(self._full(name)) - self._partitions(table):
                self._make_partition(table, partition)
        self._tables.load(table)
        return True

    def page(self, table: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[Record]:
        """See `ShadowStore.page`. A server gives rows of a limited query in order, Lite only when told."""
        where = filters.behind(after)
        order = {"iterator": "True"} if self._link.server().lite else {}
        try:
            rows = self._query(table, where, fields, limit=limit, **order)
        except VectorStoreError as error:
            # Longer rows than all before: half as many may fit into one answer.
            if limit == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return self.page(table, after, limit // 2, fields)
        ids = [row["id"] for row in rows]
        if ids != sorted(set(ids)) or (ids and ids[0] <= after):
            raise PermanentStoreError(f"{table}: the server does not give rows in the order of their ids")
        return rows

    def fetch(self, table: str, ids: Sequence[str]) -> list[Record]:
        """See `ShadowStore.fetch`."""
        parts = scalars.chunks(ids, MAX_REQUEST_ROWS)
        return [row for part in parts for row in self._query(table, filters.of_ids(part), ("*",))]

    def _query(self, table: str, where: Filter, fields: Sequence[str], **more: Any) -> list[Record]:
        more |= {"timeout": self._timeout_s, **STRONG}
        return self._loaded(
            table,
            lambda client: [
                dict(row)
                for row in client.query(
                    table, output_fields=list(fields), **self._link.arguments(where), **more
                )
            ],
        )

    def put(self, table: str, records: Sequence[Record]) -> None:
        """See `ShadowStore.put`."""
        for partition, part in self._requests(table, records):
            rows = [row | {"vector": np.asarray(row["vector"], dtype=np.float32)} for row in part]
            self._link.attempt(
                table,
                lambda client, rows=rows, partition=partition: client.upsert(  # type: ignore[misc]
                    table, rows, timeout=self._timeout_s, partition_name=partition
                ),
            )

    def _requests(self, table: str, records: Sequence[Record]) -> Iterator[tuple[str, Sequence[Record]]]:
        for partition, group in self._by_partition(table, records):
            for part in scalars.chunks(group, MAX_REQUEST_ROWS):
                yield partition, part

    def _by_partition(self, table: str, records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
        groups: dict[str, list[Record]] = {}
        for row in records:
            named = scalars.partition_name(row["tenant_id"], row["project_id"]) if self._named else ""
            groups.setdefault(named, []).append(row)
        for partition in groups.keys() - {""}:
            once(
                lambda partition=partition: partition in self._partitions(table),  # type: ignore[misc]
                lambda partition=partition: self._make_partition(table, partition),  # type: ignore[misc]
            )
        yield from groups.items()

    def remove(self, table: str, ids: Sequence[str]) -> None:
        """See `ShadowStore.remove`."""
        for part in scalars.chunks(ids, MAX_REQUEST_ROWS):
            where = filters.of_ids(part)
            self._loaded(
                table,
                lambda client, where=where: client.delete(  # type: ignore[misc]
                    table, timeout=self._timeout_s, **self._link.arguments(where)
                ),
            )

    def count(self, table: str) -> int:
        """See `ShadowStore.count`."""
        return int(self._query(table, EVERYTHING, ["count(*)"])[0]["count(*)"])

    def seal(self, table: str) -> None:
        """See `ShadowStore.seal`."""
        self._link.attempt(table, lambda client: client.flush(table, timeout=BUILD_TIMEOUT_S))

    def unindexed(self, table: str) -> int:
        """See `ShadowStore.unindexed`."""
        about = self._link.attempt(
            table, lambda client: client.describe_index(table, "vector", timeout=self._timeout_s)
        )
        return int((about or {}).get("pending_index_rows", 0))

    def nearest(self, table: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        """See `ShadowStore.nearest`."""
        found = self._loaded(
            table,
            lambda client: client.search(
                table,
                data=[vector.tolist() for vector in vectors],
                limit=limit,
                search_params={"metric_type": "COSINE", "params": {"ef": max(SEARCH_EF, limit)}},
                timeout=self._timeout_s,
                **STRONG,
            ),
        )
        return [[(hit["id"], float(hit["distance"])) for hit in hits] for hits in found]

    def switch(self, name: str, table: str) -> None:
        """See `ShadowStore.switch`."""
        alias = self._full(name)
        # Both together take no longer than one request may: the caller keeps writers out so long.
        limit_s = (self._timeout_s - STALE_ALIAS_S) / 2

        def alter() -> None:
            self._link.attempt(alias, lambda client: client.alter_alias(table, alias, timeout=limit_s))

        alter()
        time.sleep(STALE_ALIAS_S)
        alter()

    def drop(self, table: str, mark: str) -> bool:
        """See `ShadowStore.drop`. Milvus Lite and Milvus 2.3 drop a collection's aliases with it."""
        if not self.exists(table):
            return True
        if self.mark(table) != mark or self._tables.aliases(table):
            return False
        self._link.attempt(table, lambda client: client.drop_collection(table, timeout=self._timeout_s))
        return True

    def reindex(self, name: str) -> None:
        """See `ShadowStore.reindex`."""
        table = self._full(name)
        self._described(table)
        for tries_left in reversed(range(IN_PLACE_TRIES)):
            try:
                self._take_out(table)
                break
            except VectorStoreError:
                if not tries_left:
                    raise
        once(lambda: self._tables.has_index(table), lambda: self._build_index(table))
        self._link.attempt(table, lambda client: client.load_collection(table, timeout=BUILD_TIMEOUT_S))

    def _take_out(self, table: str) -> None:
        self._link.attempt(table, lambda client: client.release_collection(table, timeout=self._timeout_s))
        if self._tables.has_index(table):
            self._link.attempt(
                table, lambda client: client.drop_index(table, "vector", timeout=self._timeout_s)
            )

    def _build_index(self, table: str) -> None:
        params = milvus_client().index()
        self._link.attempt(table, lambda client: client.create_index(table, params, timeout=BUILD_TIMEOUT_S))

    def close(self) -> None:
        """See `ShadowStore.close`."""
        self._link.close()

    def _partitions(self, table: str) -> set[str]:
        return set(
            self._link.attempt(table, lambda client: client.list_partitions(table, timeout=self._timeout_s))
        )

    def _make_partition(self, table: str, partition: str) -> None:
        self._link.attempt(
            table, lambda client: client.create_partition(table, partition, timeout=self._timeout_s)
        )

    def _loaded(self, table: str, do: Callable[[Any], T]) -> T:
        try:
            return self._link.attempt(table, do)
        except NotLoaded:
            self._tables.load(table)
        return self._link.attempt(table, do)

    def _described(self, table: str) -> dict[str, Any]:
        described = self._tables.describe(table)
        if described is None:
            raise NoCollection(f"collection {table} does not exist")
        return described

    def _full(self, name: str) -> str:
        return scalars.check_collection(self._prefix + name)


def open_shadow(
    uri: str, *, token: str | None, prefix: str, named: bool, timeout_s: float = 30.0
) -> MilvusShadow:
    """Return what rebuilds the collections at `uri`; connects on the first call, not here."""
    return MilvusShadow(milvus_client().MilvusClientHandle(uri, token, timeout_s), prefix=prefix, named=named)
