"""The payloads of `embedding_batch` and `entity_upsert`: validation of fields, and the rows made of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

from jobworker.worker import Job, PermanentError
from jobworker.worker.safe_text import is_unicode

from ..jobstore.erasures import created_us
from ..vectors.ports import AnyRow, EntityRow, Row, Vector
from ..vectors.schema import (
    DEFAULT_COLLECTION,
    ENTITIES_COLLECTION,
    ID,
    INT64_MAX,
    INT64_MIN,
    PROFILE_PREFIX,
    clip,
    entity_row_id,
    plain_name,
    shown,
)

# Limits of the collections' VARCHAR fields, which Milvus counts in UTF-8 bytes.
SEGMENT_TYPE_LIMIT_BYTES = 32
NAME_LIMIT_BYTES = 256
# All vectors of a job are in memory at once: 200 MB at 1024 dimensions. No chapter comes near this number.
MAX_TEXTS = 50_000


class Payload(Protocol):
    """A valid payload of a job type that embeds texts. `chapter_ids` has one entry a text, "" for none."""

    @property
    def tenant_id(self) -> str: ...
    @property
    def project_id(self) -> str: ...
    @property
    def collection(self) -> str: ...
    @property
    def ids(self) -> list[str]: ...
    @property
    def texts(self) -> list[str]: ...
    @property
    def chapter_ids(self) -> list[str]: ...
    @property
    def version(self) -> int | None: ...
    @property
    def replace(self) -> bool: ...
    @property
    def created_us(self) -> int: ...

    def part(self, start: int, stop: int) -> "Payload":
        """The payload with some of its texts."""

    def rows(self, vectors: Vector) -> Sequence[AnyRow]:
        """Rows from vectors of shape (texts, dim); a text too long for its field is clipped."""

    def clipped_chars(self, rows: Sequence[AnyRow]) -> list[tuple[str, int, int]]:
        """Of the rows whose text was clipped: id, characters of the text, characters stored."""


class EmbedPayload(NamedTuple):
    """A valid payload: columns of equal length, one entry a text.

    With `replace`, older rows of its chapters are removed; `version` None turns versioning off.
    """

    tenant_id: str
    project_id: str
    collection: str
    ids: list[str]
    texts: list[str]
    chapter_ids: list[str]
    story_times: list[int]
    segment_types: list[str]
    version: int | None
    replace: bool
    created_us: int = 0

    @classmethod
    def parse(cls, job: Job, prefix: str) -> "EmbedPayload":
        """Validate a job's payload. Raises PermanentError with the field and the fault.

        `prefix` is that of the collections; a job may name its collection with or without it.
        """
        payload = job.payload
        if not isinstance(payload, dict):
            raise PermanentError(f"payload must be an object, not {shown(payload)}")
        for field, owner in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
            _check_owner(field, owner, payload.get(field))
        ids = _column(payload, "ids", None, _id)
        texts = _column(payload, "texts", len(ids), _text)
        version = payload.get("version")
        return cls(
            job.tenant_id,
            job.project_id,
            plain_name(_value(payload, "collection", DEFAULT_COLLECTION), prefix),
            ids,
            texts,
            _optional(payload, "chapter_ids", ids, _id_or_empty, ""),
            _optional(payload, "story_times", ids, _int64, 0),
            _optional(payload, "segment_types", ids, _segment_type, ""),
            None if version is None else _check("version", version, _int64),
            _replace(payload),
            created_us(job),
        )

    def part(self, start: int, stop: int) -> "EmbedPayload":
        part = slice(start, stop)
        return self._replace(
            ids=self.ids[part],
            texts=self.texts[part],
            chapter_ids=self.chapter_ids[part],
            story_times=self.story_times[part],
            segment_types=self.segment_types[part],
        )

    def clipped_chars(self, rows: Sequence[Any]) -> list[tuple[str, int, int]]:
        return _clipped([(row.id, row.text_content) for row in rows], self.texts)

    def rows(self, vectors: Vector) -> list[Row]:
        columns = zip(
            self.ids,
            vectors,
            self.chapter_ids,
            self.story_times,
            self.segment_types,
            self.texts,
            strict=True,
        )
        return [
            Row(
                id_,
                vector,
                self.tenant_id,
                self.project_id,
                chapter,
                story_time,
                segment_type,
                clip(text),
                self.version or 0,
                self.created_us,
            )
            for id_, vector, chapter, story_time, segment_type, text in columns
        ]


def _clipped(rows: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[tuple[str, int, int]]:
    pairs = zip(rows, texts, strict=True)
    return [(id_, len(text), len(kept)) for (id_, kept), text in pairs if len(kept) < len(text)]


class EntityPayload(NamedTuple):
    """A valid payload of `entity_upsert`: columns of equal length, one entry an entity.

    With `replace`, older entities of the project that such jobs wrote are removed.
    """

    tenant_id: str
    project_id: str
    entity_ids: list[str]
    names: list[str]
    entity_types: list[str]
    descriptions: list[str]
    version: int | None
    replace: bool
    created_us: int

    @classmethod
    def parse(cls, job: Job, prefix: str) -> Self:
        """As `EmbedPayload.parse`."""
        payload = job.payload
        if not isinstance(payload, dict):
            raise PermanentError(f"payload must be an object, not {shown(payload)}")
        for field, owner in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
            _check_owner(field, owner, payload.get(field))
        entities = _column(payload, "entities", None, _object)
        version = payload.get("version")
        replace = _check("replace", _value(payload, "replace", False), _bool)
        if replace and (version is None or not entities):
            raise PermanentError("replace needs version and at least one entity")
        return cls(
            job.tenant_id,
            job.project_id,
            _members(entities, "entity_id", _id),
            _members(entities, "name", _name),
            _members(entities, "entity_type", _optional_type),
            _members(entities, "description", _optional_text),
            None if version is None else _check("version", version, _int64),
            replace,
            created_us(job),
        )

    @property
    def collection(self) -> str:
        return ENTITIES_COLLECTION

    @property
    def ids(self) -> list[str]:
        owner = (self.tenant_id, self.project_id)
        return [entity_row_id(*owner, id_, PROFILE_PREFIX) for id_ in self.entity_ids]

    @property
    def texts(self) -> list[str]:
        """What is embedded: the same as a rebuild embeds from the row."""
        pairs = zip(self.names, self.descriptions, strict=True)
        return ["\n".join(filter(None, pair)) for pair in pairs]

    @property
    def chapter_ids(self) -> list[str]:
        return [""] * len(self.entity_ids)

    def part(self, start: int, stop: int) -> "EntityPayload":
        part = slice(start, stop)
        return self._replace(
            entity_ids=self.entity_ids[part],
            names=self.names[part],
            entity_types=self.entity_types[part],
            descriptions=self.descriptions[part],
        )

    def rows(self, vectors: Vector) -> list[EntityRow]:
        columns = (self.ids, vectors, self.entity_ids, self.entity_types, self.names, self.descriptions)
        owner, last = (self.tenant_id, self.project_id), (self.version or 0, self.created_us)
        return [
            EntityRow(id_, vector, *owner, entity_id, kind, name, clip(description), *last)
            for id_, vector, entity_id, kind, name, description in zip(*columns, strict=True)
        ]

    def clipped_chars(self, rows: Sequence[Any]) -> list[tuple[str, int, int]]:
        return _clipped([(row.id, row.description) for row in rows], self.descriptions)


def _replace(payload: dict[str, Any]) -> bool:
    """The flag `replace`, which requires `version` and at least one row of a chapter.

    Without such a row there would be nothing to replace, and the job would succeed unnoticed.
    """
    replace = _check("replace", _value(payload, "replace", False), _bool)
    missing = [field for field in ("chapter_ids", "version") if payload.get(field) is None]
    if replace and missing:
        raise PermanentError(f"replace needs {' and '.join(missing)}")
    if replace and not any(payload["chapter_ids"]):
        raise PermanentError(
            "replace needs a chapter, and chapter_ids names none: send at least one text of the chapter"
        )
    return bool(replace)


# A rule returns None for a valid value, else the description of a valid one.
_Rule = Callable[[Any], str | None]


def _check_owner(field: str, envelope: str, payload: Any) -> None:
    if not ID.fullmatch(envelope):
        raise PermanentError(f"{field} of the job must match {ID.pattern}, not {shown(envelope)}")
    if payload not in (None, "", envelope):
        raise PermanentError(f"{field} of the payload is {shown(payload)}, of the job {shown(envelope)}")


def _column(payload: dict[str, Any], field: str, count: int | None, rule: _Rule) -> list[Any]:
    if field not in payload:
        raise PermanentError(f"payload lacks {field}")
    # Go encodes a nil slice as null.
    values = [] if payload[field] is None else payload[field]
    if not isinstance(values, list):
        raise PermanentError(f"{field} must be a list, not {shown(values)}")
    if len(values) > MAX_TEXTS:
        raise PermanentError(f"{field} has {len(values)} entries, a job may have {MAX_TEXTS}: send several")
    if count is not None and len(values) != count:
        raise PermanentError(f"{field} has {len(values)} entries, ids has {count}")
    for index, value in enumerate(values):
        _check(f"{field}[{index}]", value, rule)
    return values


def _optional(payload: dict[str, Any], field: str, ids: list[str], rule: _Rule, default: Any) -> list[Any]:
    if payload.get(field) is None:
        return [default] * len(ids)
    return _column(payload, field, len(ids), rule)


def _value(payload: dict[str, Any], field: str, default: Any) -> Any:
    value = payload.get(field)
    return default if value is None or value == "" else value


def _check(name: str, value: Any, rule: _Rule) -> Any:
    wanted = rule(value)
    if wanted is not None:
        raise PermanentError(f"{name} must be {wanted}, not {shown(value)}")
    return value


def _id(value: Any) -> str | None:
    valid = isinstance(value, str) and ID.fullmatch(value)
    return None if valid else f"a string that matches {ID.pattern}"


def _id_or_empty(value: Any) -> str | None:
    """A segment outside any chapter has an empty chapter id."""
    return None if value == "" else _id(value)


def _text(value: Any) -> str | None:
    valid = isinstance(value, str) and is_unicode(value)
    return None if valid else "a string without unpaired surrogates"


def _segment_type(value: Any) -> str | None:
    valid = isinstance(value, str) and is_unicode(value) and len(value.encode()) <= SEGMENT_TYPE_LIMIT_BYTES
    return None if valid else f"a string of at most {SEGMENT_TYPE_LIMIT_BYTES} bytes"


def _int64(value: Any) -> str | None:
    # In Python, bool is a subclass of int; in JSON it is no number.
    valid = isinstance(value, int) and not isinstance(value, bool) and INT64_MIN <= value <= INT64_MAX
    return None if valid else "a 64-bit integer"


def _bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object"


def _name(value: Any) -> str | None:
    valid = isinstance(value, str) and is_unicode(value) and 0 < len(value.encode()) <= NAME_LIMIT_BYTES
    return None if valid else f"a string of 1 to {NAME_LIMIT_BYTES} bytes"


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _optional_type(value: Any) -> str | None:
    return None if value is None else _segment_type(value)


def _members(entities: list[dict[str, Any]], field: str, rule: _Rule) -> list[str]:
    """One field of every entity; Go encodes an absent text as null or ""."""
    values = ((index, one.get(field)) for index, one in enumerate(entities))
    return [_check(f"entities[{index}].{field}", value, rule) or "" for index, value in values]
