"""Payload of `summary_write_back` and `memory_update`, checked field by field."""

from typing import Any, NamedTuple, Self

from jobworker.worker import Job, PermanentError

from ..jobstore.erasures import created_us
from ..vectors.schema import ID, INT64_MAX, INT64_MIN, SUMMARY_PREFIX, shown

#: The rest of the 64 characters of a row's id.
CHAPTER_ID_CHARS = 64 - len(SUMMARY_PREFIX)
#: About a hundred times a long chapter; the vectors of its sentences still fit into memory.
MAX_CONTENT_CHARS = 1_000_000


class ChapterPayload(NamedTuple):
    """Checked payload. An empty `summary` (or one of whitespace only) has to be made from `content`."""

    tenant_id: str
    project_id: str
    chapter_id: str
    chapter_version: int
    content: str
    summary: str
    created_us: int

    @classmethod
    def parse(cls, job: Job) -> Self:
        """Check a job's payload. Raises PermanentError that names the field and its fault."""
        payload = job.payload
        if not isinstance(payload, dict):
            raise PermanentError(f"payload must be an object, not {shown(payload)}")
        for field, envelope in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
            _check_owner(field, envelope, payload.get(field))
        content, summary = _text(payload, "content"), _text(payload, "summary")
        summary = summary if summary.strip() else ""
        if len(content) > MAX_CONTENT_CHARS:
            raise PermanentError(f"content has {len(content)} characters, the limit is {MAX_CONTENT_CHARS}")
        if not content.strip() and not summary:
            raise PermanentError("payload has neither a summary nor a content to make one from")
        chapter_id, version = _chapter_id(payload), _version(payload)
        owner = (job.tenant_id, job.project_id)
        return cls(*owner, chapter_id, version, content, summary, created_us(job))


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
            f"chapter_id has {len(value)} characters, the limit is {CHAPTER_ID_CHARS}: the id of its row is "
            f"{SUMMARY_PREFIX}… with 64 characters at most"
        )
    return value


def _version(payload: dict[str, Any]) -> int:
    value = payload.get("chapter_version")
    if value is None:
        return 0
    # In Python True is an int; in JSON true is not a number.
    if not isinstance(value, int) or isinstance(value, bool) or not INT64_MIN <= value <= INT64_MAX:
        raise PermanentError(f"chapter_version must be a 64-bit integer, not {shown(value)}")
    return value


def _text(payload: dict[str, Any], field: str) -> str:
    value = payload.get(field)
    if value is None:  # Go producers omit empty fields
        return ""
    if not isinstance(value, str):
        raise PermanentError(f"{field} must be a string, not {shown(value)}")
    return value
