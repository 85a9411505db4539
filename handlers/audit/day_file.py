"""Archive file of one day: many processes append to it, each entry once and durably."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import Unavailable

from ..file_lock import lock_file
from .index import StreamIndex, entry_key
from .units import EntryRef, Unit, pack_unit, read_units

log = logging.getLogger("jobworker.audit")

#: Bytes at the end of a file that is opened whose checksums are verified. Units that were not synced before a
#: power failure can only be there; verifying a whole day of a busy archive would take minutes.
CHECKED_BYTES = 64 * 1024 * 1024
#: Timeout of the file lock. Its holder only writes to the page cache, so a longer wait means a hung disk.
LOCK_WITHIN_S = 10.0
#: Interval between two tries for the lock, about as long as it is held.
_LOCK_POLL_S = 0.0002
#: First bytes of a file that another program compressed.
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: Bytes of each step when a torn tail is copied.
_COPY_BYTES = 1024 * 1024


class ArchiveLine(NamedTuple):
    """Entry to archive; `json` is one line with its newline."""

    ref: EntryRef
    json: bytes


class DayFile:
    """Archive file of one day, as one process sees it.

    The kernel's file lock orders the writers, and ends with its holder. A writer holds it for some hundred
    microseconds, while it reads what others appended and appends its own units. It does not hold it during
    the sync, so one sync may cover the units of several writers.
    """

    def __init__(self, path: Path, compress: Callable[[bytes], bytes]) -> None:
        """`compress` returns one zstd frame. The file is opened by the first call that needs it."""
        self.path = path
        self._compress = compress
        self._fd = -1
        self._end = 0
        self._indexes: dict[str, StreamIndex] = {}
        #: Offsets and bytes of units since the last good sync; after a failed one they are written again.
        self._unsynced: list[tuple[int, bytes]] = []
        self._sync_failed = False

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._reset()

    def append(self, stream: str, lines: Sequence[ArchiveLine]) -> int:
        """Append the entries that are not in the file yet, sync it, and return how many were added.

        Raises Unavailable if the disk is full, fails or hangs. Some lines may be in the file then; the same
        call can be repeated.
        """
        try:
            return self._append(stream, lines)
        except OSError as error:
            raise Unavailable(f"audit archive {self.path}: {error}") from error

    def archived_digests(self, stream: str, digests: set[int]) -> set[int]:
        """Those of the digests that lines of this stream have, synced to the disk. It reads the whole file.

        Raises Unavailable as `append` does.
        """
        if not self.path.exists():
            return set()
        try:
            with self._locked():
                self._read_appended()
                of_stream = (unit for unit in self._units(0, self._end) if unit.stream == stream)
                archived = {ref.digest for unit in of_stream for ref in unit.refs} & digests
            self._sync()
            return archived
        except OSError as error:
            raise Unavailable(f"audit archive {self.path}: {error}") from error

    def _append(self, stream: str, lines: Sequence[ArchiveLine]) -> int:
        distinct = list({entry_key(line.ref): line for line in lines}.values())
        data = self._pack(stream, distinct)  # outside the lock: nearly always all of them are new
        with self._locked():
            self._read_appended()
            present = self._index(stream).contained({entry_key(line.ref) for line in distinct})
            fresh = [line for line in distinct if entry_key(line.ref) not in present]
            if fresh:
                self._write(stream, fresh, self._pack(stream, fresh) if present else data)
        self._sync()
        return len(fresh)

    def _pack(self, stream: str, lines: Sequence[ArchiveLine]) -> bytes:
        frame = self._compress(b"".join(line.json for line in lines))
        return pack_unit(stream, [line.ref for line in lines], frame)

    def _write(self, stream: str, lines: Sequence[ArchiveLine], data: bytes) -> None:
        start = self._end
        try:
            _write_at(self._fd, data, start)
        except OSError:
            os.ftruncate(self._fd, start)  # disk full: remove the half-written unit
            raise
        self._unsynced.append((start, data))
        self._add(Unit(start, start + len(data), stream, [line.ref for line in lines]))

    def _sync(self) -> None:
        """Sync the file, even if nothing was added: the writer of a duplicate may not have synced it yet."""
        if self._sync_failed:
            # After a failed fsync, the kernel may mark the unwritten pages clean: write them again.
            for offset, data in self._unsynced:
                _write_at(self._fd, data, offset)
        self._sync_failed = True
        os.fsync(self._fd)
        self._sync_failed = False
        self._unsynced.clear()

    # ---- units of the file

    def _reset(self) -> None:
        self._end = 0
        self._indexes = {}
        self._unsynced = []
        self._sync_failed = False

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def _units(self, start: int, stop: int) -> Iterable[Unit]:
        return read_units(self._read, start, stop, checked_from=stop)

    def _index(self, stream: str) -> StreamIndex:
        if stream not in self._indexes:
            self._indexes[stream] = StreamIndex(stream, self._units)
        return self._indexes[stream]

    def _add(self, unit: Unit) -> None:
        self._index(unit.stream).add(unit)
        self._end = unit.end

    def _read_appended(self) -> None:
        """Index the units that others appended, and cut off the half-written unit of a killed writer."""
        size = os.fstat(self._fd).st_size
        if size < self._end:
            self._reset()
        for unit in read_units(self._read, self._end, size, checked_from=size - CHECKED_BYTES):
            self._add(unit)
        if self._end < size:
            self._cut_tail(size)

    def _cut_tail(self, size: int) -> None:
        """Move everything after the last whole unit to a file of its own.

        It is not deleted: a kill tears only entries without acknowledgement, but a bad disk may tear others.
        """
        aside = self.path.with_name(f"{self.path.name}.torn-{self._end}-{time.time_ns()}")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for offset in range(self._end, size, _COPY_BYTES):
                file.write(self._read(offset, min(_COPY_BYTES, size - offset)))
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(self._fd, self._end)
        log.warning(
            "audit.tail_cut", extra={"file": self.path.name, "bytes": size - self._end, "kept_as": aside.name}
        )

    # ---- the lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the file that has this name now; if the day was moved away, create a new file."""
        give_up_at = time.monotonic() + LOCK_WITHIN_S
        while True:
            self._open()
            lock_file(self._fd, mono_give_up_s=give_up_at, poll_s=_LOCK_POLL_S)
            if self._is_current() and not self._replace_foreign():
                break
            self.close()
        try:
            yield
        finally:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _open(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            sync_folder(self.path.parent)

    def _replace_foreign(self) -> bool:
        """Rename a file that another program compressed; True if it did.

        Such a file has no index, so duplicates of its entries cannot be detected.
        """
        if self._end or self._read(0, len(_ZSTD_MAGIC)) != _ZSTD_MAGIC:
            return False
        day, _, suffix = self.path.name.partition(".")
        aside = self.path.with_name(f"{day}.{time.time_ns()}.{suffix}")
        os.rename(self.path, aside)
        log.warning("audit.file_replaced", extra={"file": self.path.name, "kept_as": aside.name})
        return True

    def _is_current(self) -> bool:
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        opened = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder: without its entry, a synced file is lost."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
