"""Schemas of the collections; validation of ids, names and rows; division of rows into requests."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..graphemes import Graphemes
from .ports import (
    NO_FILTER,
    AnyHit,
    AnyRow,
    EntityHit,
    EntityRow,
    Hit,
    PermanentStoreError,
    Row,
    SearchFilter,
    StoredRow,
    Vector,
)

#: Collection of a job that names none.
DEFAULT_COLLECTION = "story_segments"
#: Collection of entities.
ENTITIES_COLLECTION = "entity_profiles"
#: Prefix of the id of a summary's row; the chapter's id follows.
SUMMARY_PREFIX = "summary:"
#: Prefix of the id of an entity's row: of one that `entity_upsert` writes, and of one found in a chapter.
PROFILE_PREFIX, FOUND_PREFIX = "profile:", "entity:"
#: Bytes of a text column, the largest VARCHAR of Milvus.
TEXT_LIMIT_BYTES = 65_535

#: Vector of a row that was read without it.
NO_VECTOR = np.empty(0, np.float32)

T = TypeVar("T")

ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
# A part of a filter, which has no escapes that every server reads alike.
SEGMENT_TYPE = re.compile(r"[^\"'\\\x00-\x1f\x7f{}]{1,32}")
# Collection names that Milvus accepts; the limit of 200 leaves room for the numbered suffix.
COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
# Suffix of the collections behind an alias, which a job must not be able to name.
NUMBERED = re.compile(r"_v[0-9]+\Z", re.ASCII)
PARTITION = re.compile(r"[A-Za-z0-9_]{1,255}", re.ASCII)
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# Length of an untrusted value in an error message.
SHOWN_CHARS = 80
# Upper bound of the tags, lengths and field names of one row on the wire.
ROW_OVERHEAD_BYTES = 256
# A Milvus server accepts requests of 64 MiB; a quarter bounds its memory and the time of one call.
MAX_REQUEST_BYTES = 16 * 1024 * 1024
# Larger requests are not faster, on a Milvus server or Milvus Lite.
MAX_REQUEST_ROWS = 500


class Scalar(NamedTuple):
    """One scalar field: a VARCHAR of at most `max_bytes` UTF-8 bytes; None: an INT64."""

    name: str
    max_bytes: int | None


class Schema(NamedTuple):
    """Scalar fields of a collection, and the types of its rows and hits.

    `row_fields`: those that are read.
    """

    fields: tuple[Scalar, ...]
    row: Callable[..., AnyRow]
    hit: Callable[..., AnyHit]
    row_fields: tuple[str, ...]
    hit_fields: tuple[str, ...]

    @property
    def named_in(self) -> str:
        """The field of which a store computes BM25."""
        return "text_content" if self.row is Row else "name"


def _schema(row: type[AnyRow], hit: type[AnyHit], *fields: tuple[str, int | None]) -> Schema:
    """A schema: id, tenant and project, then `fields`."""
    common = (("id", 64), ("tenant_id", 64), ("project_id", 64))
    scalars = tuple(Scalar(*field) for field in (*common, *fields))
    read = tuple(field for field in row._fields if field != "sparse")
    return Schema(scalars, row, hit, read, hit._fields)


SEGMENTS = _schema(
    Row, Hit, ("chapter_id", 64), ("story_time", None), ("segment_type", 32), ("text_content", 65535)
)
ENTITIES = _schema(
    EntityRow, EntityHit, ("entity_id", 64), ("entity_type", 32), ("name", 256), ("description", 65535)
)
SCHEMAS = {DEFAULT_COLLECTION: SEGMENTS, ENTITIES_COLLECTION: ENTITIES}


def schema_of(name: str) -> Schema:
    """The schema of a collection; a collection with a name of the job's choice is like `story_segments`."""
    return SCHEMAS.get(name, SEGMENTS)


def entity_row_id(tenant_id: str, project_id: str, entity_id: str, prefix: str = FOUND_PREFIX) -> str:
    """Id of an entity's row. It includes tenant and project: unlike chapter ids, names repeat there."""
    scope = "/".join((tenant_id, project_id, entity_id))
    return prefix + hashlib.blake2b(scope.encode(), digest_size=16).hexdigest()


def shown(value: object, limit_chars: int = SHOWN_CHARS) -> str:
    """`value` for an error message: any script as it is written, control characters escaped, truncated."""
    try:
        # Texts and lists may have megabytes.
        text = repr(value[: limit_chars + 1] if isinstance(value, str | bytes | list) else value)
    except RecursionError:
        text = f"{type(value).__name__} that is nested too deeply"
    if len(text) <= limit_chars:
        return text
    return f"{text[: Graphemes(text).last_boundary(limit_chars) or limit_chars]}…"


