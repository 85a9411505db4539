"""The port by which all who write to a collection, on every host, keep out of each other's way.

A vector store has no compare-and-set. So a writer asks for admission first: a write with a version holds its
ids and chapters, and every write is known while it runs, so that a rebuild
can write down what changes and wait for the last of them. Each step is one atomic step of the job store.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

#: A write that was not ended is taken for dead after this. It is renewed before each part of a write, which
#: is a read and a write of at most 30 s each; half as much again is for what is still on its way.
LEASE_MS = 90_000


class WriteIntent(NamedTuple):
    """What one job is about to write.

    `token` is of this attempt alone, `owner` of every attempt of the job. `held`: what no other writer may
    write meanwhile, empty for a write without a version. `ids`: every row it touches. `model`: what made its
    vectors, empty where that does not matter.
    """

    collection: str
    token: str
    owner: str
    ids: tuple[str, ...]
    held: tuple[str, ...] = ()
    chapters: tuple[str, ...] = ()
    model: str = ""


class WriteAdmission(NamedTuple):
    """Whether a write may begin: `in`, `held` (another has what it wants), `closed` (for all), or `model`
    (the collection was rebuilt with another one).

    `min_versions`: for each chapter that was replaced once, the version that it was last replaced by.
    """

    verdict: Literal["in", "held", "closed", "model"]
    min_versions: Mapping[str, int] = {}
    model: str = ""


class Fence(Protocol):
    """Every method raises StoreUnavailable where the job store does not answer."""

    def admit(self, intents: Sequence[WriteIntent]) -> list[WriteAdmission]:
        """Admit writes, each wholly or not at all. For an admitted write it renews the lease."""

    def record_removal(
        self, intent: WriteIntent, gone: Sequence[str], min_versions: Mapping[str, int]
    ) -> None:
        """Before rows are removed: set the minimum versions of the held chapters, record the removed ids."""

    def release(self, intents: Sequence[WriteIntent]) -> None:
        """End writes that are finished; those that may still be on their way are left to their lease."""

    def close(self) -> None:
        """Drop the connection."""


class RebuildLease(NamedTuple):
    """A rebuild that is ours: what the last process left of it, as text by field."""

    epoch: int
    fields: Mapping[str, str]


class Rebuilds(Protocol):
    """One rebuild a collection at a time, its state, and what was written meanwhile.

    Every method raises StoreUnavailable where the job store does not answer, those with an `epoch` raise
    Fenced where another process has taken the rebuild over.
    """

    def begin(self, collection: str, owner: str, lease_ms: int) -> RebuildLease | str:
        """Take a collection's rebuild, or say who has it. The same owner takes it from itself at once."""

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

        `journal`: write down from now on which ids are written, or forget them and stop. The field
        `live_model` names the one model whose vectors are let in, if any is named.
        """

    def writers(self, collection: str) -> int:
        """How many writes are under way."""

    def changed(self, collection: str, done: Sequence[str], limit: int) -> list[str]:
        """Some ids written since the journal began; `done`: those of earlier answers that are seen to."""

    def state(self, collection: str) -> dict[str, str]:
        """All fields of a rebuild, for reading; empty where there is none."""

    def close(self) -> None:
        """Drop the connection."""
