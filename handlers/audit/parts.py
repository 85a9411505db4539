"""Parts of an archive file: units, frames of other programs, damage, and the torn end of a killed writer.

Damage hides nothing behind it: the search continues with the next unit whose checksum is right.
"""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from .units import HEADER_BYTES, MAGIC, Read, Unit, has_crc, read_sizes, unit_at

#: Magic number of the skippable frame that covers damage, so that zstd tools read what is behind it.
COVER_MAGIC = 0x184D2A5B
#: Covers are skippable frames, whose length is 32 bits.
COVER_BYTES = 8
_MAX_COVERED_BYTES = 2**32 - 1

_UNIT_START = MAGIC.to_bytes(4, "little")
_ZSTD_START = zstandard.FRAME_HEADER
_FRAME = struct.Struct("<II")
#: Longest header of a zstd frame.
_ZSTD_HEADER_BYTES = 18
_BLOCK_HEADER_BYTES = 3
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
#: Bytes that are searched in one step.
_STEP_BYTES = 1024 * 1024
#: A longer damaged part is not decompressed to see whether zstd tools read it.
_MAX_TRIED_BYTES = 64 * 1024 * 1024


class Foreign(NamedTuple):
    """Byte range of a whole frame without an index: of another program, or a cover of damage."""

    start: int
    end: int


class Damage(NamedTuple):
    """Byte range in which no unit is whole. Its entries may have been acknowledged."""

    start: int
    end: int


class Torn(NamedTuple):
    """Beginning of a unit at the end of a file. Its writer was killed, so it acknowledged nothing of it."""

    start: int
    end: int


Part = Unit | Foreign | Damage | Torn


def read_parts(read: Read, start: int, stop: int, *, checked_from: int = 0) -> Iterator[Part]:
    """The parts between two offsets, in order and without a gap.

    Checksums are verified for units that start at or after `checked_from`, and where sizes are wrong.
    """
    while start < stop:
        part = _part_at(read, start, stop, check=start >= checked_from)
        yield part
        start = part.end


def _part_at(read: Read, start: int, stop: int, *, check: bool) -> Part:
    unit = unit_at(read, start, stop, check=check)
    # A wrong size shows at the next part only.
    if unit and (check or _begins_frame(read, unit.end, stop) or unit_at(read, start, stop)):
        return unit
    magic = read(start, len(_UNIT_START))
    if magic != _UNIT_START and (unit_end := _find_end_without_magic(read, start, stop)):
        return Damage(start, unit_end)
    frame_end = None if magic == _UNIT_START else find_frame_end(read, start, stop)
    if frame_end is not None and _begins_frame(read, frame_end, stop):
        return Foreign(start, frame_end)
    next_unit = _find_unit(read, start + 1, frame_end or stop)
    if next_unit is not None:
        return Damage(start, next_unit)
    if frame_end is not None:
        return Foreign(start, frame_end)
    return Torn(start, stop) if _is_torn(read, start, stop) else Damage(start, stop)


def _find_end_without_magic(read: Read, start: int, stop: int) -> int | None:
    """The end of a unit that is whole but for its first bytes."""
    header = _UNIT_START + read(start, HEADER_BYTES)[len(_UNIT_START) :]
    sizes = read_sizes(header)
    if sizes is None or (end := start + sizes.unit_bytes) > stop:
        return None
    return end if has_crc(read, start, header, end) else None


def _begins_frame(read: Read, offset: int, stop: int) -> bool:
    magic = read(offset, 4) if offset < stop else b""
    return offset == stop or magic == _ZSTD_START or _is_skippable(magic)


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and int.from_bytes(magic, "little") & 0xFFFFFFF0 == 0x184D2A50


def find_frame_end(read: Read, start: int, stop: int) -> int | None:
    """Where the zstd or skippable frame at an offset ends, by its sizes; None if no whole frame is there."""
    header = read(start, _ZSTD_HEADER_BYTES)
    if _is_skippable(header[:4]) and len(header) >= _FRAME.size:
        end = start + _FRAME.size + _FRAME.unpack_from(header)[1]
    elif header[:4] == _ZSTD_START:
        end = _find_zstd_end(read, start, header, stop)
    else:
        return None
    return end if end <= stop else None


def _find_zstd_end(read: Read, start: int, header: bytes, stop: int) -> int:
    """The end of a zstd frame, by the headers of its blocks; beyond `stop` if it is not whole."""
    try:
        offset = start + zstandard.frame_header_size(header)
        checksum_bytes = 4 if zstandard.get_frame_parameters(header).has_checksum else 0
    except zstandard.ZstdError:
        return stop + 1
    while offset + _BLOCK_HEADER_BYTES <= stop:
        block = int.from_bytes(read(offset, _BLOCK_HEADER_BYTES), "little")
        is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
        if kind == _RESERVED_BLOCK:
            break
        offset += _BLOCK_HEADER_BYTES + (1 if kind == _RLE_BLOCK else size)
        if is_last:
            return offset + checksum_bytes
    return stop + 1


def _find_unit(read: Read, start: int, stop: int) -> int | None:
    """Offset of the next whole unit, its checksum verified."""
    return next((at for at in _unit_starts(read, start, stop) if unit_at(read, at, stop)), None)


def _unit_starts(read: Read, start: int, stop: int) -> Iterator[int]:
    """Offsets at which the header of a unit seems to be."""
    while start < stop:
        step = read(start, min(_STEP_BYTES, stop - start))
        found = step.find(_UNIT_START)
        while found >= 0:
            if read_sizes(read(start + found, HEADER_BYTES)) is not None:
                yield start + found
            found = step.find(_UNIT_START, found + 1)
        if len(step) < _STEP_BYTES:
            return
        start += len(step) - len(_UNIT_START) + 1


def _is_torn(read: Read, start: int, stop: int) -> bool:
    """Whether what ends at `stop`, the end of the file, is what a killed writer leaves.

    That is the beginning of a unit and nothing else. A unit with a wrong size looks like it, but is whole if
    the file's end is taken for its own, or other units are behind it.
    """
    header = read(start, HEADER_BYTES)
    if stop - start < HEADER_BYTES:
        return True  # too short for a line
    sizes = read_sizes(header)
    if sizes is None or start + sizes.unit_bytes <= stop:
        return False
    if has_crc(read, start, header, stop):
        return False
    return next(_unit_starts(read, start + 1, stop), None) is None


def cover(damage: Damage) -> bytes | None:
    """Bytes that, written over the beginning of damage, make zstd tools skip it; None if it does not fit."""
    covered = damage.end - damage.start - COVER_BYTES
    return _FRAME.pack(COVER_MAGIC, covered) if 0 <= covered <= _MAX_COVERED_BYTES else None


def zstd_reads(read: Read, start: int, end: int) -> bool:
    """Whether zstd tools read this range without an error: only the index of a unit in it is damaged."""
    if end - start > _MAX_TRIED_BYTES:
        return False
    offset: int | None = start
    while offset is not None and offset < end:
        offset = find_frame_end(read, offset, end)
    if offset != end:
        return False
    source = io.BytesIO(read(start, end - start))
    try:
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader:
            while reader.read(_STEP_BYTES):
                pass
    except zstandard.ZstdError:
        return False
    return True
