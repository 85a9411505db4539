"""Vectors by what was embedded, kept on disk, so that a text that was embedded before costs no forward pass.

A cache may only ever save work: whatever is wrong with it (locked, full, damaged, gone), lookups then miss
and nothing is kept. It is a SQLite file: that comes with Python, is shared by all workers of a host, and no
kill at any moment leaves a lock behind or a file that cannot be read. (A memory-mapped store such as LMDB
would take its worker down by SIGBUS where the file is cut or the disk full; diskcache pickles.)
"""

import fcntl
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NewType, TypeVar

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("jobworker.cache")

Vector = NDArray[np.float32]
T = TypeVar("T")

# A new layout begins a new file.
LAYOUT = 1
# Three vectors of 1024 dimensions fill a page to seven eighths; at 4096 bytes each would take two pages.
PAGE_BYTES = 16_384
# SQLite's log of what is not yet in the file: written back at half of this and cut to it.
LOG_BYTES = 8 * 1024 * 1024
# Below this the log would be most of it.
MIN_LIMIT_BYTES = 2 * LOG_BYTES
# A row beside its vector: key (twice, once in the index), checksum, lengths.
ROW_OVERHEAD_BYTES = 72
# Room is made for more than is needed, so that not every write has to.
SPARE_SHARE = 1 / 32
# Of 32,766 parameters that a statement may have.
KEYS_A_QUERY = 500
# Another worker's write takes some milliseconds; after that the cache is skipped.
BUSY_MS = 100
LOCK_WITHIN_S = 1.0
# How long a cache that failed is left alone: a full disk or a bad mount does not mend itself in a second.
PAUSE_S = 30.0
CHECKSUM_BYTES = 16

_GONE_BAD = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


#: What a vector is found by: a keyed hash, so that no tenant finds out what another one has.
Key = NewType("Key", bytes)
# As it lies in the file: whether it is of the older half, key and value.
_Entry = tuple[bool, Key, object]


def key_of(tenant_id: str, identity: str, text: str) -> Key:
    """The key of `text` for a tenant (at most 64 bytes) and a model.

    `identity` names all else that the vector depends on: revision (a fingerprint of the weights, the pooling
    and the prefixes), window, and the treatment of long texts.
    """
    data = f"{identity}\0{text}".encode()
    return Key(hashlib.blake2b(data, key=tenant_id.encode(), digest_size=32).digest())


