"""Keys that handlers keep in the job store, in one place."""

from typing import NamedTuple

#: Set: full names of the collections that were ever rebuilt.
REBUILT_KEY = "jobworker:rebuilt"


class WritesKeys(NamedTuple):
    """What is known of the writes to one collection; one hash tag, so that a cluster keeps them together.

    `writers`: hash attempt -> end of its lease in ms. `held`: hash id or chapter -> end of the lease, owner.
    `floors`: hash chapter -> version that replaced it last. `rebuild`: hash, the state of a rebuild.
    `journal`, `doing`: sets of ids written while a rebuild runs.
    """

    writers: str
    held: str
    floors: str
    rebuild: str
    journal: str
    doing: str


def writes_keys(collection: str) -> WritesKeys:
    """The keys of a collection by its full name."""
    return WritesKeys(*(f"writes:{{{collection}}}:{field}" for field in WritesKeys._fields))


def record_key(kind: str, tenant_id: str, project_id: str, id: str) -> str:
    """Hash: what is known of a chapter (``summary``) or an entity (``entity``), with its version."""
    return f"{kind}:{tenant_id}:{project_id}:{id}"


def mentions_key(tenant_id: str, project_id: str, chapter_id: str) -> str:
    """Set: ids of the entities that any version of a chapter told of."""
    return f"entities:{tenant_id}:{project_id}:{chapter_id}"
