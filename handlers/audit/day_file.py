"""One day of the audit archive: a file that many processes append to, each entry once, durable on return."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import Unavailable

from .index import StreamIndex, key
from .units import Ref, Unit, pack, units

log = logging.getLogger("jobworker.audit")

#: Of a file that is opened, so much of the end is checked by checksum: units that no sync had covered when
#: the power failed can only be there, and a whole day of a busy archive would take minutes.
CHECKED_BYTES = 64 * 1024 * 1024
#: A holder of the lock writes to the page cache and lets go: so long means that the disk hangs.
LOCK_WITHIN_S = 10.0
#: Between two tries for the lock; a holder has it for about this long.
_LOCK_POLL_S = 0.0002
#: What a file begins with that has no units in it.
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: Bytes copied at once when a damaged tail is put aside.
_COPY_BYTES = 1024 * 1024


class ArchiveLine(NamedTuple):
    """One entry to archive: what it is of, and its JSON with the newline."""

    ref: Ref
    json: bytes


class DayFile:
    """The file of one day, in one process.

    The kernel's file lock orders the writers and is given back however its holder ends. It is held while a
    writer looks at what the others appended and adds its own, which is some hundred microseconds, and not
    while it waits for the disk; so one sync of the file may cover several writers' units.
    """

    def __init__(self, path: Path, compress: Callable[[bytes], bytes]) -> None:
        """Opens nothing yet; `compress` makes one zstd frame of the lines."""
        self.path = path
        self._compress = compress
        self._fd = -1
        self._end = 0
        self._indexes: dict[str, StreamIndex] = {}
        #: What a sync has not covered yet, by offset; after one that failed it has to be written again.
        self._unsynced: list[tuple[int, bytes]] = []
        self._sync_failed = False

    def close(self) -> None:
        """Let go of the file; the next call would open it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._forget()

    def append(self, stream: str, lines: Sequence[ArchiveLine]) -> int:
        """Have these entries of one stream in the file, each once, and on the disk; how many were added.

        Entries that the file holds already are skipped. Raises Unavailable where the disk is full, fails or
        hangs; then some of the lines may be in, and the same call may be made again.
        """
        try:
            return self._append(stream, lines)
        except OSError as error:
            raise Unavailable(f"audit archive {self.path}: {error}") from error

    def jobs(self, stream: str, digests: set[int]) -> set[int]:
        """Those of the digests that a line of this stream has, by reading what all lines are of.

        What it finds is on the disk. Raises as `append` does.
        """
        if not self.path.exists():
            return set()
        try:
            with self._locked():
                self._catch_up()
                of_stream = (unit for unit in self._units(0, self._end) if unit.stream == stream)
                found = {ref.digest for unit in of_stream for ref in unit.refs} & digests
            self._sync()
            return found
        except OSError as error:
            raise Unavailable(f"audit archive {self.path}: {error}") from error

    def _append(self, stream: str, lines: Sequence[ArchiveLine]) -> int:
        distinct = list({key(line.ref): line for line in lines}.values())
        data = self._pack(stream, distinct)  # before the lock: nearly always all of them are new
        with self._locked():
            self._catch_up()
            known = self._index(stream).known({key(line.ref) for line in distinct})
            fresh = [line for line in distinct if key(line.ref) not in known]
            if fresh:
                self._write(stream, fresh, self._pack(stream, fresh) if known else data)
        self._sync()
        return len(fresh)

    def _pack(self, stream: str, lines: Sequence[ArchiveLine]) -> bytes:
        frame = self._compress(b"".join(line.json for line in lines))
        return pack(stream, [line.ref for line in lines], frame)

    def _write(self, stream: str, lines: Sequence[ArchiveLine], data: bytes) -> None:
        start = self._end
        try:
            _write_at(self._fd, data, start)
        except OSError:
            os.ftruncate(self._fd, start)  # a full disk: half a unit would be in the others' way
            raise
        self._unsynced.append((start, data))
        self._remember(Unit(start, start + len(data), stream, [line.ref for line in lines]))

    def _sync(self) -> None:
        """Wait for the disk, for what others wrote too: a duplicate may not have been synced."""
        if self._sync_failed:
            # A kernel that could not write a page may call it clean afterwards: it must be dirty again.
            for offset, data in self._unsynced:
                _write_at(self._fd, data, offset)
        self._sync_failed = True
        os.fsync(self._fd)
        self._sync_failed = False
        self._unsynced.clear()

    # ---- what is in the file

    def _forget(self) -> None:
        self._end = 0
        self._indexes = {}
        self._unsynced = []
        self._sync_failed = False

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def _units(self, start: int, stop: int) -> Iterable[Unit]:
        return units(self._read, start, stop, checked_from=stop)

    def _index(self, stream: str) -> StreamIndex:
        if stream not in self._indexes:
            self._indexes[stream] = StreamIndex(stream, self._units)
        return self._indexes[stream]

    def _remember(self, unit: Unit) -> None:
        self._index(unit.stream).add(unit)
        self._end = unit.end

    def _catch_up(self) -> None:
        """Learn what others have appended, and cut off what a writer that was killed left half-written."""
        size = os.fstat(self._fd).st_size
        if size < self._end:
            self._forget()
        for unit in units(self._read, self._end, size, checked_from=size - CHECKED_BYTES):
            self._remember(unit)
        if self._end < size:
            self._cut(size)

    def _cut(self, size: int) -> None:
        """Cut a torn end off. It is kept aside: a kill tears only what was not acknowledged, but a failing
        disk may tear more."""
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
        """Hold the lock of the file that now has this name; if the day was moved away, a new file is
        started."""
        give_up_at = time.monotonic() + LOCK_WITHIN_S
        while True:
            self._open()
            _lock(self._fd, give_up_at)
            if self._has_the_name() and not self._is_anothers():
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

    def _is_anothers(self) -> bool:
        """Whether the file was compressed by another program; then it is given another name, for late entries
        cannot be told from those in it."""
        if self._end or self._read(0, len(_ZSTD_MAGIC)) != _ZSTD_MAGIC:
            return False
        day, _, suffix = self.path.name.partition(".")
        aside = self.path.with_name(f"{day}.{time.time_ns()}.{suffix}")
        os.rename(self.path, aside)
        log.warning("audit.file_replaced", extra={"file": self.path.name, "kept_as": aside.name})
        return True

    def _has_the_name(self) -> bool:
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk: a file of which only the inode is there is lost."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int, give_up_at: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"another writer has held the file for {LOCK_WITHIN_S} s") from None
            time.sleep(_LOCK_POLL_S)  # the kernel's wait for a lock has no deadline


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
