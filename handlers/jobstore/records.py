"""The port to what is known of a chapter or an entity: small versioned records, kept beside the jobs."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol


class RecordKey(NamedTuple):
    """What a record is about. `kind` is `summary` (`id` is a chapter's) or `entity`."""

    kind: Literal["summary", "entity"]
    tenant_id: str
    project_id: str
    id: str

    @property
    def owner(self) -> str:
        """Tenant and project where the name of the key alone could be read in two ways, else empty."""
        ambiguous = ":" in self.tenant_id + self.project_id
        return f"{self.tenant_id}/{self.project_id}" if ambiguous else ""


class Record(NamedTuple):
    """A stored record: the version of the chapter that it was made from, and its texts by name."""

    version: int
    fields: Mapping[str, str]


class Put(NamedTuple):
    """Result of a `put`, and the record that is stored now.

    `stored`; `same`: stood there already, to the letter; `older`: a newer version of the chapter stands
    there; `foreign`: the key's name is taken by another tenant or project (then no record is shown).
    """

    verdict: Literal["stored", "same", "older", "foreign"]
    record: Record | None


class Records(Protocol):
    """Every method raises StoreUnavailable where the job store does not answer."""

    def put(self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str) -> Put:
        """Store a record in one step, unless a newer version is stored.

        An equal version is replaced. Versions of different chapters are not compared: a field `chapter_id`
        says which one the record was made from, and another chapter's record is replaced.
        """

    def get(self, key: RecordKey) -> Record | None:
        """The stored record; None if there is none or it is another tenant's."""

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        """Remember, before anything is written of them, that a version of this chapter tells of entities."""

    def mentioned(self, chapter: RecordKey) -> list[str]:
        """The ids of all entities that any version of this chapter told of, sorted."""

    def close(self) -> None:
        """Drop the connection."""
