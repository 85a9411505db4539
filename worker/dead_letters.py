"""Dead letters as an operator sees them: read, chosen by what they say, made into jobs again."""

from dataclasses import dataclass
from typing import Any

import msgspec

from .store import Entry

_NOTHING = msgspec.Raw(b"null")


class _Written(msgspec.Struct):
    """A letter as it stands in the store. Nothing is required: others may have written it."""

    task: msgspec.Raw = _NOTHING
    error: str = ""
    failed_at: str = ""
    reason: str = ""
    original_id: str = ""
    worker: str = ""
    retry_count: int = 0
    deaths: int = 0
    raw: str | None = None
    details: dict[str, Any] | None = None


class _Named(msgspec.Struct):
    """What a job is called, also where the rest of it is in order no more."""

    id: str = ""
    type: str = ""
    tenant_id: str = ""
    project_id: str = ""


@dataclass(frozen=True)
class Letter:
    """One dead letter. ``task`` is the job as it was received, None where that could not be read."""

    stream: str
    id: bytes
    job_id: str
    type: str
    tenant_id: str
    project_id: str
    reason: str
    error: str
    failed_at: str
    original_id: str
    worker: str
    retry_count: int
    deaths: int
    task: bytes | None
    raw: str | None
    details: dict[str, Any] | None

    @property
    def wall_s(self) -> float:
        """When it was written, by the store's clock (unix seconds)."""
        return int(self.id.partition(b"-")[0]) / 1000


@dataclass(frozen=True)
class Choice:
    """Which letters are meant: all that fit everything that is given. Times are unix seconds."""

    ids: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    error: str = ""
    after_wall_s: float = 0.0
    before_wall_s: float = float("inf")

    @property
    def everything(self) -> bool:
        """Whether nothing was given."""
        return self == Choice()

    def __contains__(self, letter: Letter) -> bool:
        return (
            (not self.ids or bool(self.ids & {letter.id.decode(), letter.job_id, letter.original_id}))
            and (not self.reasons or letter.reason in self.reasons)
            and (not self.types or letter.type in self.types)
            and (not self.tenants or letter.tenant_id in self.tenants)
            and self.error in letter.error
            and self.after_wall_s <= letter.wall_s <= self.before_wall_s
        )


_written = msgspec.json.Decoder(_Written, strict=False)
_named = msgspec.json.Decoder(_Named)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_letter(stream: str, entry: Entry) -> Letter:
    """A letter of ``dlq:<stream>``; what cannot be read is shown as far as it goes."""
    try:
        said = _written.decode(entry.data or b"")
    except (ValueError, RecursionError) as error:
        said = _Written(error=f"not a dead letter: {error}")
    task = bytes(said.task)
    named = _name(task)
    return Letter(
        stream, entry.id, named.id, named.type, named.tenant_id, named.project_id, said.reason, said.error,
        said.failed_at, said.original_id, said.worker, said.retry_count, said.deaths,
        task if named.id and named.type else None, said.raw, said.details,
    )  # fmt: skip


def _name(task: bytes) -> _Named:
    try:
        return _named.decode(task)
    except (ValueError, RecursionError):
        return _Named()


def fresh_job(task: bytes) -> bytes:
    """The job as it was first sent: without what earlier tries have counted; all else keeps its bytes."""
    members = _members.decode(task)
    counted = [name for name in ("retry_count", "deaths") if name in members]
    if not counted:
        return task
    for name in counted:
        del members[name]
    return msgspec.json.encode(members)
