"""Batches of jobs in the job store: the ports, their values, and the fields of a batch's hash.

A batch has a hash of counters on each stream that its jobs use. That of its home stream also is its record:
the callback goes to the home stream, so that one step finishes the batch and enqueues the callback. The
fields are listed in ``prelude_batch.lua``.
"""

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

#: Seconds for which a batch that has not finished is kept after its last change.
OPEN_S = 30 * 24 * 3600
#: Finished batches that are kept for each home stream, whatever their age.
MAX_FINISHED = 10_000
#: Batches that one call lists, marks or looks up.
PAGE = 500

#: Longest number of a hash. Other programs can write to it.
_MAX_DIGITS = 15


class StreamBatch(NamedTuple):
    """What one stream keeps of a batch. Times are unix seconds of the store's clock.

    ``total`` is None while it is unknown. On the home stream ``home`` is empty, and ``streams`` are the other
    streams. Only there the rest is set. ``callback`` is the entry id of the callback.
    """

    total: int | None = None
    done: int = 0
    dead: int = 0
    home: str = ""
    streams: tuple[str, ...] = ()
    name: str = ""
    tenant_id: str = ""
    on_complete: bytes = b""
    wall_created_s: float | None = None
    wall_closed_s: float | None = None
    wall_finished_s: float | None = None
    callback: str = ""
    error: str = ""

    @property
    def state(self) -> str:
        """``open`` while jobs may be added, then ``closed``, then ``finished``."""
        if self.wall_finished_s is not None:
            return "finished"
        return "open" if self.wall_closed_s is None else "closed"


class DueBatch(NamedTuple):
    """A batch that the reaper must look at. ``mark`` changes when one of its jobs ends."""

    id: str
    mark: bytes


class Sweep(NamedTuple):
    """Number of open batches, and where the next call continues (0: at the start)."""

    open: int
    next_rank: int


class Added(IntEnum):
    """What became of jobs that were to be added to a batch. Only with ``YES`` were all of them enqueued."""

    #: The total differs from the expected one.
    OTHER_TOTAL = -1
    FINISHED = 0
    YES = 1


class BatchFinder(Protocol):
    """Reading of batches."""

    def batch_hash(self, stream: str, id: str) -> StreamBatch | None:
        """What the stream keeps of a batch; None if it keeps nothing."""

    def batch_ids(self, stream: str, count: int) -> list[str]:
        """Batches whose home is the stream: open ones, then finished ones, each newest first."""


class BatchProducerStore(Protocol):
    """Batches as a producer fills them."""

    def batch_hash(self, stream: str, id: str) -> StreamBatch | None:
        """As `BatchFinder`'s."""

    def batch_open(self, stream: str, id: str, fields: Mapping[str, bytes]) -> bool:
        """Create the record of a batch on its home stream, or add missing fields to it.

        False if the batch has finished.
        """

    def batch_add(
        self, stream: str, id: str, home: str, jobs: Sequence[bytes], total: int | None = None
    ) -> Added:
        """Enqueue jobs and add them to the total, in one atomic step for each 1,000 jobs or 8 MiB.

        ``home`` is empty on the home stream. A step without effect ends the call: the batch has finished, or
        the stream does not count ``total`` jobs of it (None: any number) and those of earlier steps.
        """

    def batch_close(self, stream: str, id: str) -> bool:
        """Make the total final. False if the batch has no record."""


class BatchStore(BatchFinder, Protocol):
    """Batches as the reaper uses them."""

    def batch_due(self, stream: str) -> list[DueBatch]:
        """Some batches that must be looked at."""

    def batch_seen(self, stream: str, due: DueBatch) -> None:
        """The batch was looked at: it is due no more, unless a job ended since."""

    def batch_finish(self, stream: str, id: str, callback: bytes, error: str, keep_s: float) -> bool:
        """Finish a closed batch and append its callback (empty: none) to its home stream, in one atomic step.

        False, without effect, if it is not closed or has finished before.
        """

    def batch_seal(self, stream: str, id: str, keep_s: float) -> None:
        """Mark the counters of a finished batch on a stream that is not its home."""

    def batch_sweep(self, stream: str, rank: int, keep_s: float) -> Sweep:
        """Make a page of open batches due, and forget batches whose time is over."""


def parse_batch(fields: Mapping[bytes, bytes]) -> StreamBatch:
    """The fields of the hash. What has another form counts as missing: other programs write to it."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode(errors="replace")

    others = (field[7:].decode(errors="replace") for field in fields if field.startswith(b"stream/"))
    return StreamBatch(
        _count(fields.get(b"total")), _count(fields.get(b"done")) or 0, _count(fields.get(b"dead")) or 0,
        text("home"), tuple(sorted(others)), text("name"), text("tenant_id"),
        fields.get(b"on_complete", b""), _time(fields.get(b"created")), _time(fields.get(b"closed")),
        _time(fields.get(b"finished")), text("callback"), text("error"),
    )  # fmt: skip


def _count(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() and len(value) <= _MAX_DIGITS else None


def _time(value: bytes | None) -> float | None:
    """Unix seconds. A field of any other form is set, too: a Go producer may write ``closed 1``."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0
