"""Facts about a Milvus server and its collections, and whether a collection can be used (pure)."""

import re
from typing import Any, NamedTuple

from ..ports import PermanentStoreError

# Milvus 2.3.5 stores an upserted row under the hash of its primary key instead of its partition key, so a
# filter on the partition key misses almost every row. Repaired late in 2.3.
PARTITION_KEY_SINCE = (2, 4)
# Template parameters of filters; older versions reject a brace in a filter.
TEMPLATES_SINCE = (2, 5)
# 2.3 lists the aliases in the answer of describe_collection.
LISTS_ALIASES_SINCE = (2, 4)
#: Property with a collection's mark on Milvus Lite, which does not store descriptions.
MARK = "jobworker.made"


class Server(NamedTuple):
    """Kind of the server: its version string, and whether it is Milvus Lite."""

    version: str
    lite: bool

    @property
    def keeps_partition_keys(self) -> bool:
        """Whether a filter on the partition key finds upserted rows."""
        return self.lite or self._is_since(PARTITION_KEY_SINCE)

    @property
    def takes_templates(self) -> bool:
        """Whether a filter may have template parameters."""
        return not self.lite and self._is_since(TEMPLATES_SINCE)

    @property
    def lists_aliases(self) -> bool:
        """Whether it has a call that lists the aliases of a collection."""
        return self.lite or self._is_since(LISTS_ALIASES_SINCE)

    def _is_since(self, since: tuple[int, int]) -> bool:
        number = re.search(r"(\d{1,9})\.(\d{1,9})", self.version)
        # A cloud service without a version number is a recent one.
        return number is None or (int(number[1]), int(number[2])) >= since


class CollectionInfo(NamedTuple):
    """Cached part of a collection's description; `takes_version`: rows may carry a version."""

    dim: int
    takes_version: bool

    @classmethod
    def of(cls, description: dict[str, Any]) -> "CollectionInfo":
        """From the server's description. Raises PermanentStoreError if there is no field `vector`."""
        vector = next((field for field in description["fields"] if field["name"] == "vector"), None)
        if vector is None:
            raise PermanentStoreError(f"collection {description['collection_name']} has no field `vector`")
        return cls(int(vector["params"]["dim"]), bool(description.get("enable_dynamic_field")))


def mark_of(description: dict[str, Any]) -> str:
    """The mark of a collection: a text that names its creator; empty if it has none."""
    return str(description.get("description") or (description.get("properties") or {}).get(MARK, ""))


def check_usable(alias: str, description: dict[str, Any], dim: int, *, named: bool, server: Server) -> None:
    """Raise PermanentStoreError if the model, the server or the settings do not fit the collection."""
    actual_dim = CollectionInfo.of(description).dim
    if actual_dim != dim:
        raise PermanentStoreError(
            f"collection {alias} holds vectors of {actual_dim} dimensions, the model makes {dim}: "
            "start with the model it was filled with, set another --milvus-prefix, or rebuild it"
        )
    if not any(field.get("is_partition_key") for field in description["fields"]):
        return
    if named:
        raise PermanentStoreError(f"collection {alias} has a partition key: set --milvus-partitions key")
    if not server.keeps_partition_keys:
        raise PermanentStoreError(
            f"collection {alias} has a partition key, and Milvus {server.version} misplaces rows that are "
            "upserted there: use Milvus 2.4 or later"
        )
