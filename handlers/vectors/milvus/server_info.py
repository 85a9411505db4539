"""What a collection on a Milvus server is like, and whether it can be used as it is (pure)."""

import re
from typing import Any, NamedTuple

from ..ports import PermanentStoreError

# Milvus 2.3.5 files an upserted row under the hash of its primary key instead of its partition key: a filter
# on the key then finds next to nothing. Repaired late in 2.3.
PARTITION_KEY_SINCE = (2, 4)
# Values of a filter beside its text; before, a brace in a filter is an error.
TEMPLATES_SINCE = (2, 5)


# 2.3 has the aliases in the answer of describe_collection.
LISTS_ALIASES_SINCE = (2, 4)
#: Property that holds a collection's mark on Milvus Lite, which keeps no descriptions.
MARK = "jobworker.made"


class Server(NamedTuple):
    """What answers: `version` as it says, and whether it is Milvus Lite."""

    version: str
    lite: bool

    @property
    def keeps_partition_keys(self) -> bool:
        """Return whether upserts go where a filter on the partition key looks for them."""
        return self.lite or self._is_since(PARTITION_KEY_SINCE)

    @property
    def takes_templates(self) -> bool:
        """Return whether a filter may have names in the place of values."""
        return not self.lite and self._is_since(TEMPLATES_SINCE)

    @property
    def lists_aliases(self) -> bool:
        """Return whether the aliases of a collection can be asked for."""
        return self.lite or self._is_since(LISTS_ALIASES_SINCE)

    def _is_since(self, since: tuple[int, int]) -> bool:
        number = re.search(r"(\d{1,9})\.(\d{1,9})", self.version)
        # A cloud service that gives no number is a recent one.
        return number is None or (int(number[1]), int(number[2])) >= since


class CollectionInfo(NamedTuple):
    """What a process remembers of a collection."""

    dim: int
    takes_version: bool


def collection_info_of(described: dict[str, Any]) -> CollectionInfo:
    """Return what matters of the server's description of a collection."""
    vector = next((field for field in described["fields"] if field["name"] == "vector"), None)
    if vector is None:
        raise PermanentStoreError(f"collection {described['collection_name']} has no field `vector`")
    return CollectionInfo(int(vector["params"]["dim"]), bool(described.get("enable_dynamic_field")))


def mark_of(described: dict[str, Any]) -> str:
    """Return the mark of a collection, empty where it has none."""
    return str(described.get("description") or (described.get("properties") or {}).get(MARK, ""))


def refuse_unusable(alias: str, described: dict[str, Any], dim: int, *, named: bool, server: Server) -> None:
    """Raise PermanentStoreError where the collection cannot be used with this model, server or setting."""
    has = collection_info_of(described).dim
    if has != dim:
        raise PermanentStoreError(
            f"collection {alias} holds vectors of {has} dimensions, the model makes {dim}: "
            "start with the model it was filled with, set another --milvus-prefix, or rebuild it"
        )
    if not any(field.get("is_partition_key") for field in described["fields"]):
        return
    if named:
        raise PermanentStoreError(f"collection {alias} has a partition key: set --milvus-partitions key")
    if not server.keeps_partition_keys:
        raise PermanentStoreError(
            f"collection {alias} has a partition key, and Milvus {server.version} misplaces rows that are "
            "upserted there: use Milvus 2.4 or later"
        )
