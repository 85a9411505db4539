"""Rebuilds of the vector store in memory, for tests of handlers."""

import itertools
from collections.abc import Sequence

import numpy as np

from ..vectors import schema as scalars
from ..vectors.memory import MemoryVectors, cosine
from ..vectors.ports import AnyRow, PermanentStoreError, Vector
from .ports import Record


class MemoryShadow:
    """`ShadowStore` on a `MemoryVectors`; what it knows of aliases is this object's."""

    def __init__(self, store: MemoryVectors) -> None:
        self._store = store
        self._live: dict[str, str] = {}
        self._rows: dict[str, dict[str, AnyRow]] = {}
        self._dims: dict[str, int] = {}
        self._marks: dict[str, str] = {}

    def blind_s(self) -> float:
        """See `ShadowStore.blind_s`."""
        return 0.0

    def live(self, name: str) -> str:
        """See `ShadowStore.live`."""
        alias = self._store._full(name)
        if alias not in self._store._rows:
            raise PermanentStoreError(f"collection {alias} does not exist")
        table = self._live.get(alias) or self._first(alias)
        self._rows[table], self._dims[table] = self._store._rows[alias], self._store._dims[alias]
        return table

    def exists(self, table: str) -> bool:
        """See `ShadowStore.exists`."""
        return table in self._rows or table in self._store._rows

    def mark(self, table: str) -> str | None:
        """See `ShadowStore.mark`."""
        return self._marks.get(table, "") if table in self._rows else None

    def dim(self, table: str) -> int:
        """See `ShadowStore.dim`."""
        return self._dims[table]

    def _first(self, alias: str) -> str:
        tables = (f"{alias}_v{number}" for number in itertools.count(1))
        table = self._live[alias] = next(table for table in tables if not self.exists(table))
        self._marks[table] = alias
        return table

    def make(self, name: str, table: str, dim: int, mark: str) -> bool:
        """See `ShadowStore.make`."""
        if self.exists(table) and self.mark(table) != mark:
            return False
        self._marks[table] = mark
        self._rows.setdefault(table, {})
        self._dims.setdefault(table, dim)
        return True

    def page(self, table: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[Record]:
        """See `ShadowStore.page`; every field is given, whatever is asked."""
        ids = sorted(id_ for id_ in self._rows[table] if id_ > after)[:limit]
        return self.fetch(table, ids)

    def fetch(self, table: str, ids: Sequence[str]) -> list[Record]:
        """See `ShadowStore.fetch`."""
        rows = self._rows[table]
        return [rows[id_]._asdict() for id_ in ids if id_ in rows]

    def put(self, table: str, records: Sequence[Record]) -> None:
        """See `ShadowStore.put`."""
        row = scalars.schema_of("").row if "text_content" in records[0] else scalars.ENTITIES.row
        for record in records:
            if np.shape(record["vector"]) != (self._dims[table],):
                raise PermanentStoreError(f"{table}: vector of shape {np.shape(record['vector'])}")
            self._rows[table][record["id"]] = row(**record)

    def remove(self, table: str, ids: Sequence[str]) -> None:
        """See `ShadowStore.remove`."""
        for id_ in ids:
            self._rows[table].pop(id_, None)

    def count(self, table: str) -> int:
        """See `ShadowStore.count`."""
        return len(self._rows[table])

    def seal(self, table: str) -> None:
        """Nothing is elsewhere."""

    def unindexed(self, table: str) -> int:
        """There is no index."""
        return 0

    def nearest(self, table: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        """See `ShadowStore.nearest`."""
        return [
            sorted(((id_, cosine(vector, row.vector)) for id_, row in self._rows[table].items()),
                   key=lambda hit: -hit[1])[:limit]
            for vector in vectors
        ]  # fmt: skip

    def switch(self, name: str, table: str) -> None:
        """See `ShadowStore.switch`."""
        alias = self._store._full(name)
        self._live[alias] = table
        self._store._rows[alias], self._store._dims[alias] = self._rows[table], self._dims[table]

    def drop(self, table: str, mark: str) -> bool:
        """See `ShadowStore.drop`."""
        if not self.exists(table):
            return True
        if self.mark(table) != mark or table in self._live.values():
            return False
        for of in (self._rows, self._dims, self._marks):
            of.pop(table, None)
        return True

    def reindex(self, name: str) -> None:
        """There is no index."""
        self._store.count(name)

    def close(self) -> None:
        """Keeps the rows."""
