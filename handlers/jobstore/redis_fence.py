"""Write admission, rebuilds and deletions on Redis; all keys of a collection share one slot of a cluster."""

from collections.abc import Iterator, Mapping, Sequence

import orjson

from jobworker.worker import Fenced
from jobworker.worker.scripted_redis import Argument, Command, Reply, ScriptedRedis, checked

from . import keys
from .erasures import ERASING_MS, Published, Scope, Tombstones, chapter_name
from .fence import LEASE_MS, RebuildLease, WriteAdmission, WriteIntent
from .scripts import script

#: Fields that one step of a search in a hash visits.
_SCAN_FIELDS = 1000
#: Names in one entry of the log of deletions, and entries that one answer holds.
_PUBLISHED_NAMES, _PUBLISHED_ENTRIES = 1000, 100


class RedisFence(ScriptedRedis):
    """`Fence`, `Rebuilds` and `Erasures` on Redis. One thread uses an object."""

    def __init__(self, url: str) -> None:
        super().__init__(url, scripts=script)

    def admit(self, intents: Sequence[WriteIntent]) -> list[WriteAdmission]:
        replies = self._call_all(intents, [_admit(intent) for intent in intents])
        return [_admission(intent, reply) for intent, reply in zip(intents, replies, strict=True)]

    def record_removal(
        self, intent: WriteIntent, gone: Sequence[str], min_versions: Mapping[str, int]
    ) -> None:
        on = keys.writes_keys(intent.collection)
        pairs = [part for chapter, version in min_versions.items() for part in (chapter, str(version))]
        fixed = (len(min_versions), intent.created_us)
        command = script("record_removal", [on.floors, on.rebuild, on.journal], *fixed, *pairs, *gone)
        self.one(on.rebuild, command)

    def release(self, intents: Sequence[WriteIntent]) -> list[bool]:
        return [reply == 1 for reply in self._call_all(intents, [_release(intent) for intent in intents])]

    def abandon(self, intents: Sequence[WriteIntent]) -> None:
        self._call_all(intents, [_release(intent, abandon=True) for intent in intents])

    def _call_all(self, intents: Sequence[WriteIntent], commands: Sequence[Command]) -> list[Reply]:
        """One reply for each intent; intents of one collection share a pipeline."""
        replies: list[Reply] = [None] * len(intents)
        for name in dict.fromkeys(intent.collection for intent in intents):
            indexes = [index for index, intent in enumerate(intents) if intent.collection == name]
            answers = self.call(keys.writes_keys(name).rebuild, [commands[index] for index in indexes])
            for index, reply in zip(indexes, answers, strict=True):
                replies[index] = checked(reply)
        return replies

    # ---- rebuilds

    def begin(self, collection: str, owner: str, lease_ms: int) -> RebuildLease | str:
        # Its error is ignored: only `explain` reads the set, and an access list may lack the key.
        self.call(keys.REBUILT_KEY, [("SADD", keys.REBUILT_KEY, collection)])
        key = keys.writes_keys(collection).rebuild
        epoch, *rest = self.one(key, script("rebuild_begin", [key], owner, lease_ms))
        return RebuildLease(epoch, _fields(rest)) if epoch else rest[0].decode()

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
        on = keys.writes_keys(collection)
        pairs = [part for pair in fields.items() for part in pair]
        closed, recording = "" if shut_ms is None else shut_ms, "" if journal is None else int(journal)
        arguments: list[Argument] = [epoch, lease_ms, closed, recording, *pairs]
        command = script("rebuild_save", [on.rebuild, on.journal, on.doing], *arguments)
        if not self.one(on.rebuild, command):
            raise Fenced(f"the rebuild of {collection} was taken over by another process")

    def writers(self, collection: str) -> int:
        key = keys.writes_keys(collection).writers
        leases, now = (checked(reply) for reply in self.call(key, [("HVALS", key), ("TIME",)]))
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        return sum(int(till) > now_ms for till in leases)

    def changed(self, collection: str, done: Sequence[str], limit: int) -> list[str]:
        on = keys.writes_keys(collection)
        ids = self.one(on.rebuild, script("journal", [on.journal, on.doing], limit, *done))
        return [id_.decode() for id_ in ids]

    def state(self, collection: str) -> dict[str, str]:
        key = keys.writes_keys(collection).rebuild
        return _fields(self.one(key, ("HGETALL", key)))

    # ---- deletions

    def record(self, tombstones: Tombstones, *, ttl_ms: int, exclusive: bool) -> dict[str, int] | None:
        on = keys.writes_keys(tombstones.collection)
        all_keys = [on.writers, on.attempts, on.erased, on.erasing]
        arguments = (tombstones.owner, tombstones.cutoff_us, ttl_ms, ERASING_MS, int(exclusive))
        command = script("erase_record", all_keys, *arguments, *tombstones.names)
        verdict, *writers = self.one(on.rebuild, command)
        if verdict != b"in":
            return None
        return {token: int(created) for token, created in _fields(writers).items()}

    def writing(self, collection: str) -> frozenset[str]:
        key = keys.writes_keys(collection).writers
        leases, now = (checked(reply) for reply in self.call(key, [("HGETALL", key), ("TIME",)]))
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        return frozenset(token for token, till in _fields(leases).items() if int(till) > now_ms)

    def forget(self, collection: str, scope: Scope, cutoff_us: int) -> None:
        on = keys.writes_keys(collection)
        if scope.chapter_ids:
            names = [chapter_name(scope.tenant_id, scope.project_id, id_)[2:] for id_ in scope.chapter_ids]
            self._forget_floors(on.floors, names, cutoff_us)
            self._remove_fields(on.held, [f"c/{name}" for name in names])
        elif scope.whole:
            prefix = f"{scope.tenant_id}/" + (f"{scope.project_id}/" if scope.project_id else "")
            for names in self._scan_fields(on.floors, f"{prefix}*"):
                self._forget_floors(on.floors, names, cutoff_us)
            for names in self._scan_fields(on.held, f"c/{prefix}*"):
                self._remove_fields(on.held, names)

    def _forget_floors(self, key: str, names: Sequence[str], cutoff_us: int) -> None:
        """Remove the minimum versions that no job after the deletion has set."""
        if not names:
            return
        times = self.one(key, ("HMGET", key, *(f"/{name}" for name in names)))
        older = [name for name, time in zip(names, times, strict=True) if int(time or 0) <= cutoff_us]
        self._remove_fields(key, [field for name in older for field in (name, f"/{name}")])

    def _scan_fields(self, key: str, pattern: str) -> Iterator[list[str]]:
        cursor: bytes = b"0"
        while True:
            cursor, flat = self.one(key, ("HSCAN", key, cursor, "MATCH", pattern, "COUNT", _SCAN_FIELDS))
            yield list(_fields(flat))
            if cursor == b"0":
                return

    def _remove_fields(self, key: str, names: Sequence[str]) -> None:
        if names:
            self.one(key, ("HDEL", key, *names))

    def finish(self, collection: str, owner: str) -> None:
        on = keys.writes_keys(collection)
        self.one(on.rebuild, script("erase_finish", [on.erasing, on.held], owner))

    def publish(self, published: Published, ttl_ms: int) -> None:
        key = keys.ERASURES_KEY
        seconds, _ = self.one(key, ("TIME",))
        oldest = str(max(0, int(seconds) * 1000 - ttl_ms))
        for start in range(0, len(published.names), _PUBLISHED_NAMES):
            part = published.names[start : start + _PUBLISHED_NAMES]
            data = orjson.dumps([part, published.cutoff_us, published.collections])
            self.one(key, ("XADD", key, "MINID", "~", oldest, "*", "data", data))
        self.one(key, ("PEXPIRE", key, ttl_ms))

    def published(self, after: str) -> list[Published]:
        key = keys.ERASURES_KEY
        start = f"({after}" if after else "-"
        found = []
        for id_, fields in self.one(key, ("XRANGE", key, start, "+", "COUNT", _PUBLISHED_ENTRIES)):
            names, cutoff_us, collections = orjson.loads(fields[1])
            found.append(Published(tuple(names), cutoff_us, tuple(collections), id_.decode()))
        return found

    def adopt(self, collection: str) -> None:
        # First the registration: a deletion after it finds the collection, one before it is in the log.
        self.one(keys.COLLECTIONS_KEY, ("SADD", keys.COLLECTIONS_KEY, collection))
        on = keys.writes_keys(collection)
        after, page = "", self.published("")
        while page:
            for one in page:
                after = one.id
                if one.concerns(collection):
                    scored = [part for name in one.names for part in (one.cutoff_us, name)]
                    self.one(on.erased, ("ZADD", on.erased, "GT", *scored))
            page = self.published(after)
        left_ms = self.one(keys.ERASURES_KEY, ("PTTL", keys.ERASURES_KEY))
        if after and left_ms > 0:
            self.one(on.erased, ("PEXPIRE", on.erased, left_ms))

    def adopted(self) -> list[str]:
        members = self.one(keys.COLLECTIONS_KEY, ("SMEMBERS", keys.COLLECTIONS_KEY))
        return sorted(member.decode() for member in members)

    def copying(self, collection: str) -> str:
        key = keys.writes_keys(collection).rebuild
        flat, now = (checked(reply) for reply in self.call(key, [("HGETALL", key), ("TIME",)]))
        fields = _fields(flat)
        now_ms = int(now[0]) * 1000 + int(now[1]) // 1000
        if not fields.get("reading") or int(fields.get("lease_until", 0)) <= now_ms:
            return ""
        return f"{fields['epoch']}/{fields['reading']}"


