"""Versioned records of chapters and entities: the port to small hashes in the job store."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from .erasures import Scope


class RecordKey(NamedTuple):
    """Key of a record. `kind` is `summary` (`id` is a chapter's) or `entity`."""

    kind: Literal["summary", "entity"]
    tenant_id: str
    project_id: str
    id: str

    @property
    def owner(self) -> str:
        """Tenant and project if a colon in them makes the key's name ambiguous, else empty."""
        ambiguous = ":" in self.tenant_id + self.project_id
        return f"{self.tenant_id}/{self.project_id}" if ambiguous else ""


class Record(NamedTuple):
    """A stored record: the version of the chapter that it was made from, its texts by name, and when the
    newest job that stored it was created (unix microseconds, 0 for unknown)."""

    version: int
    fields: Mapping[str, str]
    created_us: int = 0


class FoundRecords(NamedTuple):
    """Records of a scope: summaries, entities, and the chapters that mention entities."""

    summaries: Sequence[RecordKey]
    entities: Sequence[RecordKey]
    mentioning: Sequence[RecordKey]


class Put(NamedTuple):
    """Result of a `put`, and the record that is stored now.

    `stored`; `same`: an equal record was stored already; `older`: a newer version of the chapter is stored;
    `foreign`: the key's name belongs to another tenant or project (then `record` is None).
    """

    verdict: Literal["stored", "same", "older", "foreign"]
    record: Record | None


class Records(Protocol):
    """Port of records. Every method raises StoreUnavailable where the job store does not answer."""

    def put(
        self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str, created_us: int = 0
    ) -> Put:
        """Store a record in one step, unless a newer version is stored. `created_us`: of its job.

        An equal version is replaced. Versions of different chapters are not compared: a field `chapter_id`
        says which one the record was made from, and another chapter's record is replaced.
        """

    def get(self, key: RecordKey) -> Record | None:
        """The stored record; None if there is none or it is another tenant's."""

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        """Record, before the entities are written, that a version of this chapter mentions them."""

    def mentioned(self, chapter: RecordKey) -> list[str]:
        """The ids of all entities that any version of this chapter mentioned, sorted."""

    def find(self, scope: Scope) -> FoundRecords:
        """The records of a tenant, a project, or chapters: their summaries, and the entities whose record was
        made from one of them. Rows have none."""

    def discard(self, key: RecordKey, cutoff_us: int) -> bool:
        """Delete a record, unless a job created after `cutoff_us` has stored it; True if it is gone."""

    def discard_mentions(self, chapter: RecordKey) -> None:
        """Forget which entities a chapter mentioned."""

    def close(self) -> None:
        """Drop the connection."""
