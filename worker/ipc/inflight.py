"""In-flight table: which entries one worker holds and their state, in shared memory that outlives the reader.

Rows are handed out in order and counted up for ever; row ``n`` stands at ``n % ROWS``. The reader writes
a row before it pushes the job into the ring, and that push is what makes the row count: a new reader finds
the head from the frames still in the ring and from ``taken``, the row after the last frame that the worker
took out. From then on the state byte alone moves:

    QUEUED -> STARTED -> SUCCEEDED | FAILED     by the worker
    SUCCEEDED | FAILED -> SETTLED               by the reader, once the store has it

so when either of the two dies, the other (or a successor) knows which jobs had started.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

QUEUED, STARTED, SUCCEEDED, FAILED, SETTLED = 1, 2, 3, 4, 5

#: Jobs that one worker may hold at once. Enough that a worker of no-op jobs never runs dry between two
#: turns of the reader; the window that the reader really uses is far smaller where jobs are slow.
ROWS = 4096
#: The longest id: two 64-bit numbers in decimal and a dash.
_ID_BYTES = 41
#: state, type, source and deaths: one byte each, then the id.
TABLE_BYTES = ROWS * (4 + _ID_BYTES)

_SUCCEEDED_RUN = re.compile(bytes([SUCCEEDED]) + b"+")


class Held(NamedTuple):
    """One row: the entry and how often it was charged with a worker's death."""

    row: int
    source: int
    kind: int
    deaths: int
    entry_id: bytes


class InFlight:
    """One worker's table. ``words`` is the shared header; ``tail`` and ``taken`` index into it."""

    def __init__(self, words: memoryview, tail: int, taken: int, area: memoryview) -> None:
        self._words = words
        self._tail = tail
        self._taken = taken
        self.head = int(words[taken])
        self.states = area[:ROWS]
        self._kinds = area[ROWS : 2 * ROWS]
        self._sources = area[2 * ROWS : 3 * ROWS]
        self._deaths = area[3 * ROWS : 4 * ROWS]
        self._ids = area[4 * ROWS : TABLE_BYTES]

    @property
    def tail(self) -> int:
        """The oldest row not yet settled (written by the reader)."""
        return int(self._words[self._tail])

    @property
    def taken(self) -> int:
        """The row after the last one that the worker took from the ring (written by the worker)."""
        return int(self._words[self._taken])

    @taken.setter
    def taken(self, row: int) -> None:
        self._words[self._taken] = row

    def __len__(self) -> int:
        """Rows in use, seen from the reader, who alone knows the head."""
        return self.head - self.tail

    def write(
        self, sources: Sequence[int], kinds: Sequence[int], deaths: Sequence[int], ids: Sequence[bytes]
    ) -> None:
        """Fill the rows from the head on; they count once the head is moved over them (reader)."""
        count, at = len(ids), self.head % ROWS
        assert len(self) + count <= ROWS
        fits = min(count, ROWS - at)
        for start, stop, to in ((0, fits, at), (fits, count, 0)):
            end = to + stop - start
            self._sources[to:end] = bytes(sources[start:stop])
            self._kinds[to:end] = bytes(kinds[start:stop])
            self._deaths[to:end] = bytes(deaths[start:stop])
            padded = b"".join([entry_id.ljust(_ID_BYTES, b"\0") for entry_id in ids[start:stop]])
            self._ids[to * _ID_BYTES : end * _ID_BYTES] = padded
            self.states[to:end] = bytes([QUEUED]) * (stop - start)

    def held(self, row: int) -> Held:
        """What a row says."""
        at = row % ROWS
        entry_id = bytes(self._ids[at * _ID_BYTES : (at + 1) * _ID_BYTES]).rstrip(b"\0")
        return Held(row, self._sources[at], self._kinds[at], self._deaths[at], entry_id)

    def columns(self, rows: range) -> tuple[bytes, bytes, list[bytes]]:
        """Sources, kinds and entry ids of consecutive rows, many at once."""
        sources, kinds, ids = b"", b"", b""
        for start, stop in self._spans(rows.start, rows.stop):
            sources += bytes(self._sources[start:stop])
            kinds += bytes(self._kinds[start:stop])
            ids += bytes(self._ids[start * _ID_BYTES : stop * _ID_BYTES])
        return sources, kinds, [ids[i : i + _ID_BYTES].rstrip(b"\0") for i in range(0, len(ids), _ID_BYTES)]

    def state(self, row: int) -> int:
        """How far a row is."""
        return int(self.states[row % ROWS])

    def mark(self, rows: Iterable[int], state: int) -> None:
        """Move rows to a state (worker: STARTED and the outcomes; reader: SETTLED)."""
        for row in rows:
            self.states[row % ROWS] = state

    def settle(self, rows: range) -> None:
        """Mark consecutive rows SETTLED, many at once (reader)."""
        for start, stop in self._spans(rows.start, rows.stop):
            self.states[start:stop] = bytes([SETTLED]) * (stop - start)

    def succeeded(self) -> Iterator[range]:
        """Runs of rows that a handler has finished and that are not settled yet."""
        for first, column in self._columns():
            for run in _SUCCEEDED_RUN.finditer(column):
                yield range(first + run.start(), first + run.end())

    def unsettled(self) -> list[Held]:
        """Every row that is not settled."""
        return [self.held(row) for row in range(self.tail, self.head) if self.state(row) != SETTLED]

    def started(self) -> list[Held]:
        """What the worker runs now, for anyone who shares the table. A row that was settled and given to
        another job while we looked is left out: the tail has moved past its number by then."""
        found = []
        for row in range(self.tail, self.taken):
            if self.state(row) == STARTED:
                held = self.held(row)
                if row >= self.tail:
                    found.append(held)
        return found

    def advance(self) -> None:
        """Forget the settled rows at the tail, so that they can be handed out again (reader)."""
        tail = self.tail
        for _, column in self._columns():
            settled = len(column) - len(column.lstrip(bytes([SETTLED])))
            tail += settled
            if settled < len(column):
                break
        self._words[self._tail] = tail

    def _columns(self) -> Iterator[tuple[int, bytes]]:
        """The state bytes from tail to head, in at most two pieces, each with its first row."""
        row = self.tail
        for start, stop in self._spans(row, self.head):
            yield row, bytes(self.states[start:stop])
            row += stop - start

    @staticmethod
    def _spans(row: int, end: int) -> Iterator[tuple[int, int]]:
        """Where consecutive rows stand: at most two pieces of the table."""
        while row < end:
            at = row % ROWS
            count = min(end - row, ROWS - at)
            yield at, at + count
            row += count
