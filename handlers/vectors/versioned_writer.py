"""Writes rows to the vector store so that an older version never covers a newer one or brings its rows back.

Every writer to a collection goes through here, versioned or not: a rebuild learns by it what changes.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jobworker.worker import StoreUnavailable

from ..jobstore.fence import Fence, WriteAdmission, WriteIntent
from . import schema as scalars
from .ports import AnyRow, TransientStoreError, VectorStore

log = logging.getLogger("jobworker.versions")

T = TypeVar("T")

# One request to the store at a time, so that the lease can be renewed between them.
PART_ROWS, PART_BYTES = 500, 16 * 1024 * 1024
# The lease is renewed once this much of it is gone: a read and a write of 30 s each still fit behind it.
RENEW_AFTER_S = 10.0
# How often one that must wait asks again; a write takes some 10 to 100 ms.
POLL_S = 0.02
# A worker that died while it wrote is heard of within 2 s and its job run again, which frees what it held;
# after this the job is tried again later instead of keeping this worker.
WAIT_S = 20.0


class Contended(Exception):
    """Another job held the same rows or chapters for too long: worth another try."""


class VersionedRows(NamedTuple):
    """The rows that one job writes. `version` None: no fence, the last to write wins.

    `owner` names the job: every try of it gives the same. `replace`: rows of the chapters in `rows` with an
    older version whose ids are not in `rows` are removed once these are in.
    """

    owner: str
    rows: Sequence[AnyRow]
    version: int | None = None
    replace: bool = False


class VersionedWriter:
    """Used by one thread. `model` names what makes the vectors; `sleep` and `mono_s` are for tests."""

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

    def write(self, collection: str, editions: Sequence[VersionedRows]) -> None:
        """Write all editions; what a newer version has made obsolete is left out without an error.

        Raises what the store raises, TransientStoreError where the job store does not answer or the
        collection is closed for long, Contended where others hold the same rows for too long. Repeat the
        whole call then: some rows may be in.
        """
        waiting = [self._begin(collection, edition) for edition in editions if edition.rows]
        give_up_at = self._mono_s() + WAIT_S
        while waiting:
            # The newest first: what it makes obsolete is then not written at all.
            order = sorted(waiting, key=lambda write: -(write.edition.version or 0))
            admitted = self._admit(order)
            if admitted:
                self._write(collection, [write for write in waiting if write in admitted])
                waiting = [write for write in waiting if write not in admitted]
            elif self._mono_s() > give_up_at:
                raise _blocked(collection, waiting)
            else:
                self._sleep(POLL_S)

    def _begin(self, collection: str, edition: VersionedRows) -> "_Write":
        ids = tuple(dict.fromkeys(row.id for row in edition.rows))
        chapters = {_chapter(row): None for row in edition.rows if _chapter_id(row)}
        fenced = edition.version is not None
        held = (*(f"i/{id_}" for id_ in ids), *(f"c/{chapter}" for chapter in chapters)) if fenced else ()
        return _Write(
            edition,
            WriteIntent(
                self._prefix + collection,
                os.urandom(8).hex(),
                f"{edition.owner}@{edition.version}",
                ids,
                held,
                tuple(chapters) if fenced else (),
                self._model,
            ),
        )

    def _admit(self, writes: Sequence["_Write"]) -> list["_Write"]:
        answers = self._told(lambda: self._fence.admit([write.intent for write in writes]))
        for write, answer in zip(writes, answers, strict=True):
            write.answer = answer
            if answer.verdict == "model":
                raise TransientStoreError(
                    f"{write.intent.collection} was rebuilt with the model {answer.model}, this service "
                    f"embeds with {self._model}: start it with --model {answer.model}"
                )
        return [write for write in writes if write.answer.verdict == "in"]

    def _write(self, collection: str, writes: Sequence["_Write"]) -> None:
        """Write what was let in. Where a request may still be on its way, its lease is left to run out."""
        round_ = _Round(self, collection, writes)
        try:
            round_.run()
        except (TransientStoreError, Contended):
            raise
        except BaseException:
            self._told(lambda: self._fence.release([write.intent for write in writes]))
            raise
        self._told(lambda: self._fence.release([write.intent for write in writes]))

    def _told(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except StoreUnavailable as error:
            raise TransientStoreError(str(error)) from error


@dataclass(eq=False)
class _Write:
    """One edition on its way."""

    edition: VersionedRows
    intent: WriteIntent
    answer: WriteAdmission = field(default_factory=lambda: WriteAdmission("closed"))


class _Round:
    """Editions that hold all they need, written together."""

    def __init__(self, writer: VersionedWriter, collection: str, writes: Sequence[_Write]) -> None:
        self._writer, self._store, self._collection = writer, writer._store, collection
        self._writes = writes
        self._mono_renewed_s = writer._mono_s()

    def run(self) -> None:
        rows = [row for write in self._writes for row in self._current(write)]
        for part in scalars.batches(rows, PART_ROWS, PART_BYTES):
            self._renew()
            self._store.upsert(self._collection, part)
        for write in self._writes:
            if write.edition.replace:
                self._remove_older(write)

    def _renew(self) -> None:
        """Renew the lease before it expires. Raises Contended if it was lost and others may be writing."""
        if self._writer._mono_s() - self._mono_renewed_s < RENEW_AFTER_S:
            return
        self._mono_renewed_s = self._writer._mono_s()
        if len(self._writer._admit(self._writes)) < len(self._writes):
            raise Contended(f"{self._collection}: the write took so long that another one began")

    def _current(self, write: _Write) -> Sequence[AnyRow]:
        """The rows that nothing newer has come before."""
        edition, version = write.edition, write.edition.version
        if version is None:
            return edition.rows
        min_versions = write.answer.min_versions
        rows = [row for row in edition.rows if min_versions.get(_chapter(row), version) <= version]
        has = self._versions(rows)
        current = [row for row in rows if has.get(row.id, version) <= version]
        if len(current) < len(edition.rows):
            left = len(edition.rows) - len(current)
            log.info("rows.stale_skipped", extra={"owner": edition.owner, "version": version, "rows": left})
        return current

    def _versions(self, rows: Sequence[AnyRow]) -> dict[str, int]:
        self._renew()
        ids: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            ids.setdefault(scalars.owner(row), []).append(row.id)
        found: dict[str, int] = {}
        for (tenant, project), some in ids.items():
            found |= self._store.versions(self._collection, some, tenant_id=tenant, project_id=project)
        return found

    def _remove_older(self, write: _Write) -> None:
        """Remove what the chapters had before. The floor is raised first: a row that goes stays away."""
        version, min_versions = write.edition.version, write.answer.min_versions
        assert version is not None
        kept = {row.id for row in write.edition.rows}
        for name, (tenant, project, chapter) in _chapters(write.edition.rows).items():
            if min_versions.get(name, version) > version:
                continue
            scope: Any = {"tenant_id": tenant, "project_id": project}
            self._renew()
            has = self._store.chapter_versions(self._collection, chapter, **scope)
            # The summary is a row of the chapter too, with a version of its own.
            others = kept | {f"summary:{chapter}"}
            gone = [id_ for id_, its in has.items() if its < version and id_ not in others]
            self._note(write, gone, {name: version})
            if gone:
                self._store.delete(self._collection, gone, **scope)
                fields = {"owner": write.edition.owner, "chapter_id": chapter, "rows": len(gone)}
                log.info("rows.removed", extra=fields)
                # Removed rows are recorded before and after, like written ones.
                self._note(write, gone, {})

    def _note(self, write: _Write, gone: Sequence[str], min_versions: dict[str, int]) -> None:
        self._writer._told(lambda: self._writer._fence.record_removal(write.intent, gone, min_versions))


def _chapter_id(row: AnyRow) -> str:
    return getattr(row, "chapter_id", "")


def _chapter(row: AnyRow) -> str:
    """A chapter's name among all tenants; no id holds a slash."""
    return f"{row.tenant_id}/{row.project_id}/{_chapter_id(row)}"


def _chapters(rows: Sequence[AnyRow]) -> dict[str, tuple[str, str, str]]:
    return {
        _chapter(row): (row.tenant_id, row.project_id, _chapter_id(row)) for row in rows if _chapter_id(row)
    }


def _blocked(collection: str, waiting: Sequence[_Write]) -> Exception:
    if any(write.answer.verdict == "closed" for write in waiting):
        return TransientStoreError(f"{collection} is closed while a rebuild takes its place")
    owners = ", ".join(write.edition.owner for write in waiting[:3])
    return Contended(f"{collection}: others hold the same rows for more than {WAIT_S:.0f} s ({owners})")
