"""The vector store in memory, for tests of handlers: same checks and same answers, no server."""

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from . import filters
from . import schema as scalars
from .ports import AnyHit, AnyRow, PermanentStoreError, Vector


class MemoryVectors:
    """VectorStore that keeps its rows in this process; usable from several threads."""

    def __init__(self, *, prefix: str = "z_novel_", partitions: Literal["key", "named"] = "key") -> None:
        self._prefix, self._named = prefix, partitions == "named"
        self._lock = threading.Lock()
        self._dims: dict[str, int] = {}
        self._rows: dict[str, dict[str, AnyRow]] = {}

    def ping(self) -> None:
        """Always answers."""

    def ensure_collection(self, name: str, dim: int) -> None:
        """Make the collection; see VectorStore."""
        with self._lock:
            has = self._dims.setdefault(self._full(name), dim)
            self._rows.setdefault(self._full(name), {})
        if has != dim:
            raise PermanentStoreError(
                f"collection {self._full(name)} holds vectors of {has} dimensions, the model makes {dim}"
            )

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Write rows under their ids; see VectorStore."""
        if not rows:
            return
        distinct = scalars.distinct(name, rows, self._dim(name))
        with self._lock:
            kept = self._rows[self._full(name)]
            scalars.refuse_foreign(name, distinct, {row.id: scalars.owner(row) for row in kept.values()})
            for row in distinct:
                self._check_partition(*scalars.owner(row))
            kept.update(
                (row.id, row._replace(vector=np.array(row.vector, dtype=np.float32))) for row in distinct
            )

    def search(
        self,
        name: str,
        vector: Vector,
        *,
        tenant_id: str,
        project_id: str,
        limit: int = 5,
        strong: bool = False,
    ) -> list[AnyHit]:
        """Return the nearest rows, by comparing with every one; see VectorStore."""
        schema = scalars.schema_of(name)
        asked = scalars.check_vector(vector, self._dim(name))
        scored = [(cosine(asked, row.vector), row) for row in self._of(name, tenant_id, project_id)]
        scored.sort(key=lambda pair: -pair[0])
        return [
            schema.hit(row.id, score, *(getattr(row, field) for field in schema.hit_fields[2:]))
            for score, row in scored[: scalars.check_limit(limit)]
        ]

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        """Return rows by id; see VectorStore."""
        wanted = [scalars.check_id("id", row_id) for row_id in dict.fromkeys(ids)]
        own = {row.id: row for row in self._of(name, tenant_id, project_id)}
        return [own[row_id] for row_id in wanted if row_id in own]

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        """Return the versions of rows by id; see VectorStore."""
        return {
            row.id: row.version for row in self.get(name, ids, tenant_id=tenant_id, project_id=project_id)
        }

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        """Return the versions of a chapter's rows by id; see VectorStore."""
        scalars.check_id("chapter_id", chapter_id)
        rows = self._of(name, tenant_id, project_id)
        return {row.id: row.version for row in rows if getattr(row, "chapter_id", None) == chapter_id}

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        """Remove rows by id; see VectorStore."""
        gone = self.get(name, ids, tenant_id=tenant_id, project_id=project_id)
        with self._lock:
            for row in gone:
                self._rows[self._full(name)].pop(row.id, None)

    def count(self, name: str) -> int:
        """Return the number of rows of all tenants; see VectorStore."""
        self._dim(name)
        return len(self._rows[self._full(name)])

    def close(self) -> None:
        """Keeps the rows: a store that is opened again has them, too."""

    def _full(self, name: str) -> str:
        return scalars.check_collection(self._prefix + name)

    def _dim(self, name: str) -> int:
        try:
            return self._dims[self._full(name)]
        except KeyError:
            raise PermanentStoreError(f"collection {self._full(name)} does not exist") from None

    def _check_partition(self, tenant_id: str, project_id: str) -> None:
        if self._named:
            scalars.partition_name(tenant_id, project_id)

    def _of(self, name: str, tenant_id: str, project_id: str) -> list[AnyRow]:
        filters.of_scope(tenant_id, project_id)
        self._check_partition(tenant_id, project_id)
        self._dim(name)
        with self._lock:
            rows = list(self._rows[self._full(name)].values())
        return [row for row in rows if scalars.owner(row) == (tenant_id, project_id)]


def cosine(left: Vector, right: Vector) -> float:
    """Return the cosine of two vectors of one shape, 0 where one of them is zero."""
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.dot(left, right)) / lengths if lengths else 0.0
