"""`ShadowStore` on Milvus: copies whole rows, switches aliases, rebuilds an index in place."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..sparse_vector import SparseVector
from ..vectors import filters
from ..vectors import schema as schemas
from ..vectors.filters import EVERYTHING, Filter
from ..vectors.milvus.collections import CollectionAdmin, create_if_missing, import_client
from ..vectors.milvus.errors import NoCollection, NotLoaded
from ..vectors.milvus.server_info import CollectionInfo, check_fields
from ..vectors.milvus.store import NO_WEIGHTS
from ..vectors.ports import PermanentStoreError, SparseKind, Vector, VectorStoreError
from .ports import RawRow

if TYPE_CHECKING:
    from ..vectors.milvus.client import MilvusClientHandle

T = TypeVar("T")

# As for searches in the vector store, so that the measured recall is that of users.
SEARCH_EF = 128
STRONG = {"consistency_level": "Strong"}
# A real server took 100 s for an index of 100,000 rows; the caller's lease is longer.
BUILD_TIMEOUT_S = 600.0
# Milvus clears an alias from the caches of its proxies before it alters the alias (rootcoord's
# alterAliasTask). A request in between caches the old collection again, so later writes go there and are
# lost with it. This was seen on 2.3.5 in 1 of 11 rebuilds under load. A second alter after this pause clears
# that entry, and the next request caches the new collection. Answers under way have arrived by then.
STALE_ALIAS_S = 1.0
# A search of another process loads the collection again, which makes the drop of the index fail.
IN_PLACE_TRIES = 5


class MilvusShadow:
    """`ShadowStore` on a Milvus server or Milvus Lite; `named`: every tenant and project has a partition."""

    def __init__(
        self, milvus: "MilvusClientHandle", *, prefix: str, named: bool, sparse_on_lite: bool = False
    ) -> None:
        self._sparse_on_lite = sparse_on_lite
        #: By full name, whose collection never gets another one.
        self._kinds: dict[str, SparseKind] = {}
        self._milvus, self._prefix, self._named = milvus, prefix, named
        self._timeout_s = milvus.timeout_s
        self._admin = CollectionAdmin(milvus, named=named)

    def max_read_lag_s(self) -> float:
        return self._milvus.max_read_lag_s()

    def live_collection(self, name: str) -> str:
        alias = self._full(name)
        description = self._describe(alias)
        collection = str(description["collection_name"])
        if collection == alias:
            raise PermanentStoreError(
                f"{alias} is a collection and not an alias, so no other can replace it: use mode in_place"
            )
        check_fields(alias, schemas.schema_of(name), description)
        return collection

    def exists(self, collection: str) -> bool:
        return self._admin.describe(collection) is not None

    def mark(self, collection: str) -> str | None:
        return self._admin.mark(collection)

    def dim(self, collection: str) -> int:
        return CollectionInfo.of(self._describe(collection)).dim

    def sparse_kind(self, collection: str) -> SparseKind:
        if collection not in self._kinds:
            self._kinds[collection] = CollectionInfo.of(self._describe(collection)).sparse
        return self._kinds[collection]

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        return kind if kind == "none" else self._milvus.server().sparse(kind, on_lite=self._sparse_on_lite)

    def create(self, name: str, collection: str, dim: int, mark: str, sparse: SparseKind = "none") -> bool:
        self._kinds.pop(collection, None)
        if not self._admin.create(collection, schemas.schema_of(name), dim, mark, sparse):
            return False
        if self._named:
            for partition in self._partitions(self._full(name)) - self._partitions(collection):
                self._make_partition(collection, partition)
        self._admin.load(collection)
        return True

    def page(self, collection: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[RawRow]:
        where = filters.after(after)
        try:
            rows = self._query(collection, where, fields, **self._milvus.ordered(limit))
        except VectorStoreError as error:
            # Rows may be longer than on earlier pages: half of them may fit into one answer.
            if limit == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return self.page(collection, after, limit // 2, fields)
        ids = [row["id"] for row in rows]
        if ids != sorted(set(ids)) or (ids and ids[0] <= after):
            raise PermanentStoreError(
                f"{collection}: the server does not give rows in the order of their ids"
            )
        return rows

    def fetch(self, collection: str, ids: Sequence[str]) -> list[RawRow]:
        parts = schemas.chunks(ids, schemas.MAX_REQUEST_ROWS)
        return [row for part in parts for row in self._query(collection, filters.of_ids(part), ("*",))]

    def _query(self, collection: str, where: Filter, fields: Sequence[str], **more: Any) -> list[RawRow]:
        more |= {"timeout": self._timeout_s, **STRONG}
        return self._when_loaded(
            collection,
            lambda client: [
                dict(row)
                for row in client.query(
                    collection, output_fields=list(fields), **self._milvus.filter_arguments(where), **more
                )
            ],
        )

    def upsert(self, collection: str, rows: Sequence[RawRow]) -> None:
        kind = self.sparse_kind(collection)
        for partition, part in self._requests(collection, rows):
            data = [_as_stored(row, kind) for row in part]
            self._milvus.call(
                collection,
                lambda client, data=data, partition=partition: client.upsert(  # type: ignore[misc]
                    collection, data, timeout=self._timeout_s, partition_name=partition
                ),
            )

    def _requests(self, collection: str, rows: Sequence[RawRow]) -> Iterator[tuple[str, Sequence[RawRow]]]:
        for partition, group in self._by_partition(collection, rows):
            for part in schemas.chunks(group, schemas.MAX_REQUEST_ROWS):
                yield partition, part

    def _by_partition(self, collection: str, rows: Sequence[RawRow]) -> Iterator[tuple[str, list[RawRow]]]:
        groups: dict[str, list[RawRow]] = {}
        for row in rows:
            partition = schemas.partition_name(row["tenant_id"], row["project_id"]) if self._named else ""
            groups.setdefault(partition, []).append(row)
        for partition in groups.keys() - {""}:
            create_if_missing(
                lambda partition=partition: partition in self._partitions(collection),  # type: ignore[misc]
                lambda partition=partition: self._make_partition(collection, partition),  # type: ignore[misc]
            )
        yield from groups.items()

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        for part in schemas.chunks(ids, schemas.MAX_REQUEST_ROWS):
            where = filters.of_ids(part)
            self._when_loaded(
                collection,
                lambda client, where=where: client.delete(  # type: ignore[misc]
                    collection, timeout=self._timeout_s, **self._milvus.filter_arguments(where)
                ),
            )

    def count(self, collection: str) -> int:
        return int(self._query(collection, EVERYTHING, ["count(*)"])[0]["count(*)"])

    def flush(self, collection: str) -> None:
        self._milvus.call(collection, lambda client: client.flush(collection, timeout=BUILD_TIMEOUT_S))

    def unindexed_rows(self, collection: str) -> int:
        fields = ["vector", *(["sparse"] if self.sparse_kind(collection) != "none" else [])]
        pending = []
        for field in fields:
            index = self._milvus.call(
                collection,
                lambda client, field=field: client.describe_index(  # type: ignore[misc]
                    collection, field, timeout=self._timeout_s
                ),
            )
            pending.append(int((index or {}).get("pending_index_rows", 0)))
        return max(pending)

    def search(self, collection: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        results = self._when_loaded(
            collection,
            lambda client: client.search(
                collection,
                data=[vector.tolist() for vector in vectors],
                anns_field="vector",
                limit=limit,
                search_params={"metric_type": "COSINE", "params": {"ef": max(SEARCH_EF, limit)}},
                timeout=self._timeout_s,
                **STRONG,
            ),
        )
        return [[(hit["id"], float(hit["distance"])) for hit in hits] for hits in results]

    def switch_alias(self, name: str, collection: str) -> None:
        alias = self._full(name)
        # Both requests together stay within the timeout of one: the caller pauses writes for that long.
        limit_s = (self._timeout_s - STALE_ALIAS_S) / 2

        def alter() -> None:
            self._milvus.call(alias, lambda client: client.alter_alias(collection, alias, timeout=limit_s))

        alter()
        time.sleep(STALE_ALIAS_S)
        alter()

    def drop(self, collection: str, mark: str) -> bool:
        if not self.exists(collection):
            return True
        # Milvus Lite and Milvus 2.3 drop the aliases of a collection with it.
        if self.mark(collection) != mark or self._admin.aliases(collection):
            return False
        self._milvus.call(
            collection, lambda client: client.drop_collection(collection, timeout=self._timeout_s)
        )
        return True

    def rebuild_index(self, name: str) -> None:
        collection = self._full(name)
        self._describe(collection)
        for tries_left in reversed(range(IN_PLACE_TRIES)):
            try:
                self._drop_index(collection)
                break
            except VectorStoreError:
                if not tries_left:
                    raise
        create_if_missing(lambda: self._admin.has_index(collection), lambda: self._build_index(collection))
        self._milvus.call(
            collection, lambda client: client.load_collection(collection, timeout=BUILD_TIMEOUT_S)
        )

    def _drop_index(self, collection: str) -> None:
        self._milvus.call(
            collection, lambda client: client.release_collection(collection, timeout=self._timeout_s)
        )
        if self._admin.has_index(collection):
            self._milvus.call(
                collection, lambda client: client.drop_index(collection, "vector", timeout=self._timeout_s)
            )

    def _build_index(self, collection: str) -> None:
        params = import_client().index_options()
        self._milvus.call(
            collection, lambda client: client.create_index(collection, params, timeout=BUILD_TIMEOUT_S)
        )

    def close(self) -> None:
        self._milvus.close()

    def _partitions(self, collection: str) -> set[str]:
        return set(
            self._milvus.call(
                collection, lambda client: client.list_partitions(collection, timeout=self._timeout_s)
            )
        )

    def _make_partition(self, collection: str, partition: str) -> None:
        self._milvus.call(
            collection, lambda client: client.create_partition(collection, partition, timeout=self._timeout_s)
        )

    def _when_loaded(self, collection: str, request: Callable[[Any], T]) -> T:
        try:
            return self._milvus.call(collection, request)
        except NotLoaded:
            self._admin.load(collection)
        return self._milvus.call(collection, request)

    def _describe(self, collection: str) -> dict[str, Any]:
        described = self._admin.describe(collection)
        if described is None:
            raise NoCollection(f"collection {collection} does not exist")
        return described

    def _full(self, name: str) -> str:
        return schemas.check_collection(self._prefix + name)


def _as_stored(row: RawRow, kind: SparseKind) -> RawRow:
    data = row | {"vector": np.asarray(row["vector"], dtype=np.float32)}
    sparse = data.pop("sparse", None)
    if kind == "model":
        data["sparse"] = (sparse.as_dict() if isinstance(sparse, SparseVector) else sparse) or NO_WEIGHTS
    return data


def open_shadow(
    uri: str,
    *,
    token: str | None,
    prefix: str,
    named: bool,
    timeout_s: float = 30.0,
    sparse_on_lite: bool = False,
) -> MilvusShadow:
    """Open the store at `uri`; it connects at the first call."""
    milvus = import_client().MilvusClientHandle(uri, token, timeout_s)
    return MilvusShadow(milvus, prefix=prefix, named=named, sparse_on_lite=sparse_on_lite)
