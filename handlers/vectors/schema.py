"""What a row may look like: schemas of the collections, and checks of ids, names and rows."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .ports import AnyHit, AnyRow, EntityHit, EntityRow, Hit, PermanentStoreError, Row

#: Where rows go whose job names no collection.
DEFAULT_COLLECTION = "story_segments"
#: Bytes of a text column, the largest VARCHAR of Milvus.
TEXT_LIMIT_BYTES = 65_535

T = TypeVar("T")

ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
# What Milvus takes as a name of a collection; 200 leaves room for the version that is put behind it.
COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}", re.ASCII)
# Suffix of the collections behind an alias. A name in a job must not have it, or it could be one of them.
NUMBERED = re.compile(r"_v[0-9]+\Z", re.ASCII)
PARTITION = re.compile(r"[A-Za-z0-9_]{1,255}", re.ASCII)
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# How much of a hostile value an error message repeats.
SHOWN_CHARS = 80
# Tags, lengths and field names around the values of one row on the wire, generously.
ROW_OVERHEAD_BYTES = 256


class Scalar(NamedTuple):
    """One scalar field; `max_bytes` bounds a VARCHAR in UTF-8 bytes, None makes the field an INT64."""

    name: str
    max_bytes: int | None


class Schema(NamedTuple):
    """The scalar fields of a collection beside id and vector, and the types of its rows and hits."""

    fields: tuple[Scalar, ...]
    row: Callable[..., AnyRow]
    hit: Callable[..., AnyHit]
    row_fields: tuple[str, ...]
    hit_fields: tuple[str, ...]


def schema(row: type[AnyRow], hit: type[AnyHit], *fields: tuple[str, int | None]) -> Schema:
    """Build one entry of the table below; the id and what keeps tenants apart come first in each."""
    common = (("id", 64), ("tenant_id", 64), ("project_id", 64))
    scalars = tuple(Scalar(*field) for field in (*common, *fields))
    return Schema(scalars, row, hit, row._fields, hit._fields)


SEGMENTS = schema(
    Row, Hit, ("chapter_id", 64), ("story_time", None), ("segment_type", 32), ("text_content", 65535)
)
ENTITIES = schema(
    EntityRow, EntityHit, ("entity_id", 64), ("entity_type", 32), ("name", 256), ("description", 65535)
)
SCHEMAS = {"story_segments": SEGMENTS, "entity_profiles": ENTITIES}


def schema_of(name: str) -> Schema:
    """Return the schema of a collection; one that a job names freely is shaped like `story_segments`."""
    return SCHEMAS.get(name, SEGMENTS)


def shown(value: object) -> str:
    """Return `value` for an error message, cut to a harmless length."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def check_id(what: str, value: object) -> str:
    """Return `value` if it is an id that can do no harm in a filter, else raise PermanentStoreError."""
    if isinstance(value, str) and ID.fullmatch(value):
        return value
    raise PermanentStoreError(f"{what} {shown(value)} does not match {ID.pattern}")


def check_collection(name: str) -> str:
    """Return `name`, with its prefix, if it can be an alias, else raise PermanentStoreError."""
    if not COLLECTION.fullmatch(name):
        raise PermanentStoreError(f"collection name {shown(name)} does not match {COLLECTION.pattern}")
    if NUMBERED.search(name):
        raise PermanentStoreError(
            f"collection name {shown(name)} ends in _v and digits, which is kept for the collections "
            "behind an alias: use another name"
        )
    return name


def plain_name(given: object, prefix: str) -> str:
    """Return a collection's name without the prefix; jobs may give it with the prefix or without.

    Raises PermanentStoreError where no collection can have the name.
    """
    if not isinstance(given, str) or not COLLECTION.fullmatch(given):
        raise PermanentStoreError(
            f"collection must be a string that matches {COLLECTION.pattern}, not {shown(given)}"
        )
    # With the prefix `story_` the name `story_segments` is still the plain one.
    name = given if given in SCHEMAS else given.removeprefix(prefix)
    if not name:
        raise PermanentStoreError(f"collection {shown(given)} is the prefix alone: add a name")
    check_collection(prefix + name)
    return name


