"""Vector store on Milvus: a server of version 2.3 or later, or the bundled server around Milvus Lite.

Every filter contains tenant_id and project_id; on Lite, rows that are read by id are filtered here, which is
far cheaper. In addition, tenants are separated by a partition key on tenant_id (from Milvus 2.4 on, see
`server_info`) or by the partitions of the Go service.

The id of a row is the primary key, so a tenant could overwrite the row of another one by sending its id.
Therefore `upsert` reads the owners of all ids first and rejects foreign ones. One race remains: two tenants
send the same new id at the same moment. Milvus Lite serialises calls, but not the pair of read and write. A
Milvus server may answer the read with slightly old data; a strongly consistent read took 200 to 400 ms on
2.3.5.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from ...jobstore.erasures import Scope
from ...sparse_vector import SparseVector
from .. import filters, fusion
from .. import schema as schemas
from ..filters import EVERYTHING, Filter
from ..ports import (
    NO_FILTER,
    AnyHit,
    AnyRow,
    CollectionMissing,
    EntityHit,
    EntityRow,
    Hit,
    PermanentStoreError,
    Row,
    SearchFilter,
    SparseKind,
    StoredRow,
    SuspectStoreError,
    TransientStoreError,
    Vector,
    VectorStore,
    VectorStoreError,
)
from .collections import CollectionAdmin, create_if_missing, import_client
from .errors import NoCollection, NotLoaded
from .server_info import CollectionInfo

__all__ = [
    "EntityHit",
    "EntityRow",
    "Hit",
    "MilvusVectors",
    "PermanentStoreError",
    "Row",
    "TransientStoreError",
    "Vector",
    "VectorStore",
    "VectorStoreError",
    "open_vectors",
]

if TYPE_CHECKING:
    from .client import MilvusClientHandle

T = TypeVar("T")
Partitions = Literal["key", "named"]

# Candidates that HNSW keeps during a search (parameter `ef`); at least the limit of the search.
SEARCH_EF = 128
# 200 rows with the longest texts and 4096 dimensions stay below 64 MiB, the limit of a response.
MAX_READ_ROWS = 200
# What a deletion reads of a row.
SCANNED = ("id", "tenant_id", "project_id", "chapter_id", "entity_id", "created_us")
# Rows of one page of a deletion.
SCAN_ROWS = 1000
# A rebuild of another process may have switched the alias: the kind of sparse vectors is read again then.
KIND_FRESH_S = 5.0
# Replaces a sparse vector without a weight, which servers refuse. In the vocabularies of BERT, RoBERTa and
# XLM-R id 0 is a special token, so no question has it.
NO_WEIGHTS = {0: 1e-6}
# No row has this id, because ids hold no slash.
NO_ROW_ID = "jobworker/probe"


class MilvusVectors:
    """`VectorStore` on Milvus; connects at its first call, in the calling process."""

    def __init__(
        self,
        milvus: "MilvusClientHandle",
        *,
        prefix: str,
        partitions: Partitions,
        sparse_on_lite: bool = False,
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sparse_on_lite, self._mono_s = sparse_on_lite, mono_s
        self._milvus, self._timeout_s = milvus, milvus.timeout_s
        self._prefix, self._named = prefix, partitions == "named"
        self._collections = CollectionAdmin(milvus, named=self._named)
        self._infos: dict[str, CollectionInfo] = {}
        self._mono_described_s: dict[str, float] = {}
        self._ensured: dict[str, tuple[int, SparseKind]] = {}
        self._seen_partitions: set[tuple[str, str]] = set()

    # ---- the port

    def ping(self) -> None:
        self._milvus.ping()

    def ensure_collection(self, name: str, dim: int, sparse: SparseKind = "none") -> None:
        kind = self.supported_sparse(sparse)
        description = self._collections.ensure(self._full(name), schemas.schema_of(name), dim, kind)
        self._infos[name], self._ensured[name] = CollectionInfo.of(description), (dim, sparse)

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        if not rows:
            return
        dim = self._dim(name, *(row.vector for row in rows))
        checked = schemas.check_rows(name, rows, dim, self._info(name).max_bytes)
        self._check_owners(name, checked)
        for partition, group in self._by_partition(name, checked):
            for request in schemas.requests(group):
                self._upsert_request(name, request, partition)

    def check_writable(self, name: str) -> None:
        arguments: dict[str, Any] = {"ids": [NO_ROW_ID], "timeout": self._timeout_s}
        self._call(name, lambda client: client.get(self._full(name), **arguments))
        self._call(name, lambda client: client.delete(self._full(name), **arguments))

    def search(
        self,
        name: str,
        vector: Vector,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        strong: bool = False,
        where: SearchFilter = NO_FILTER,
    ) -> list[AnyHit]:
        schema = schemas.schema_of(name)
        schemas.check_search_fields(name, where)
        rows = filters.of_scope(tenant_id, project_id) & filters.of_search(where)
        data = [schemas.check_vector(vector, self._dim(name, vector)).tolist()]
        ef = max(SEARCH_EF, schemas.check_limit(limit))
        partitions = self._partitions_to_search(name, tenant_id, project_id)
        if partitions == []:
            return []
        hits = self._call(
            name,
            lambda client: client.search(
                self._full(name),
                data=data,
                anns_field="vector",
                limit=limit,
                output_fields=list(schema.hit_fields[2:]),
                search_params={"metric_type": "COSINE", "params": {"ef": ef}},
                partition_names=partitions,
                timeout=self._timeout_s,
                **self._milvus.filter_arguments(rows),
                **consistency(strong),
            ),
        )
        return [schemas.hit_of(schema, hit) for hit in hits[0]]

    def sparse_kind(self, name: str, *, fresh: bool = False) -> SparseKind:
        now = self._mono_s()
        if fresh or now > self._mono_described_s.get(name, -KIND_FRESH_S) + KIND_FRESH_S:
            self._infos[name], self._mono_described_s[name] = self._describe(name), now
        return self._info(name).sparse

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        return kind if kind == "none" else self._milvus.server().sparse(kind, on_lite=self._sparse_on_lite)

    def hybrid_search(
        self,
        name: str,
        vector: Vector,
        lexical: SparseVector | str,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        where: SearchFilter = NO_FILTER,
    ) -> list[AnyHit]:
        schema, kind = schemas.schema_of(name), self._info(name).sparse
        if kind != ("bm25" if isinstance(lexical, str) else "model"):
            raise PermanentStoreError(f"collection {self._full(name)} has no such sparse vectors")
        if not (lexical if isinstance(lexical, str) else len(lexical.ids)):
            return self.search(
                name, vector, tenant_id=tenant_id, project_id=project_id, limit=limit, where=where
            )
        schemas.check_search_fields(name, where)
        rows = filters.of_scope(tenant_id, project_id) & filters.of_search(where)
        dense = schemas.check_vector(vector, self._dim(name, vector))
        most = fusion.candidates(schemas.check_limit(limit))
        partitions = self._partitions_to_search(name, tenant_id, project_id)
        if partitions == []:
            return []
        arguments = import_client().hybrid_arguments(
            dense.tolist(),
            lexical if isinstance(lexical, str) else lexical.as_dict(),
            max(SEARCH_EF, most),
            most,
            self._milvus.filter_arguments(rows),
        )
        hits = self._call(
            name,
            lambda client: client.hybrid_search(
                self._full(name),
                limit=limit,
                output_fields=[*schema.hit_fields[2:], "vector"],
                partition_names=partitions,
                timeout=self._timeout_s,
                **arguments,
            ),
        )
        return [schemas.hit_of(schema, hit, cosine_to=dense) for hit in hits[0]]

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        schema, info = schemas.schema_of(name), self._info(name)
        where = filters.of_scope(tenant_id, project_id)
        wanted = list(dict.fromkeys(ids))
        fields = [field for field in schema.row_fields if field not in info.lacks]
        rows_by_id: dict[str, AnyRow] = {}
        for part in schemas.chunks(wanted, MAX_READ_ROWS):
            by_id = filters.of_ids(part)
            # Lite has a fast path for ids only. With a further condition it scans all rows: 153 ms at 12,660.
            filter_ = by_id if self._milvus.server().lite else by_id & where
            rows = (schemas.row_of(schema, row) for row in self._query(name, filter_, fields, strong=strong))
            rows_by_id.update((row.id, row) for row in rows if schemas.owner(row) == (tenant_id, project_id))
        return [rows_by_id[row_id] for row_id in wanted if row_id in rows_by_id]

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        versions: dict[str, int] = {}
        for part in schemas.chunks(list(dict.fromkeys(ids)), schemas.MAX_REQUEST_ROWS):
            versions |= self._versions(name, filters.of_ids(part), tenant_id, project_id)
        return versions

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        where = filters.of_chapter(chapter_id) & filters.of_scope(tenant_id, project_id)
        return self._versions(name, where, tenant_id, project_id)

    def _versions(self, name: str, where: Filter, tenant_id: str, project_id: str) -> dict[str, int]:
        lacks = self._info(name).lacks
        fields = [one for one in ("id", "tenant_id", "project_id", "version") if one not in lacks]
        rows = self._query(name, where, fields, strong=True)
        own = (row for row in rows if (row["tenant_id"], row["project_id"]) == (tenant_id, project_id))
        return {row["id"]: int(row.get("version", 0)) for row in own}

    def scan(self, name: str, scope: Scope, after: str, limit: int) -> list[StoredRow]:
        lacks = self._info(name).lacks
        if scope.chapter_ids and "chapter_id" in lacks:
            return []
        fields = [field for field in SCANNED if field not in lacks]
        return _first_page(
            lambda where, **more: self._query(name, where, fields, strong=True, **more),
            scope,
            after,
            self._milvus.ordered(limit),
        )

    def page(
        self, name: str, *, tenant_id: str, project_id: str, after: str, limit: int, vectors: bool
    ) -> list[AnyRow]:
        schema, lacks = schemas.schema_of(name), self._info(name).lacks
        left_out = {*lacks, *(() if vectors else ("vector",))}
        fields = [field for field in schema.row_fields if field not in left_out]
        where = filters.after(after) & filters.of_scope(tenant_id, project_id)
        try:
            rows = self._query(name, where, fields, strong=True, **self._milvus.ordered(limit))
        except VectorStoreError as error:
            # Rows may be longer than on earlier pages: half of them may fit into one answer.
            if limit == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            scope = {"tenant_id": tenant_id, "project_id": project_id}
            return self.page(name, **scope, after=after, limit=limit // 2, vectors=vectors)
        return sorted((schemas.row_of(schema, row) for row in rows), key=lambda row: row.id)

    def erase_copy(self, collection: str, scope: Scope, cutoff_us: int) -> int:
        description = self._collections.describe(collection)
        if description is None:
            return 0
        lacks = CollectionInfo.of(description).lacks
        if scope.chapter_ids and "chapter_id" in lacks:
            return 0
        options = {"timeout": self._timeout_s, "output_fields": [one for one in SCANNED if one not in lacks]}

        def query(where: Filter, **more: Any) -> list[dict[str, Any]]:
            more |= options | consistency(True) | self._milvus.filter_arguments(where)
            return self._milvus.call(collection, lambda client: client.query(collection, **more))

        erased, after, order = 0, "", self._milvus.ordered(SCAN_ROWS)
        while page := _first_page(query, scope, after, order):
            old = [row.id for row in page if row.created_us <= cutoff_us]
            for part in schemas.chunks(old, schemas.MAX_REQUEST_ROWS):
                where = self._milvus.filter_arguments(filters.of_ids(part))
                self._milvus.call(
                    collection,
                    lambda client, where=where: client.delete(  # type: ignore[misc]
                        collection, timeout=self._timeout_s, **where
                    ),
                )
            erased += len(old)
            after = page[-1].id
        return erased

    def collections(self) -> list[str]:
        return self._collections.plain_names(self._prefix)

    def max_read_lag_s(self) -> float:
        return self._milvus.max_read_lag_s()

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        where = filters.of_scope(tenant_id, project_id)
        for part in schemas.chunks(list(dict.fromkeys(ids)), schemas.MAX_REQUEST_ROWS):
            both = filters.of_ids(part) & where
            self._call(
                name,
                lambda client, both=both: client.delete(  # type: ignore[misc]
                    self._full(name), timeout=self._timeout_s, **self._milvus.filter_arguments(both)
                ),
            )

    def collection_behind(self, name: str) -> str:
        return str(self._description(name)["collection_name"])

    def count(self, name: str) -> int:
        return int(self._query(name, EVERYTHING, ["count(*)"], strong=True)[0]["count(*)"])

    def close(self) -> None:
        self._milvus.close()

    # ---- reading and writing

    def _query(
        self, name: str, where: Filter, fields: list[str], *, strong: bool = False, **more: Any
    ) -> list[dict[str, Any]]:
        return self._call(
            name,
            lambda client: client.query(
                self._full(name),
                output_fields=fields,
                timeout=self._timeout_s,
                **self._milvus.filter_arguments(where),
                **consistency(strong),
                **more,
            ),
        )

    def _check_owners(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Reject ids of other tenants. The filter is the primary key only, which is a fast read."""
        for part in schemas.chunks(rows, schemas.MAX_REQUEST_ROWS):
            where = filters.of_ids(row.id for row in part)
            stored = self._query(name, where, ["id", "tenant_id", "project_id"])
            owners = {row["id"]: (row["tenant_id"], row["project_id"]) for row in stored}
            schemas.check_owners(name, part, owners)

    def _upsert_request(self, name: str, rows: Sequence[AnyRow], partition: str | None) -> None:
        info = self._info(name)
        try:
            self._upsert_as(info, name, rows, partition)
        except (PermanentStoreError, SuspectStoreError):
            # A rebuild of another process may have given the collection the field `sparse`, or taken it.
            self._infos[name] = self._describe(name)
            if self._infos[name].sparse == info.sparse:
                raise
            self._upsert_as(self._infos[name], name, rows, partition)

    def _upsert_as(
        self, info: CollectionInfo, name: str, rows: Sequence[AnyRow], partition: str | None
    ) -> None:
        data = [_as_stored(row, info) for row in rows]
        self._call(
            name,
            lambda client: client.upsert(
                self._full(name), data, timeout=self._timeout_s, partition_name=partition or ""
            ),
        )

    # ---- named partitions

    def _by_partition(
        self, name: str, rows: Sequence[AnyRow]
    ) -> Iterator[tuple[str | None, Sequence[AnyRow]]]:
        """Group rows by partition and create missing ones; with a partition key, one group without a name."""
        if not self._named:
            yield None, rows
            return
        groups: dict[str, list[AnyRow]] = {}
        for row in rows:
            groups.setdefault(schemas.partition_name(*schemas.owner(row)), []).append(row)
        for partition, group in groups.items():
            create_if_missing(
                lambda partition=partition: self._has_partition(name, partition),  # type: ignore[misc]
                lambda partition=partition: self._create_partition(name, partition),  # type: ignore[misc]
            )
            yield partition, group

    def _partitions_to_search(self, name: str, tenant_id: str, project_id: str) -> list[str] | None:
        """The partitions of a search: None for all, [] if the tenant's partition does not exist yet."""
        if not self._named:
            return None
        partition = schemas.partition_name(tenant_id, project_id)
        return [partition] if self._has_partition(name, partition) else []

    def _has_partition(self, name: str, partition: str) -> bool:
        if (name, partition) in self._seen_partitions:
            return True
        exists = self._call(
            name, lambda client: client.has_partition(self._full(name), partition, timeout=self._timeout_s)
        )
        if exists:
            self._seen_partitions.add((name, partition))
        return bool(exists)

    def _create_partition(self, name: str, partition: str) -> None:
        self._call(
            name, lambda client: client.create_partition(self._full(name), partition, timeout=self._timeout_s)
        )

    # ---- collections

    def _full(self, name: str) -> str:
        return schemas.check_collection(self._prefix + name)

    def _info(self, name: str) -> CollectionInfo:
        if name not in self._infos:
            self._infos[name] = self._describe(name)
        return self._infos[name]

    def _describe(self, name: str) -> CollectionInfo:
        return CollectionInfo.of(self._description(name))

    def _description(self, name: str) -> dict[str, Any]:
        description = self._collections.describe(self._full(name))
        if description is None:
            raise CollectionMissing(f"collection {self._full(name)} does not exist")
        return description

    def _dim(self, name: str, *vectors: Vector) -> int:
        """The dimension of a collection; reads it again if vectors have another one, as after a rebuild."""
        dim = self._info(name).dim
        if any(np.shape(vector) != (dim,) for vector in vectors):
            self._infos[name] = self._describe(name)
        return self._infos[name].dim

    # ---- calls and their errors

    def _call(self, name: str, action: Callable[[Any], T]) -> T:
        """Run one call on a collection. Load or create the collection if necessary, and call again."""
        try:
            return self._milvus.call(name, action)
        except NotLoaded:
            self._collections.load(self._full(name))
        except NoCollection:
            self._forget(name)
            if name not in self._ensured:
                raise
            self.ensure_collection(name, *self._ensured[name])
        return self._milvus.call(name, action)

    def _forget(self, name: str) -> None:
        self._infos.pop(name, None)
        self._seen_partitions = {pair for pair in self._seen_partitions if pair[0] != name}


