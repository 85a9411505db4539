"""The vector store on Milvus: a server of version 2.3 or later, or our server around Milvus Lite.

Tenants are kept apart by tenant_id and project_id in every filter (on Lite a read by id is sorted out here,
which is far cheaper), and by a partition key on tenant_id (from
Milvus 2.4 on, see milvus_collection) or by the Go service's partitions. The id is the primary key and stands
as it was given, so a tenant could overwrite another's row by sending its id; `upsert` therefore reads who
owns the ids first and refuses. What remains: two tenants that send the same new id within a moment of each
other. Milvus Lite serialises calls but not the pair of them, and a Milvus server answers that read with what
it knew a moment ago (a read that waits for the newest state took 200 to 400 ms on 2.3.5).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from .. import filters
from .. import schema as scalars
from ..filters import EVERYTHING, Filter
from ..ports import (
    AnyHit,
    AnyRow,
    EntityHit,
    EntityRow,
    Hit,
    PermanentStoreError,
    Row,
    TransientStoreError,
    Vector,
    VectorStore,
    VectorStoreError,
)
from .collections import CollectionAdmin, create_if_missing, milvus_client
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

# How many neighbours HNSW keeps while it searches; never less than the limit asked for.
SEARCH_EF = 128
# A Milvus server takes 64 MiB a request; a quarter keeps its memory and the time of one call bounded.
MAX_REQUEST_BYTES = 16 * 1024 * 1024
# Larger batches gained nothing on either server.
MAX_REQUEST_ROWS = 500
# 200 rows with the longest texts and 4096 dimensions stay below 64 MiB in one answer.
MAX_READ_ROWS = 200


class MilvusVectors:
    """VectorStore on a Milvus server; the connection is made by the first call, in the process that calls."""

    def __init__(self, link: "MilvusClientHandle", *, prefix: str, partitions: Partitions) -> None:
        self._link, self._timeout_s = link, link.timeout_s
        self._prefix, self._named = prefix, partitions == "named"
        self._tables = CollectionAdmin(link, named=self._named)
        self._known: dict[str, CollectionInfo] = {}
        self._ensured: dict[str, int] = {}
        self._partitions_seen: set[tuple[str, str]] = set()

    # ---- the port

    def ping(self) -> None:
        """Raise TransientStoreError unless the store answers within a few seconds."""
        self._link.ping()

    def ensure_collection(self, name: str, dim: int) -> None:
        """Make and load the collection; see VectorStore."""
        described = self._tables.ensure(self._full(name), scalars.schema_of(name), dim)
        self._known[name], self._ensured[name] = CollectionInfo.of(described), dim

    def upsert(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Write rows under their ids; see VectorStore."""
        if not rows:
            return
        distinct = scalars.distinct(name, rows, self._dim(name, rows))
        self._refuse_foreign(name, distinct)
        for partition, group in self._by_partition(name, distinct):
            for batch in scalars.batches(group, MAX_REQUEST_ROWS, MAX_REQUEST_BYTES):
                self._upsert_batch(name, batch, partition)

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
        """Return the nearest rows; see VectorStore."""
        schema = scalars.schema_of(name)
        where = filters.of_scope(tenant_id, project_id)
        data = [scalars.check_vector(vector, self._dim(name)).tolist()]
        ef = max(SEARCH_EF, scalars.check_limit(limit))
        partition = self._existing_partition(name, tenant_id, project_id)
        if partition == []:
            return []
        found = self._call(
            name,
            lambda client: client.search(
                self._full(name),
                data=data,
                limit=limit,
                output_fields=list(schema.hit_fields[2:]),
                search_params={"metric_type": "COSINE", "params": {"ef": ef}},
                partition_names=partition,
                timeout=self._timeout_s,
                **self._link.arguments(where),
                **consistency(strong),
            ),
        )
        return [scalars.hit_of(schema, hit) for hit in found[0]]

    def get(
        self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str, strong: bool = False
    ) -> list[AnyRow]:
        """Return rows by id; see VectorStore."""
        schema, known = scalars.schema_of(name), self._know(name)
        where = filters.of_scope(tenant_id, project_id)
        wanted = list(dict.fromkeys(ids))
        fields = [field for field in schema.row_fields if field != "version" or known.takes_version]
        found: dict[str, AnyRow] = {}
        for part in scalars.chunks(wanted, MAX_READ_ROWS):
            by_id = filters.of_ids(part)
            # Lite reads ids alone point by point, and every row for anything more (153 ms at 12,660 rows).
            only = by_id if self._link.server().lite else by_id & where
            rows = (scalars.row_of(schema, row) for row in self._query(name, only, fields, strong=strong))
            found.update((row.id, row) for row in rows if scalars.owner(row) == (tenant_id, project_id))
        return [found[row_id] for row_id in wanted if row_id in found]

    def versions(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> dict[str, int]:
        """Return the versions of rows by id; see VectorStore."""
        found: dict[str, int] = {}
        for part in scalars.chunks(list(dict.fromkeys(ids)), MAX_REQUEST_ROWS):
            found |= self._versions(name, filters.of_ids(part), tenant_id, project_id)
        return found

    def chapter_versions(
        self, name: str, chapter_id: str, *, tenant_id: str, project_id: str
    ) -> dict[str, int]:
        """Return the versions of a chapter's rows by id; see VectorStore."""
        where = filters.of_chapter(chapter_id) & filters.of_scope(tenant_id, project_id)
        return self._versions(name, where, tenant_id, project_id)

    def _versions(self, name: str, where: Filter, tenant_id: str, project_id: str) -> dict[str, int]:
        fields = ["id", "tenant_id", "project_id", *(["version"] if self._know(name).takes_version else [])]
        rows = self._query(name, where, fields, strong=True)
        own = (row for row in rows if (row["tenant_id"], row["project_id"]) == (tenant_id, project_id))
        return {row["id"]: int(row.get("version", 0)) for row in own}

    def delete(self, name: str, ids: Sequence[str], *, tenant_id: str, project_id: str) -> None:
        """Remove rows by id; see VectorStore."""
        where = filters.of_scope(tenant_id, project_id)
        for part in scalars.chunks(list(dict.fromkeys(ids)), MAX_REQUEST_ROWS):
            both = filters.of_ids(part) & where
            self._call(
                name,
                lambda client, both=both: client.delete(  # type: ignore[misc]
                    self._full(name), timeout=self._timeout_s, **self._link.arguments(both)
                ),
            )

    def count(self, name: str) -> int:
        """Return the number of rows of all tenants; see VectorStore."""
        return int(self._query(name, EVERYTHING, ["count(*)"], strong=True)[0]["count(*)"])

    def close(self) -> None:
        """Give the connection back; the next call would make a new one."""
        self._link.close()

    # ---- reading and writing

    def _query(
        self, name: str, where: Filter, fields: list[str], *, strong: bool = False
    ) -> list[dict[str, Any]]:
        return self._call(
            name,
            lambda client: client.query(
                self._full(name),
                output_fields=fields,
                timeout=self._timeout_s,
                **self._link.arguments(where),
                **consistency(strong),
            ),
        )

    def _refuse_foreign(self, name: str, rows: Sequence[AnyRow]) -> None:
        """Refuse ids of others before anything is written; by primary key alone, which is a point read."""
        for part in scalars.chunks(rows, MAX_REQUEST_ROWS):
            where = filters.of_ids(row.id for row in part)
            found = self._query(name, where, ["id", "tenant_id", "project_id"])
            owners = {row["id"]: (row["tenant_id"], row["project_id"]) for row in found}
            scalars.refuse_foreign(name, part, owners)

    def _upsert_batch(self, name: str, batch: Sequence[AnyRow], partition: str | None) -> None:
        drop_version = not self._know(name).takes_version
        data = [row._asdict() for row in batch]
        for row in data:
            row["vector"] = np.asarray(row["vector"], dtype=np.float32)
            if drop_version:
                del row["version"]
        self._call(
            name,
            lambda client: client.upsert(
                self._full(name), data, timeout=self._timeout_s, partition_name=partition or ""
            ),
        )

    # ---- partitions by name

    def _by_partition(
        self, name: str, rows: Sequence[AnyRow]
    ) -> Iterator[tuple[str | None, Sequence[AnyRow]]]:
        """Group rows by their partition, made if missing; one group without a name for a partition key."""
        if not self._named:
            yield None, rows
            return
        groups: dict[str, list[AnyRow]] = {}
        for row in rows:
            groups.setdefault(scalars.partition_name(*scalars.owner(row)), []).append(row)
        for partition, group in groups.items():
            create_if_missing(
                lambda partition=partition: self._has_partition(name, partition),  # type: ignore[misc]
                lambda partition=partition: self._create_partition(name, partition),  # type: ignore[misc]
            )
            yield partition, group

    def _existing_partition(self, name: str, tenant_id: str, project_id: str) -> list[str] | None:
        """Return what to search: None for everything, [] where the tenant's partition is not there yet."""
        if not self._named:
            return None
        partition = scalars.partition_name(tenant_id, project_id)
        return [partition] if self._has_partition(name, partition) else []

    def _has_partition(self, name: str, partition: str) -> bool:
        if (name, partition) in self._partitions_seen:
            return True
        there = self._call(
            name, lambda client: client.has_partition(self._full(name), partition, timeout=self._timeout_s)
        )
        if there:
            self._partitions_seen.add((name, partition))
        return bool(there)

    def _create_partition(self, name: str, partition: str) -> None:
        self._call(
            name, lambda client: client.create_partition(self._full(name), partition, timeout=self._timeout_s)
        )

    # ---- collections

    def _full(self, name: str) -> str:
        return scalars.check_collection(self._prefix + name)

    def _know(self, name: str) -> CollectionInfo:
        if name not in self._known:
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> CollectionInfo:
        described = self._tables.describe(self._full(name))
        if described is None:
            raise PermanentStoreError(f"collection {self._full(name)} does not exist")
        return CollectionInfo.of(described)

    def _dim(self, name: str, rows: Sequence[AnyRow] = ()) -> int:
        """Return the dimension of a collection; asks again where rows have another, as after a rebuild."""
        dim = self._know(name).dim
        if any(np.shape(row.vector) != (dim,) for row in rows):
            self._known[name] = self._look(name)
        return self._known[name].dim

    # ---- calls and their errors

    def _call(self, name: str, do: Callable[[Any], T]) -> T:
        """Run one call on a collection; mend one that is not loaded or was dropped, and try once more."""
        try:
            return self._link.attempt(name, do)
        except NotLoaded:
            self._tables.load(self._full(name))
        except NoCollection:
            self._forget(name)
            if name not in self._ensured:
                raise
            self.ensure_collection(name, self._ensured[name])
        return self._link.attempt(name, do)

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._partitions_seen = {seen for seen in self._partitions_seen if seen[0] != name}


def consistency(strong: bool) -> dict[str, str]:
    """Return the option that makes a read wait for every finished write."""
    return {"consistency_level": "Strong"} if strong else {}


def open_vectors(
    uri: str,
    *,
    token: str | None = None,
    prefix: str = "z_novel_",
    partitions: Partitions = "key",
    timeout_s: float = 30.0,
) -> VectorStore:
    """Return the vector store at `uri` (http(s)://host:port); connects on the first call, not here.

    `timeout_s` bounds each request to the server. Call it in the process that will use the store.
    """
    link = milvus_client().MilvusClientHandle(uri, token, timeout_s)
    return MilvusVectors(link, prefix=prefix, partitions=partitions)
