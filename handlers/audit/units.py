"""File format of a day of the audit archive: units that zstd tools read as one stream of JSON lines.

A unit is a zstd skippable frame, which every zstd reader ignores, followed by a zstd frame with the lines.
The skippable frame lists the stream entries of the lines, so an index is built without decompression. Its
checksum covers both frames, so a torn unit is detected. All numbers are little-endian:

    u32 magic, u32 bytes that follow in this frame, u32 crc32 of everything after it, both frames,
    u32 bytes of the frame with the lines, u16 bytes of the stream name, the name,
    and for each line u64 ms, u64 sequence, u64 digest of its job
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: One of the sixteen magic numbers that the zstd format reserves for skippable frames.
MAGIC = 0x184D2A5A

_FRAME = struct.Struct("<II")
_GUARD = struct.Struct("<I")
_SIZES = struct.Struct("<IH")
_REF = struct.Struct("<QQQ")
_HEADER_BYTES = _FRAME.size + _GUARD.size + _SIZES.size

#: Reads `size` bytes at an offset; fewer at the end of the file.
Read = Callable[[int, int], bytes]


class EntryRef(NamedTuple):
    """Stream entry of a line, and a digest of its job that is the same for every retry."""

    ms: int
    sequence: int
    digest: int


class Unit(NamedTuple):
    """Byte range of a unit in its file, and the entries of its lines."""

    start: int
    end: int
    stream: str
    refs: list[EntryRef]


def parse_ref(entry_id: str, digest: int) -> EntryRef:
    """The reference of entry id ``<ms>-<sequence>``. Raises ValueError for any other text."""
    ms, _, sequence = entry_id.partition("-")
    return EntryRef(int(ms), int(sequence or "0"), digest)


def pack_unit(stream: str, refs: Sequence[EntryRef], frame: bytes) -> bytes:
    """Bytes of one unit; `frame` is the zstd frame with one line for each reference."""
    name = stream.encode()
    guarded = b"".join([_SIZES.pack(len(frame), len(name)), name, *(_REF.pack(*ref) for ref in refs)])
    crc = zlib.crc32(frame, zlib.crc32(guarded))
    return _FRAME.pack(MAGIC, _GUARD.size + len(guarded)) + _GUARD.pack(crc) + guarded + frame


def read_units(read: Read, start: int, stop: int, *, checked_from: int = 0) -> Iterator[Unit]:
    """The units between two offsets, in order, up to the first torn one.

    Checksums are verified only for units that start at or after `checked_from`.
    """
    while (unit := _unit_at(read, start, stop, check=start >= checked_from)) is not None:
        yield unit
        start = unit.end


def _unit_at(read: Read, start: int, stop: int, *, check: bool) -> Unit | None:
    header = read(start, _HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    magic, header_rest = _FRAME.unpack_from(header)
    frame_bytes, name_bytes = _SIZES.unpack_from(header, _FRAME.size + _GUARD.size)
    refs_bytes = header_rest - _GUARD.size - _SIZES.size - name_bytes
    frame_start = start + _FRAME.size + header_rest
    end = frame_start + frame_bytes
    if magic != MAGIC or refs_bytes < 0 or refs_bytes % _REF.size or end > stop:
        return None
    body = read(start + _HEADER_BYTES, name_bytes + refs_bytes)
    if (
        check
        and _crc(header, body, read(frame_start, frame_bytes)) != _GUARD.unpack_from(header, _FRAME.size)[0]
    ):
        return None
    refs = [EntryRef(*ref) for ref in _REF.iter_unpack(body[name_bytes:])]
    return Unit(start, end, body[:name_bytes].decode(), refs)


def _crc(header: bytes, body: bytes, frame: bytes) -> int:
    guarded = header[_FRAME.size + _GUARD.size :]
    return zlib.crc32(frame, zlib.crc32(body, zlib.crc32(guarded)))