def check_id(what: str, value: object) -> str:
    """Return `value` if it is an id, which is safe in a filter; else raise PermanentStoreError."""
    if isinstance(value, str) and ID.fullmatch(value):
        return value
    raise PermanentStoreError(f"{what} {shown(value)} does not match {ID.pattern}")


def check_segment_type(value: object) -> str:
    """Return `value` if a search can filter by it; else raise PermanentStoreError."""
    if isinstance(value, str) and SEGMENT_TYPE.fullmatch(value):
        return value
    raise PermanentStoreError(
        f"segment_type {shown(value)}: a filter takes 1 to 32 characters without quotes, backslashes and "
        "control characters"
    )


def check_int64(what: str, value: object) -> int:
    """Return `value` if it is a 64-bit integer; else raise PermanentStoreError."""
    if isinstance(value, int) and not isinstance(value, bool) and INT64_MIN <= value <= INT64_MAX:
        return value
    raise PermanentStoreError(f"{what} {shown(value)} is not a 64-bit integer")


def check_search_fields(name: str, where: SearchFilter) -> None:
    """Raise PermanentStoreError if the rows of a collection lack a field of the filter."""
    if where != NO_FILTER and schema_of(name) is not SEGMENTS:
        raise PermanentStoreError(
            f"{name}: its rows have no chapter, segment type or story time to filter by"
        )


def check_collection(name: str) -> str:
    """Return `name` (with its prefix) if it can be an alias, else raise PermanentStoreError."""
    if not COLLECTION.fullmatch(name):
        raise PermanentStoreError(f"collection name {shown(name)} does not match {COLLECTION.pattern}")
    if NUMBERED.search(name):
        raise PermanentStoreError(
            f"collection name {shown(name)} ends in _v and digits, which is reserved for the collections "
            "behind an alias: use another name"
        )
    return name


def plain_name(given: object, prefix: str) -> str:
    """The name of a collection without the prefix; jobs may name it with or without.

    Raises PermanentStoreError if no collection can have the name.
    """
    if not isinstance(given, str) or not COLLECTION.fullmatch(given):
        raise PermanentStoreError(
            f"collection must be a string that matches {COLLECTION.pattern}, not {shown(given)}"
        )
    # With the prefix `story_`, `story_segments` is a plain name all the same.
    name = given if given in SCHEMAS else given.removeprefix(prefix)
    if not name:
        raise PermanentStoreError(f"collection {shown(given)} is the prefix alone: add a name")
    check_collection(prefix + name)
    return name


def check_limit(limit: int) -> int:
    """Return `limit` if Milvus can return as many hits (1 to 16384), else raise PermanentStoreError."""
    if 1 <= limit <= 16384:
        return limit
    raise PermanentStoreError(f"limit {limit} is not between 1 and 16384")


def partition_name(tenant_id: str, project_id: str) -> str:
    """The name that the Go service gives a partition. Raises PermanentStoreError if Milvus cannot have it."""
    name = f"tenant_{check_id('tenant_id', tenant_id)}_proj_{check_id('project_id', project_id)}"
    if PARTITION.fullmatch(name):
        return name
    raise PermanentStoreError(
        f"tenant {tenant_id} and project {project_id} cannot name a Milvus partition, which takes only "
        "letters, digits and _: use --milvus-partitions key"
    )