def _admit(intent: WriteIntent) -> Command:
    on = keys.writes_keys(intent.collection)
    all_keys = [on.writers, on.held, on.floors, on.rebuild, on.journal, on.attempts, on.erased, on.erasing]
    work = (intent.tenant_id, intent.project_id, intent.created_us, intent.delivery or intent.token)
    counts = (len(intent.held), len(intent.chapters))
    lists = (*intent.held, *intent.chapters, *intent.ids)
    fixed = (intent.token, intent.owner, LEASE_MS, intent.model)
    return script("admit", all_keys, *fixed, *work, *counts, *lists)


def _release(intent: WriteIntent, *, abandon: bool = False) -> Command:
    on = keys.writes_keys(intent.collection)
    all_keys = [on.writers, on.held, on.rebuild, on.journal, on.attempts]
    name = intent.delivery or intent.token
    fixed = (intent.token, intent.owner, int(abandon), name, len(intent.held))
    return script("release", all_keys, *fixed, *intent.held, *intent.ids)


def _admission(intent: WriteIntent, reply: Reply) -> WriteAdmission:
    if reply[0] == b"model":
        return WriteAdmission("model", model=reply[1].decode())
    if reply[0] == b"closed":
        return WriteAdmission("closed")
    verdict, floors, erased, *silent_ms = reply
    names = frozenset(name.decode() for name in erased)
    if verdict != b"in":
        silent_s = silent_ms[0] / 1000 if silent_ms else 0.0
        return WriteAdmission("hold" if verdict == b"hold" else "held", erased=names, silent_s=silent_s)
    min_versions = zip(intent.chapters, floors, strict=True)
    known = {chapter: int(floor) for chapter, floor in min_versions if floor is not None}
    return WriteAdmission("in", known, erased=names)


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
