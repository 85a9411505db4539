"""Records in memory, for tests of handlers; they pass the same tests as the records on Redis."""

import threading
from collections.abc import Mapping, Sequence

from .keys import mentions_key, record_key
from .records import Put, Record, RecordKey


class MemoryRecords:
    """`Records` within this process; several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stored: dict[str, tuple[str, str, Record]] = {}
        self._mentions: dict[str, set[str]] = {}

    def put(self, key: RecordKey, version: int, fields: Mapping[str, str], updated_at: str) -> Put:
        name = record_key(*key)
        with self._lock:
            if name in self._stored:
                owner, _, has = self._stored[name]
                if owner != key.owner:
                    return Put("foreign", None)
                same_chapter = has.fields.get("chapter_id", "") == fields.get("chapter_id", "")
                if same_chapter and version < has.version:
                    return Put("older", has)
                if has == Record(version, fields):
                    return Put("same", has)
            record = Record(version, dict(fields))
            self._stored[name] = (key.owner, updated_at, record)
            return Put("stored", record)

    def get(self, key: RecordKey) -> Record | None:
        with self._lock:
            owner, _, record = self._stored.get(record_key(*key), ("", "", None))
        return record if owner == key.owner else None

    def mention(self, chapter: RecordKey, entity_ids: Sequence[str]) -> None:
        with self._lock:
            self._mentions.setdefault(mentions_key(*chapter[1:]), set()).update(entity_ids)

    def mentioned(self, chapter: RecordKey) -> list[str]:
        with self._lock:
            return sorted(self._mentions.get(mentions_key(*chapter[1:]), ()))

    def close(self) -> None:
        """Nothing to drop."""
