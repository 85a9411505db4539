"""Records in memory, for tests of handlers; they pass the same tests as the records on Redis."""

import threading
from collections.abc import Mapping, Sequence

from .erasures import Scope
from .keys import mentions_key, record_key
from .records import FoundRecords, Put, Record, RecordKey


class MemoryRecords:
    """`Records` within this process; several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: dict[str, tuple[str, str, Record]] = {}
        self._keys: dict[str, RecordKey] = {}
        self._mentions: dict[str, set[str]] = {}
        self._mentioning: dict[str, RecordKey] = {}

    def put(
        self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str, created_us: int = 0
    ) -> Put:
        name = record_key(*key)
        with self._lock:
            if name in self._stored:
                owner, _, has = self._stored[name]
                if owner != key.owner:
                    return Put("foreign", None)
                same_chapter = has.fields.get("chapter_id", "") == fields.get("chapter_id", "")
                if same_chapter and version < has.version:
                    return Put("older", has)
                if has[:2] == (version, fields):
                    record = has._replace(created_us=max(has.created_us, created_us))
                    self._stored[name] = (key.owner, self._stored[name][1], record)
                    return Put("same", record)
            record = Record(version, dict(fields), created_us)
            self._stored[name] = (key.owner, updated_at, record)
            self._keys[name] = key
            return Put("stored", record)

    def get(self, key: RecordKey) -> Record | None:
        with self._lock:
            owner, _, record = self._stored.get(record_key(*key), ("", "", None))
        return record if owner == key.owner else None

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        with self._lock:
            self._mentions.setdefault(mentions_key(*chapter[1:]), set()).update(entity_ids)
            self._mentioning[mentions_key(*chapter[1:])] = chapter

    def mentioned(self, chapter: RecordKey) -> list[str]:
        with self._lock:
            return sorted(self._mentions.get(mentions_key(*chapter[1:]), ()))

    def find(self, scope: Scope) -> FoundRecords:
        def is_of(key: RecordKey, chapter_id: str) -> bool:
            owner = (key.tenant_id, key.project_id if scope.project_id else "")
            return owner == scope[:2] and (scope.whole or chapter_id in scope.chapter_ids)

        with self._lock:
            stored = [
                (key, self._stored[name][2]) for name, key in self._keys.items() if name in self._stored
            ]
            chapters = [self._mentioning[name] for name in self._mentions]
        return FoundRecords(
            [key for key, _ in stored if key.kind == "summary" and is_of(key, key.id)],
            [
                key
                for key, record in stored
                if key.kind == "entity" and is_of(key, record.fields.get("chapter_id", ""))
            ],
            [key for key in chapters if is_of(key, key.id)],
        )

    def discard(self, key: RecordKey, cutoff_us: int) -> bool:
        with self._lock:
            owner, _, record = self._stored.get(record_key(*key), (key.owner, "", None))
            if owner != key.owner or (record and record.created_us > cutoff_us):
                return False
            self._stored.pop(record_key(*key), None)
        return True

    def discard_mentions(self, chapter: RecordKey) -> None:
        with self._lock:
            self._mentions.pop(mentions_key(*chapter[1:]), None)

    def close(self) -> None:
        """Nothing to drop."""
