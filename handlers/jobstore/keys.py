"""Names of the keys that handlers use in the job store. They never change: stored data depends on them."""

from typing import NamedTuple

#: Set: full names of the collections that were ever rebuilt.
REBUILT_KEY = "jobworker:rebuilt"
#: Stream: every deletion, for the vector caches of all hosts and for new collections.
ERASURES_KEY = "jobworker:erasures"
#: Set: full names of the collections that jobs of users have named.
COLLECTIONS_KEY = "jobworker:collections"


class WritesKeys(NamedTuple):
    """Keys of the write admission of one collection. One hash tag puts them in one slot of a cluster.

    Each field's name is part of its key.

    - `writers`: hash token -> end of its lease in ms; `attempts`: hash delivery -> latest token, creation.
    - `held`: hash id or chapter -> end of the lease, owner.
    - `floors`: hash chapter -> minimum version (tombstone of a replaced chapter); `/` and chapter -> latest
      creation (us) of a job that set it. No tenant is empty, so no chapter begins with `/`.
    - `rebuild`: hash with the state of a rebuild; `journal`: set of ids written while one runs; `doing`: set
      of those that the rebuild processes now.
    - `erased`: ZSET of deleted scopes by time in us (tombstones of deletions); `erasing`: hash scope -> end
      of the lease of the deletion that runs, 1 if it is exclusive, owner.
    """

    writers: str
    held: str
    floors: str
    rebuild: str
    journal: str
    doing: str
    attempts: str
    erased: str
    erasing: str


def writes_keys(collection: str) -> WritesKeys:
    """The keys of a collection by its full name."""
    return WritesKeys(*(f"writes:{{{collection}}}:{field}" for field in WritesKeys._fields))


def usage_key(day: str) -> str:
    """Hash: counters of tenants on a day."""
    return f"jobworker:usage:{day}"


def record_key(kind: str, tenant_id: str, project_id: str, id: str) -> str:
    """Hash: record of a chapter (``summary``) or an entity (``entity``), with its version."""
    return f"{kind}:{tenant_id}:{project_id}:{id}"


def mentions_key(tenant_id: str, project_id: str, chapter_id: str) -> str:
    """Set: ids of the entities that any version of a chapter mentioned."""
    return f"entities:{tenant_id}:{project_id}:{chapter_id}"
