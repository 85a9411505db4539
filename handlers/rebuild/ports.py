"""Port to the vector store for a rebuild: a second collection beside the live one, and the alias switch."""

from collections.abc import Sequence
from typing import Any, Protocol

from ..vectors.ports import SparseKind, Vector

#: A whole row by field name, as the store gives it, with the fields that this program does not know.
RawRow = dict[str, Any]


class ShadowStore(Protocol):
    """Collections as a rebuild sees them.

    `name` is a plain name (`story_segments`), `collection` a full name on the server.

    `mark` identifies the program and the rebuild that created a collection. The request that creates the
    collection sets it, so a collection of the same name made by another program never has it. It is "" for a
    collection without one.

    Every method raises VectorStoreError. Reads and counts see every finished write, except as
    `max_read_lag_s` says.
    """

    def max_read_lag_s(self) -> float:
        """For how many seconds reads and counts may miss existing rows; 0.0 if they never do."""

    def live_collection(self, name: str) -> str:
        """The collection behind the alias. Raises PermanentStoreError if the name is a collection, or if
        nothing has this name."""

    def exists(self, collection: str) -> bool:
        """Whether there is a collection or an alias of this name."""

    def mark(self, collection: str) -> str | None:
        """The mark of a collection; None if there is none of this name, or the name is an alias."""

    def dim(self, collection: str) -> int:
        """The dimension of its vectors."""

    def sparse_kind(self, collection: str) -> SparseKind:
        """Where the sparse vectors of a collection come from."""

    def supported_sparse(self, kind: SparseKind) -> SparseKind:
        """The kind, or `none` where the store lacks it or a search by it is slow."""

    def create(self, name: str, collection: str, dim: int, mark: str, sparse: SparseKind = "none") -> bool:
        """Create a loaded collection with the schema and partitions of the live one; repeatable.

        False, without a change, if the name is an alias or a collection with another mark.
        """

    def page(self, collection: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[RawRow]:
        """The next rows after the id `after`, in the order of ids.

        It may return fewer than `limit`; it returns none only at the end.
        """

    def fetch(self, collection: str, ids: Sequence[str]) -> list[RawRow]:
        """The rows with these ids; ids without a row are left out."""

    def upsert(self, collection: str, rows: Sequence[RawRow]) -> None:
        """Write rows under their ids, without the field `sparse` where the collection does not take it."""

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Delete rows by id, of any tenant."""

    def count(self, collection: str) -> int:
        """The number of rows."""

    def flush(self, collection: str) -> None:
        """Write rows that are only in memory to segments, so that the vector index can include them."""

    def unindexed_rows(self, collection: str) -> int:
        """How many flushed rows are not in the index yet."""

    def search(self, collection: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        """For each vector, ids and cosines of the nearest rows of all tenants."""

    def switch_alias(self, name: str, collection: str) -> None:
        """Point the alias at this collection; no search fails meanwhile."""

    def drop(self, collection: str, mark: str) -> bool:
        """Drop a collection; True if it does not exist.

        False, without a change, if it has another mark or an alias names it.
        """

    def rebuild_index(self, name: str) -> None:
        """Release the live collection, drop its index, create it again, load the collection."""

    def close(self) -> None:
        """Close the connection."""
