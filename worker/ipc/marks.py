"""Shared memory that outlives the reader and says which entry it was reading when it ended.

The supervisor owns the memory and passes it to every reader. The reader sets a mark before it looks at
anything that comes from a stream, and clears it afterwards. A reader that ends leaves its mark behind; the
supervisor counts it (`record_death`) before it starts the next reader, which goes by what was counted:

- Marked with one entry: the entry has a strike. With `CONVICTED_AT` strikes it is poison, and no reader looks
  into it again.
- Marked with an answer of several entries: the next reader lists what is pending of that stream one entry at
  a time, each under a mark of its own.

A SIGKILL may come from outside and hit any entry, so it is one strike of three, and an entry that a reader
gets past loses its strikes. A crash, an exit, or an endless computation that the supervisor ended is proof.
One process writes at a time: the reader while it lives, the supervisor after its end.
"""

import mmap
import os
from typing import NamedTuple, Self

#: Strikes from which on an entry is refused.
CONVICTED_AT = 3
#: Strikes from which on not even the bytes of the entry are fetched: the reader ended as it fetched them.
UNTOUCHABLE_AT = 2 * CONVICTED_AT

#: As many as the in-flight table can name: a source is one byte there.
_SOURCES = 256
_WINDOW, _IS_MARKED, _SOURCE, _LENGTH, _SETTLING, _NEXT_ROW = range(6)
_ID_AT = 64
_CAREFUL_AT = 256
_OUTSIDE_AT = _CAREFUL_AT + _SOURCES
#: Rows of entries with strikes: source, strikes, length of the id, whether it was being settled, the id.
_ROWS_AT, _ROW_BYTES, _ROWS = 1024, 64, 48
_SIZE = 4096


class Suspect(NamedTuple):
    """An entry that has a strike. ``strikes`` counts this one too."""

    source: int
    entry_id: bytes
    settling: bool
    strikes: int

    @property
    def convicted(self) -> bool:
        """Whether it is refused from now on."""
        return self.strikes >= CONVICTED_AT


class Marks:
    """One reader's marks, and the strikes of all readers before it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._view = memoryview(self._map)
        self._words = self._view.cast("Q")
        #: Strikes of the entries that no reader may look into, by source and id.
        self.convicted: dict[tuple[int, bytes], int] = {}
        # Rows of the entries that had strikes as they came in, but too few.
        self._suspects: dict[tuple[int, bytes], int] = {}
        for at in range(_ROWS):
            row = self._row(at)
            if row.convicted:
                self.convicted[row.source, row.entry_id] = row.strikes
            elif row.strikes and not row.settling:
                self._suspects[row.source, row.entry_id] = at

    @classmethod
    def create(cls) -> Self:
        """New memory, without a mark."""
        fd = os.memfd_create("marks", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    # -- the reader

    def open_window(self, source: int) -> None:
        """Mark an answer of several entries: nothing is known of them yet. One write."""
        self._words[_WINDOW] = source + 1

    def mark(self, source: int, entry_id: bytes, *, settling: bool = False) -> None:
        """Mark one entry, in place of any other. ``settling``: it has come in before."""
        self._words[_IS_MARKED] = 0  # a reader that is killed between the writes leaves no mixture
        self._words[_SOURCE] = source
        self._words[_LENGTH] = len(entry_id)
        self._words[_SETTLING] = settling
        self._view[_ID_AT : _ID_AT + len(entry_id)] = entry_id
        self._words[_IS_MARKED] = 1

    def unmark(self) -> None:
        """The entry is dealt with."""
        self._words[_IS_MARKED] = 0

    def absolve(self, source: int, entry_id: bytes) -> None:
        """The entry has come in, and the reader lives."""
        if self._suspects and (at := self._suspects.pop((source, entry_id), None)) is not None:
            self._view[_ROWS_AT + at * _ROW_BYTES + 1] = 0

    def clear(self) -> None:
        """All that was read is dealt with, or will be read again."""
        self._words[_IS_MARKED] = 0
        self._words[_WINDOW] = 0

    def is_careful(self, source: int) -> bool:
        """Whether the pending entries of this source are to be listed one at a time."""
        return bool(self._view[_CAREFUL_AT + source])

    def survived(self, source: int) -> None:
        """All that was pending of this source is listed, and the reader lives."""
        self._view[_CAREFUL_AT + source] = 0
        self._view[_OUTSIDE_AT + source] = 0

    # -- the supervisor

    def record_death(self, *, proven: bool) -> Suspect | None:
        """Count a reader's end and clear its mark. ``proven``: nothing from outside can have caused it.

        Returns the one entry that was marked, if there was one.
        """
        suspect = None
        if self._words[_IS_MARKED]:
            suspect = self._strike(CONVICTED_AT if proven else 1)
            self._view[_CAREFUL_AT + suspect.source] = 1
        elif self._words[_WINDOW]:
            source = self._words[_WINDOW] - 1
            outside = min(self._view[_OUTSIDE_AT + source] + 1, CONVICTED_AT)
            self._view[_OUTSIDE_AT + source] = outside
            if proven or outside == CONVICTED_AT:
                self._view[_CAREFUL_AT + source] = 1
        self.clear()
        return suspect

    def _strike(self, weight: int) -> Suspect:
        source, length = self._words[_SOURCE], self._words[_LENGTH]
        entry_id = bytes(self._view[_ID_AT : _ID_AT + length])
        settling = bool(self._words[_SETTLING])
        rows = {row[:3]: at for at in range(_ROWS) if (row := self._row(at)).strikes}
        at = rows.get((source, entry_id, settling))
        if at is None:
            at = self._words[_NEXT_ROW] % _ROWS  # the oldest is forgotten
            self._words[_NEXT_ROW] += 1
            strikes = weight
        else:
            strikes = min(self._row(at).strikes + weight, 255)
        packed = bytes([source, strikes, length, settling]) + entry_id
        start = _ROWS_AT + at * _ROW_BYTES
        self._view[start : start + len(packed)] = packed
        return Suspect(source, entry_id, settling, strikes)

    def _row(self, at: int) -> Suspect:
        start = _ROWS_AT + at * _ROW_BYTES
        source, strikes, length, settling = self._view[start : start + 4]
        return Suspect(source, bytes(self._view[start + 4 : start + 4 + length]), bool(settling), strikes)

    def close(self) -> None:
        """Unmap and close."""
        self._words.release()
        self._view.release()
        self._map.close()
        os.close(self.fd)
