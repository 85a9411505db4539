"""Records on Redis: one hash each, changed by one script."""

from collections.abc import Mapping, Sequence

from jobworker.worker.scripted_redis import ScriptedRedis

from . import keys
from .records import Put, Record, RecordKey
from .scripts import script

#: Fields of the hash that do not belong to the record itself.
_OWN_FIELDS = frozenset({"chapter_version", "updated_at", "owner"})


class RedisRecords(ScriptedRedis):
    """`Records` on Redis. One thread uses an object.

    The hash has the record's fields, `chapter_version`, `updated_at`, and `owner` where the key's name alone
    is ambiguous.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, scripts=script)

    def put(self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str) -> Put:
        name = keys.record_key(*key)
        pairs = [part for pair in fields.items() for part in pair]
        verdict, *flat = self.one(name, script("record", [name], key.owner, str(version), updated_at, *pairs))
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


def _record(key: RecordKey, flat: Sequence[bytes]) -> Record | None:
    found = {
        flat[i].decode(errors="replace"): flat[i + 1].decode(errors="replace") for i in range(0, len(flat), 2)
    }
    if not found or found.get("owner", "") != key.owner:
        return None
    version = found.get("chapter_version", "")
    number = int(version) if version.removeprefix("-").isdecimal() else 0
    return Record(number, {name: text for name, text in found.items() if name not in _OWN_FIELDS})
