"""Disk cache of vectors: a text that was embedded before costs no forward pass.

A fault of the cache (locked, full, damaged, deleted) fails no job: lookups miss and nothing is stored. The
file is a SQLite database, shared by all workers of a host. A kill at any moment leaves no lock behind and no
unreadable file. LMDB, which maps its file, would kill the worker with SIGBUS when the file is truncated or
the disk is full; diskcache uses pickle.
"""

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NewType, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..file_lock import lock_file
from ..jobstore.erasures import chapter_name, id_name, owner_names
from ..sparse_vector import SparseVector

log = logging.getLogger("jobworker.cache")

Vector = NDArray[np.float32]
T = TypeVar("T")

# A file with another layout is replaced.
LAYOUT = 3
# Three vectors of 1024 dimensions fill a page to seven eighths; at 4096 bytes each would take two pages.
PAGE_BYTES = 16_384
# SQLite's write-ahead log: written back at half of this size and truncated to it.
WAL_BYTES = 8 * 1024 * 1024
# With less, the log would take most of the space.
MIN_LIMIT_BYTES = 2 * WAL_BYTES
# A row without its vector: key and origin (each in table and index), tokens, time, checksum, lengths.
ROW_OVERHEAD_BYTES = 152
# Rows that one transaction deletes; other workers wait for it.
ERASED_AT_ONCE = 500
# An entry of the index of keys, and a mark of a used row, in pages that are half full.
INDEX_ENTRY_BYTES, MARK_BYTES = 96, 24
# Rows in use that are moved away from the end where rows are evicted: in one write, which bounds its time,
# and in one transaction, which bounds the write-ahead log.
MAX_MOVED_BYTES, MAX_MOVED_AT_ONCE_BYTES = 16 * 1024 * 1024, 1024 * 1024
# Additional share that is evicted, so that not every write has to evict.
SPARE_SHARE = 1 / 32
# SQLite allows 32,766 parameters in a statement.
KEYS_PER_QUERY = 500
# Another worker's write takes some milliseconds; after that the cache is skipped.
BUSY_MS = 100
LOCK_WITHIN_S = 1.0
# Pause after a failure: a full disk or a bad mount is not repaired within a second.
PAUSE_S = 30.0
CHECKSUM_BYTES = 16

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


#: Hash keyed by the tenant, so that no tenant can find out what texts another one has.
Key = NewType("Key", bytes)
# As stored: whether it is in the older half, key, value, origin, tokens.
_Entry = tuple[bool, Key, object, object, object]
_COLUMNS = "key, value, origin, tokens, created_us"
# Bytes of each of the three parts of an origin.
_PART_BYTES = 8


