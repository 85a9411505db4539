"""Facts about a Milvus server and its collections, and whether a collection can be used (pure)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..ports import PermanentStoreError, SparseKind
from ..schema import Schema

# Milvus 2.3.5 stores an upserted row under the hash of its primary key instead of its partition key, so a
# filter on the partition key misses almost every row. Repaired late in 2.3.
PARTITION_KEY_SINCE = (2, 4)
# Template parameters of filters; older versions reject a brace in a filter.
TEMPLATES_SINCE = (2, 5)
# Sparse vectors and searches by several vectors at once; full-text search (BM25) with analysers.
SPARSE_SINCE, BM25_SINCE = (2, 4), (2, 5)
# 2.3 lists the aliases in the answer of describe_collection.
LISTS_ALIASES_SINCE = (2, 4)
#: Fields of rows without which a collection of another program can be used.
OPTIONAL = frozenset({"version", "created_us"})
#: Fields that group rows; each collection of the service has one of them.
GROUPING = frozenset({"chapter_id", "entity_id"})
#: Property with a collection's mark on Milvus Lite, which does not store descriptions.
MARK = "jobworker.made"

# Field types by their numbers in the protocol: `DataType` of the client library is too heavy to import here.
INTEGERS = {2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64"}
VARCHAR, FLOAT_VECTOR, SPARSE_FLOAT_VECTOR = 21, 101, 104


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

    def sparse(self, kind: SparseKind, *, on_lite: bool = False) -> SparseKind:
        """The kind, or `none` if the server lacks it; `on_lite`: also where searches by it are slow."""
        if kind == "model" and self.lite:
            # A search among 5,000 rows took 0.3 s instead of 15 ms: its index is scanned in Python.
            return kind if on_lite else "none"
        since = {"none": (0, 0), "model": SPARSE_SINCE, "bm25": BM25_SINCE}[kind]
        # Lite splits Chinese only with a further package, and weighs words within each segment alone.
        return kind if not self.lite and self._is_since(since) else "none"

    @property
    def lists_aliases(self) -> bool:
        """Whether it has a call that lists the aliases of a collection."""
        return self.lite or self._is_since(LISTS_ALIASES_SINCE)

    def _is_since(self, since: tuple[int, int]) -> bool:
        number = re.search(r"(\d{1,9})\.(\d{1,9})", self.version)
        # A cloud service without a version number is a recent one.
        return number is None or (int(number[1]), int(number[2])) >= since


class CollectionInfo(NamedTuple):
    """Cached part of a collection's description.

    `lacks`: fields of rows that it does not store. `max_bytes`: limits of the VARCHAR fields. `sparse`: where
    its sparse vectors come from.
    """

    dim: int
    lacks: frozenset[str]
    max_bytes: Mapping[str, int]
    sparse: SparseKind = "none"

    @classmethod
    def of(cls, description: dict[str, Any]) -> "CollectionInfo":
        """From the server's description. Raises PermanentStoreError if `vector` is no FLOAT_VECTOR field."""
        fields = {field["name"]: field for field in description["fields"]}
        vector = fields.get("vector")
        if vector is None or vector["type"] != FLOAT_VECTOR:
            raise PermanentStoreError(
                f"collection {description['collection_name']} has no field `vector` of type FLOAT_VECTOR"
            )
        max_bytes = {
            name: int(field["params"]["max_length"])
            for name, field in fields.items()
            if field["type"] == VARCHAR and "max_length" in field["params"]
        }
        is_dynamic = bool(description.get("enable_dynamic_field"))
        lacks = frozenset() if is_dynamic else (OPTIONAL | GROUPING) - fields.keys()
        return cls(int(vector["params"]["dim"]), lacks, max_bytes, _sparse_kind(fields.get("sparse")))


def _sparse_kind(field: Mapping[str, Any] | None) -> SparseKind:
    if field is None or field["type"] != SPARSE_FLOAT_VECTOR:
        return "none"
    return "bm25" if field.get("is_function_output") else "model"


def check_fields(alias: str, schema: Schema, description: dict[str, Any]) -> None:
    """Raise PermanentStoreError unless every row of `schema` has its fields in the collection.

    A server reports such a collection at the first write only, with the code of an outage.
    """
    fields = {field["name"]: field for field in description["fields"]}
    id_, dynamic = fields.get("id", {}), bool(description.get("enable_dynamic_field"))
    auto_id = id_.get("auto_id") or description.get("auto_id")
    faults = []
    if not id_.get("is_primary") or id_["type"] != VARCHAR or auto_id:
        faults.append("the primary key must be a VARCHAR field `id` without auto id")
    wanted = {field.name: (VARCHAR,) if field.max_bytes else tuple(INTEGERS) for field in schema.fields[1:]}
    for name, types in wanted.items():
        if name not in fields and not dynamic:
            faults.append(f"no field `{name}`")
        elif name in fields and fields[name]["type"] not in types:
            faults.append(f"field `{name}` is no {'VARCHAR' if VARCHAR in types else 'integer'}")
    faults += [
        f"field `{name}` is no INT64"
        for name in sorted(OPTIONAL & fields.keys())
        if fields[name]["type"] != max(INTEGERS)
    ]
    if faults:
        raise PermanentStoreError(
            f"collection {alias} cannot hold the rows of this service: {'; '.join(faults)}"
        )


def check_no_other_field(alias: str, schema: Schema, description: dict[str, Any]) -> None:
    """Raise PermanentStoreError if a row needs a value for a field that this service does not know."""
    filled = {field.name for field in schema.fields} | {"vector", *OPTIONAL}
    if CollectionInfo.of(description).sparse == "model":
        filled.add("sparse")
    others = [field["name"] for field in description["fields"] if _is_required(field)]
    unknown = [name for name in others if name not in filled]
    if unknown:
        raise PermanentStoreError(
            f"collection {alias} cannot hold the rows of this service: a row needs {', '.join(unknown)}"
        )


def _is_required(field: dict[str, Any]) -> bool:
    flags = ("nullable", "auto_id", "is_function_output", "is_dynamic")
    return field.get("default_value") is None and not any(field.get(flag) for flag in flags)


def mark_of(description: dict[str, Any]) -> str:
    """The mark of a collection: a text that names its creator; empty if it has none."""
    return str(description.get("description") or (description.get("properties") or {}).get(MARK, ""))


def check_usable(
    alias: str, schema: Schema, description: dict[str, Any], dim: int, *, named: bool, server: Server
) -> None:
    """Raise PermanentStoreError if rows, model, server or settings do not fit the collection."""
    actual_dim = CollectionInfo.of(description).dim
    check_fields(alias, schema, description)
    check_no_other_field(alias, schema, description)
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
