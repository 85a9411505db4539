"""Deletion of a scope: tombstones first, then the wait for older writes, then rows and records.

The order makes every step repeatable, and leaves no row in any order of events:

1. Tombstones: from now on no work that is older than the deletion is admitted.
2. Wait until the writes that were admitted before have ended. Newer work of the scope waits meanwhile.
3. Delete old rows. Their ids are held, so that newer work does not write them at the same moment.
4. Delete the records, and the rows that a running rebuild has copied.

After a kill the next attempt repeats all steps.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jobworker.worker import report_progress

from ..jobstore.erasures import Erasures, Published, Scope, Tombstones, cache_name
from ..jobstore.fence import Fence, WriteIntent
from ..jobstore.records import FoundRecords, RecordKey, Records
from ..vectors.ports import StoredRow, TransientStoreError, VectorStore
from ..vectors.schema import (
    DEFAULT_COLLECTION,
    ENTITIES_COLLECTION,
    FOUND_PREFIX,
    PROFILE_PREFIX,
    SCHEMAS,
    SUMMARY_PREFIX,
    entity_row_id,
)

#: Rows of one step: they are held, read again, and deleted.
PAGE_ROWS = 500
#: Interval of polls; writes take 10 to 100 ms.
POLL_S = 0.05
#: After this, rows are deleted although older writes have not ended: their workers may be dead.
EARLY_S = 2.0
#: Age at which the lease of the deletion is renewed; a step takes less than the rest of it.
RENEW_AFTER_S = 5.0
#: Longest wait for rows that another job holds, and for a rebuild that has paused writes (45 s if it died).
WAIT_S = 60.0


class Busy(Exception):
    """Another job works on the same rows for too long, or deletes the same scope: worth a retry."""


class EraseRequest(NamedTuple):
    """One deletion: the job, what, until when it was created, and plain names of collections (none: all)."""

    owner: str
    scope: Scope
    cutoff_us: int
    collections: tuple[str, ...] = ()


class Erased(NamedTuple):
    """How many rows, by collection, and records were deleted; of a dry run, how many there are."""

    rows: dict[str, int]
    summaries: int
    entities: int


class Eraser:
    """Deletes scopes. Every method raises the errors of the stores; one thread uses an object."""

    def __init__(
        self,
        store: VectorStore,
        fence: Fence,
        erasures: Erasures,
        records: Records,
        *,
        prefix: str,
        ttl_ms: int,
        mono_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store, self.fence, self.erasures, self.records = store, fence, erasures, records
        self.prefix, self.ttl_ms = prefix, ttl_ms
        self.mono_s, self.sleep = mono_s, sleep

    def erase(self, request: EraseRequest) -> Erased:
        """Delete; repeatable. Raises Busy if other jobs are in the way for too long."""
        return _Erasure(self, request).run()

    def count(self, request: EraseRequest) -> Erased:
        """What `erase` would delete; without an effect."""
        rows = {
            name: sum(len(page) for page in self.pages(name, scope_of(name, request.scope)))
            for name in self.collections(request)
        }
        found = self.find_records(request)
        return Erased(rows, len(found.summaries), len(found.entities))

    def collections(self, request: EraseRequest) -> list[str]:
        """Existing collections with rows of tenants, by plain name; those of the request if it names some."""
        existing = self.store.collections()
        return [name for name in existing if name in request.collections or not request.collections]

    def pages(self, name: str, scope: Scope) -> Iterator[list[StoredRow]]:
        """The rows of a scope, page by page."""
        after = ""
        while page := self.store.scan(name, scope, after, PAGE_ROWS):
            yield page
            after = page[-1].id

    def find_records(self, request: EraseRequest) -> FoundRecords:
        """The records of the scope that belong to the collections of the request."""
        found = self._records_of_rows(request) if request.scope.ids else self.records.find(request.scope)
        named = request.collections or tuple(SCHEMAS)
        if DEFAULT_COLLECTION not in named:
            found = found._replace(summaries=[])
        if ENTITIES_COLLECTION not in named:
            found = found._replace(entities=[], mentioning=[])
        return found

    def _records_of_rows(self, request: EraseRequest) -> FoundRecords:
        """The records that rows are made from: they would restore the rows."""
        scope = request.scope
        owner = (scope.tenant_id, scope.project_id)
        chapters = [id_.removeprefix(SUMMARY_PREFIX) for id_ in scope.ids if id_.startswith(SUMMARY_PREFIX)]
        entity_ids = dict.fromkeys(scope.ids)
        if ENTITIES_COLLECTION in self.store.collections():
            of_entities = scope_of(ENTITIES_COLLECTION, scope)
            pages = self.pages(ENTITIES_COLLECTION, of_entities)
            entity_ids |= dict.fromkeys(row.entity_id for page in pages for row in page if row.entity_id)
        keys = [RecordKey("summary", *owner, one) for one in chapters]
        entities = [RecordKey("entity", *owner, one) for one in entity_ids]
        return FoundRecords(
            [key for key in keys if self.records.get(key)],
            [key for key in entities if self.records.get(key)],
            [],
        )


def scope_of(collection: str, scope: Scope) -> Scope:
    """The scope within a collection: an id names an entity too, whose rows have other ids."""
    if collection != ENTITIES_COLLECTION or not scope.ids:
        return scope
    owner = (scope.tenant_id, scope.project_id)
    rows = [
        entity_row_id(*owner, id_, prefix) for id_ in scope.ids for prefix in (PROFILE_PREFIX, FOUND_PREFIX)
    ]
    return scope._replace(ids=(*scope.ids, *rows))


class _Erasure:
    """One run of a deletion."""

    def __init__(self, eraser: Eraser, request: EraseRequest) -> None:
        self._eraser, self._request = eraser, request
        self._store, self._fence = eraser.store, eraser.fence
        self._erasures, self._records = eraser.erasures, eraser.records
        self._mono_s, self._sleep = eraser.mono_s, eraser.sleep
        self._tombstones: list[Tombstones] = []
        self._exclusive = True
        self._mono_renewed_s = self._mono_s()
        self._rows: dict[str, int] = {}

    def run(self) -> Erased:
        request, scope = self._request, self._request.scope
        # Published before the collections are listed: a collection that is adopted meanwhile finds it.
        names = scope_of(ENTITIES_COLLECTION, scope).names
        self._publish(names)
        existing = self._eraser.collections(request)
        self._publish_cached(existing)
        self._exclude({name: scope_of(name, scope) for name in self._tombstoned(existing)}, existing)
        found = self._eraser.find_records(request)
        scopes = {name: scope_of(name, scope) for name in existing}
        if scope.chapter_ids and ENTITIES_COLLECTION in scopes:
            del scopes[ENTITIES_COLLECTION]
            if found.entities:
                scopes[ENTITIES_COLLECTION] = self._exclude_entities(found.entities)
        self._publish_cached(existing)
        for tombstones in self._tombstones:
            self._erasures.forget(tombstones.collection, scope, self._request.cutoff_us)
        if scope.ids:
            # Before the rows, which tell the entities. Of chapters the records tell the rows.
            self._discard(found)
        self._exclusive = False
        self._renew(always=True)
        self._sweep(scopes)
        for name, part in scopes.items():
            self._sweep_copies(name, part)
        self._discard(found)
        for collection in {tombstones.collection: None for tombstones in self._tombstones}:
            self._erasures.finish(collection, request.owner)
        return Erased(self._rows, len(found.summaries), len(found.entities))

    def _full(self, name: str) -> str:
        return self._eraser.prefix + name

    def _tombstoned(self, existing: Sequence[str]) -> list[str]:
        """Plain names of the collections that get tombstones: jobs may make them later."""
        if self._request.collections:
            return list(self._request.collections)
        prefix = self._eraser.prefix
        adopted = [name.removeprefix(prefix) for name in self._erasures.adopted() if name.startswith(prefix)]
        return list(dict.fromkeys([*existing, *SCHEMAS, *adopted]))

    # ---- older work

    def _exclude(self, scopes: Mapping[str, Scope], existing: Sequence[str]) -> None:
        """Record tombstones by collection, and wait until the writes admitted before have ended."""
        admitted = {}
        for name, scope in scopes.items():
            tombstones = Tombstones(
                self._full(name), self._request.owner, scope.names, self._request.cutoff_us
            )
            admitted[name] = self._record(tombstones)
            self._tombstones.append(tombstones)
        for name, writes in admitted.items():
            self._wait_for_writes(name, writes, sweeps=name in existing)

    def _record(self, tombstones: Tombstones) -> dict[str, int]:
        writes = self._erasures.record(tombstones, ttl_ms=self._eraser.ttl_ms, exclusive=self._exclusive)
        if writes is None:
            raise Busy(f"{tombstones.collection}: another job deletes the same scope")
        return dict(writes)

    def _wait_for_writes(self, name: str, writes: dict[str, int], *, sweeps: bool) -> None:
        mono_start_s = mono_swept_s = self._mono_s()
        while left := writes.keys() & self._erasures.writing(self._full(name)):
            self._renew()
            now = self._mono_s()
            # Newer work that is under way has not held its ids: its rows could be taken for old ones.
            only_older = all(writes[token] <= self._request.cutoff_us for token in left)
            if sweeps and only_older and now - mono_start_s > EARLY_S and now - mono_swept_s > EARLY_S:
                self._sweep_once(name, scope_of(name, self._request.scope), wait_s=0.0)
                mono_swept_s = self._mono_s()
            self._sleep(POLL_S)

    def _renew(self, *, always: bool = False) -> None:
        report_progress()
        if always or self._mono_s() - self._mono_renewed_s > RENEW_AFTER_S:
            self._mono_renewed_s = self._mono_s()
            for tombstones in self._tombstones:
                self._record(tombstones)

    def _exclude_entities(self, entities: Sequence[RecordKey]) -> Scope:
        """Tombstones for the rows of entities, which name no chapter; returns these rows."""
        scope = self._request.scope
        ids = tuple(entity_row_id(*key[1:]) for key in entities)
        rows = scope._replace(chapter_ids=(), ids=ids)
        self._exclude({ENTITIES_COLLECTION: rows}, [])
        return rows

    # ---- rows and records

    def _publish_cached(self, existing: Sequence[str]) -> None:
        """Cached vectors are kept by chapter: name those of single rows while the rows are there."""
        scope = self._request.scope
        if not scope.ids:
            return
        owner = (scope.tenant_id, scope.project_id)
        chapters = {
            row.chapter_id
            for name in existing
            for page in self._eraser.pages(name, scope_of(name, scope))
            for row in page
        }
        if chapters:
            self._publish(tuple(cache_name(*owner, chapter_id) for chapter_id in sorted(chapters)))

    def _publish(self, names: tuple[str, ...]) -> None:
        # `*`: every collection with the prefix of this service.
        collections = tuple(map(self._full, self._request.collections or ("*",)))
        published = Published(names, self._request.cutoff_us, collections)
        self._erasures.publish(published, self._eraser.ttl_ms)

    def _sweep(self, scopes: Mapping[str, Scope]) -> None:
        """Delete old rows until no read finds one, for as long as reads may miss some.

        All collections wait together: the time does not grow with their number.
        """
        lag_s = self._store.max_read_lag_s()
        trusted_at = dict.fromkeys(scopes, self._mono_s() + lag_s)
        while trusted_at:
            erased = 0
            for name in list(trusted_at):
                began_s = self._mono_s()
                if found := self._sweep_once(name, scopes[name]):
                    erased += found
                    trusted_at[name] = self._mono_s() + lag_s
                elif began_s >= trusted_at[name]:
                    del trusted_at[name]
            if trusted_at and not erased:
                self._sleep(POLL_S * 10)

    def _sweep_once(self, name: str, scope: Scope, wait_s: float = WAIT_S) -> int:
        """Delete the old rows of all pages. Without a wait, pages with rows that others hold are left out."""
        erased = 0
        for page in self._eraser.pages(name, scope):
            by_project: dict[str, list[str]] = {}
            for row in self._old(page):
                by_project.setdefault(row.project_id, []).append(row.id)
            for project_id, ids in by_project.items():
                erased += self._delete(name, project_id, ids, wait_s)
            self._renew()
        self._rows[name] = self._rows.get(name, 0) + erased
        return erased

    def _old(self, rows: Sequence[StoredRow]) -> list[StoredRow]:
        return [row for row in rows if row.created_us <= self._request.cutoff_us]

    def _delete(self, name: str, project_id: str, ids: Sequence[str], wait_s: float) -> int:
        """Delete the rows that are still old while this job holds their ids."""
        held = tuple(f"i/{id_}" for id_ in ids)
        owner = self._request.owner
        intent = WriteIntent(self._full(name), os.urandom(8).hex(), owner, tuple(ids), held, delivery=owner)
        give_up_at = self._mono_s() + wait_s
        while (verdict := self._fence.admit([intent])[0].verdict) != "in":
            if not wait_s:
                return 0
            if self._mono_s() > give_up_at and verdict == "closed":
                raise TransientStoreError(f"{self._full(name)} is closed while its index is built")
            if self._mono_s() > give_up_at:
                raise Busy(f"{self._full(name)}: other jobs hold rows that are to be deleted")
            self._renew()
            self._sleep(POLL_S)
        tenant_id = self._request.scope.tenant_id
        page = self._store.scan(name, Scope(tenant_id, project_id, ids=tuple(ids)), "", PAGE_ROWS)
        old = [row.id for row in self._old(page)]
        if old:
            self._store.delete(name, old, tenant_id=tenant_id, project_id=project_id)
        self._fence.release([intent])
        return len(old)

    def _sweep_copies(self, name: str, scope: Scope) -> None:
        """Delete the rows that a running rebuild has copied, and those that it is about to write."""
        full = self._full(name)
        give_up_at = self._mono_s() + WAIT_S
        while (state := self._erasures.state(full)).get("phase") == "switch":
            if self._mono_s() > give_up_at:
                raise Busy(f"{full}: a rebuild is about to take its place")
            self._renew()
            self._sleep(POLL_S)
        if state.get("phase", "done") == "done":
            return
        copy = state.get("source" if state["phase"] == "drop" else "target", "")
        reading = self._erasures.copying(full)
        self._store.erase_copy(copy, scope, self._request.cutoff_us)
        while reading and self._erasures.copying(full) == reading:
            self._renew()
            self._sleep(POLL_S)
        if reading:
            self._store.erase_copy(copy, scope, self._request.cutoff_us)

    def _discard(self, found: FoundRecords) -> None:
        for key in (*found.entities, *found.summaries):
            self._records.discard(key, self._request.cutoff_us)
        for chapter in found.mentioning:
            if self._records.get(chapter) is None:
                self._records.discard_mentions(chapter)
