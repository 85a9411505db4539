"""Reads the payload of `embedding_batch`: every rule of its fields, and the rows that it asks for."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jobworker.worker import Job, PermanentError

from ..vectors.ports import Row, Vector
from ..vectors.schema import DEFAULT_COLLECTION, ID, INT64_MAX, INT64_MIN, clip, plain_name

# Limits of the collection's VARCHAR fields, which Milvus counts in UTF-8 bytes.
SEGMENT_TYPE_LIMIT_BYTES = 32
# Their vectors are in memory together: 200 MB with 1024 dimensions. Far more than any chapter has segments.
MOST_TEXTS = 50_000
# How much of a bad value an error message repeats.
SHOWN_CHARS = 80


class EmbedPayload(NamedTuple):
    """A payload in order: columns of equal length, one entry a text."""

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

    def rows(self, vectors: Vector) -> list[Row]:
        """Rows for the store from vectors (texts, dim); of a text too long for its field the beginning."""
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
                time,
                kind,
                clip(text),
                self.version or 0,
            )
            for id_, vector, chapter, time, kind, text in columns
        ]


def read_work(job: Job, prefix: str) -> EmbedPayload:
    """Check a payload. Raises PermanentError that names the field and what is wrong with it.

    `prefix` is that of the collections; the job may give a collection's name with or without it.
    """
    payload = job.payload
    if not isinstance(payload, dict):
        raise PermanentError(f"payload must be an object, not {_shown(payload)}")
    for field, owner in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
        _check_owner(field, owner, payload.get(field))
    ids = _column(payload, "ids", None, _id)
    texts = _column(payload, "texts", len(ids), _text)
    version = payload.get("version")
    return EmbedPayload(
        job.tenant_id,
        job.project_id,
        plain_name(_given(payload, "collection", DEFAULT_COLLECTION), prefix),
        ids,
        texts,
        _optional(payload, "chapter_ids", ids, _id_or_none, ""),
        _optional(payload, "story_times", ids, _int64, 0),
        _optional(payload, "segment_types", ids, _segment_type, ""),
        None if version is None else _check("version", version, _int64),
        _replace(payload),
    )


def _replace(payload: dict[str, Any]) -> bool:
    """Whether the chapters are replaced as wholes; that needs to know which, and by which version."""
    replace = _check("replace", _given(payload, "replace", False), _bool)
    missing = [field for field in ("chapter_ids", "version") if payload.get(field) is None]
    if replace and missing:
        raise PermanentError(f"replace needs {' and '.join(missing)}")
    return bool(replace)


# A rule returns None for a good value, else what a good one looks like.
_Rule = Callable[[Any], str | None]


def _check_owner(field: str, envelope: str, payload: Any) -> None:
    if not ID.fullmatch(envelope):
        raise PermanentError(f"{field} of the job must match {ID.pattern}, not {_shown(envelope)}")
    if payload not in (None, "", envelope):
        raise PermanentError(f"{field} of the payload is {_shown(payload)}, of the job {_shown(envelope)}")


def _column(payload: dict[str, Any], field: str, count: int | None, rule: _Rule) -> list[Any]:
    if field not in payload:
        raise PermanentError(f"payload lacks {field}")
    # Go writes an empty slice that was never filled as null.
    values = [] if payload[field] is None else payload[field]
    if not isinstance(values, list):
        raise PermanentError(f"{field} must be a list, not {_shown(values)}")
    if len(values) > MOST_TEXTS:
        raise PermanentError(f"{field} has {len(values)} entries, a job may have {MOST_TEXTS}: send several")
    if count is not None and len(values) != count:
        raise PermanentError(f"{field} has {len(values)} entries, ids has {count}")
    for place, value in enumerate(values):
        _check(f"{field}[{place}]", value, rule)
    return values


def _optional(payload: dict[str, Any], field: str, ids: list[str], rule: _Rule, default: Any) -> list[Any]:
    if payload.get(field) is None:
        return [default] * len(ids)
    return _column(payload, field, len(ids), rule)


def _given(payload: dict[str, Any], field: str, default: Any) -> Any:
    value = payload.get(field)
    return default if value is None or value == "" else value


def _check(name: str, value: Any, rule: _Rule) -> Any:
    wanted = rule(value)
    if wanted is not None:
        raise PermanentError(f"{name} must be {wanted}, not {_shown(value)}")
    return value


def _id(value: Any) -> str | None:
    good = isinstance(value, str) and ID.fullmatch(value)
    return None if good else f"a string that matches {ID.pattern}"


def _id_or_none(value: Any) -> str | None:
    """A segment may belong to no chapter: then the string is empty."""
    return None if value == "" else _id(value)


def _text(value: Any) -> str | None:
    good = isinstance(value, str) and _is_unicode(value)
    return None if good else "a string without unpaired surrogates"


def _segment_type(value: Any) -> str | None:
    good = isinstance(value, str) and _is_unicode(value) and len(value.encode()) <= SEGMENT_TYPE_LIMIT_BYTES
    return None if good else f"a string of at most {SEGMENT_TYPE_LIMIT_BYTES} bytes"


def _int64(value: Any) -> str | None:
    # JSON's true is no number, though Python's is.
    good = isinstance(value, int) and not isinstance(value, bool) and INT64_MIN <= value <= INT64_MAX
    return None if good else "a 64-bit integer"


def _bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
