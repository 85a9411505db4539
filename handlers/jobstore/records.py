"""Versioned records of chapters and entities: the port to small hashes in the job store."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol


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
    """A stored record: the version of the chapter that it was made from, and its texts by name."""

    version: int
    fields: Mapping[str, str]


class Put(NamedTuple):
    """Result of a `put`, and the record that is stored now.

    `stored`; `same`: an equal record was stored already; `older`: a newer version of the chapter is stored;
    `foreign`: the key's name belongs to another tenant or project (then `record` is None).
    """

    verdict: Literal["stored", "same", "older", "foreign"]
    record: Record | None


class Records(Protocol):
    """Port of records. Every method raises StoreUnavailable where the job store does not answer."""

    def put(self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str) -> Put:
        """Store a record in one step, unless a newer version is stored.

        An equal version is replaced. Versions of different chapters are not compared: a field `chapter_id`
        says which one the record was made from, and another chapter's record is replaced.
        """

    def get(self, key: RecordKey) -> Record | None:
        """The stored record; None if there is none or it is another tenant's."""

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        """Record, before the entities are written, that a version of this chapter mentions them."""

    def mentioned(self, chapter: RecordKey) -> list[str]:
        """The ids of all entities that any version of this chapter mentioned, sorted."""

    def close(self) -> None:
        """Drop the connection."""
