"""Versioned upserts: an older version never overwrites rows of a newer one and never restores removed rows.

Every write to a collection uses this module, with or without a version: a rebuild learns from the fence which
rows change meanwhile, and work that is older than a deletion is not stored.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jobworker.worker import RateLimited, StoreUnavailable, report_progress

from ..jobstore.erasures import Scope, chapter_name, id_name, owner_names
from ..jobstore.fence import Fence, WriteAdmission, WriteIntent
from . import schema as schemas
from .ports import AnyRow, CollectionUnavailable, EntityRow, TransientStoreError, VectorStore

log = logging.getLogger("jobworker.versions")

T = TypeVar("T")

# Age at which the lease is renewed: a read and a write of 30 s each still fit into the rest of it.
RENEW_AFTER_S = 10.0
# Interval between two tries for admission at first: a write takes about 10 to 100 ms. Later the holder is
# slow or dead, and all waiting workers together would keep the job store busy.
POLL_S, FAST_POLLS_S, SLOW_POLL_S = 0.02, 1.0, 0.1
# Longest wait in the worker, for a closed collection and for rows that one job after another writes.
WAIT_S = 20.0
# A job that holds rows and was not admitted again for this long is slow or dead. Who waits for it gives the
# worker back: only the next try of a dead job frees its rows, and that try may need this worker.
SILENT_S = 1.0
# The same for rows that are being deleted, which may take minutes, and the wait outside the worker then.
ERASING_WAIT_S, AFTER_ERASING_S = 1.0, 3.0
# Wait outside the worker for another holder: half of the time that it was silent, within these limits.
AGAIN_S = (0.5, 5.0)

# Used instead of a chapter where entities of a project are replaced; no id contains it.
PROFILES = "*"


class LeaseLost(Exception):
    """The lease expired during a slow write, and another job took the rows: worth a retry."""


class VersionedRows(NamedTuple):
    """The rows that one job writes. With `version` None nothing is compared: the last write wins.

    `owner` names the job, and is the same in every retry. All rows belong to one tenant and project. With
    `replace`, rows of the same chapters are removed after the write, if they have an older version and an id
    that is not in `rows`. `delivery` names the stream entry that is run, if the job has one.
    """

    owner: str
    rows: Sequence[AnyRow]
    version: int | None = None
    replace: bool = False
    delivery: str = ""


class Contended(RateLimited):
    """Other jobs hold the same rows or chapters: the job waits outside the worker, and no retry is used up.

    `deliveries` names the writes that were not done, as `VersionedRows` does.
    """

    def __init__(self, message: str, after_s: float, deliveries: frozenset[str]) -> None:
        super().__init__(after_s, key="job")
        self.args = (message,)
        self._deliveries = deliveries

    def concerns(self, rows: VersionedRows) -> bool:
        """Whether these rows were not written."""
        return not rows.delivery or rows.delivery in self._deliveries or "" in self._deliveries


class VersionedWriter:
    """Upserts under the write fence. Not thread-safe.

    `model` names the model of the vectors; `sleep` and `mono_s` are for tests.
    """

    def __init__(
        self,
        store: VectorStore,
        fence: Fence,
        *,
        prefix: str,
        model: str = "",
        mono_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._fence, self._prefix, self._model = store, fence, prefix, model
        self._mono_s, self._sleep = mono_s, sleep
        self._adopted: set[str] = set()

    def write(self, collection: str, jobs: Sequence[VersionedRows]) -> None:
        """Write the rows of several jobs; silently leaves out rows that a newer version has superseded, and
        those that were deleted after their job was created.

        Raises the errors of the store, TransientStoreError if the job store does not answer or the collection
        stays closed, LeaseLost, and Contended if other jobs hold the same rows for too long. Repeat the whole
        call then: some rows may be stored. With Contended, only the jobs that it names have to be repeated.
        """
        if collection not in schemas.SCHEMAS and collection not in self._adopted:
            self._call_fence(lambda: self._fence.adopt(self._prefix + collection))
            self._adopted.add(collection)
        waiting = [self._pending_write(collection, rows) for rows in jobs if rows.rows]
        mono_start_s = self._mono_s()
        while waiting:
            # The newest first: rows that it supersedes are then not written at all.
            newest_first = sorted(waiting, key=lambda write: -(write.job.version or 0))
            admitted = self._admit(collection, newest_first)
            if admitted:
                self._write_admitted(collection, [write for write in waiting if write in admitted])
                waiting = [write for write in waiting if write not in admitted]
            erased = [write for write in waiting if not write.job.rows]
            if erased:
                self._release(erased)
                waiting = [write for write in waiting if write not in erased]
            if admitted or erased or any(write.admission.verdict == "hold" for write in waiting):
                continue
            self._pause(collection, waiting, mono_start_s, gives_back=True)

    @contextmanager
    def admitted(self, collection: str, intent: WriteIntent) -> Iterator[frozenset[str]]:
        """Admit a change of records that belong to rows; gives the scopes of it that were deleted.

        `intent` needs no collection, token and model. Raises as `write` does, and the errors of the body.
        """
        intent = intent._replace(collection=self._prefix + collection, token=os.urandom(8).hex())
        write = _PendingWrite(VersionedRows(intent.owner, ()), intent)
        mono_start_s = self._mono_s()
        while not self._admit(collection, [write]):
            if write.admission.verdict != "hold":
                # The caller may have asked a language model: patience costs less than another question.
                self._pause(collection, [write], mono_start_s, gives_back=False)
        try:
            yield write.admission.erased
        except StoreUnavailable:
            self._abandon([write])
            raise
        except BaseException:
            self._release([write])
            raise
        self._release([write])

    def _pause(
        self, collection: str, waiting: Sequence["_PendingWrite"], mono_start_s: float, *, gives_back: bool
    ) -> None:
        """Sleep until the next try for admission.

        Raises TransientStoreError or Contended after the longest wait; with `gives_back` Contended as soon as
        all the writes wait for holders that are silent.
        """
        waited_s = self._mono_s() - mono_start_s
        is_stuck = gives_back and all(_is_stuck(write.admission, waited_s) for write in waiting)
        if is_stuck or waited_s > WAIT_S:
            raise _timeout_error(collection, waiting)
        self._sleep(POLL_S if waited_s < FAST_POLLS_S else SLOW_POLL_S)

    def _pending_write(self, collection: str, job: VersionedRows) -> "_PendingWrite":
        ids = tuple(dict.fromkeys(row.id for row in job.rows))
        chapters = {_chapter_name(row): None for row in job.rows if _chapter_id(row)}
        versioned = job.version is not None
        held = (*_held_ids(ids), *(f"c/{chapter}" for chapter in chapters)) if versioned else ()
        tenant, project = schemas.owner(job.rows[0])
        intent = WriteIntent(
            self._prefix + collection,
            os.urandom(8).hex(),
            f"{job.owner}@{job.version}",
            ids,
            held,
            tuple(chapters),
            self._model,
            tenant,
            project,
            min(row.created_us for row in job.rows),
            job.delivery,
        )
        return _PendingWrite(job, intent)

    def _admit(self, collection: str, writes: Sequence["_PendingWrite"]) -> list["_PendingWrite"]:
        admissions = self._call_fence(lambda: self._fence.admit([write.intent for write in writes]))
        for write, admission in zip(writes, admissions, strict=True):
            write.admission = admission
            if admission.verdict == "model":
                # The default collections serve all tenants, so a wrong model there is a fault of the service.
                kind = TransientStoreError if collection in schemas.SCHEMAS else CollectionUnavailable
                raise kind(
                    f"{write.intent.collection} was rebuilt with the model {admission.model}, this service "
                    f"embeds with {self._model}: start it with --model {admission.model}"
                )
            write.leave_out_erased()
            if admission.verdict == "hold":
                write.intent = write.intent._replace(held=_held_ids(write.intent.ids))
        return [write for write in writes if write.admission.verdict == "in"]

    def _write_admitted(self, collection: str, writes: Sequence["_PendingWrite"]) -> None:
        """Write, then release. After an error that leaves a request under way, the lease has to expire."""
        rows = {write.intent.token: len(write.job.rows) for write in writes}
        try:
            _WriteRound(self, collection, writes).run()
        except (TransientStoreError, LeaseLost):
            self._abandon(writes)
            raise
        except BaseException:
            self._release(writes)
            raise
        for write, still_admitted in zip(writes, self._release(writes), strict=True):
            if not still_admitted or len(write.job.rows) < rows[write.intent.token]:
                self._remove_erased(collection, write.all_rows)

    def _release(self, writes: Sequence["_PendingWrite"]) -> list[bool]:
        return self._call_fence(lambda: self._fence.release([write.intent for write in writes]))

    def _abandon(self, writes: Sequence["_PendingWrite"]) -> None:
        with suppress(StoreUnavailable):
            self._fence.abandon([write.intent for write in writes])

    def _remove_erased(self, collection: str, rows: Sequence[AnyRow]) -> None:
        """Remove the rows of a write that a deletion may not have waited for: its lease was over."""
        write = self._pending_write(collection, VersionedRows(f"late-{os.urandom(8).hex()}", rows))
        write.intent = write.intent._replace(held=_held_ids(write.intent.ids), model="")
        mono_start_s = self._mono_s()
        while not self._admit(collection, [write]):
            self._pause(collection, [write], mono_start_s, gives_back=False)
        kept = {row.id for row in write.job.rows}
        ids = tuple(row.id for row in rows if row.id not in kept)
        tenant, project = schemas.owner(rows[0])
        after = ""
        while ids and (
            page := self._store.scan(
                collection, Scope(tenant, project, ids=ids), after, schemas.MAX_REQUEST_ROWS
            )
        ):
            late = [row.id for row in page if row.created_us <= write.intent.created_us]
            self._store.delete(collection, late, tenant_id=tenant, project_id=project)
            after = page[-1].id
        self._release([write])

    def _call_fence(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except StoreUnavailable as error:
            raise TransientStoreError(str(error)) from error


@dataclass(eq=False)
class _PendingWrite:
    """The rows of a job and the latest answer of the fence."""

    job: VersionedRows
    intent: WriteIntent
    admission: WriteAdmission = field(default_factory=lambda: WriteAdmission("closed"))
    all_rows: Sequence[AnyRow] = field(init=False)

    def __post_init__(self) -> None:
        self.all_rows = self.job.rows

    def leave_out_erased(self) -> None:
        """Keep the rows that no deletion after the creation of the job names."""
        erased = self.admission.erased
        if not erased:
            return
        rows = [row for row in self.job.rows if erased.isdisjoint(_erasable_as(row))]
        if left_out := len(self.job.rows) - len(rows):
            log.info("rows.erased_skipped", extra={"owner": self.job.owner, "rows": left_out})
            self.job = self.job._replace(rows=rows)


class _WriteRound:
    """Admitted writes that share requests to the store."""

    def __init__(self, writer: VersionedWriter, collection: str, writes: Sequence[_PendingWrite]) -> None:
        self._writer, self._store, self._collection = writer, writer._store, collection
        self._writes = writes
        self._mono_renewed_s = writer._mono_s()

    def run(self) -> None:
        rows = [row for write in self._writes for row in self._current_rows(write)]
        # One request a call, so that the lease can be renewed in between.
        for request in schemas.requests(rows):
            self._renew_lease()
            self._store.upsert(self._collection, self._not_erased(request))
            report_progress()
        for write in self._writes:
            if write.job.replace:
                self._remove_older(write)

    def _not_erased(self, rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
        """The rows that no deletion has named meanwhile: it waits for this write."""
        if not any(write.admission.erased for write in self._writes):
            return rows
        left = {id(row) for write in self._writes for row in write.job.rows}
        return [row for row in rows if id(row) in left]

    def _renew_lease(self) -> None:
        """Renew the lease before it expires. Raises LeaseLost if it was lost and others may be writing."""
        if self._writer._mono_s() - self._mono_renewed_s < RENEW_AFTER_S:
            return
        self._mono_renewed_s = self._writer._mono_s()
        if len(self._writer._admit(self._collection, self._writes)) < len(self._writes):
            raise LeaseLost(f"{self._collection}: the lease expired during a slow write and was taken")

    def _current_rows(self, write: _PendingWrite) -> Sequence[AnyRow]:
        """The rows that no newer version has superseded."""
        job, version = write.job, write.job.version
        if version is None:
            return job.rows
        min_versions = write.admission.min_versions
        rows = [row for row in job.rows if min_versions.get(_chapter_name(row), version) <= version]
        stored = self._stored_versions(rows)
        current = [row for row in rows if stored.get(row.id, version) <= version]
        if len(current) < len(job.rows):
            stale = len(job.rows) - len(current)
            log.info("rows.stale_skipped", extra={"owner": job.owner, "version": version, "rows": stale})
        return current

    def _stored_versions(self, rows: Sequence[AnyRow]) -> dict[str, int]:
        self._renew_lease()
        ids: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            ids.setdefault(schemas.owner(row), []).append(row.id)
        versions: dict[str, int] = {}
        for (tenant, project), own_ids in ids.items():
            versions |= self._store.versions(self._collection, own_ids, tenant_id=tenant, project_id=project)
        return versions

    def _remove_older(self, write: _PendingWrite) -> None:
        """Remove older rows of the chapters. Their minimum version is set first, so none of them returns."""
        version, min_versions = write.job.version, write.admission.min_versions
        assert version is not None
        written = {row.id for row in write.job.rows}
        for name, (tenant, project, chapter) in _chapters(write.job.rows).items():
            if min_versions.get(name, version) > version:
                continue
            scope: Any = {"tenant_id": tenant, "project_id": project}
            self._renew_lease()
            stored = (
                self._profile_versions(tenant, project)
                if chapter == PROFILES
                else self._store.chapter_versions(self._collection, chapter, **scope)
            )
            # The summary is a row of the chapter too, with a version of its own.
            preserved = written | {schemas.SUMMARY_PREFIX + chapter}
            older = [id_ for id_, its in stored.items() if its < version and id_ not in preserved]
            self._record_removal(write, older, {name: version})
            if older:
                self._store.delete(self._collection, older, **scope)
                fields = {"owner": write.job.owner, "chapter_id": chapter, "rows": len(older)}
                log.info("rows.removed", extra=fields)
                # Removed rows are recorded before and after, like written ones.
                self._record_removal(write, older, {})

    def _profile_versions(self, tenant_id: str, project_id: str) -> dict[str, int]:
        """As `chapter_versions`, of the entities of a project that were sent and not found in chapters."""
        after, versions = "", dict[str, int]()
        while page := self._store.scan(
            self._collection, Scope(tenant_id, project_id), after, schemas.MAX_REQUEST_ROWS
        ):
            ids = [row.id for row in page if row.id.startswith(schemas.PROFILE_PREFIX)]
            versions |= self._store.versions(
                self._collection, ids, tenant_id=tenant_id, project_id=project_id
            )
            after = page[-1].id
        return versions

    def _record_removal(self, write: _PendingWrite, ids: Sequence[str], min_versions: dict[str, int]) -> None:
        fence = self._writer._fence
        self._writer._call_fence(lambda: fence.record_removal(write.intent, ids, min_versions))


def _chapter_id(row: AnyRow) -> str:
    """The chapter, or what takes its place: entities that were sent are replaced together."""
    if isinstance(row, EntityRow):
        return PROFILES if row.id.startswith(schemas.PROFILE_PREFIX) else ""
    return row.chapter_id


def _chapter_name(row: AnyRow) -> str:
    """Name of a chapter that is unique among all tenants; no id contains a slash."""
    return f"{row.tenant_id}/{row.project_id}/{_chapter_id(row)}"


def _erasable_as(row: AnyRow) -> tuple[str, ...]:
    """Names of the tombstones that cover a row."""
    scope = schemas.owner(row)
    return (
        *owner_names(*scope),
        id_name(*scope, row.id),
        *([chapter_name(*scope, _chapter_id(row))] if _chapter_id(row) else ()),
    )


def _held_ids(ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"i/{id_}" for id_ in ids)


def _chapters(rows: Sequence[AnyRow]) -> dict[str, tuple[str, str, str]]:
    return {
        _chapter_name(row): (row.tenant_id, row.project_id, _chapter_id(row))
        for row in rows
        if _chapter_id(row)
    }


def _is_stuck(admission: WriteAdmission, waited_s: float) -> bool:
    """Whether a write waits for a job that is not known to make progress."""
    if admission.verdict != "held":
        return False
    return admission.silent_s >= SILENT_S or (not admission.silent_s and waited_s >= ERASING_WAIT_S)


def _timeout_error(collection: str, waiting: Sequence[_PendingWrite]) -> Exception:
    if any(write.admission.verdict == "closed" for write in waiting):
        return TransientStoreError(f"{collection} is closed while a rebuild takes its place")
    owners = ", ".join(write.job.owner for write in waiting[:3])
    shortest_s, longest_s = AGAIN_S
    silent_s = max(write.admission.silent_s for write in waiting)
    return Contended(
        f"{collection}: other jobs hold the same rows ({owners})",
        max(shortest_s, min(silent_s / 2, longest_s)) if silent_s else AFTER_ERASING_S,
        frozenset(write.job.delivery for write in waiting),
    )
