"""Write admission: the port by which all writers of a collection, on every host, take turns.

A vector store has no compare-and-set. So a writer asks for admission first. A write with a version holds its
ids and chapters, and every write is registered while it runs. A rebuild can record which ids change and wait
for the last writer. Each step is one atomic step of the job store.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

#: Lease of an admitted write. It is renewed before each part of a write, which is a read and an upsert of at
#: most 30 s each; the other 30 s are for requests that the server has not finished.
LEASE_MS = 90_000


class WriteIntent(NamedTuple):
    """Request of one job for admission.

    - `token` is unique to this attempt, `owner` common to all attempts of the job.
    - `ids`: every row of the write. `held`: ids and chapters that no other writer may write meanwhile, empty
      for a write without a version. `model`: the model of its vectors, empty for any.
    - `tenant_id`, `project_id`, `created_us` (when the job was created, unix microseconds) and `chapters` are
      compared with the tombstones of deletions; without a tenant nothing is compared.
    - `delivery` names the entry that is run: another attempt with it means that the one before has died.
    """

    collection: str
    token: str
    owner: str
    ids: tuple[str, ...]
    held: tuple[str, ...] = ()
    chapters: tuple[str, ...] = ()
    model: str = ""
    tenant_id: str = ""
    project_id: str = ""
    created_us: int = 0
    delivery: str = ""


class WriteAdmission(NamedTuple):
    """Answer to a request: `in` (admitted), `held` (another job holds one of its ids or chapters), `hold`
    (a deletion runs there: ask again and hold the ids; never for a write without ids), `closed` (no write is
    admitted now), or `model` (the collection was rebuilt with another model).

    `silent_s`: with `held` by another job, seconds since that one was last admitted.
    `min_versions`: the tombstones, by chapter: the version that last replaced it. `erased`: the scopes of the
    write, as `handlers.jobstore.erasures` names them, that were deleted after its job was created; not with
    `closed` and `model`.
    """

    verdict: Literal["in", "held", "hold", "closed", "model"]
    min_versions: Mapping[str, int] = {}
    model: str = ""
    erased: frozenset[str] = frozenset()
    silent_s: float = 0.0


class Fence(Protocol):
    """Port of write admission. Every method raises StoreUnavailable where the job store does not answer."""

    def admit(self, intents: Sequence[WriteIntent]) -> list[WriteAdmission]:
        """Admit writes, each wholly or not at all. For an admitted write it renews the lease."""

    def record_removal(
        self, intent: WriteIntent, gone: Sequence[str], min_versions: Mapping[str, int]
    ) -> None:
        """Record, before rows are removed, the minimum versions of the held chapters and the ids `gone`."""

    def adopt(self, collection: str) -> None:
        """As `Erasures.adopt`: before the first write to a collection that a job names."""

    def release(self, intents: Sequence[WriteIntent]) -> list[bool]:
        """End finished writes; whether each was still admitted."""

    def abandon(self, intents: Sequence[WriteIntent]) -> None:
        """Leave writes to their leases, whose requests may still run on the server: not even another attempt
        of the delivery ends them."""

    def close(self) -> None:
        """Drop the connection."""


class RebuildLease(NamedTuple):
    """A rebuild that this process owns: its epoch, and the fields that the last process saved."""

    epoch: int
    fields: Mapping[str, str]


class Rebuilds(Protocol):
    """Port of rebuilds: one at a time for each collection, its state, and the ids written meanwhile.

    Every method raises StoreUnavailable where the job store does not answer. Methods with an `epoch` raise
    Fenced where another process has taken over the rebuild.
    """

    def begin(self, collection: str, owner: str, lease_ms: int) -> RebuildLease | str:
        """Take over the rebuild of a collection; returns its present owner where that one's lease runs.

        The same owner takes it over at once.
        """

    def save(
        self,
        collection: str,
        epoch: int,
        fields: Mapping[str, str],
        *,
        lease_ms: int,
        shut_ms: int | None = None,
        journal: bool | None = None,
    ) -> None:
        """Save fields and renew the lease. `shut_ms`: admit no new write for so long; 0 admits them again.

        `journal`: True records written ids from now on, False stops that and forgets them. If the field
        `live_model` is set, only vectors of that model are admitted.
        """

    def writers(self, collection: str) -> int:
        """Number of admitted writes that have not ended."""

    def changed(self, collection: str, done: Sequence[str], limit: int) -> list[str]:
        """Some ids that were written since the journal began. `done`: processed ids of earlier answers."""

    def state(self, collection: str) -> dict[str, str]:
        """All fields of a rebuild; empty where there was none."""

    def close(self) -> None:
        """Drop the connection."""