class Origin(NamedTuple):
    """The text that a vector is of: its row, and when the job was created (unix microseconds)."""

    tenant_id: str = ""
    project_id: str = ""
    chapter_id: str = ""
    row_id: str = ""
    created_us: int = 0

    @property
    def stored(self) -> bytes:
        """Digests of tenant, project and chapter: a prefix covers all of a tenant or project."""
        return _digests(self.tenant_id, self.project_id, self.chapter_id)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tombstones that cover it."""
        owner = (self.tenant_id, self.project_id)
        return (*owner_names(*owner), chapter_name(*owner, self.chapter_id), id_name(*owner, self.row_id))


class NewVector(NamedTuple):
    """A vector to store, and the tokens that the model was given for it."""

    key: Key
    vector: Vector
    origin: Origin = Origin()
    tokens: int = 0
    sparse: SparseVector | None = None


class CachedVector(NamedTuple):
    """A stored vector, the tokens that it spares the model, and its sparse vector, empty if it has none."""

    vector: Vector
    tokens: int
    sparse: SparseVector


def cache_key(tenant_id: str, identity: str, text: str) -> Key:
    """The key of `text` for a tenant (id of at most 64 bytes) and a model.

    `identity` covers everything else that the vector depends on: revision (a fingerprint of weights, pooling
    and prefixes), window, and the treatment of long texts.
    """
    data = f"{identity}\0{text}".encode()
    return Key(hashlib.blake2b(data, key=tenant_id.encode(), digest_size=32).digest())


class VectorCache:
    """Cache of vectors of `dim` numbers in at most `limit_bytes` of disk.

    It evicts the oldest vectors that were not used since they were written. Safe for several threads and
    processes. No method raises. Keeps the totals `embedding_cache_hits` and `embedding_cache_misses` in
    `counters`.
    """

    def __init__(
        self,
        path: Path,
        dim: int,
        limit_bytes: int,
        counters: dict[str, float],
        *,
        mono_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._dim, self._mono_s = path, dim, mono_s
        self._limit_bytes = max(limit_bytes, MIN_LIMIT_BYTES) - WAL_BYTES
        self._counters = counters
        for name in ("embedding_cache_hits", "embedding_cache_misses"):
            counters.setdefault(name, 0)
        self._lock = threading.Lock()
        self._file: _CacheFile | None = None
        self._paused_until_s = 0.0
        self._recently_used: set[Key] = set()
        # Entries that texts of several chapters or projects share: what covers all of them.
        self._shared: dict[Key, bytes] = {}

    def lookup(self, keys: Sequence[Key], origins: Sequence[Origin] = ()) -> dict[Key, CachedVector]:
        """The valid vectors among those of `keys`; counts hits and misses. `origins`: one a key."""
        vectors = {}
        entries: list[_Entry] = self._attempt(lambda file: file.read(list(set(keys))), [])
        asking = {key: origin.stored for key, origin in zip(keys, origins, strict=False)}
        for is_old, key, value, origin, tokens in entries:
            if (decoded := _decode(key, value, self._dim)) is not None:
                vector, sparse = decoded
                vectors[key] = CachedVector(vector, tokens if isinstance(tokens, int) else 0, sparse)
                if is_old:
                    self._recently_used.add(key)
                if isinstance(origin, bytes) and (both := _common(origin, asking.get(key, origin))) != origin:
                    self._shared[key] = both
        hits = sum(key in vectors for key in keys)
        self._counters["embedding_cache_hits"] += hits
        self._counters["embedding_cache_misses"] += len(keys) - hits
        return vectors

    def put(self, vectors: Iterable[tuple[Any, ...]]) -> None:
        """Store vectors (`NewVector`), replacing those of the same key; evicts first.

        Skips vectors that are not finite, and those whose origin was deleted after the job was created.
        """
        entries = (NewVector(*entry) for entry in vectors)
        rows = [_Row.of(entry) for entry in entries if np.isfinite(entry.vector).all()]
        # Sparse vectors differ in size; a wrong estimate evicts in more steps, or more at once.
        longest = max((len(row.value) for row in rows), default=CHECKSUM_BYTES + 4 * self._dim)
        row_bytes = longest + ROW_OVERHEAD_BYTES
        rows = rows[: self._limit_bytes // 2 // row_bytes]
        used, self._recently_used = list(self._recently_used), set()
        shared, self._shared = self._shared, {}
        if rows or used or shared:
            self._attempt(lambda file: file.write(rows, used, shared, row_bytes), None)

    def position(self) -> tuple[str, float] | None:
        """What `move_on` was given last: where the reading of deletions stopped, and when (unix seconds).

        ``("", 0.0)`` for a new file; None if the file cannot be read now.
        """
        return self._attempt(lambda file: file.position(), None)

    def move_on(self, position: str, wall_now_s: float) -> None:
        """Note how far the log of deletions was read."""
        self._attempt(lambda file: file.move_on(position, wall_now_s), None)

    def erase(self, names: Sequence[str], cutoff_us: int) -> bool:
        """Delete the vectors of scopes, by the names of their tombstones, that are of jobs created at
        `cutoff_us` or earlier; from now on `put` refuses these. False if the file could not be changed."""
        return self._attempt(lambda file: file.erase(names, cutoff_us), False)

    def clear(self) -> bool:
        """Delete all vectors. False if the file could not be changed."""
        return self._attempt(lambda file: file.delete_where("1"), False)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def _attempt(self, action: "Callable[[_CacheFile], T]", default: T) -> T:
        with self._lock:
            if self._mono_s() < self._paused_until_s:
                return default
            try:
                self._file = self._file or _open_or_replace(self._path, self._limit_bytes)
                return action(self._file)
            except Exception as error:
                self._handle_error(error)
                return default

    def _handle_error(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return
        self._paused_until_s = self._mono_s() + PAUSE_S
        fields = {"file": str(self._path), "seconds": PAUSE_S, "error": str(error)}
        log.warning("cache.paused", extra=fields)
        if self._file:
            self._file.close()
            if code in _CORRUPT:
                _delete_corrupt(self._path, self._file.inode)
        self._file = None


class _Row(NamedTuple):
    """A row of the table, and the names of the tombstones that keep it out."""

    key: Key
    value: bytes
    origin: bytes
    tokens: int
    created_us: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, entry: NewVector) -> "_Row":
        key, origin = entry.key, entry.origin
        value = _encode(key, entry.vector, entry.sparse)
        return cls(key, value, origin.stored, entry.tokens, origin.created_us, origin.names)


class _CacheFile:
    """The open database file. Most methods may raise sqlite3.Error."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        # Vectors reveal their texts: for the service's user only. SQLite gives its log the same mode.
        # A file that exists must not be opened here: to close it would drop the locks of other connections of
        # this process, and the next process that ends would delete the log under all others.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self.inode = path.stat().st_ino
        self._db = sqlite3.connect(
            path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
        )
        self._db.text_factory = bytes  # a damaged value that reads as text is then invalid, not an error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A power failure may lose the latest entries, but not the file; a kill loses nothing.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {WAL_BYTES // 2 // PAGE_BYTES}")
        self._db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        self._db.execute(f"PRAGMA max_page_count = {self.limit_bytes // PAGE_BYTES}")
        # A file with another layout is left as it is: it may have no room for a further table.
        if not self._number("PRAGMA user_version"):
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE,"
                " value BLOB NOT NULL, origin BLOB NOT NULL, tokens INTEGER NOT NULL,"
                " created_us INTEGER NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS origins ON vectors (origin)")
            # Tombstones of deletions, and how far their log was read.
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS erased (name BLOB PRIMARY KEY, cutoff_us INTEGER NOT NULL)"
                " WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS log (position TEXT NOT NULL, read_s REAL NOT NULL)")
            # Ids of rows that were used since they were written.
            self._db.execute("CREATE TABLE IF NOT EXISTS used (id INTEGER PRIMARY KEY)")
            self._db.execute(f"PRAGMA user_version = {LAYOUT}")

    @property
    def usable(self) -> bool:
        """Whether it has the current layout and is within the size limit."""
        pages = self._number("PRAGMA page_count")
        return self._number("PRAGMA user_version") == LAYOUT and pages * PAGE_BYTES <= self.limit_bytes

    def read(self, keys: Sequence[Key]) -> list[_Entry]:
        """The entries of `keys` that exist."""
        entries: list[_Entry] = []
        old_below = self._old_below()
        for start in range(0, len(keys), KEYS_PER_QUERY):
            part = keys[start : start + KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            columns = "id, key, value, origin, tokens"
            rows = self._db.execute(f"SELECT {columns} FROM vectors WHERE key IN ({marks})", part)
            entries += [(id_ < old_below, Key(key), *rest) for id_, key, *rest in rows]
        return entries

    def _old_below(self) -> int:
        """Ids below this are in the older half; 0 until half of the space is used."""
        if self._used_bytes() < self.limit_bytes // 2:
            return 0
        return self._number("SELECT min(id) / 2 + max(id) / 2 FROM vectors")

    def write(
        self, rows: "Sequence[_Row]", used: Sequence[Key], shared: Mapping[Key, bytes], row_bytes: int
    ) -> None:
        """Mark `used`, make room for `rows`, insert them. A failure in between costs only some entries."""
        if shared:
            with self._transaction():
                change = "UPDATE vectors SET origin = ? WHERE key = ?"
                self._db.executemany(change, [(origin, key) for key, origin in shared.items()])
        if used:
            mark = "INSERT OR IGNORE INTO used (id) SELECT id FROM vectors WHERE key = ?"
            with self._transaction():
                self._db.executemany(mark, [(key,) for key in used])
        moves_left = min(MAX_MOVED_BYTES, self.limit_bytes // 8) // row_bytes
        while moves_left > 0 and self._excess_bytes(len(rows), row_bytes) > 0:
            with self._transaction():
                moves_left -= 1 + self._evict_unused(len(rows), row_bytes)
        try:
            self._insert(rows, row_bytes, spare_bytes=0)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_FULL:
                raise
            # The estimate of the pages was too low, or the disk is full: then this fails as well.
            self._insert(rows, row_bytes, spare_bytes=int(self.limit_bytes * 4 * SPARE_SHARE))

    def _evict_unused(self, rows: int, row_bytes: int) -> int:
        """Delete the oldest rows, but move those that were used to the other end; returns how many moved.

        Whole pages become free, because rows next to each other go. To move a row when it is used would take
        a new page and leave a hole in the old one.
        """
        spare_bytes = int(self.limit_bytes * SPARE_SHARE)
        last = self._oldest(self._excess_bytes(rows, row_bytes) + spare_bytes, row_bytes)
        at_once = MAX_MOVED_AT_ONCE_BYTES // row_bytes + 1
        nth_used = self._number("SELECT id FROM used ORDER BY id LIMIT 1 OFFSET ?", at_once)
        last = min(last, nth_used or last)
        moved = self._db.execute(
            f"SELECT {_COLUMNS} FROM vectors JOIN used USING (id) WHERE id <= ?", (last,)
        ).fetchall()
        self._delete_until(last)
        self._put(moved)
        return len(moved)

    def _insert(self, rows: "Sequence[_Row]", row_bytes: int, spare_bytes: int) -> None:
        """Insert; if there is no room, delete the oldest rows first, used or not."""
        with self._transaction():
            excess = self._excess_bytes(len(rows), row_bytes)
            while excess + spare_bytes > 0 and self._delete_until(
                self._oldest(excess + spare_bytes, row_bytes)
            ):
                excess, spare_bytes = self._excess_bytes(len(rows), row_bytes), 0
            # In the transaction: a deletion comes before it and is seen, or after it and deletes the rows.
            self._put([row[:5] for row in self._not_erased(rows)])

    def _not_erased(self, rows: "Sequence[_Row]") -> "Sequence[_Row]":
        if not self._number("SELECT count(*) FROM (SELECT 1 FROM erased LIMIT 1)"):
            return rows
        query = "SELECT count(*) FROM erased WHERE name IN (?, ?, ?, ?) AND cutoff_us >= ?"
        return [row for row in rows if not self._number(query, *map(_digest, row.names), row.created_us)]

    def erase(self, names: Sequence[str], cutoff_us: int) -> bool:
        """Tombstones first, then the vectors, some at a time. Free pages are overwritten."""
        tombstone = (
            "INSERT INTO erased (name, cutoff_us) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET cutoff_us = max(cutoff_us, excluded.cutoff_us)"
        )
        with self._transaction():
            self._db.executemany(tombstone, [(_digest(_covering(name)), cutoff_us) for name in names])
        for name in names:
            for first, last in _origins_of(name):
                self.delete_where("origin BETWEEN ? AND ? AND created_us <= ?", first, last, cutoff_us)
        return True

    def delete_where(self, condition: str, *values: bytes | int) -> bool:
        """Delete the vectors that a condition of this file selects."""
        self._db.execute("PRAGMA secure_delete = ON")
        page = f"SELECT id FROM vectors WHERE {condition} LIMIT {ERASED_AT_ONCE}"
        while ids := [row[0] for row in self._db.execute(page, values)]:
            with self._transaction():
                for table in ("used", "vectors"):
                    self._db.executemany(f"DELETE FROM {table} WHERE id = ?", [(id_,) for id_ in ids])
        self._db.execute("PRAGMA secure_delete = OFF")
        # The log holds copies of deleted pages. While another worker reads it, it stays until a later write.
        with suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return True

    def position(self) -> tuple[str, float]:
        row = self._db.execute("SELECT position, read_s FROM log").fetchone()
        return (row[0].decode(), float(row[1])) if row else ("", 0.0)

    def move_on(self, position: str, wall_now_s: float) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM log")
            self._db.execute("INSERT INTO log (position, read_s) VALUES (?, ?)", (position, wall_now_s))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _oldest(self, size_bytes: int, row_bytes: int) -> int:
        """The last id of the oldest rows that take `size_bytes`; 0 if there are none."""
        query = "SELECT max(id) FROM (SELECT id FROM vectors ORDER BY id LIMIT ?)"
        return self._number(query, size_bytes // row_bytes + 1)

    def _delete_until(self, last: int) -> int:
        self._db.execute("DELETE FROM used WHERE id <= ?", (last,))
        return self._db.execute("DELETE FROM vectors WHERE id <= ?", (last,)).rowcount

    def _put(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._db.executemany(f"INSERT OR REPLACE INTO vectors ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)", rows)

    def _excess_bytes(self, rows: int, row_bytes: int) -> int:
        """Bytes by which `rows` more exceed the limit. Partly free pages do not count as free."""
        most_rows = self.limit_bytes // row_bytes
        # Keys are random, so each new one may divide a page of the index.
        index_pages = min(rows, most_rows * INDEX_ENTRY_BYTES // PAGE_BYTES + 1)
        reserved = 2 * rows * row_bytes + index_pages * PAGE_BYTES + most_rows // 2 * MARK_BYTES
        return self._used_bytes() + reserved - self.limit_bytes

    def _used_bytes(self) -> int:
        free = self._number("PRAGMA freelist_count")
        return (self._number("PRAGMA page_count") - free) * PAGE_BYTES

    def _number(self, query: str, *values: int | bytes) -> int:
        """The number that a query gives; 0 if it is null or there is no row."""
        row = self._db.execute(query, values).fetchone()
        return int(row[0] or 0) if row else 0

    def close(self) -> None:
        """Close; an error here adds nothing to the one that led to the close."""
        try:
            self._db.close()
        except sqlite3.Error:
            pass


def _open_or_replace(path: Path, limit_bytes: int) -> _CacheFile:
    """Open the file. Replace it by an empty one if its layout or size is wrong or it is corrupt."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(path):
        try:
            file = _CacheFile(path, limit_bytes)
            if file.usable:
                return file
            file.close()
            log.info(
                "cache.reset", extra={"file": str(path), "hint": "it had another layout or was too large"}
            )
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _CORRUPT:
                raise
            log.warning("cache.damaged", extra={"file": str(path), "error": str(error)})
        _delete(path)
        return _CacheFile(path, limit_bytes)


def _delete_corrupt(path: Path, inode: int) -> None:
    """Delete the file, unless another worker has replaced it already."""
    try:
        with _locked(path):
            if path.stat().st_ino == inode:
                _delete(path)
    except OSError:
        pass  # the next open checks it again


def _delete(path: Path) -> None:
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from opening or deleting the file. Raises TimeoutError."""
    give_up_at = time.monotonic() + LOCK_WITHIN_S
    # A user who can open the file can hold its lock for ever, so the mode is 0600.
    with open(os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_WRONLY, 0o600), "ab") as lock:
        lock_file(lock.fileno(), mono_give_up_s=give_up_at, poll_s=0.01)
        yield


def _encode(key: Key, vector: Vector, sparse: SparseVector | None) -> bytes:
    """Checksum, dense vector; ids and weights of the sparse one behind it."""
    data = np.asarray(vector, "<f4").tobytes()
    if sparse is not None:
        data += np.asarray(sparse.ids, "<u4").tobytes() + np.asarray(sparse.weights, "<f4").tobytes()
    return _checksum(key, data) + data


def _decode(key: Key, value: object, dim: int) -> tuple[Vector, SparseVector] | None:
    """The vectors; None if the value is not the one that was written under this key."""
    size = len(value) - CHECKSUM_BYTES - 4 * dim if isinstance(value, bytes) else -1
    if not isinstance(value, bytes) or size < 0 or size % 8:
        return None
    checksum, data = value[:CHECKSUM_BYTES], value[CHECKSUM_BYTES:]
    vector = np.frombuffer(data, "<f4", dim).astype(np.float32)
    if checksum != _checksum(key, data) or not np.isfinite(vector).all():
        return None
    ids = np.frombuffer(data, "<u4", size // 8, 4 * dim).astype(np.uint32)
    weights = np.frombuffer(data, "<f4", size // 8, 4 * dim + size // 2).astype(np.float32)
    return vector, SparseVector(ids, weights)


def _checksum(key: Key, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=key, digest_size=CHECKSUM_BYTES).digest()


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_PART_BYTES).digest()


def _digests(*names: str) -> bytes:
    """A digest of the first name, of the first two, and so on."""
    return b"".join(_digest("/".join(names[: stop + 1])) for stop in range(len(names)))


def _common(one: bytes, other: bytes) -> bytes:
    """The parts that two origins share; the rest is zero."""
    shared = 0
    while shared < len(one) and one[: shared + _PART_BYTES] == other[: shared + _PART_BYTES]:
        shared += _PART_BYTES
    return one[:shared].ljust(len(one), b"\0")


def _covering(name: str) -> str:
    """The tombstone of the chapter, where single rows of it were deleted."""
    return f"c/{name[2:]}" if name.startswith("k/") else name


def _origins_of(name: str) -> list[tuple[bytes, bytes]]:
    """Ranges of origins that a deletion covers: its own, and those that texts beyond it share."""
    kind, *parts = name.split("/")
    if kind == "i":
        return []  # it is deleted with its chapter
    own, full = _digests(*parts), 3 * _PART_BYTES
    shared = [own[:stop].ljust(full, b"\0") for stop in range(_PART_BYTES, len(own), _PART_BYTES)]
    return [(own.ljust(full, b"\0"), own.ljust(full, b"\xff")), *((one, one) for one in shared)]
