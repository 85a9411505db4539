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
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: One of the sixteen magic numbers that the zstd format reserves for skippable frames.
MAGIC = 0x184D2A5A

_FRAME = struct.Struct("<II")
_GUARD = struct.Struct("<I")
_SIZES = struct.Struct("<IH")
_REF = struct.Struct("<QQQ")
#: Bytes of a unit before the stream name.
HEADER_BYTES = _FRAME.size + _GUARD.size + _SIZES.size

#: Bytes that are read in one step, whatever size a damaged header states.
_STEP_BYTES = 1024 * 1024

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


def unit_at(read: Read, start: int, stop: int, *, check: bool = True) -> Unit | None:
    """The whole unit at an offset, or None. `check`: whether its checksum is verified."""
    header = read(start, HEADER_BYTES)
    sizes = read_sizes(header)
    if sizes is None or start + sizes.unit_bytes > stop:
        return None
    end = start + sizes.unit_bytes
    if check and not has_crc(read, start, header, end):
        return None
    body = read(start + HEADER_BYTES, sizes.body_bytes)
    try:
        stream = body[: sizes.name_bytes].decode()
    except UnicodeDecodeError:
        return None
    return Unit(start, end, stream, [EntryRef(*ref) for ref in _REF.iter_unpack(body[sizes.name_bytes :])])


class Sizes(NamedTuple):
    """Bytes of the stream name, of name and references, and of the whole unit."""

    name_bytes: int
    body_bytes: int
    unit_bytes: int


def read_sizes(header: bytes) -> Sizes | None:
    """The sizes that a unit's first `HEADER_BYTES` state, or None if no unit begins so."""
    if len(header) < HEADER_BYTES:
        return None
    magic, header_rest = _FRAME.unpack_from(header)
    frame_bytes, name_bytes = _SIZES.unpack_from(header, _FRAME.size + _GUARD.size)
    body_bytes = header_rest - _GUARD.size - _SIZES.size
    refs_bytes = body_bytes - name_bytes
    if magic != MAGIC or refs_bytes < 0 or refs_bytes % _REF.size:
        return None
    return Sizes(name_bytes, body_bytes, HEADER_BYTES + body_bytes + frame_bytes)


def has_crc(read: Read, start: int, header: bytes, end: int) -> bool:
    """Whether a whole unit with this header ends at `end`, though one of its sizes may be wrong."""
    guard, rest = _GUARD.unpack_from(header, _FRAME.size)[0], start + HEADER_BYTES
    stated = header[_FRAME.size + _GUARD.size :]
    if guard == _crc(read, rest, end, stated):
        return True
    sizes = read_sizes(header)
    if sizes is None or not rest + sizes.body_bytes <= end < rest + sizes.body_bytes + 2**32:
        return False
    real = _SIZES.pack(end - rest - sizes.body_bytes, sizes.name_bytes)
    return real != stated and bool(guard == _crc(read, rest, end, real))


def _crc(read: Read, start: int, end: int, before: bytes) -> int:
    crc = zlib.crc32(before)
    for offset in range(start, end, _STEP_BYTES):
        crc = zlib.crc32(read(offset, min(_STEP_BYTES, end - offset)), crc)
    return crc
