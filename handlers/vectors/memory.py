"""Vector store in memory for tests: the checks and results of a Milvus store, without a server."""

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..jobstore.erasures import Scope
from ..sparse_vector import NOTHING, SparseVector
from . import filters, fusion
from . import schema as schemas
from .ports import (
    NO_FILTER,
    AnyHit,
    AnyRow,
    CollectionMissing,
    PermanentStoreError,
    Row,
    SearchFilter,
    SparseKind,
    StoredRow,
    Vector,
)


class MemoryVectors:
    """Vector store whose rows live in this process; thread-safe."""

    def __init__(self, *, prefix: str = "z_novel_", partitions: Literal["key", "named"] = "key") -> None:
        self._prefix, self._named = prefix, partitions == "named"
        self._lock = threading.Lock()
        self._dims: dict[str, int] = {}
        self._sparse: dict[str, SparseKind] = {}
        self._rows: dict[str, dict[str, AnyRow]] = {}
        #: Rows of the collections of rebuilds, by full name.
        self.copies: dict[str, dict[str, AnyRow]] = {}

    def ping(self) -> None:
        """Never fails."""

    def ensure_collection(self, name: str, dim: int, sparse: SparseKind = "none") -> None:
        with self._lock:
            self._sparse.setdefault(self._full(name), self.supported_sparse(sparse))
            actual_dim = self._dims.setdefault(self._full(name), dim)
            self._rows.setdefault(self._full(name), {})
        if actual_dim != dim:
            raise PermanentStoreError(
                f"collection {self._full(name)} holds vectors of {actual_dim} dimensions, "
                f"the model makes {dim}"
            )

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        if not rows:
            return
        checked = schemas.check_rows(name, rows, self._dim(name))
        with self._lock:
            rows_by_id = self._rows[self._full(name)]
            schemas.check_owners(name, checked, {row.id: schemas.owner(row) for row in rows_by_id.values()})
            for row in checked:
                self._check_partition(*schemas.owner(row))
            rows_by_id.update(
                (row.id, row._replace(vector=np.array(row.vector, dtype=np.float32))) for row in checked
            )

    def check_writable(self, name: str) -> None:
        self._dim(name)

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
        schemas.check_search_fields(name, where)
        filters.of_search(where)
        schema = schemas.schema_of(name)
        query = schemas.check_vector(vector, self._dim(name))
        rows = self._rows_of(name, tenant_id, project_id)
        scored = [(schemas.cosine(query, row.vector), row) for row in rows if is_within(row, where)]
        scored.sort(key=lambda pair: -pair[0])
        return [
            schema.hit(row.id, score, *(getattr(row, field) for field in schema.hit_fields[2:]))
            for score, row in scored[: schemas.check_limit(limit)]
        ]

    def sparse_kind(self, name: str, *, fresh: bool = False) -> SparseKind:
        self._dim(name)
        return self._sparse.get(self._full(name), "none")

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        # It has no BM25.
        return kind if kind == "model" else "none"

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
        if self.sparse_kind(name) != "model" or isinstance(lexical, str):
            raise PermanentStoreError(f"collection {self._full(name)} has no such sparse vectors")
        dense = self.search(
            name, vector, tenant_id=tenant_id, project_id=project_id, limit=16384, where=where
        )
        asked = lexical.as_dict()
        rows = [row for row in self._rows_of(name, tenant_id, project_id) if is_within(row, where)]
        scores = {row.id: _product(asked, row.sparse or NOTHING) for row in rows}
        named = sorted((id_ for id_, score in scores.items() if score > 0), key=lambda id_: -scores[id_])
        most = fusion.candidates(schemas.check_limit(limit))
        hits = {hit.id: hit for hit in dense}
        rankings = ([hit.id for hit in dense[:most]], named[:most])
        return [hits[id_] for id_ in fusion.fuse(rankings, limit)]

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        wanted = [schemas.check_id("id", row_id) for row_id in dict.fromkeys(ids)]
        own = {row.id: row._replace(sparse=None) for row in self._rows_of(name, tenant_id, project_id)}
        return [own[row_id] for row_id in wanted if row_id in own]

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        return {
            row.id: row.version for row in self.get(name, ids, tenant_id=tenant_id, project_id=project_id)
        }

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        schemas.check_id("chapter_id", chapter_id)
        rows = self._rows_of(name, tenant_id, project_id)
        return {row.id: row.version for row in rows if getattr(row, "chapter_id", None) == chapter_id}

    def scan(self, name: str, scope: Scope, after: str, limit: int) -> list[StoredRow]:
        self._dim(name)
        with self._lock:
            rows = sorted(self._rows[self._full(name)].values(), key=lambda row: row.id)
        found = [schemas.stored_row(row._asdict()) for row in rows if row.id > after and _is_in(row, scope)]
        return found[:limit]

    def page(
        self, name: str, *, tenant_id: str, project_id: str, after: str, limit: int, vectors: bool
    ) -> list[AnyRow]:
        rows = sorted(self._rows_of(name, tenant_id, project_id), key=lambda row: row.id)
        found = [row for row in rows if row.id > after][:limit]
        return found if vectors else [row._replace(vector=schemas.NO_VECTOR) for row in found]

    def erase_copy(self, collection: str, scope: Scope, cutoff_us: int) -> int:
        rows = self.copies.get(collection, {})
        with self._lock:
            old = [row.id for row in rows.values() if _is_in(row, scope) and row.created_us <= cutoff_us]
            for id_ in old:
                del rows[id_]
        return len(old)

    def collections(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._rows if name.startswith(self._prefix)]

    def max_read_lag_s(self) -> float:
        return 0.0

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        deleted = self.get(name, ids, tenant_id=tenant_id, project_id=project_id)
        with self._lock:
            for row in deleted:
                self._rows[self._full(name)].pop(row.id, None)

    def collection_behind(self, name: str) -> str:
        self._dim(name)
        return self._full(name)

    def count(self, name: str) -> int:
        self._dim(name)
        return len(self._rows[self._full(name)])

    def close(self) -> None:
        """Does nothing: the rows stay available."""

    def _full(self, name: str) -> str:
        return schemas.check_collection(self._prefix + name)

    def _dim(self, name: str) -> int:
        try:
            return self._dims[self._full(name)]
        except KeyError:
            raise CollectionMissing(f"collection {self._full(name)} does not exist") from None

    def _check_partition(self, tenant_id: str, project_id: str) -> None:
        if self._named:
            schemas.partition_name(tenant_id, project_id)

    def _rows_of(self, name: str, tenant_id: str, project_id: str) -> list[AnyRow]:
        filters.of_scope(tenant_id, project_id)
        self._check_partition(tenant_id, project_id)
        self._dim(name)
        with self._lock:
            rows = list(self._rows[self._full(name)].values())
        return [row for row in rows if schemas.owner(row) == (tenant_id, project_id)]


def is_within(row: AnyRow, where: SearchFilter) -> bool:
    """Whether a filter permits a row."""
    if not isinstance(row, Row):
        return where == NO_FILTER
    return (
        (not where.chapter_ids or row.chapter_id in where.chapter_ids)
        and (not where.segment_types or row.segment_type in where.segment_types)
        and (where.story_time_from is None or row.story_time >= where.story_time_from)
        and (where.story_time_to is None or row.story_time <= where.story_time_to)
    )


def _is_in(row: AnyRow, scope: Scope) -> bool:
    return (
        row.tenant_id == scope.tenant_id
        and scope.project_id in ("", row.project_id)
        and (not scope.chapter_ids or getattr(row, "chapter_id", "") in scope.chapter_ids)
        and (not scope.ids or row.id in scope.ids)
    )


def _product(asked: dict[int, float], sparse: SparseVector) -> float:
    return sum(asked.get(id_, 0.0) * weight for id_, weight in sparse.as_dict().items())
