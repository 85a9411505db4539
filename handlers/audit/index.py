"""Exact index of the stream entries in one archive file, with bounded memory for recent entries."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .units import EntryRef, Unit

#: Entries of a span, whose keys are cached or read together. A key takes about 80 bytes; reading a span takes
#: about 1 ms.
_SPAN_ENTRIES = 4096
#: Spans whose keys are cached: the batches of several workers each need a few.
_CACHED_SPANS = 8

_ReadUnits = Callable[[int, int], Iterable[Unit]]


def entry_key(ref: EntryRef) -> int:
    """One number for an entry, in the order of entry ids.

    It includes the digest: after Redis lost its data, another entry may get the id of an archived one.
    """
    return ref.ms << 128 | ref.sequence << 64 | ref.digest


class _Span(NamedTuple):
    """Consecutive units. `highest_so_far`: the highest key in it and in all spans before it."""

    lowest: int
    highest_so_far: int
    start: int
    end: int


class StreamIndex:
    """Entries of one stream in one file.

    Workers receive entries nearly in order, so a batch needs only the last few spans. Of each other span,
    only the lowest and highest key and its byte range are in memory; a late entry makes it read the file.
    """

    def __init__(self, stream: str, read_units: _ReadUnits) -> None:
        self._stream = stream
        self._read_units = read_units
        self._spans: list[_Span] = []
        self._cached: OrderedDict[_Span, set[int]] = OrderedDict()
        self._open: set[int] = set()
        self._open_start = 0

    def add(self, unit: Unit) -> None:
        """Add a unit; units must come in the order of the file."""
        if not self._open:
            self._open_start = unit.start
        self._open.update(entry_key(ref) for ref in unit.refs)
        if len(self._open) >= _SPAN_ENTRIES:
            before = self._spans[-1].highest_so_far if self._spans else 0
            highest = max(before, max(self._open))
            span = _Span(min(self._open), highest, self._open_start, unit.end)
            self._spans.append(span)
            self._cache(span, self._open)
            self._open = set()

    def contained(self, keys: set[int]) -> set[int]:
        """Those of the keys that are in the file."""
        if not keys:
            return set()
        lowest, highest = min(keys), max(keys)
        contained = keys & self._open
        for span in reversed(self._spans):
            if span.highest_so_far < lowest:
                break
            if span.lowest <= highest:
                contained |= keys & self._keys_of(span)
        return contained

    def _keys_of(self, span: _Span) -> set[int]:
        keys = self._cached.get(span)
        if keys is None:
            units = self._read_units(span.start, span.end)
            keys = {entry_key(ref) for unit in units if unit.stream == self._stream for ref in unit.refs}
        self._cache(span, keys)
        return keys

    def _cache(self, span: _Span, keys: set[int]) -> None:
        self._cached[span] = keys
        self._cached.move_to_end(span)
        if len(self._cached) > _CACHED_SPANS:
            self._cached.popitem(last=False)