def _as_stored(row: AnyRow, info: CollectionInfo) -> dict[str, Any]:
    """The row in the form of the client, without fields that the collection lacks."""
    data = row._asdict()
    data["vector"] = np.asarray(row.vector, dtype=np.float32)
    sparse = data.pop("sparse")
    for field in info.lacks:
        data.pop(field, None)
    if info.sparse == "model":
        data["sparse"] = (sparse.as_dict() if sparse else None) or NO_WEIGHTS
    return data


def _first_page(
    query: Callable[..., list[dict[str, Any]]], scope: Scope, after: str, order: dict[str, Any]
) -> list[StoredRow]:
    """The next rows of a scope after an id; a page of ids without a row is passed over."""
    pages: Iterator[list[dict[str, Any]]]
    if scope.ids:
        ids = sorted(id_ for id_ in scope.ids if id_ > after)
        pages = (query(filters.of_ids(part)) for part in schemas.chunks(ids, order["limit"]))
    else:
        pages = iter([query(filters.after(after) & filters.of_erased(scope), **order)])
    for page in pages:
        own = [row for row in page if row["tenant_id"] == scope.tenant_id]
        rows = [schemas.stored_row(row) for row in own if scope.project_id in ("", row["project_id"])]
        if rows:
            return sorted(rows)
    return []


def consistency(strong: bool) -> dict[str, str]:
    """Options of a read; `strong` includes every finished write."""
    return {"consistency_level": "Strong"} if strong else {}


def open_vectors(
    uri: str,
    *,
    token: str | None = None,
    prefix: str = "z_novel_",
    partitions: Partitions = "key",
    timeout_s: float = 30.0,
    sparse_on_lite: bool = False,
) -> VectorStore:
    """The vector store at `uri` (http(s)://host:port); it connects at its first call.

    `timeout_s` is that of each request; `sparse_on_lite`: new collections get sparse vectors on Milvus Lite
    too, where searches by them are slow. Call this in the process that uses the store.
    """
    milvus = import_client().MilvusClientHandle(uri, token, timeout_s)
    return MilvusVectors(milvus, prefix=prefix, partitions=partitions, sparse_on_lite=sparse_on_lite)
