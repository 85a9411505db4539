"""Reads the payload of `summary_write_back` and `memory_update`: every rule of its fields."""

from typing import Any, NamedTuple

from jobworker.worker import Job, PermanentError

from ..vectors.schema import ID, INT64_MAX, INT64_MIN, shown

#: Before the chapter's id in the id of its summary's row.
SUMMARY_PREFIX = "summary:"
#: What that leaves of the 64 characters of a row's id.
CHAPTER_ID_CHARS = 64 - len(SUMMARY_PREFIX)
#: Some hundred times a long chapter; its sentences' vectors still fit into memory.
MOST_CONTENT_CHARS = 1_000_000


class ChapterWork(NamedTuple):
    """A payload in order. `summary` is empty where one is to be made of `content`; blanks alone are none."""

    tenant_id: str
    project_id: str
    chapter_id: str
    chapter_version: int
    content: str
    summary: str


def read_chapter(job: Job) -> ChapterWork:
    """Check a payload. Raises PermanentError that names the field and what is wrong with it."""
    payload = job.payload
    if not isinstance(payload, dict):
        raise PermanentError(f"payload must be an object, not {shown(payload)}")
    for field, owner in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
        _check_owner(field, owner, payload.get(field))
    content, summary = _text(payload, "content"), _text(payload, "summary")
    summary = summary if summary.strip() else ""
    if len(content) > MOST_CONTENT_CHARS:
        raise PermanentError(f"content has {len(content)} characters, the limit is {MOST_CONTENT_CHARS}")
    if not content.strip() and not summary:
        raise PermanentError("payload has neither a summary nor a content to make one of")
    chapter_id, version = _chapter_id(payload), _version(payload)
    return ChapterWork(job.tenant_id, job.project_id, chapter_id, version, content, summary)


def _check_owner(field: str, envelope: str, payload: Any) -> None:
    if not ID.fullmatch(envelope):
        raise PermanentError(f"{field} of the job must match {ID.pattern}, not {shown(envelope)}")
    if payload not in (None, "", envelope):
        raise PermanentError(f"{field} of the payload is {shown(payload)}, of the job {shown(envelope)}")


def _chapter_id(payload: dict[str, Any]) -> str:
    value = payload.get("chapter_id")
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise PermanentError(f"chapter_id must be a string that matches {ID.pattern}, not {shown(value)}")
    if len(value) > CHAPTER_ID_CHARS:
        raise PermanentError(
            f"chapter_id has {len(value)} characters, its row's id {SUMMARY_PREFIX}… has room for "
            f"{CHAPTER_ID_CHARS}"
        )
    return value


def _version(payload: dict[str, Any]) -> int:
    value = payload.get("chapter_version")
    if value is None:
        return 0
    # JSON's true is no number, though Python's is.
    if not isinstance(value, int) or isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
        raise PermanentError(f"chapter_version must be a 64-bit integer, not {shown(value)}")
    return value


def _text(payload: dict[str, Any], field: str) -> str:
    value = payload.get(field)
    if value is None:  # as Go leaves out what is empty
        return ""
    if not isinstance(value, str):
        raise PermanentError(f"{field} must be a string, not {shown(value)}")
    return value
