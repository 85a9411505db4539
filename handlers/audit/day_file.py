"""Archive file of one day: many processes append to it, each entry once and durably."""

import fcntl
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jobworker.worker import Unavailable

from ..file_lock import lock_file
from .index import StreamIndex, entry_key
from .parts import Damage, Part, Torn, cover, read_parts, zstd_reads
from .units import MAGIC, EntryRef, Unit, pack_unit

log = logging.getLogger("jobworker.audit")

#: Bytes at the end of a file that is opened whose checksums are verified. Units that were not synced before a
#: power failure can only be there; verifying a whole day of a busy archive would take minutes.
CHECKED_BYTES = 64 * 1024 * 1024
#: Timeout of the file lock. Its holder only writes to the page cache, so a longer wait means a hung disk.
LOCK_WITHIN_S = 10.0
#: Interval between two tries for the lock, about as long as it is held.
_LOCK_POLL_S = 0.0002
#: Bytes at either end of what was read, which show whether another program replaced it.
_EDGE_BYTES = 32
#: Bytes of each step when a part is copied.
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

    Other programs do not take the lock. What they put here is never cut or overwritten: whole zstd frames
    stay in their place, and a file that they may still be writing is renamed.
    """

    def __init__(self, path: Path, compress: Callable[[bytes], bytes]) -> None:
        """`compress` returns one zstd frame. The file is opened by the first call that needs it."""
        self.path = path
        self._compress = compress
        self._fd = -1
        self._end = 0
        #: First and last bytes before `_end`, as they were read.
        self._edges = (b"", b"")
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

    def _append(self, stream: str, lines: Sequence[ArchiveLine]) -> int:
        distinct = list({entry_key(line.ref): line for line in lines}.values())
        data = self._pack(stream, distinct)  # outside the lock: nearly always all of them are new
        with self._locked():
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
        self._edges = self._read_edges()

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
        self._edges = (b"", b"")
        self._indexes = {}
        self._unsynced = []
        self._sync_failed = False

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def _units(self, start: int, stop: int) -> Iterable[Unit]:
        parts = read_parts(self._read, start, stop, checked_from=stop)
        return (part for part in parts if isinstance(part, Unit))

    def _index(self, stream: str) -> StreamIndex:
        if stream not in self._indexes:
            self._indexes[stream] = StreamIndex(stream, self._units)
        return self._indexes[stream]

    def _add(self, unit: Unit) -> None:
        self._index(unit.stream).add(unit)
        self._end = unit.end

    def _read_appended(self) -> bool:
        """Index what others appended and mend what is broken; False if the file was renamed instead."""
        size = os.fstat(self._fd).st_size
        is_replaced = size < self._end or self._edges_differ()
        had_units = self._end > 0
        if is_replaced:
            self._reset()
        for part in read_parts(self._read, self._end, size, checked_from=size - CHECKED_BYTES):
            if isinstance(part, Damage | Torn) and (is_replaced or self._is_unknown(part, size)):
                self._set_aside()
                return False
            self._take(part)
        if had_units and not size:
            self._set_aside()  # another program emptied the file, perhaps to fill it again
            return False
        self._edges = self._read_edges()
        return True

    def _take(self, part: Part) -> None:
        if isinstance(part, Unit):
            self._add(part)
            return
        if isinstance(part, Torn):
            self._cut(part)
            return
        if isinstance(part, Damage):
            self._cover(part)
        self._end = part.end

    def _read_edges(self) -> tuple[bytes, bytes]:
        size = min(_EDGE_BYTES, self._end)
        return self._read(0, size), self._read(self._end - size, size)

    def _edges_differ(self) -> bool:
        """Whether both ends of what was read differ now: damage of one sector changes one of them."""
        first, last = self._read_edges()
        return first != self._edges[0] and last != self._edges[1]

    def _is_unknown(self, part: Damage | Torn, size: int) -> bool:
        """Whether the file as a whole is of another format, or of a program that still writes it."""
        starts_as_unit = self._read(0, 4) == MAGIC.to_bytes(4, "little")
        return isinstance(part, Damage) and (part.start, part.end) == (0, size) and not starts_as_unit

    def _set_aside(self) -> None:
        """Rename the file as it is. A program that is still writing it continues in the renamed file."""
        day, _, suffix = self.path.name.partition(".")
        aside = self.path.with_name(f"{day}.{time.time_ns()}.{suffix}")
        os.rename(self.path, aside)
        log.warning("audit.file_replaced", extra={"file": self.path.name, "kept_as": aside.name})

    def _cut(self, torn: Torn) -> None:
        """Move the half-written unit of a killed writer to a file of its own."""
        aside = self.path.with_name(f"{self.path.name}.torn-{torn.start}-{time.time_ns()}")
        self._copy(torn, aside)
        os.ftruncate(self._fd, torn.start)
        log.warning(
            "audit.tail_cut",
            extra={"file": self.path.name, "bytes": torn.end - torn.start, "kept_as": aside.name},
        )

    def _cover(self, damage: Damage) -> None:
        """Keep a damaged part in its place, and make zstd tools skip it if they cannot read it.

        Of the part itself, the first bytes are overwritten; a copy holds them.
        """
        crc = 0
        for chunk in self._chunks(damage):
            crc = zlib.crc32(chunk, crc)
        aside = self.path.with_name(f"{self.path.name}.damaged-{damage.start}-{crc:08x}")
        if not aside.exists():
            self._copy(damage, aside)
        length = damage.end - damage.start
        log.error(
            "audit.damaged",
            extra={"file": self.path.name, "offset": damage.start, "bytes": length, "kept_as": aside.name},
        )
        data = cover(damage)
        if data is not None and not zstd_reads(self._read, *damage):
            _write_at(self._fd, data, damage.start)

    def _copy(self, part: Damage | Torn, target: Path) -> None:
        partial = target.with_name(f"{target.name}.part")
        try:
            with open(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb"
            ) as file:
                file.writelines(self._chunks(part))
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    def _chunks(self, part: Damage | Torn) -> Iterator[bytes]:
        for offset in range(part.start, part.end, _COPY_BYTES):
            yield self._read(offset, min(_COPY_BYTES, part.end - offset))

    # ---- the lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the file that has this name now, with all of it read.

        If the day was moved away, a new file is created.
        """
        give_up_at = time.monotonic() + LOCK_WITHIN_S
        while True:
            self._open()
            lock_file(self._fd, mono_give_up_s=give_up_at, poll_s=_LOCK_POLL_S)
            if self._is_current() and self._read_appended():
                break
            self.close()
        try:
            yield
        finally:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _open(self) -> None:
        if self._fd < 0:
            # Not through a symbolic link: it would lead to a file that is no archive.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self.path, flags, 0o600)
            sync_folder(self.path.parent)

    def _is_current(self) -> bool:
        try:
            named = os.lstat(self.path)
        except FileNotFoundError:
            return False
        opened = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def find_archived(path: Path, stream: str, digests: set[int]) -> set[int]:
    """Those of the digests that lines of this stream in a file have, synced to the disk.

    It reads every index of the file and changes nothing. Frames of other programs have no index. Raises
    Unavailable if the disk fails.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise Unavailable(f"audit archive {path}: {error}") from error
    try:
        size = os.fstat(fd).st_size
        parts = read_parts(lambda offset, count: os.pread(fd, count, offset), 0, size, checked_from=size)
        units = (part for part in parts if isinstance(part, Unit) and part.stream == stream)
        found = {ref.digest for unit in units for ref in unit.refs} & digests
        if found:
            os.fsync(fd)  # the writer may have been killed before it did
        return found
    except OSError as error:
        raise Unavailable(f"audit archive {path}: {error}") from error
    finally:
        os.close(fd)


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