def check_limit(limit: int) -> int:
    """Return `limit` if Milvus can answer that many hits (1 to 16384), else raise PermanentStoreError."""
    if 1 <= limit <= 16384:
        return limit
    raise PermanentStoreError(f"limit {limit} is not between 1 and 16384")


def partition_name(tenant_id: str, project_id: str) -> str:
    """Return the Go service's name of a partition; PermanentStoreError where Milvus cannot take it."""
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
    """Raise PermanentStoreError where `value` does not fit the field."""
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


def check_row(of: Schema, row: AnyRow, dim: int) -> None:
    """Raise PermanentStoreError where a row does not fit its collection."""
    if not isinstance(row, of.row):  # type: ignore[arg-type]
        raise PermanentStoreError(f"{type(row).__name__} is not a row of this collection")
    for what in ("id", "tenant_id", "project_id"):
        check_id(what, getattr(row, what))
    check_vector(row.vector, dim)
    for field in of.fields:
        check_scalar(field, getattr(row, field.name))
    check_scalar(Scalar("version", None), row.version)


def owner(row: AnyRow) -> tuple[str, str]:
    """Return who a row belongs to: tenant and project."""
    return row.tenant_id, row.project_id


def distinct(name: str, rows: Sequence[AnyRow], dim: int) -> list[AnyRow]:
    """Return checked rows, the last of each id; PermanentStoreError names every row that does not fit."""
    faults: dict[str, str] = {}
    last: dict[str, AnyRow] = {}
    for row in rows:
        try:
            check_row(schema_of(name), row, dim)
        except PermanentStoreError as error:
            faults.setdefault(str(row.id), str(error))
            continue
        if owner(last.setdefault(row.id, row)) != owner(row):
            faults.setdefault(row.id, "two tenants or projects send this id")
        last[row.id] = row
    if faults:
        refuse(name, faults)
    return list(last.values())


def refuse(name: str, faults: dict[str, str]) -> None:
    """Raise the PermanentStoreError that tells of rows at fault, the first of them in words."""
    first, reason = next(iter(faults.items()))
    more = f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else ""
    raise PermanentStoreError(f"{name}: row {shown(first)}: {reason}{more}", tuple(faults))


def refuse_foreign(name: str, rows: Sequence[AnyRow], owners: dict[str, tuple[str, str]]) -> None:
    """Raise PermanentStoreError where an id is taken by another tenant or project; says nothing of whom."""
    faults = {
        row.id: "this id belongs to another tenant or project"
        for row in rows
        if owners.get(row.id, owner(row)) != owner(row)
    }
    if faults:
        refuse(name, faults)


def row_bytes(row: AnyRow) -> int:
    """Return about how many bytes a row takes on the wire, never less than it does."""
    texts = sum(len(value.encode()) for value in row if isinstance(value, str))
    return int(row.vector.size) * 4 + texts + ROW_OVERHEAD_BYTES


def batches(rows: Sequence[AnyRow], max_rows: int, max_bytes: int) -> Iterator[list[AnyRow]]:
    """Cut rows, in order, into requests within both limits; a row larger than `max_bytes` goes alone."""
    batch: list[AnyRow] = []
    size = 0
    for row in rows:
        needed = row_bytes(row)
        if batch and (len(batch) == max_rows or size + needed > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += needed
    if batch:
        yield batch


def pick(entity: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Return those fields of an answer; a collection made by others may lack some."""
    return {field: entity[field] for field in fields if field in entity}


def row_of(of: Schema, answer: dict[str, Any]) -> AnyRow:
    """Return a row from an answer of the server."""
    fields = pick(answer, of.row_fields)
    fields["vector"] = np.asarray(fields["vector"], dtype=np.float32)
    return of.row(**fields)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut items, in order, into runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def hit_of(of: Schema, answer: dict[str, Any]) -> AnyHit:
    """Return a hit from one answer of a search."""
    fields = pick(answer["entity"], of.hit_fields[2:])
    return of.hit(id=answer["id"], score=float(answer["distance"]), **fields)


def clip(text: str, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """The beginning of `text` that fits into `limit_bytes` of UTF-8, whole characters only."""
    if len(text) * 4 <= limit_bytes:
        return text
    return text.encode()[:limit_bytes].decode(errors="ignore")
