"""Deletions of scopes: names of their tombstones, and the port by which a deletion excludes older writes.

A tombstone holds the time of a deletion. Work that was created at this time or earlier is not stored. It is
recorded before the first row is removed, and outlives the longest retry.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

from jobworker.worker import Job

#: Lease of a running deletion; it is renewed every few seconds.
ERASING_MS = 30_000
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


class Scope(NamedTuple):
    """What is deleted: a tenant (no project), a project, or chapters or rows of a project."""

    tenant_id: str
    project_id: str = ""
    chapter_ids: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is all of a tenant or project."""
        return not self.chapter_ids and not self.ids

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tombstones."""
        if self.ids:
            return tuple(id_name(self.tenant_id, self.project_id, id_) for id_ in self.ids)
        if self.chapter_ids:
            return tuple(chapter_name(self.tenant_id, self.project_id, name) for name in self.chapter_ids)
        return (owner_names(self.tenant_id, self.project_id)[1 if self.project_id else 0],)


def owner_names(tenant_id: str, project_id: str) -> tuple[str, str]:
    """Tombstones of a tenant and of a project; no id contains a slash."""
    return f"t/{tenant_id}", f"p/{tenant_id}/{project_id}"


def chapter_name(tenant_id: str, project_id: str, chapter_id: str) -> str:
    """Tombstone of a chapter."""
    return f"c/{tenant_id}/{project_id}/{chapter_id}"


def id_name(tenant_id: str, project_id: str, row_id: str) -> str:
    """Tombstone of a row."""
    return f"i/{tenant_id}/{project_id}/{row_id}"


def cache_name(tenant_id: str, project_id: str, chapter_id: str) -> str:
    """Cached vectors of a chapter, of which single rows were deleted."""
    return f"k/{tenant_id}/{project_id}/{chapter_id}"


class Tombstones(NamedTuple):
    """Tombstones of one deletion in one collection: their names and time. `owner` is the job."""

    collection: str
    owner: str
    names: Sequence[str]
    cutoff_us: int


class Erasures(Protocol):
    """Port of deletions. Every method raises StoreUnavailable where the job store does not answer."""

    def record(self, tombstones: Tombstones, *, ttl_ms: int, exclusive: bool) -> Mapping[str, int] | None:
        """Record tombstones and renew the lease of the deletion; None while another one has the same scope.

        Returns the writes that are admitted: token -> when its job was created (0: unknown). `exclusive`:
        admit no newer work of the scope either; else newer work is admitted if it holds its ids. Tombstones
        older than `ttl_ms` are forgotten.
        """

    def writing(self, collection: str) -> frozenset[str]:
        """Tokens of the writes that are admitted."""

    def forget(self, collection: str, scope: Scope, cutoff_us: int) -> None:
        """Forget the minimum versions of the chapters of a scope, and who held them. Only while the deletion
        is exclusive and no older write is admitted. What a job after `cutoff_us` has set stays."""

    def finish(self, collection: str, owner: str) -> None:
        """End the deletion of a job: admit newer work as usual again. The tombstones stay.

        What dead writes held is forgotten too.
        """

    def publish(self, published: "Published", ttl_ms: int) -> None:
        """Tell all hosts what is deleted: their vector caches, and collections that are adopted later."""

    def published(self, after: str) -> list["Published"]:
        """What was published after an entry; `after` is the id of an earlier answer, or empty."""

    def adopt(self, collection: str) -> None:
        """Register a collection before its first write, and record the tombstones of all deletions there."""

    def adopted(self) -> list[str]:
        """The collections that were registered."""

    def copying(self, collection: str) -> str:
        """Names the rows that a running rebuild has read and not written yet; empty if there are none."""

    def state(self, collection: str) -> dict[str, str]:
        """As `Rebuilds.state`."""

    def close(self) -> None:
        """Drop the connection."""


class Published(NamedTuple):
    """One entry of the log of deletions.

    `names`: of tombstones, or of parts of the cache (`cache_name`). `collections`: full names, or a prefix
    with `*` behind it for all that begin so.
    """

    names: tuple[str, ...]
    cutoff_us: int
    collections: tuple[str, ...]
    id: str = ""

    def concerns(self, collection: str) -> bool:
        """Whether the deletion covers a collection (full name)."""
        return any(
            collection.startswith(one[:-1]) if one.endswith("*") else collection == one
            for one in self.collections
        )


def created_us(job: Job) -> int:
    """When a job was created, in unix microseconds: what tells work that is older than a deletion from newer.

    Retries, delays and requeued dead letters keep `created_at`. It counts only up to the time of the stream
    entry, which the server's clock gave, so that a producer's fast clock does not make old work new. The
    entry's time replaces a missing or invalid one.
    """
    entry_ms = job.entry_id.partition("-")[0]
    entered_us = int(entry_ms) * 1000 if entry_ms.isdecimal() else 0
    try:
        created = datetime.fromisoformat(job.created_at)
        # Go writes the year 1 for a time never set.
        stated_us = (created - _EPOCH) // _MICROSECOND if created.tzinfo else 0
    except ValueError:
        stated_us = 0
    return min(filter(lambda us: us > 0, (stated_us, entered_us)), default=0)