def check_vector(vector: object, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return `vector` as float32 of shape (dim,), else raise PermanentStoreError."""
    array = np.asarray(vector, dtype=np.float32)
    if array.shape != (dim,):
        raise PermanentStoreError(f"vector of shape {array.shape} where ({dim},) is wanted")
    if not np.isfinite(array).all():
        raise PermanentStoreError("vector holds NaN or infinity")
    return array


def check_scalar(field: Scalar, value: object) -> None:
    """Raise PermanentStoreError if `value` does not fit the field."""
    if field.max_bytes is None:
        if type(value) is not int or not INT64_MIN <= value <= INT64_MAX:
            raise PermanentStoreError(f"{field.name} is not a 64-bit integer")
        return
    if not isinstance(value, str):
        raise PermanentStoreError(f"{field.name} is not text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise PermanentStoreError(f"{field.name} holds half a surrogate pair") from None
    if size > field.max_bytes:
        raise PermanentStoreError(f"{field.name} has {size} bytes, the limit is {field.max_bytes}")


def check_row(schema: Schema, row: AnyRow, dim: int) -> None:
    """Raise PermanentStoreError if a row does not fit its collection."""
    if not isinstance(row, schema.row):  # type: ignore[arg-type]
        raise PermanentStoreError(f"{type(row).__name__} is not a row of this collection")
    for what in ("id", "tenant_id", "project_id"):
        check_id(what, getattr(row, what))
    check_vector(row.vector, dim)
    if row.sparse is not None and not np.isfinite(row.sparse.weights).all():
        raise PermanentStoreError("sparse vector holds NaN or infinity")
    for field in schema.fields:
        check_scalar(field, getattr(row, field.name))
    check_scalar(Scalar("version", None), row.version)


def _with_limits(schema: Schema, max_bytes: Mapping[str, int]) -> Schema:
    fields = (
        field._replace(max_bytes=min(field.max_bytes, max_bytes.get(field.name, field.max_bytes)))
        if field.max_bytes is not None
        else field
        for field in schema.fields
    )
    return schema._replace(fields=tuple(fields))


def owner(row: AnyRow) -> tuple[str, str]:
    """Tenant and project of a row."""
    return row.tenant_id, row.project_id


def check_rows(
    name: str, rows: Sequence[AnyRow], dim: int, max_bytes: Mapping[str, int] = MappingProxyType({})
) -> list[AnyRow]:
    """The last valid row of each id. Raises PermanentStoreError with the ids of all invalid rows.

    `max_bytes`: lower limits of the collection itself, by field.
    """
    schema = _with_limits(schema_of(name), max_bytes)
    faults: dict[str, str] = {}
    last: dict[str, AnyRow] = {}
    for row in rows:
        try:
            check_row(schema, row, dim)
        except PermanentStoreError as error:
            faults.setdefault(str(row.id), str(error))
            continue
        if owner(last.setdefault(row.id, row)) != owner(row):
            faults.setdefault(row.id, "two tenants or projects send this id")
        last[row.id] = row
    if faults:
        raise_faults(name, faults)
    return list(last.values())


def raise_faults(name: str, faults: dict[str, str]) -> None:
    """Raise PermanentStoreError with all ids of `faults` and the reason of the first."""
    first, reason = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else ""
    raise PermanentStoreError(f"{name}: row {shown(first)}: {reason}{more}", tuple(faults))


def check_owners(name: str, rows: Sequence[AnyRow], owners: dict[str, tuple[str, str]]) -> None:
    """Raise PermanentStoreError if an id belongs to another tenant or project, without naming either."""
    faults = {
        row.id: "this id belongs to another tenant or project"
        for row in rows
        if owners.get(row.id, owner(row)) != owner(row)
    }
    if faults:
        raise_faults(name, faults)


def row_bytes(row: AnyRow) -> int:
    """Upper bound of the bytes of a row on the wire."""
    texts = sum(len(value.encode()) for value in row if isinstance(value, str))
    sparse = 8 * len(row.sparse.ids) if row.sparse else 0
    return int(row.vector.size) * 4 + sparse + texts + ROW_OVERHEAD_BYTES


def requests(
    rows: Sequence[AnyRow], max_rows: int = MAX_REQUEST_ROWS, max_bytes: int = MAX_REQUEST_BYTES
) -> Iterator[list[AnyRow]]:
    """Divide rows into requests, in order; a row larger than `max_bytes` is a request of its own."""
    batch: list[AnyRow] = []
    size = 0
    for row in rows:
        row_size = row_bytes(row)
        if batch and (len(batch) == max_rows or size + row_size > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row_size
    if batch:
        yield batch


def _present(entity: Any, fields: Sequence[str]) -> dict[str, Any]:
    """The existing ones of `fields`: a collection of another program may lack some."""
    return {field: entity[field] for field in fields if field in entity}


def row_of(schema: Schema, answer: dict[str, Any]) -> AnyRow:
    """A row from the server's response."""
    fields = _present(answer, schema.row_fields)
    fields["vector"] = np.asarray(fields.get("vector", NO_VECTOR), dtype=np.float32)
    return schema.row(**fields)


def stored_row(answer: Mapping[str, Any]) -> StoredRow:
    """What a deletion reads of a row, from the server's response."""
    id_, project, chapter, entity = (
        str(answer.get(field) or "") for field in ("id", "project_id", "chapter_id", "entity_id")
    )
    return StoredRow(id_, project, chapter, entity, int(answer.get("created_us") or 0))


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Divide items into sequences of at most `size`, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def hit_of(schema: Schema, answer: dict[str, Any], cosine_to: Vector | None = None) -> AnyHit:
    """A hit from the server's response; its score is the server's, or the cosine to a vector."""
    fields = _present(answer["entity"], schema.hit_fields[2:])
    distance = answer["distance"]
    score = float(distance) if cosine_to is None else cosine(cosine_to, answer["entity"]["vector"])
    return schema.hit(id=answer["id"], score=score, **fields)


def cosine(left: Any, right: Any) -> float:
    """Cosine of two vectors of the same shape; 0 if one of them is zero."""
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.dot(left, right)) / lengths if lengths else 0.0


def clip(text: str, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """The longest prefix of whole graphemes that fits into `limit_bytes` of UTF-8.

    A grapheme that alone is longer is cut between its characters.
    """
    if len(text) * 4 <= limit_bytes:
        return text
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    fitting = len(data[:limit_bytes].decode(errors="ignore"))
    return text[: Graphemes(text).last_boundary(fitting) or fitting]
