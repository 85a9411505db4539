"""Payload of `vectors_delete`, checked field by field."""

from typing import Any, NamedTuple, Self

from jobworker.worker import Job, PermanentError

from ..jobstore.erasures import Scope, created_us
from ..vectors.schema import ID, plain_name, shown

#: Each id and chapter is a tombstone of about 100 bytes.
MAX_NAMES = 10_000
#: Most collections that a job may name.
MAX_COLLECTIONS = 100
_CHOICES = ("ids", "chapter_ids", "all")


class DeletePayload(NamedTuple):
    """Checked payload. `collections`: plain names, empty for all. What is newer than `cutoff_us` stays."""

    scope: Scope
    collections: tuple[str, ...]
    cutoff_us: int

    @classmethod
    def parse(cls, job: Job, prefix: str) -> Self:
        """Check a job's payload. Raises PermanentError that names the field and its fault."""
        payload = job.payload
        if not isinstance(payload, dict):
            raise PermanentError(f"payload must be an object, not {shown(payload)}")
        given = [name for name in _CHOICES if payload.get(name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise PermanentError(f"payload must have one of ids, chapter_ids and all, not {found}")
        # An empty project is all projects of the tenant: only `all` says so on purpose.
        for field, envelope in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
            may_be_empty = field == "project_id" and given == ["all"]
            _check_owner(field, envelope, payload.get(field), may_be_empty=may_be_empty)
        scope = Scope(job.tenant_id, job.project_id)
        if given == ["all"] and payload["all"] is not True:
            raise PermanentError(f"all must be true, not {shown(payload['all'])}")
        if given == ["ids"]:
            scope = scope._replace(ids=_ids("ids", payload["ids"]))
        elif given == ["chapter_ids"]:
            scope = scope._replace(chapter_ids=_ids("chapter_ids", payload["chapter_ids"]))
        cutoff_us = created_us(job)
        if not cutoff_us:
            raise PermanentError("the job has neither a valid created_at nor the id of a stream entry")
        return cls(scope, _collections(payload.get("collections"), prefix), cutoff_us)


def _check_owner(field: str, envelope: str, payload: Any, *, may_be_empty: bool) -> None:
    if not ID.fullmatch(envelope) and not (may_be_empty and envelope == ""):
        raise PermanentError(f"{field} of the job must match {ID.pattern}, not {shown(envelope)}")
    if payload not in (None, "", envelope):
        raise PermanentError(f"{field} of the payload is {shown(payload)}, of the job {shown(envelope)}")


def _ids(field: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise PermanentError(f"{field} must be a list of ids, not {shown(values)}")
    if len(values) > MAX_NAMES:
        raise PermanentError(f"{field} has {len(values)} entries, a job may have {MAX_NAMES}: send several")
    for index, value in enumerate(values):
        if not isinstance(value, str) or not ID.fullmatch(value):
            raise PermanentError(
                f"{field}[{index}] must be a string that matches {ID.pattern}, not {shown(value)}"
            )
    return tuple(dict.fromkeys(values))


def _collections(values: Any, prefix: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_COLLECTIONS:
        raise PermanentError(
            f"collections must be a list of 1 to {MAX_COLLECTIONS} names, not {shown(values)}"
        )
    return tuple(dict.fromkeys(plain_name(value, prefix) for value in values))
