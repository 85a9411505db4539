"""Collection administration on a Milvus server: create, load, describe, resolve aliases."""

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import schema as scalars
from ..ports import TransientStoreError, VectorStoreError
from .errors import NoCollection
from .server_info import check_usable, mark_of

if TYPE_CHECKING:
    from .client import MilvusClientHandle


log = logging.getLogger("jobworker.vectors")


def milvus_client() -> Any:
    """Import the side that talks to pymilvus only where it is used: that costs 0.7 s and 130 MB."""
    from . import client as milvus_client

    return milvus_client


def create_if_missing(done: Callable[[], bool], do: Callable[[], None]) -> None:
    """Do a step unless it is done; an error is none where another process did the step meanwhile."""
    if done():
        return
    try:
        do()
    except VectorStoreError:
        if not done():
            raise


class CollectionAdmin:
    """Every method raises VectorStoreError; names are full ones, of collections or aliases."""

    def __init__(self, link: "MilvusClientHandle", *, named: bool) -> None:
        self._link, self._timeout_s, self._named = link, link.timeout_s, named

    def ensure(self, alias: str, schema: scalars.Schema, dim: int) -> dict[str, Any]:
        """Make, check and load a collection and its alias; returns the server's description."""
        described = self.describe(alias)
        if described is None:
            self._create(alias, schema, dim)
            described = self.describe(alias)
        if described is None:
            raise TransientStoreError(f"collection {alias} was made but is not there yet")
        check_usable(alias, described, dim, named=self._named, server=self._link.server())
        create_if_missing(lambda: self.has_index(alias), lambda: self.create_index(alias))
        self.load(alias)
        return described

    def describe(self, name: str) -> dict[str, Any] | None:
        """Return the server's description of a collection or alias, None where there is none."""
        try:
            described: dict[str, Any] = self._link.attempt(
                name, lambda client: client.describe_collection(name, timeout=self._timeout_s)
            )
        except NoCollection:
            return None
        return described

    def _create(self, alias: str, schema: scalars.Schema, dim: int) -> None:
        """Make collection, index and alias, each step only if it is missing: many workers start at once."""
        target = next(
            table
            for table in (f"{alias}_v{number}" for number in itertools.count(1))
            if self.create(table, schema, dim, f"made by jobworker for {alias}")
        )
        create_if_missing(
            lambda: self.describe(alias) is not None,
            lambda: self._run(
                alias, lambda client: client.create_alias(target, alias, timeout=self._timeout_s)
            ),
        )

    def create(self, target: str, schema: scalars.Schema, dim: int, mark: str) -> bool:
        """Make a collection and its index unless they exist; False where the name is taken.

        Raises TransientStoreError where another program took the name at the same moment.
        """
        there = self.describe(target) is not None
        if not there:
            create_if_missing(
                lambda: self.describe(target) is not None,
                lambda: self._create_table(target, schema, dim, mark),
            )
        if self.mark(target) != mark:
            if not there:
                raise TransientStoreError(
                    f"{target}: another program made a collection of this name at the same moment"
                )
            log.warning(
                "collection.name_taken", extra={"collection": target, "hint": "the next number is used"}
            )
            return False
        create_if_missing(lambda: self.has_index(target), lambda: self.create_index(target))
        return True

    def mark(self, table: str) -> str | None:
        """Return a collection's mark; None where there is no collection of this name, or it is an alias."""
        described = self.describe(table)
        # Describing an alias describes its collection, which a drop by alias removes on Milvus Lite.
        if described is None or described["collection_name"] != table:
            return None
        return mark_of(described)

    def aliases(self, table: str) -> list[str]:
        """Return the aliases of a collection."""
        if self._link.server().lists_aliases:
            answer = self._link.attempt(
                table, lambda client: client.list_aliases(table, timeout=self._timeout_s)
            )
            return list(answer["aliases"])
        return list((self.describe(table) or {}).get("aliases", ()))

    def _create_table(self, target: str, schema: scalars.Schema, dim: int, mark: str) -> None:
        server = self._link.server()
        key = not self._named and server.keeps_partition_keys
        options = milvus_client().table(schema, dim, key=key, mark=mark, lite=server.lite)
        self._run(target, lambda client: client.create_collection(target, timeout=self._timeout_s, **options))

    def has_index(self, name: str) -> bool:
        """Return whether the vectors have an index."""
        found = self._link.attempt(
            name, lambda client: client.list_indexes(name, "vector", timeout=self._timeout_s)
        )
        return bool(found)

    def create_index(self, name: str) -> None:
        """Make the index of the vectors."""
        params = milvus_client().index()
        self._run(name, lambda client: client.create_index(name, params, timeout=self._timeout_s))

    def load(self, name: str) -> None:
        """Make a collection ready for searches."""
        self._run(name, lambda client: client.load_collection(name, timeout=self._timeout_s))

    def _run(self, name: str, do: Callable[[Any], object]) -> None:
        self._link.attempt(name, do)
