"""Jobs on their way into the store, and a batch while a producer fills it."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

from .shards import logical_stream
from .store.batches import Added, BatchProducerStore

#: Jobs held back for one script: enough to hide the round trip, little to lose when it fails.
_PART_JOBS = 1000
#: How long a producer goes by a number of shards (seconds).
SHARDS_LIFETIME_S = 30.0


class PreparedJob(NamedTuple):
    """A job that was checked and encoded, and its stream."""

    id: str
    stream: str
    data: bytes


class HeldJobs:
    """Jobs that wait for their pipeline."""

    def __init__(self) -> None:
        self.jobs: list[bytes] = []
        self._mono_since_s = time.monotonic()

    def destination(self, stream: str) -> str:
        """Where to send jobs that were meant for a stream or shard.

        A caller may take minutes between two jobs, and services may not read the shard any more. They always
        read the stream that it belongs to.
        """
        is_old = time.monotonic() - self._mono_since_s > SHARDS_LIFETIME_S
        return logical_stream(stream) if is_old else stream


class BatchFinished(ValueError):
    """The batch has finished: it takes no more jobs."""


class BatchChanged(ValueError):
    """The batch has another number of jobs than expected: another producer fills it."""


class BatchCounts(NamedTuple):
    """How far a batch is: its jobs over all streams. ``wall_created_s``: unix seconds of the store's clock.

    ``state`` is ``open`` while jobs may be added, then ``closed``, then ``finished``.
    """

    total: int
    done: int
    dead: int
    state: str
    name: str
    wall_created_s: float

    @property
    def ended(self) -> int:
        """Jobs that are done or dead."""
        return self.done + self.dead

    @property
    def left(self) -> int:
        """Jobs that have not ended."""
        return max(0, self.total - self.ended)


class OpenBatch:
    """A batch to which jobs can be added; made by `Producer.batch`.

    As a context manager it is closed at the end of the block, but not after an error: an incomplete batch
    must not call back. `Producer.batch` with the same ``id`` opens it again. One thread uses an object; other
    threads and processes may open the same batch. Methods raise as `Producer.enqueue` does, and
    `BatchFinished`, a `ValueError`, if the batch has finished.
    """

    def __init__(
        self,
        id: str,
        home: str,
        default_home: str,
        fields: Mapping[str, bytes],
        borrow: Callable[[], AbstractContextManager[BatchProducerStore]],
        prepare: Callable[[Any, str | None], PreparedJob],
    ) -> None:
        """``home`` is empty if the first job decides; ``default_home`` is for a batch without jobs.
        ``prepare`` gets a job and the stream of jobs that name none."""
        #: The id, for ``jobworker batch show`` and ``GET /batches/ID``.
        self.id = id
        self._home = ""
        self._default_home = default_home
        self._fields = dict(fields)
        self._borrow = borrow
        self._prepare = prepare
        self._streams: set[str] = set()
        #: Jobs on each stream, as last seen or added.
        self._totals: dict[str, int] = {}
        if home:
            self._open(home)

    def enqueue(self, type: str, payload: Any, **options: Any) -> str:
        """Enqueue one job of the batch, as `Producer.enqueue` does; returns its id."""
        prepared = self._prepare({"type": type, "payload": payload, **options}, None)
        self._add(prepared.stream, [prepared.data])
        return prepared.id

    def enqueue_many(
        self, jobs: Iterable[Any], *, stream: str | None = None, expected_total: int | None = None
    ) -> list[str]:
        """Enqueue many jobs of the batch, as `Producer.enqueue_many` does; returns their ids in order.

        Give ``expected_total``, the jobs that the batch has now, where two producers may fill the batch with
        the same jobs. The step that enqueues compares it, and the later producer gets `BatchChanged`: none of
        its jobs from that step on are enqueued. Jobs on other streams are those that `counts` saw last. These
        jobs are never sent to shards: two producers may know of different numbers of them.
        """
        ids: list[str] = []
        waiting: dict[str, HeldJobs] = {}
        try:
            for item in jobs:
                prepared = self._prepare(item, stream)
                ids.append(prepared.id)
                to = prepared.stream if expected_total is None else logical_stream(prepared.stream)
                held = waiting.get(to) or waiting.setdefault(to, HeldJobs())
                held.jobs.append(prepared.data)
                if len(held.jobs) >= _PART_JOBS:
                    expected_total = self._flush(to, waiting.pop(to), expected_total)
        except BatchChanged:
            waiting.clear()  # the other producer sends them
            raise
        finally:
            # Also after an error: the jobs before it were accepted, in their order.
            for name, held in waiting.items():
                expected_total = self._flush(name, held, expected_total)
        return ids

    def close(self) -> None:
        """Make the number of jobs final. The batch finishes when all of them have ended."""
        if not self._home:
            self._open(self._default_home)
        with self._borrow() as store:
            if not store.batch_close(self._home, self.id):
                raise ValueError(f"batch {self.id} is gone: it was deleted, or its time was over")

    def counts(self) -> BatchCounts:
        """How far the batch is. Raises `ValueError` for a batch that has no record (yet)."""
        with self._borrow() as store:
            record = store.batch_hash(self._home, self.id) if self._home else None
            if record is None:
                raise ValueError(f"batch {self.id} has no record")
            others = {stream: store.batch_hash(stream, self.id) for stream in record.streams}
        parts = [record, *(one for one in others.values() if one is not None)]
        self._totals = {name: one.total or 0 for name, one in others.items() if one is not None}
        self._totals[self._home] = record.total or 0
        return BatchCounts(
            sum(one.total or 0 for one in parts), sum(one.done for one in parts),
            sum(one.dead for one in parts), record.state, record.name, record.wall_created_s or 0.0,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _open(self, home: str) -> None:
        self._write_record(home, self._fields)
        self._home = home
        self._streams.add(home)

    def _flush(self, stream: str, held: HeldJobs, expected_total: int | None) -> int | None:
        return self._add(held.destination(stream), held.jobs, expected_total)

    def _add(self, stream: str, jobs: list[bytes], expected_total: int | None = None) -> int | None:
        """Add jobs; returns the total that is expected after them."""
        if not self._home:
            self._open(logical_stream(stream))  # a later number of shards must find it
        if stream not in self._streams:
            # Before the first job: the reaper must not overlook a stream.
            self._write_record(self._home, {f"stream/{stream}": b"1"})
            self._streams.add(stream)
        on_others = sum(count for name, count in self._totals.items() if name != stream)
        expected = None if expected_total is None else expected_total - on_others
        with self._borrow() as store:
            home = "" if stream == self._home else self._home
            added = store.batch_add(stream, self.id, home, jobs, expected)
        if added is Added.FINISHED:
            raise self._finished()
        if added is Added.OTHER_TOTAL:
            raise BatchChanged(
                f"batch {self.id} does not have the expected {expected_total} jobs: another producer fills it"
            )
        self._totals[stream] = self._totals.get(stream, 0) + len(jobs)
        return None if expected_total is None else expected_total + len(jobs)

    def _write_record(self, home: str, fields: Mapping[str, bytes]) -> None:
        with self._borrow() as store:
            if not store.batch_open(home, self.id, fields):
                raise self._finished()

    def _finished(self) -> BatchFinished:
        return BatchFinished(f"batch {self.id} has finished: give the next one an id of its own")
