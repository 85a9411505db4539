"""Collection administration on a Milvus server: create, load, describe, resolve aliases."""

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import schema as schemas
from ..ports import SparseKind, TransientStoreError, VectorStoreError
from .errors import NoCollection
from .server_info import CollectionInfo, check_usable, mark_of

if TYPE_CHECKING:
    from .client import MilvusClientHandle


log = logging.getLogger("jobworker.vectors")


def import_client() -> Any:
    """Import the client module at its first use, because pymilvus takes 0.7 s and 130 MB."""
    from . import client

    return client


def create_if_missing(exists: Callable[[], bool], create: Callable[[], None]) -> None:
    """Create something unless it exists; ignores the error if another process created it meanwhile."""
    if exists():
        return
    try:
        create()
    except VectorStoreError:
        if not exists():
            raise


class CollectionAdmin:
    """Administration of collections. Names are full names of collections or aliases.

    Every method raises VectorStoreError.
    """

    def __init__(self, milvus: "MilvusClientHandle", *, named: bool) -> None:
        self._milvus, self._timeout_s, self._named = milvus, milvus.timeout_s, named

    def ensure(
        self, alias: str, schema: schemas.Schema, dim: int, sparse: SparseKind = "none"
    ) -> dict[str, Any]:
        """Create, check and load a collection and its alias; returns the server's description."""
        description = self.describe(alias)
        if description is None:
            self._create(alias, schema, dim, sparse)
            description = self.describe(alias)
        if description is None:
            raise TransientStoreError(f"collection {alias} was created but is not visible yet")
        check_usable(alias, schema, description, dim, named=self._named, server=self._milvus.server())
        self._index(alias, CollectionInfo.of(description).sparse)
        self.load(alias)
        return description

    def describe(self, name: str) -> dict[str, Any] | None:
        """The server's description of a collection or alias; None if it does not exist."""
        try:
            description: dict[str, Any] = self._milvus.call(
                name, lambda client: client.describe_collection(name, timeout=self._timeout_s)
            )
        except NoCollection:
            return None
        return description

    def _create(self, alias: str, schema: schemas.Schema, dim: int, sparse: SparseKind) -> None:
        """Create collection, index and alias if missing. Each step tolerates other workers that start."""
        target = next(
            name
            for name in (f"{alias}_v{number}" for number in itertools.count(1))
            if self.create(name, schema, dim, f"made by jobworker for {alias}", sparse)
        )
        create_if_missing(
            lambda: self.describe(alias) is not None,
            lambda: self._run(
                alias, lambda client: client.create_alias(target, alias, timeout=self._timeout_s)
            ),
        )

    def create(
        self, target: str, schema: schemas.Schema, dim: int, mark: str, sparse: SparseKind = "none"
    ) -> bool:
        """Create a collection and its indexes unless they exist. False if another program uses the name.

        Raises TransientStoreError if another program created the collection at the same moment.
        """
        existed = self.describe(target) is not None
        if not existed:
            create_if_missing(
                lambda: self.describe(target) is not None,
                lambda: self._create_collection(target, schema, dim, mark, sparse),
            )
        if self.mark(target) != mark:
            if not existed:
                raise TransientStoreError(
                    f"{target}: another program created a collection of this name at the same moment"
                )
            log.warning(
                "collection.name_taken", extra={"collection": target, "hint": "the next number is used"}
            )
            return False
        self._index(target, self.sparse_kind(target) if existed else sparse)
        return True

    def sparse_kind(self, name: str) -> SparseKind:
        """Where the sparse vectors of a collection come from; `none` if it does not exist."""
        description = self.describe(name)
        return "none" if description is None else CollectionInfo.of(description).sparse

    def _index(self, name: str, sparse: SparseKind) -> None:
        """Create the missing indexes."""
        create_if_missing(lambda: self.has_index(name), lambda: self.create_index(name))
        if sparse != "none":
            params = import_client().sparse_index_options(sparse)
            create_if_missing(
                lambda: self.has_index(name, "sparse"), lambda: self._create_index(name, params)
            )

    def mark(self, name: str) -> str | None:
        """The mark of a collection; None if it does not exist or `name` is an alias."""
        description = self.describe(name)
        # The description of an alias is that of its collection. On Milvus Lite, a drop by alias removes it.
        if description is None or description["collection_name"] != name:
            return None
        return mark_of(description)

    def aliases(self, name: str) -> list[str]:
        """The aliases of a collection."""
        if self._milvus.server().lists_aliases:
            response = self._milvus.call(
                name, lambda client: client.list_aliases(name, timeout=self._timeout_s)
            )
            return list(response["aliases"])
        return list((self.describe(name) or {}).get("aliases", ()))

    def plain_names(self, prefix: str) -> list[str]:
        """Names of all collections that have the prefix and tenants, without the prefix: of aliases, if any.

        A collection that a rebuild fills has no alias and is left out.
        """
        collections = self._milvus.call(
            "collections", lambda client: client.list_collections(timeout=self._timeout_s)
        )
        names = set()
        for collection in collections:
            fields = {field["name"] for field in (self.describe(collection) or {"fields": []})["fields"]}
            if {"id", "tenant_id", "project_id"} <= fields:
                names.update(self.aliases(collection) or [collection])
        plain = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sorted(name for name in plain if name and not schemas.NUMBERED.search(name))

    def _create_collection(
        self, target: str, schema: schemas.Schema, dim: int, mark: str, sparse: SparseKind
    ) -> None:
        server = self._milvus.server()
        partition_key = not self._named and server.keeps_partition_keys
        options = import_client().collection_options(
            schema, dim, partition_key=partition_key, mark=mark, lite=server.lite, sparse=sparse
        )
        self._run(target, lambda client: client.create_collection(target, timeout=self._timeout_s, **options))

    def has_index(self, name: str, field: str = "vector") -> bool:
        """Whether the vectors have an index."""
        indexes = self._milvus.call(
            name, lambda client: client.list_indexes(name, field, timeout=self._timeout_s)
        )
        return bool(indexes)

    def create_index(self, name: str) -> None:
        """Create the index of the vectors."""
        self._create_index(name, import_client().index_options())

    def _create_index(self, name: str, params: Any) -> None:
        self._run(name, lambda client: client.create_index(name, params, timeout=self._timeout_s))

    def load(self, name: str) -> None:
        """Load a collection into memory, which searches require."""
        self._run(name, lambda client: client.load_collection(name, timeout=self._timeout_s))

    def _run(self, name: str, action: Callable[[Any], object]) -> None:
        self._milvus.call(name, action)
