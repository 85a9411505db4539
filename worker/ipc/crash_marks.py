"""Crash marks: shared memory that names the entry that a reader was reading when it exited.

The supervisor owns the memory and passes it to every reader. The reader sets a mark before it looks at
anything from a stream, and clears it afterwards. A reader that exits leaves its mark behind. The supervisor
counts it (`record_death`) before it starts the next reader, which reads the counts:

- A mark of one entry: the entry gets a strike. With `POISON_AT_STRIKES` strikes it is poison, and no reader
  parses it again.
- A mark of an answer with several entries: the next reader lists the pending entries of that stream one by
  one, each under its own mark.

A SIGKILL may come from outside and hit any entry, so it is one strike of three, and an entry that is read
successfully loses its strikes. A crash, an exit, or an endless computation that the supervisor killed is
proof: three strikes at once. One process writes at a time: the reader while it lives, then the supervisor.
"""

import mmap
import os
from typing import NamedTuple, Self

#: Strikes from which an entry is rejected.
POISON_AT_STRIKES = 3
#: Strikes from which not even the entry's bytes are fetched: the reader exited while it fetched them.
SKIP_FETCH_AT_STRIKES = 2 * POISON_AT_STRIKES

#: Streams that the in-flight table can number: it has one byte for them.
_STREAMS = 256
_ANSWER, _IS_MARKED, _STREAM_NO, _ID_BYTES, _SETTLING, _NEXT_ROW = range(6)
_ID_AT = 64
_ONE_BY_ONE_AT = 256
_UNPROVEN_AT = _ONE_BY_ONE_AT + _STREAMS
#: Rows of entries with strikes: stream number, strikes, length of the id, whether it was settled, the id.
_ROWS_AT, _ROW_BYTES, _ROWS = 1024, 64, 48
_SIZE = 4096


class Suspect(NamedTuple):
    """An entry with strikes, the newest one included."""

    stream_no: int
    entry_id: bytes
    settling: bool
    strikes: int

    @property
    def is_poison(self) -> bool:
        """Whether readers reject the entry from now on."""
        return self.strikes >= POISON_AT_STRIKES


class CrashMarks:
    """Marks of one reader, and the strikes that all earlier readers left."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._view = memoryview(self._map)
        self._words = self._view.cast("Q")
        #: Strikes of the entries that no reader may parse, by stream number and entry id.
        self.poison: dict[tuple[int, bytes], int] = {}
        # Rows of entries that got strikes while they were read, but too few to be poison.
        self._suspects: dict[tuple[int, bytes], int] = {}
        for row_no in range(_ROWS):
            row = self._row(row_no)
            if row.is_poison:
                self.poison[row.stream_no, row.entry_id] = row.strikes
            elif row.strikes and not row.settling:
                self._suspects[row.stream_no, row.entry_id] = row_no

    @classmethod
    def create(cls) -> Self:
        """New memory without marks."""
        fd = os.memfd_create("crash-marks", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    # -- reader

    def mark_answer(self, stream_no: int) -> None:
        """Mark an answer whose entries are not known yet. One write: the hot path sets it for each read."""
        self._words[_ANSWER] = stream_no + 1

    def mark(self, stream_no: int, entry_id: bytes, *, settling: bool = False) -> None:
        """Mark one entry instead of any other. ``settling``: it was read before and is being settled."""
        self._words[_IS_MARKED] = 0  # a reader that is killed between the writes leaves no mixed mark
        self._words[_STREAM_NO] = stream_no
        self._words[_ID_BYTES] = len(entry_id)
        self._words[_SETTLING] = settling
        self._view[_ID_AT : _ID_AT + len(entry_id)] = entry_id
        self._words[_IS_MARKED] = 1

    def unmark(self) -> None:
        """Clear the mark of one entry; the mark of an answer stays."""
        self._words[_IS_MARKED] = 0

    def clear_strikes(self, stream_no: int, entry_id: bytes) -> None:
        """Forget the strikes of an entry that was read successfully."""
        if self._suspects and (row_no := self._suspects.pop((stream_no, entry_id), None)) is not None:
            self._view[_ROWS_AT + row_no * _ROW_BYTES + 1] = 0

    def clear(self) -> None:
        """Clear both marks: everything that was read is processed, or will be read again."""
        self._words[_IS_MARKED] = 0
        self._words[_ANSWER] = 0

    def lists_one_by_one(self, stream_no: int) -> bool:
        """Whether the pending entries of this stream must be listed one at a time."""
        return bool(self._view[_ONE_BY_ONE_AT + stream_no])

    def end_one_by_one(self, stream_no: int) -> None:
        """Return to full pages: all pending entries of this stream were listed without a crash."""
        self._view[_ONE_BY_ONE_AT + stream_no] = 0
        self._view[_UNPROVEN_AT + stream_no] = 0

    # -- supervisor

    def record_death(self, *, proven: bool) -> Suspect | None:
        """Count a reader's exit and clear its marks. ``proven``: nothing from outside can have caused it.

        Returns the entry that was marked, or None.
        """
        suspect = None
        if self._words[_IS_MARKED]:
            suspect = self._strike(POISON_AT_STRIKES if proven else 1)
            self._view[_ONE_BY_ONE_AT + suspect.stream_no] = 1
        elif self._words[_ANSWER]:
            stream_no = self._words[_ANSWER] - 1
            unproven = min(self._view[_UNPROVEN_AT + stream_no] + 1, POISON_AT_STRIKES)
            self._view[_UNPROVEN_AT + stream_no] = unproven
            if proven or unproven == POISON_AT_STRIKES:
                self._view[_ONE_BY_ONE_AT + stream_no] = 1
        self.clear()
        return suspect

    def _strike(self, weight: int) -> Suspect:
        stream_no, length = self._words[_STREAM_NO], self._words[_ID_BYTES]
        entry_id = bytes(self._view[_ID_AT : _ID_AT + length])
        settling = bool(self._words[_SETTLING])
        rows = {row[:3]: row_no for row_no in range(_ROWS) if (row := self._row(row_no)).strikes}
        row_no = rows.get((stream_no, entry_id, settling))
        if row_no is None:
            row_no = self._words[_NEXT_ROW] % _ROWS  # overwrites the oldest
            self._words[_NEXT_ROW] += 1
            strikes = weight
        else:
            strikes = min(self._row(row_no).strikes + weight, 255)
        packed = bytes([stream_no, strikes, length, settling]) + entry_id
        start = _ROWS_AT + row_no * _ROW_BYTES
        self._view[start : start + len(packed)] = packed
        return Suspect(stream_no, entry_id, settling, strikes)

    def _row(self, row_no: int) -> Suspect:
        start = _ROWS_AT + row_no * _ROW_BYTES
        stream_no, strikes, length, settling = self._view[start : start + 4]
        return Suspect(stream_no, bytes(self._view[start + 4 : start + 4 + length]), bool(settling), strikes)

    def close(self) -> None:
        """Unmap and close."""
        self._words.release()
        self._view.release()
        self._map.close()
        os.close(self.fd)
