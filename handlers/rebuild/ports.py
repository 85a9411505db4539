"""The port by which a rebuild fills a second collection beside the live one and puts it in its place."""

from collections.abc import Sequence
from typing import Any, Protocol

from ..vectors.ports import Vector

#: A whole row as the store gives it: every field by name, with those that this program does not know.
Record = dict[str, Any]


class ShadowStore(Protocol):
    """`name` is a plain name (`story_segments`), `table` a collection as the server calls it.

    `mark` identifies who made a collection. The request that creates the collection sets it, so that a
    collection of the same name made by another program never has it. It is "" for a collection without one.

    Every method raises VectorStoreError. Reads of rows and counts see every finished write, except as
    `blind_s` says.
    """

    def blind_s(self) -> float:
        """For how many seconds reads and counts may miss rows that are there; 0.0 where they never do."""

    def live(self, name: str) -> str:
        """The collection behind the alias. Raises PermanentStoreError if the name is a collection, or
        nothing."""

    def exists(self, table: str) -> bool:
        """Whether there is a collection or an alias of this name."""

    def mark(self, table: str) -> str | None:
        """The mark of a collection; None where there is none of this name, or the name is an alias."""

    def dim(self, table: str) -> int:
        """The dimension of its vectors."""

    def make(self, name: str, table: str, dim: int, mark: str) -> bool:
        """Make a collection like the live one, partitions included, ready for searches; again: no change.

        False, without a change, where the name is an alias or a collection with another mark.
        """

    def page(self, table: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[Record]:
        """The next rows behind the id `after` in the order of their ids; fewer than `limit` may be given,
        none only at the end."""

    def fetch(self, table: str, ids: Sequence[str]) -> list[Record]:
        """Those rows whose id is among `ids`."""

    def put(self, table: str, records: Sequence[Record]) -> None:
        """Write rows under their ids."""

    def remove(self, table: str, ids: Sequence[str]) -> None:
        """Remove rows by id, of any tenant."""

    def count(self, table: str) -> int:
        """How many rows there are."""

    def seal(self, table: str) -> None:
        """Have rows that are in memory only written out, where the index of the vectors can take them."""

    def unindexed(self, table: str) -> int:
        """How many of the rows written out wait for the index."""

    def nearest(self, table: str, vectors: Sequence[Vector], limit: int) -> list[list[tuple[str, float]]]:
        """For each vector the ids and scores (cosines) of the nearest rows of all tenants."""

    def switch(self, name: str, table: str) -> None:
        """Point the alias at this collection; no search in between fails."""

    def drop(self, table: str, mark: str) -> bool:
        """Remove a collection; none is no error.

        False, without a change, where it has another mark or an alias names it.
        """

    def reindex(self, name: str) -> None:
        """Release the live collection, drop its index, create it again, load."""

    def close(self) -> None:
        """Give the connection back."""
