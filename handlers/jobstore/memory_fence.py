"""Write admission and rebuild state in memory, for tests of handlers on their own clock."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from jobworker.worker import Fenced

from .fence import LEASE_MS, RebuildLease, WriteAdmission, WriteIntent


class _Collection:
    def __init__(self) -> None:
        self.writers: dict[str, float] = {}
        self.held: dict[str, tuple[float, str]] = {}
        self.min_versions: dict[str, int] = {}
        self.fields: dict[str, str] = {}
        self.epoch = 0
        self.lease_until = self.closed_until = 0.0
        self.journal: set[str] | None = None
        self.doing: set[str] = set()


class MemoryFence:
    """`Fence` and `Rebuilds` within this process; several threads may use it. `mono_s` is its clock."""

    def __init__(self, mono_s: Callable[[], float] = time.monotonic) -> None:
        self._mono_s = mono_s
        self._lock = threading.Lock()
        self._collections: dict[str, _Collection] = {}

    def _of(self, collection: str) -> _Collection:
        return self._collections.setdefault(collection, _Collection())

    def admit(self, intents: Sequence[WriteIntent]) -> list[WriteAdmission]:
        with self._lock:
            return [self._admit(intent) for intent in intents]

    def _admit(self, intent: WriteIntent) -> WriteAdmission:
        of, now = self._of(intent.collection), self._mono_s()
        if of.closed_until > now and intent.token not in of.writers:
            return WriteAdmission("closed")
        live = of.fields.get("live_model", "")
        if live and intent.model and live != intent.model:
            return WriteAdmission("model", model=live)
        for item in intent.held:
            till, owner = of.held.get(item, (0.0, ""))
            if owner != intent.owner and till > now:
                return WriteAdmission("held")
        till = now + LEASE_MS / 1000
        of.writers[intent.token] = till
        of.held |= dict.fromkeys(intent.held, (till, intent.owner))
        if of.journal is not None:
            of.journal |= set(intent.ids)
        return WriteAdmission(
            "in", {name: of.min_versions[name] for name in intent.chapters if name in of.min_versions}
        )

    def record_removal(
        self, intent: WriteIntent, gone: Sequence[str], min_versions: Mapping[str, int]
    ) -> None:
        with self._lock:
            of = self._of(intent.collection)
            of.min_versions |= min_versions
            if of.journal is not None:
                of.journal |= set(gone)

    def release(self, intents: Sequence[WriteIntent]) -> None:
        with self._lock:
            for intent in intents:
                of = self._of(intent.collection)
                of.writers.pop(intent.token, None)
                for item in intent.held:
                    if of.held.get(item, (0.0, ""))[1] == intent.owner:
                        del of.held[item]
                if of.journal is not None:
                    of.journal |= set(intent.ids)

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

    def close(self) -> None:
        """Nothing to drop."""
