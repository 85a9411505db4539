"""Write admission and rebuild state on Redis; all keys of a collection share one slot of a cluster."""

from collections.abc import Mapping, Sequence

from jobworker.worker import Fenced
from jobworker.worker.scripted_redis import Argument, Command, Reply, ScriptedRedis, checked

from . import keys
from .fence import LEASE_MS, RebuildLease, WriteAdmission, WriteIntent
from .scripts import script


class RedisFence(ScriptedRedis):
    """`Fence` and `Rebuilds` on Redis. One thread uses an object."""

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
        command = script(
            "record_removal", [on.floors, on.rebuild, on.journal], len(min_versions), *pairs, *gone
        )
        self.one(on.rebuild, command)

    def release(self, intents: Sequence[WriteIntent]) -> None:
        self._call_all(intents, [_release(intent) for intent in intents])

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


def _admit(intent: WriteIntent) -> Command:
    on = keys.writes_keys(intent.collection)
    all_keys = [on.writers, on.held, on.floors, on.rebuild, on.journal]
    counts = (LEASE_MS, intent.model, len(intent.held), len(intent.chapters))
    lists = (*intent.held, *intent.chapters, *intent.ids)
    return script("admit", all_keys, intent.token, intent.owner, *counts, *lists)


def _release(intent: WriteIntent) -> Command:
    on = keys.writes_keys(intent.collection)
    all_keys = [on.writers, on.held, on.rebuild, on.journal]
    return script(
        "release", all_keys, intent.token, intent.owner, len(intent.held), *intent.held, *intent.ids
    )


def _admission(intent: WriteIntent, reply: Reply) -> WriteAdmission:
    if reply[0] == b"model":
        return WriteAdmission("model", model=reply[1].decode())
    if reply[0] != b"in":
        return WriteAdmission("closed" if reply[0] == b"closed" else "held")
    min_versions = zip(intent.chapters, reply[1:], strict=True)
    return WriteAdmission("in", {chapter: int(floor) for chapter, floor in min_versions if floor is not None})


def _fields(flat: Sequence[bytes]) -> dict[str, str]:
    return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
