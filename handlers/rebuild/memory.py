"""In-memory `ShadowStore`, for tests of handlers."""

import itertools
from collections.abc import Sequence

import numpy as np

from ..vectors import schema as schemas
from ..vectors.memory import MemoryVectors
from ..vectors.ports import PermanentStoreError, SparseKind, Vector
from .ports import RawRow


class MemoryShadow:
    """`ShadowStore` on a `MemoryVectors`, which has no aliases: this object keeps them."""

    def __init__(self, store: MemoryVectors) -> None:
        self._store = store
        self._live: dict[str, str] = {}
        self._rows = store.copies
        self._dims: dict[str, int] = {}
        self._sparse: dict[str, SparseKind] = {}
        self._marks: dict[str, str] = {}

    def max_read_lag_s(self) -> float:
        return 0.0

    def live_collection(self, name: str) -> str:
        alias = self._store._full(name)
        if alias not in self._store._rows:
            raise PermanentStoreError(f"collection {alias} does not exist")
        collection = self._live.get(alias) or self._first_collection(alias)
        self._rows[collection], self._dims[collection] = self._store._rows[alias], self._store._dims[alias]
        self._sparse[collection] = self._store._sparse.get(alias, "none")
        return collection

    def exists(self, collection: str) -> bool:
        return collection in self._rows or collection in self._store._rows

    def mark(self, collection: str) -> str | None:
        return self._marks.get(collection, "") if collection in self._rows else None

    def dim(self, collection: str) -> int:
        return self._dims[collection]

    def sparse_kind(self, collection: str) -> SparseKind:
        return self._sparse.get(collection, "none")

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        return self._store.supported_sparse(kind)

    def _first_collection(self, alias: str) -> str:
        names = (f"{alias}_v{number}" for number in itertools.count(1))
        collection = self._live[alias] = next(name for name in names if not self.exists(name))
        self._marks[collection] = alias
        return collection

    def create(self, name: str, collection: str, dim: int, mark: str, sparse: SparseKind = "none") -> bool:
        if self.exists(collection) and self.mark(collection) != mark:
            return False
        self._marks[collection] = mark
        self._rows.setdefault(collection, {})
        self._dims.setdefault(collection, dim)
        self._sparse.setdefault(collection, sparse)
        return True

    def page(self, collection: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[RawRow]:
        ids = sorted(id_ for id_ in self._rows[collection] if id_ > after)[:limit]
        return self.fetch(collection, ids)

    def fetch(self, collection: str, ids: Sequence[str]) -> list[RawRow]:
        rows = self._rows[collection]
        return [rows[id_]._asdict() for id_ in ids if id_ in rows]

    def upsert(self, collection: str, rows: Sequence[RawRow]) -> None:
        row_type = schemas.schema_of("").row if "text_content" in rows[0] else schemas.ENTITIES.row
        for row in rows:
            if np.shape(row["vector"]) != (self._dims[collection],):
                raise PermanentStoreError(f"{collection}: vector of shape {np.shape(row['vector'])}")
            self._rows[collection][row["id"]] = row_type(**row)

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        for id_ in ids:
            self._rows[collection].pop(id_, None)

    def count(self, collection: str) -> int:
        return len(self._rows[collection])

    def flush(self, collection: str) -> None:
        """Does nothing: every row counts as flushed."""

    def unindexed_rows(self, collection: str) -> int:
        """Always 0: a search compares with every row."""
        return 0

    def search(self, collection: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        return [
            sorted(((id_, schemas.cosine(vector, row.vector)) for id_, row in self._rows[collection].items()),
                   key=lambda hit: -hit[1])[:limit]
            for vector in vectors
        ]  # fmt: skip

    def switch_alias(self, name: str, collection: str) -> None:
        alias = self._store._full(name)
        self._live[alias] = collection
        self._store._rows[alias], self._store._dims[alias] = self._rows[collection], self._dims[collection]
        self._store._sparse[alias] = self.sparse_kind(collection)

    def drop(self, collection: str, mark: str) -> bool:
        if not self.exists(collection):
            return True
        if self.mark(collection) != mark or collection in self._live.values():
            return False
        for by_collection in (self._rows, self._dims, self._marks):
            by_collection.pop(collection, None)
        return True

    def rebuild_index(self, name: str) -> None:
        """Only checks that the collection exists."""
        self._store.count(name)

    def close(self) -> None:
        """Does nothing; the rows stay."""
