"""Index of the stream entries in one archive file: exact, and small for files of any size."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .units import Ref, Unit

#: Entries whose keys are kept or read together. A key takes about 80 bytes in memory; reading
#: these back takes about a millisecond.
_SPAN_ENTRIES = 4096
#: Spans whose keys stay in memory after they were read: several workers' batches reach into a few each.
_SPANS_KEPT = 8

_ReadUnits = Callable[[int, int], Iterable[Unit]]


def key(ref: Ref) -> int:
    """One number for an entry, ordered as the ids are. The digest is part of it: in a Redis that lost
    its data another entry may get the id of an archived one."""
    return ref.ms << 128 | ref.sequence << 64 | ref.digest


class _Span(NamedTuple):
    """A run of units. `top`: the highest key in it and in all spans before it."""

    lowest: int
    top: int
    start: int
    end: int


class StreamIndex:
    """The entries of one stream in one file.

    Ids are handed to workers nearly in order, so a batch meets the last few spans only; the rest is two
    numbers a span, and is read from the file again where a late entry asks for it.
    """

    def __init__(self, stream: str, read_units: _ReadUnits) -> None:
        self._stream = stream
        self._read_units = read_units
        self._spans: list[_Span] = []
        self._kept: OrderedDict[_Span, set[int]] = OrderedDict()
        self._open: set[int] = set()
        self._open_from = 0

    def add(self, unit: Unit) -> None:
        """Remember a unit; units come in the order of the file."""
        if not self._open:
            self._open_from = unit.start
        self._open.update(key(ref) for ref in unit.refs)
        if len(self._open) >= _SPAN_ENTRIES:
            before = self._spans[-1].top if self._spans else 0
            top = max(before, max(self._open))
            span = _Span(min(self._open), top, self._open_from, unit.end)
            self._spans.append(span)
            self._keep(span, self._open)
            self._open = set()

    def known(self, keys: set[int]) -> set[int]:
        """The keys that the file holds."""
        if not keys:
            return set()
        lowest, highest = min(keys), max(keys)
        found = keys & self._open
        for span in reversed(self._spans):
            if span.top < lowest:
                break
            if span.lowest <= highest:
                found |= keys & self._keys_of(span)
        return found

    def _keys_of(self, span: _Span) -> set[int]:
        keys = self._kept.get(span)
        if keys is None:
            units = self._read_units(span.start, span.end)
            keys = {key(ref) for unit in units if unit.stream == self._stream for ref in unit.refs}
        self._keep(span, keys)
        return keys

    def _keep(self, span: _Span, keys: set[int]) -> None:
        self._kept[span] = keys
        self._kept.move_to_end(span)
        if len(self._kept) > _SPANS_KEPT:
            self._kept.popitem(last=False)
