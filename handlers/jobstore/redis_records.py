"""Records on Redis: one hash each, changed by one script."""

from collections.abc import Iterator, Mapping, Sequence

from jobworker.worker.scripted_redis import ScriptedRedis

from . import keys
from .erasures import Scope
from .records import FoundRecords, Put, Record, RecordKey
from .scripts import script

#: Fields of the hash that do not belong to the record itself.
_OWN_FIELDS = frozenset({"chapter_version", "updated_at", "owner", "created_us"})
#: Keys that one SCAN call visits.
_SCAN_KEYS = 1000


class RedisRecords(ScriptedRedis):
    """`Records` on Redis. One thread uses an object.

    The hash has the record's fields, `chapter_version`, `updated_at`, `created_us`, and `owner` where the
    key's name alone is ambiguous.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, scripts=script)

    def put(
        self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str, created_us: int = 0
    ) -> Put:
        name = keys.record_key(*key)
        pairs = [part for pair in fields.items() for part in pair]
        own = (key.owner, str(version), updated_at, created_us)
        verdict, *flat = self.one(name, script("record", [name], *own, *pairs))
        return Put(verdict.decode(), _record(key, flat) if flat else None)

    def get(self, key: RecordKey) -> Record | None:
        name = keys.record_key(*key)
        return _record(key, self.one(name, ("HGETALL", name)))

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        if entity_ids:
            name = keys.mentions_key(*chapter[1:])
            self.one(name, ("SADD", name, *entity_ids))

    def mentioned(self, chapter: RecordKey) -> list[str]:
        name = keys.mentions_key(*chapter[1:])
        return sorted(id_.decode(errors="replace") for id_ in self.one(name, ("SMEMBERS", name)))

    def find(self, scope: Scope) -> FoundRecords:
        if scope.whole:
            return FoundRecords(
                list(self._scan("summary", scope)),
                list(self._scan("entity", scope)),
                list(self._scan("entities", scope)),
            )
        tenant_id, project_id = scope.tenant_id, scope.project_id
        chapters = [RecordKey("summary", tenant_id, project_id, id_) for id_ in scope.chapter_ids]
        mentioned = [key._replace(kind="entity", id=id_) for key in chapters for id_ in self.mentioned(key)]
        entities = [
            key
            for key in dict.fromkeys(mentioned)
            if (record := self.get(key)) and record.fields.get("chapter_id") in scope.chapter_ids
        ]
        mentioning = [key for key in chapters if self._exists(keys.mentions_key(*key[1:]))]
        return FoundRecords([key for key in chapters if self.get(key)], entities, mentioning)

    def _scan(self, kind: str, scope: Scope) -> Iterator[RecordKey]:
        """Keys of a tenant or project, on every server of a cluster."""
        prefix = ":".join([kind, scope.tenant_id, *filter(None, [scope.project_id]), ""])
        for server in self.one_key_a_server():
            cursor: bytes = b"0"
            while True:
                command = ("SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", _SCAN_KEYS)
                cursor, names = self.one(server, command)
                found = (self._parse(kind, name.decode(errors="replace"), scope) for name in names)
                yield from filter(None, found)
                if cursor == b"0":
                    break

    def _parse(self, kind: str, name: str, scope: Scope) -> RecordKey | None:
        """The key of a name, if it belongs to the scope.

        A colon in a tenant or project makes the name ambiguous: then the record says whose it is, for a set
        of mentions the chapter's summary.
        """
        rest = name.removeprefix(f"{kind}:")
        record = f"summary:{rest}" if kind == "entities" else name
        owner = self.one(record, ("HGET", record, "owner"))
        tenant_id, _, project_id = owner.decode(errors="replace").partition("/") if owner else ("", "", "")
        if not owner:
            if ":" in scope.tenant_id + scope.project_id and kind != "entities":
                return None
            tenant_id = scope.tenant_id
            project_id = scope.project_id or rest.removeprefix(f"{tenant_id}:").partition(":")[0]
        if tenant_id != scope.tenant_id or scope.project_id not in ("", project_id):
            return None
        id_ = rest.removeprefix(f"{tenant_id}:{project_id}:")
        return RecordKey("entity" if kind == "entity" else "summary", tenant_id, project_id, id_)

    def _exists(self, name: str) -> bool:
        return bool(self.one(name, ("EXISTS", name)))

    def discard(self, key: RecordKey, cutoff_us: int) -> bool:
        name = keys.record_key(*key)
        return bool(self.one(name, script("record_discard", [name], key.owner, cutoff_us)))

    def discard_mentions(self, chapter: RecordKey) -> None:
        name = keys.mentions_key(*chapter[1:])
        self.one(name, ("DEL", name))


def _record(key: RecordKey, flat: Sequence[bytes]) -> Record | None:
    found = {
        flat[i].decode(errors="replace"): flat[i + 1].decode(errors="replace") for i in range(0, len(flat), 2)
    }
    if not found or found.get("owner", "") != key.owner:
        return None
    version = found.get("chapter_version", "")
    number = int(version) if version.removeprefix("-").isdecimal() else 0
    created = found.get("created_us", "")
    fields = {name: text for name, text in found.items() if name not in _OWN_FIELDS}
    return Record(number, fields, int(created) if created.isdecimal() else 0)
