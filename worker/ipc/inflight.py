"""In-flight table: the jobs of one worker and their states, in shared memory that outlives the reader.

Row numbers are assigned in order and never decrease; row ``n`` is at position ``n % ROWS``. The reader writes
a row before it pushes the job into the ring, and the push makes the row valid. A new reader finds the head
from the frames that are still in the ring and from ``taken``, the row after the last frame that the worker
took out. From then on only the state byte changes:

    QUEUED -> STARTED -> SUCCEEDED | FAILED     by the worker
    QUEUED -> STARTED -> RETURNED               by the worker, if the reader has asked for the job back
    SUCCEEDED | FAILED | RETURNED -> SETTLED    by the reader, once the store has settled it

FAILED means that a frame in the outcome ring says how the job ended: it failed, or it succeeded and its
result is kept. Beside the state, the reader may mark a row cancelled at any time.

If either of the two dies, the other one (or its successor) knows which jobs were started.

The reader takes back jobs that wait behind a long one, without an answer of the worker, which is busy. A
second byte of the row is the reader's: 0, ASKED, TAKEN_BACK. The worker writes STARTED, then reads it, and
returns the row if the byte is set. The reader writes ASKED, and reads the state no earlier than `SETTLES_S`
later: a row that is still QUEUED is its own, because a worker that starts it from then on sees ASKED. A
processor may delay the store of STARTED past the load that follows it, but only for microseconds, and a
switch to another process ends that delay. So the pause replaces a memory barrier at each start of a job.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

QUEUED, STARTED, SUCCEEDED, FAILED, SETTLED, RETURNED = 1, 2, 3, 4, 5, 6
#: The reader's byte of a row: it has asked for the job back; it has it back, and the row is no job in flight.
ASKED, TAKEN_BACK = 1, 2

#: Most jobs that one worker can have in flight. Enough that a worker of no-op jobs never runs dry between two
#: ticks of the reader. The credit that the reader really grants is far smaller where jobs are slow.
ROWS = 4096
#: Longest entry id: two 64-bit numbers in decimal and a dash.
_ID_BYTES = 41
#: State, type number, stream number, deaths, isolation, cancellation and the byte of the reader that asks for
#: the job back, one each, then the id.
TABLE_BYTES = ROWS * (7 + _ID_BYTES)
#: Between the request for a job and the look whether it has started (seconds): far longer than a store of one
#: processor takes to be seen by another one.
SETTLES_S = 0.05

_SUCCEEDED_RUN = re.compile(bytes([SUCCEEDED]) + b"+")


class InFlightJob(NamedTuple):
    """One row of the table.

    ``deaths`` counts the workers that died under this entry. ``isolated``: the job may have killed a worker
    before, so it runs alone.
    """

    row: int
    stream_no: int
    type_no: int
    deaths: int
    isolated: bool
    entry_id: bytes

    @property
    def key(self) -> tuple[int, bytes]:
        """Stream number and entry id: they identify the entry."""
        return self.stream_no, self.entry_id


class InFlight:
    """In-flight table of one worker. ``words`` is the shared header; ``tail`` and ``taken`` index into it."""

    def __init__(self, words: memoryview, tail: int, taken: int, area: memoryview) -> None:
        self._words = words
        self._tail = tail
        self._taken = taken
        self.head = int(words[taken])
        self.states = area[:ROWS]
        self._type_nos = area[ROWS : 2 * ROWS]
        self._stream_nos = area[2 * ROWS : 3 * ROWS]
        self._deaths = area[3 * ROWS : 4 * ROWS]
        self._isolated = area[4 * ROWS : 5 * ROWS]
        self.cancelled = area[5 * ROWS : 6 * ROWS]
        self.asked = area[6 * ROWS : 7 * ROWS]
        self._ids = area[7 * ROWS : TABLE_BYTES]

    @property
    def tail(self) -> int:
        """The oldest row that is not settled (written by the reader)."""
        return int(self._words[self._tail])

    @property
    def taken(self) -> int:
        """The row after the last one that the worker took from the ring (written by the worker)."""
        return int(self._words[self._taken])

    @taken.setter
    def taken(self, row: int) -> None:
        self._words[self._taken] = row

    def __len__(self) -> int:
        """Number of rows in use. Only the reader may ask: the worker does not know the head."""
        return self.head - self.tail

    def write(
        self,
        stream_nos: Sequence[int],
        type_nos: Sequence[int],
        deaths: Sequence[int],
        isolated: Sequence[bool],
        ids: Sequence[bytes],
    ) -> None:
        """Fill rows from the head on. They are valid once the head is moved over them (reader)."""
        count, at = len(ids), self.head % ROWS
        assert len(self) + count <= ROWS
        until_end = min(count, ROWS - at)
        for start, stop, to in ((0, until_end, at), (until_end, count, 0)):
            end = to + stop - start
            self._stream_nos[to:end] = bytes(stream_nos[start:stop])
            self._type_nos[to:end] = bytes(type_nos[start:stop])
            self._deaths[to:end] = bytes(deaths[start:stop])
            self._isolated[to:end] = bytes(isolated[start:stop])
            self.cancelled[to:end] = bytes(stop - start)
            padded = b"".join([entry_id.ljust(_ID_BYTES, b"\0") for entry_id in ids[start:stop]])
            self._ids[to * _ID_BYTES : end * _ID_BYTES] = padded
            self.asked[to:end] = bytes(stop - start)
            self.states[to:end] = bytes([QUEUED]) * (stop - start)

    def job(self, row: int) -> InFlightJob:
        """The job of a row."""
        at = row % ROWS
        entry_id = bytes(self._ids[at * _ID_BYTES : (at + 1) * _ID_BYTES]).rstrip(b"\0")
        return InFlightJob(
            *(row, self._stream_nos[at], self._type_nos[at], self._deaths[at], bool(self._isolated[at])),
            entry_id,
        )

    def columns(self, rows: range) -> tuple[bytes, bytes, list[bytes]]:
        """Stream numbers, type numbers and entry ids of consecutive rows, without a loop over the rows."""
        stream_nos, type_nos, ids = b"", b"", b""
        for start, stop in self._spans(rows.start, rows.stop):
            stream_nos += bytes(self._stream_nos[start:stop])
            type_nos += bytes(self._type_nos[start:stop])
            ids += bytes(self._ids[start * _ID_BYTES : stop * _ID_BYTES])
        split_ids = [ids[i : i + _ID_BYTES].rstrip(b"\0") for i in range(0, len(ids), _ID_BYTES)]
        return stream_nos, type_nos, split_ids

    def state(self, row: int) -> int:
        """State of a row."""
        return int(self.states[row % ROWS])

    def is_cancelled(self, row: int) -> bool:
        """Whether the job of a row was cancelled."""
        return bool(self.cancelled[row % ROWS])

    def cancel(self, row: int) -> None:
        """Mark the job of a row cancelled (reader)."""
        self.cancelled[row % ROWS] = 1

    def runs_only_cancelled(self) -> bool:
        """Whether jobs run, and all of them were cancelled; for any process that shares the table."""
        started = self.started()
        return bool(started) and all(self.is_cancelled(job.row) for job in started)

    def mark(self, rows: Iterable[int], state: int) -> None:
        """Set the state of rows (worker: STARTED and the outcomes; reader: SETTLED)."""
        for row in rows:
            self.states[row % ROWS] = state

    def settle(self, rows: range) -> None:
        """Mark consecutive rows SETTLED, without a loop over the rows (reader)."""
        for start, stop in self._spans(rows.start, rows.stop):
            self.states[start:stop] = bytes([SETTLED]) * (stop - start)

    def succeeded(self) -> Iterator[range]:
        """Runs of consecutive rows whose jobs succeeded and are not settled."""
        for first, column in self._columns():
            for run in _SUCCEEDED_RUN.finditer(column):
                yield range(first + run.start(), first + run.end())

    def unsettled(self) -> list[InFlightJob]:
        """The jobs that are not settled, oldest first; without those that were taken back."""
        return [
            self.job(row)
            for row in range(self.tail, self.head)
            if self.state(row) != SETTLED and self.asked[row % ROWS] != TAKEN_BACK
        ]

    def begin(self, row: int) -> bool:
        """Mark a row STARTED; False if its job must not run: the reader has asked for it back (worker)."""
        at = row % ROWS
        self.states[at] = STARTED
        if not self.asked[at]:
            return True
        self.states[at] = RETURNED
        return False

    def ask_back(self, rows: Iterable[int]) -> None:
        """Ask for jobs that are not started. `take_back` may follow after `SETTLES_S` (reader)."""
        for row in rows:
            self.asked[row % ROWS] = ASKED

    def take_back(self, rows: Iterable[int]) -> list[int]:
        """Take jobs that were asked for; returns the rows that the worker will not run (reader)."""
        taken = [row for row in rows if self.state(row) == QUEUED]
        for row in taken:
            self.asked[row % ROWS] = TAKEN_BACK
        return taken

    def queued(self) -> list[InFlightJob]:
        """The jobs that are not started and that the reader has not asked for, oldest first (reader)."""
        return [
            self.job(row)
            for row in range(self.tail, self.head)
            if self.state(row) == QUEUED and not self.asked[row % ROWS]
        ]

    def asked_back(self) -> list[int]:
        """Rows that the reader has asked for and that are not settled (reader)."""
        return [
            row
            for row in range(self.tail, self.head)
            if self.asked[row % ROWS] and self.state(row) != SETTLED
        ]

    def is_taken_back(self, row: int) -> bool:
        """Whether the reader has the job of a row back."""
        return self.asked[row % ROWS] == TAKEN_BACK

    def started(self) -> list[InFlightJob]:
        """The running jobs, for any process that shares the table.

        A row may be settled and reused while this looks at it. Then the tail has moved past its number, and
        the row is left out.
        """
        running = []
        for row in range(self.tail, self.taken):
            if self.state(row) == STARTED:
                job = self.job(row)
                if row >= self.tail:
                    running.append(job)
        return running

    def advance(self) -> None:
        """Free the settled rows at the tail for reuse (reader)."""
        tail = self.tail
        for _, column in self._columns():
            settled = len(column) - len(column.lstrip(bytes([SETTLED])))
            tail += settled
            if settled < len(column):
                break
        self._words[self._tail] = tail

    def _columns(self) -> Iterator[tuple[int, bytes]]:
        """State bytes from tail to head, in at most two spans, each with its first row."""
        row = self.tail
        for start, stop in self._spans(row, self.head):
            yield row, bytes(self.states[start:stop])
            row += stop - start

    @staticmethod
    def _spans(row: int, end: int) -> Iterator[tuple[int, int]]:
        """Positions of consecutive rows: at most two spans of the table."""
        while row < end:
            at = row % ROWS
            count = min(end - row, ROWS - at)
            yield at, at + count
            row += count