class VectorCache:
    """Vectors of `dim` numbers in at most `limit_bytes` of disk; the longest unused go first.

    Usable from several threads and processes. Nothing here raises. `counters` gets the totals
    `embedding_cache_hits` and `embedding_cache_misses`.
    """

    def __init__(
        self,
        path: Path,
        dim: int,
        limit_bytes: int,
        counters: dict[str, int],
        *,
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._dim, self._mono_s = path, dim, mono_s
        self._limit_bytes = max(limit_bytes, MIN_LIMIT_BYTES) - LOG_BYTES
        self._counters = counters
        counters |= {"embedding_cache_hits": 0, "embedding_cache_misses": 0}
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._off_until_s = 0.0
        self._renew: set[Key] = set()

    def find(self, keys: Sequence[Key]) -> dict[Key, Vector]:
        """The vectors that are there and sound; each lookup is counted."""
        found = {}
        there: list[_Entry] = self._attempt(lambda file: file.read(list(set(keys))), [])
        for old, key, value in there:
            if (vector := _sound(key, value, self._dim)) is not None:
                found[key] = vector
                if old:
                    self._renew.add(key)
        hits = sum(key in found for key in keys)
        self._counters["embedding_cache_hits"] += hits
        self._counters["embedding_cache_misses"] += len(keys) - hits
        return found

    def keep(self, vectors: Iterable[tuple[Key, Vector]]) -> None:
        """Keep vectors, over what is there; makes room before. What is not finite is left out."""
        most = self._limit_bytes // 2 // _row_bytes(self._dim)
        rows = [(key, _value(key, vector)) for key, vector in vectors if np.isfinite(vector).all()][:most]
        renew, self._renew = list(self._renew), set()
        if rows or renew:
            self._attempt(lambda file: file.write(rows, renew, _row_bytes(self._dim)), None)

    def close(self) -> None:
        """Close the file; the next call would open it again."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def _attempt(self, do: "Callable[[_File], T]", otherwise: T) -> T:
        with self._lock:
            if self._mono_s() < self._off_until_s:
                return otherwise
            try:
                self._file = self._file or _opened(self._path, self._limit_bytes)
                return do(self._file)
            except Exception as error:
                self._trouble(error)
                return otherwise

    def _trouble(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return
        self._off_until_s = self._mono_s() + PAUSE_S
        fields = {"file": str(self._path), "seconds": PAUSE_S, "error": str(error)}
        log.warning("cache.paused", extra=fields)
        if self._file:
            self._file.close()
            if code in _GONE_BAD:
                _discard(self._path, self._file.inode)
        self._file = None


class _File:
    """The open file. Most methods may raise sqlite3.Error."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        # Vectors tell of the texts: for the service's user only. The log gets the file's own mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self.inode = path.stat().st_ino
        self._db = sqlite3.connect(
            path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        self._db.text_factory = bytes  # a value that became text is then a bad one, not an error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power cut may cost the latest entries, not the file; a killed process costs nothing.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // 2 // PAGE_BYTES}")
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        self._db.execute(f"PRAGMA max_page_count = {self.limit_bytes // PAGE_BYTES}")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS vectors"
            " (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
        )
        if not self._number("PRAGMA user_version"):
            self._db.execute(f"PRAGMA user_version = {LAYOUT}")

    @property
    def usable(self) -> bool:
        """Whether it has our layout and is not larger than it may become."""
        pages = self._number("PRAGMA page_count")
        return self._number("PRAGMA user_version") == LAYOUT and pages * PAGE_BYTES <= self.limit_bytes

    def read(self, keys: Sequence[Key]) -> list[_Entry]:
        """Those of the keys that are there."""
        found: list[_Entry] = []
        old_below = self._old_below()
        for start in range(0, len(keys), KEYS_A_QUERY):
            part = keys[start : start + KEYS_A_QUERY]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(f"SELECT id, key, value FROM vectors WHERE key IN ({marks})", part)
            found += [(id_ < old_below, Key(key), value) for id_, key, value in rows]
        return found

    def _old_below(self) -> int:
        """Ids below this are of the older half, where it matters: once half of the room is taken."""
        if self._used_bytes() < self.limit_bytes // 2:
            return 0
        return self._number("SELECT min(id) / 2 + max(id) / 2 FROM vectors")

    def write(self, rows: Sequence[tuple[Key, bytes]], renew: Sequence[Key], row_bytes: int) -> None:
        """Make what is in use the newest, make room, put rows in: all or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            newest = self._number("SELECT max(id) FROM vectors")
            order = [(newest + place, key) for place, key in enumerate(renew, 1)]
            self._db.executemany("UPDATE vectors SET id = ? WHERE key = ?", order)
            self._make_room(len(rows), row_bytes)
            self._db.executemany("INSERT OR REPLACE INTO vectors (key, value) VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _make_room(self, rows: int, row_bytes: int) -> None:
        """Remove the oldest until the rows fit; pages that are free in part are not counted on."""
        wanted = self._used_bytes() + 2 * rows * row_bytes - self.limit_bytes
        while wanted > 0:
            oldest = wanted // row_bytes + 1 + int(self.limit_bytes * SPARE_SHARE) // row_bytes
            gone = self._db.execute(
                "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT ?)", (oldest,)
            )
            if not gone.rowcount:
                return
            wanted = self._used_bytes() + 2 * rows * row_bytes - self.limit_bytes

    def _used_bytes(self) -> int:
        free = self._number("PRAGMA freelist_count")
        return (self._number("PRAGMA page_count") - free) * PAGE_BYTES

    def _number(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0] or 0)

    def close(self) -> None:
        """Close; errors at this point say nothing new."""
        try:
            self._db.close()
        except sqlite3.Error:
            pass


def _opened(path: Path, limit_bytes: int) -> _File:
    """The file; replaced by an empty one if it has another layout or size limit, or is no database."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(path):
        try:
            file = _File(path, limit_bytes)
            if file.usable:
                return file
            file.close()
            log.info(
                "cache.reset", extra={"file": str(path), "hint": "it had another layout or was too large"}
            )
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _GONE_BAD:
                raise
            log.warning("cache.damaged", extra={"file": str(path), "error": str(error)})
        _remove(path)
        return _File(path, limit_bytes)


def _discard(path: Path, inode: int) -> None:
    """Remove a damaged file, unless another worker has done so and begun a new one."""
    try:
        with _alone(path):
            if path.stat().st_ino == inode:
                _remove(path)
    except OSError:
        pass  # it is looked at again when it is next opened


def _remove(path: Path) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Exclude other processes from opening or removing the file; the lock of a killed holder is released by
    the kernel.

    Raises OSError where another one holds it for too long.
    """
    give_up_at = time.monotonic() + LOCK_WITHIN_S
    # A user who can open the file can hold its lock for ever, so the mode is 0600.
    with open(os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_WRONLY, 0o600), "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.01)  # a file lock has no wait with a deadline
        yield


def _value(key: Key, vector: Vector) -> bytes:
    data = np.asarray(vector, "<f4").tobytes()
    return _checksum(key, data) + data


def _sound(key: Key, value: object, dim: int) -> Vector | None:
    """The vector, or None where it is not what was written for this key."""
    if not isinstance(value, bytes) or len(value) != CHECKSUM_BYTES + 4 * dim:
        return None
    checksum, data = value[:CHECKSUM_BYTES], value[CHECKSUM_BYTES:]
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    return vector if checksum == _checksum(key, data) and np.isfinite(vector).all() else None


def _checksum(key: Key, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=key, digest_size=CHECKSUM_BYTES).digest()


def _row_bytes(dim: int) -> int:
    return 4 * dim + CHECKSUM_BYTES + ROW_OVERHEAD_BYTES
