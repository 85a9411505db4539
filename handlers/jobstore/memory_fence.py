"""Write admission, rebuilds and deletions in memory, for tests of handlers on their own clock."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from jobworker.worker import Fenced

from .erasures import ERASING_MS, Published, Scope, Tombstones, chapter_name, id_name, owner_names
from .fence import LEASE_MS, RebuildLease, WriteAdmission, WriteIntent


class _Collection:
    def __init__(self) -> None:
        self.writers: dict[str, float] = {}
        self.held: dict[str, tuple[float, str]] = {}
        self.min_versions: dict[str, int] = {}
        self.floor_times: dict[str, int] = {}
        self.fields: dict[str, str] = {}
        self.epoch = 0
        self.lease_until = self.closed_until = 0.0
        self.journal: set[str] | None = None
        self.doing: set[str] = set()
        self.attempts: dict[str, tuple[str, int]] = {}
        self.erased: dict[str, int] = {}
        self.erasing: dict[str, tuple[float, bool, str]] = {}

    def end_attempt(self, delivery: str, token: str = "") -> None:
        """A new attempt, `token`, ends the one before."""
        before, _ = self.attempts.get(delivery, ("", 0))
        if before and before != token:
            self.writers.pop(before, None)
            del self.attempts[delivery]


class MemoryFence:
    """`Fence`, `Rebuilds` and `Erasures` within this process; several threads may use it.

    `mono_s` is its clock. Tombstones do not age.
    """

    def __init__(self, mono_s: Callable[[], float] = time.monotonic) -> None:
        self._mono_s = mono_s
        self._lock = threading.Lock()
        self._collections: dict[str, _Collection] = {}
        self._published: list[Published] = []
        self._adopted: set[str] = set()

    def _of(self, collection: str) -> _Collection:
        return self._collections.setdefault(collection, _Collection())

    def admit(self, intents: Sequence[WriteIntent]) -> list[WriteAdmission]:
        with self._lock:
            return [self._admit(intent) for intent in intents]

    def _admit(self, intent: WriteIntent) -> WriteAdmission:
        of, now = self._of(intent.collection), self._mono_s()
        of.end_attempt(intent.delivery or intent.token, intent.token)
        if of.closed_until > now and intent.token not in of.writers:
            return WriteAdmission("closed")
        live = of.fields.get("live_model", "")
        if live and intent.model and live != intent.model:
            return WriteAdmission("model", model=live)
        scopes = list(_scopes(intent)) if intent.tenant_id else []
        erased = frozenset(name for name in scopes if of.erased.get(name, -1) >= intent.created_us)
        running = [of.erasing[name] for name in scopes if name in of.erasing]
        exclusive = {exclusive for till, exclusive, _ in running if till > now}
        must_hold = bool(exclusive and intent.ids and not intent.held)
        if intent.token not in of.writers and (True in exclusive or must_hold):
            return WriteAdmission("held" if True in exclusive else "hold", erased=erased)
        for item in intent.held:
            till, owner = of.held.get(item, (0.0, ""))
            if owner != intent.owner and till > now:
                return WriteAdmission("held", erased=erased, silent_s=now + LEASE_MS / 1000 - till)
        till = now + LEASE_MS / 1000
        of.writers[intent.token] = till
        of.attempts[intent.delivery or intent.token] = (intent.token, intent.created_us)
        of.held |= dict.fromkeys(intent.held, (till, intent.owner))
        if of.journal is not None:
            of.journal |= set(intent.ids)
        return WriteAdmission(
            "in",
            {name: of.min_versions[name] for name in intent.chapters if name in of.min_versions},
            erased=erased,
        )

    def record_removal(
        self, intent: WriteIntent, gone: Sequence[str], min_versions: Mapping[str, int]
    ) -> None:
        with self._lock:
            of = self._of(intent.collection)
            for name, version in min_versions.items():
                same = of.min_versions.get(name) == version
                of.floor_times[name] = max(intent.created_us, of.floor_times.get(name, 0) if same else 0)
            of.min_versions |= min_versions
            if of.journal is not None:
                of.journal |= set(gone)

    def release(self, intents: Sequence[WriteIntent]) -> list[bool]:
        with self._lock:
            return [self._release(intent) for intent in intents]

    def _release(self, intent: WriteIntent) -> bool:
        of = self._of(intent.collection)
        self._forget_attempt(intent)
        for item in intent.held:
            if of.held.get(item, (0.0, ""))[1] == intent.owner:
                del of.held[item]
        if of.journal is not None:
            of.journal |= set(intent.ids)
        return of.writers.pop(intent.token, 0.0) > self._mono_s()

    def abandon(self, intents: Sequence[WriteIntent]) -> None:
        with self._lock:
            for intent in intents:
                self._forget_attempt(intent)

    def _forget_attempt(self, intent: WriteIntent) -> None:
        of = self._of(intent.collection)
        delivery = intent.delivery or intent.token
        if of.attempts.get(delivery, ("", 0))[0] == intent.token:
            del of.attempts[delivery]

    def begin(self, collection: str, owner: str, lease_ms: int) -> RebuildLease | str:
        with self._lock:
            of, now = self._of(collection), self._mono_s()
            holder = of.fields.get("owner", owner)
            if holder != owner and of.lease_until > now:
                return holder
            of.epoch += 1
            of.lease_until = now + lease_ms / 1000
            left, of.fields = dict(of.fields), of.fields | {"owner": owner}
            return RebuildLease(of.epoch, left)

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
        with self._lock:
            of, now = self._of(collection), self._mono_s()
            if of.epoch != epoch:
                raise Fenced(f"the rebuild of {collection} was taken over by another process")
            of.lease_until = now + lease_ms / 1000
            of.fields |= fields
            if shut_ms is not None:
                of.closed_until = now + shut_ms / 1000
            if journal is not None:
                of.journal = (of.journal or set()) if journal else None
                of.doing = of.doing if journal else set()

    def writers(self, collection: str) -> int:
        with self._lock:
            return sum(till > self._mono_s() for till in self._of(collection).writers.values())

    def changed(self, collection: str, done: Sequence[str], limit: int) -> list[str]:
        with self._lock:
            of = self._of(collection)
            of.doing -= set(done)
            if not of.doing and of.journal:
                of.doing, of.journal = of.journal, set()
            return sorted(of.doing)[:limit]

    def state(self, collection: str) -> dict[str, str]:
        with self._lock:
            return dict(self._of(collection).fields)

    def record(self, tombstones: Tombstones, *, ttl_ms: int, exclusive: bool) -> dict[str, int] | None:
        with self._lock:
            of, now = self._of(tombstones.collection), self._mono_s()
            running = [of.erasing[name] for name in tombstones.names if name in of.erasing]
            if any(owner != tombstones.owner and till > now for till, _, owner in running):
                return None
            of.end_attempt(tombstones.owner)
            for name in tombstones.names:
                of.erased[name] = max(of.erased.get(name, 0), tombstones.cutoff_us)
                of.erasing[name] = (now + ERASING_MS / 1000, exclusive, tombstones.owner)
            created = dict(of.attempts.values())
            return {token: created.get(token, 0) for token, till in of.writers.items() if till > now}

    def writing(self, collection: str) -> frozenset[str]:
        with self._lock:
            now = self._mono_s()
            return frozenset(token for token, till in self._of(collection).writers.items() if till > now)

    def forget(self, collection: str, scope: Scope, cutoff_us: int) -> None:
        with self._lock:
            of = self._of(collection)
            prefix = f"{scope.tenant_id}/" + (f"{scope.project_id}/" if scope.project_id else "")
            names = [name for name in of.min_versions if scope.whole and name.startswith(prefix)]
            names += [chapter_name(*scope[:2], id_)[2:] for id_ in scope.chapter_ids]
            for name in names:
                if of.floor_times.get(name, 0) <= cutoff_us:
                    of.min_versions.pop(name, None)
                    of.floor_times.pop(name, None)
            for name in list(of.held):
                if name[2:] in names or (scope.whole and name.startswith(f"c/{prefix}")):
                    del of.held[name]

    def finish(self, collection: str, owner: str) -> None:
        with self._lock:
            of, now = self._of(collection), self._mono_s()
            of.erasing = {
                name: entry for name, entry in of.erasing.items() if entry[2] != owner and entry[0] > now
            }
            of.held = {item: entry for item, entry in of.held.items() if entry[1] != owner and entry[0] > now}

    def publish(self, published: Published, ttl_ms: int) -> None:
        with self._lock:
            self._published.append(published._replace(id=str(len(self._published) + 1)))

    def published(self, after: str) -> list[Published]:
        with self._lock:
            return self._published[int(after or 0) :]

    def adopt(self, collection: str) -> None:
        with self._lock:
            erased = self._of(collection).erased
            self._adopted.add(collection)
            for one in self._published:
                if one.concerns(collection):
                    erased |= {name: max(one.cutoff_us, erased.get(name, 0)) for name in one.names}

    def adopted(self) -> list[str]:
        with self._lock:
            return sorted(self._adopted)

    def copying(self, collection: str) -> str:
        with self._lock:
            of = self._of(collection)
            reading = of.fields.get("reading", "")
            return f"{of.epoch}/{reading}" if reading and of.lease_until > self._mono_s() else ""

    def close(self) -> None:
        """Nothing to drop."""


def _scopes(intent: WriteIntent) -> Iterator[str]:
    yield from owner_names(intent.tenant_id, intent.project_id)
    yield from (f"c/{name}" for name in intent.chapters)
    yield from (id_name(intent.tenant_id, intent.project_id, id_) for id_ in intent.ids)
