"""What a day of the audit archive is made of: units that zstd tools read as one stream of JSON lines.

A unit is a zstd skippable frame, which every reader of the format passes over, and behind it a zstd frame
with the lines. The skippable frame says which stream entries the lines are of, so that the index
can be read without decompressing, and guards both frames with a checksum, so that a torn unit is
known. All numbers are little-endian:

    u32 magic, u32 bytes that follow in this frame, u32 crc32 of all behind it, the lines' frame included,
    u32 bytes of the lines' frame, u16 bytes of the stream's name, the name,
    and for each line u64 ms, u64 sequence, u64 digest of its job
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: One of the sixteen magic numbers that the format sets aside for frames to be skipped.
MAGIC = 0x184D2A5A

_FRAME = struct.Struct("<II")
_GUARD = struct.Struct("<I")
_SIZES = struct.Struct("<IH")
_REF = struct.Struct("<QQQ")
_HEADER_BYTES = _FRAME.size + _GUARD.size + _SIZES.size

#: Reads `size` bytes at an offset, fewer at the end of the file.
Read = Callable[[int, int], bytes]


class Ref(NamedTuple):
    """Which stream entry a line is of, and a digest of its job that stays the same in every try."""

    ms: int
    sequence: int
    digest: int


class Unit(NamedTuple):
    """One unit's place in its file, in bytes, and what its lines are of."""

    start: int
    end: int
    stream: str
    refs: list[Ref]


def entry_ref(entry_id: str, digest: int) -> Ref:
    """The reference of ``<ms>-<sequence>``. Raises ValueError for what is no id of a stream entry."""
    ms, _, sequence = entry_id.partition("-")
    return Ref(int(ms), int(sequence or "0"), digest)


def pack(stream: str, refs: Sequence[Ref], frame: bytes) -> bytes:
    """One unit; `frame` is the zstd frame with one line a reference."""
    name = stream.encode()
    guarded = b"".join([_SIZES.pack(len(frame), len(name)), name, *(_REF.pack(*ref) for ref in refs)])
    crc = zlib.crc32(frame, zlib.crc32(guarded))
    return _FRAME.pack(MAGIC, _GUARD.size + len(guarded)) + _GUARD.pack(crc) + guarded + frame


def units(read: Read, start: int, stop: int, *, checked_from: int = 0) -> Iterator[Unit]:
    """The whole units between two offsets, in order; ends before the first that is torn or none.

    The checksums of units that begin before `checked_from` are taken on trust.
    """
    while (unit := _unit_at(read, start, stop, check=start >= checked_from)) is not None:
        yield unit
        start = unit.end


def _unit_at(read: Read, start: int, stop: int, *, check: bool) -> Unit | None:
    header = read(start, _HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    magic, follows = _FRAME.unpack_from(header)
    frame_bytes, name_bytes = _SIZES.unpack_from(header, _FRAME.size + _GUARD.size)
    refs_bytes = follows - _GUARD.size - _SIZES.size - name_bytes
    lines_at = start + _FRAME.size + follows
    end = lines_at + frame_bytes
    if magic != MAGIC or refs_bytes < 0 or refs_bytes % _REF.size or end > stop:
        return None
    body = read(start + _HEADER_BYTES, name_bytes + refs_bytes)
    if (
        check
        and _crc(header, body, read(lines_at, frame_bytes)) != _GUARD.unpack_from(header, _FRAME.size)[0]
    ):
        return None
    refs = [Ref(*ref) for ref in _REF.iter_unpack(body[name_bytes:])]
    return Unit(start, end, body[:name_bytes].decode(), refs)


def _crc(header: bytes, body: bytes, frame: bytes) -> int:
    guarded = header[_FRAME.size + _GUARD.size :]
    return zlib.crc32(frame, zlib.crc32(body, zlib.crc32(guarded)))
