"""Dispatch: how many jobs each worker may be given, and handing them over."""

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from ..ipc.channel import READY, Channel, JobFrame
from ..ipc.control import WorkerExited
from ..ipc.inflight import ROWS
from .admission import AdmittedJob

#: A worker is given as many jobs as it finishes in this time: enough that it never runs dry between two
#: turns of the reader, little enough that the last jobs of a backlog do not queue behind one worker.
_QUEUE_S = 0.2
#: How often the rate of a worker is measured (seconds).
_MEASURE_EVERY_S = 0.05
#: Jobs of one frame, in bytes: small frames let a worker begin while the next is being packed.
_FRAME_BYTES = 256 * 1024
_FRAME_JOBS = 512


class WorkerHandle:
    """A channel with its pace. ``gone`` is set once the worker has ended; ``retired``: give it nothing."""

    def __init__(self, slot: int, generation: int, channel: Channel, mono_now_s: float) -> None:
        self.slot = slot
        self.generation = generation
        self.channel = channel
        self.table = channel.table
        self.gone: WorkerExited | None = None
        self.retired = False
        self._finished = 0
        self._measured_at = mono_now_s
        self._pace = 0.0
        self._find_head()
        #: Whether nothing is to wait behind what it runs, or it is to become empty.
        self.alone = self.runs_long
        channel.wake_worker()

    def _find_head(self) -> None:
        """Frames that the worker has not taken yet were pushed by an earlier reader: their rows count.

        ``taken`` is looked at once more after the frames, for the worker may take one while we look.
        """
        decoder = msgspec.msgpack.Decoder(JobFrame)
        for frame, _ in self.channel.jobs.frames():
            decoded = decoder.decode(frame)
            self.table.head = max(self.table.head, decoded.first_row + len(decoded.jobs))
        self.table.head = max(self.table.head, self.table.taken)

    @property
    def open(self) -> bool:
        """Whether it may be given jobs at all."""
        return not (self.gone or self.retired or self.alone) and self.channel.phase == READY

    @property
    def credit(self) -> int:
        """How many jobs it may be given now."""
        if not self.open:
            return 0
        window = max(2 * self.channel.batch_hint, int(self._pace * _QUEUE_S))
        return max(0, min(window, ROWS) - len(self.table))

    def accepts(self, kind: int) -> bool:
        """Whether the worker runs jobs of this type."""
        return not self.channel.unsupported_types >> kind & 1

    def is_long(self, kind: int) -> bool:
        """Whether jobs of this type would keep others waiting for long."""
        return bool(self.channel.exclusive_types >> kind & 1)

    @property
    def runs_long(self) -> bool:
        """Whether it has such a job."""
        return any(self.is_long(held.kind) for held in self.table.unsettled())

    def dispatch(self, arrivals: Sequence[AdmittedJob]) -> int:
        """Give it jobs, in frames; returns how many it took (fewer where its ring is full)."""
        given = 0
        while given < len(arrivals):
            frame = _one_frame(arrivals, given)
            if not self._push(frame):
                break
            given += len(frame)
        if given:
            self.channel.wake_worker()
        return given

    def _push(self, frame: Sequence[AdmittedJob]) -> bool:
        """Write the rows, push the jobs, count the rows: in this order (see `inflight`)."""
        sources, kinds, entries, _ = zip(*frame, strict=True)
        ids, bodies, _, deaths = zip(*entries, strict=True)
        self.table.write(
            sources, kinds, [min(count, 255) for count in deaths] if any(deaths) else deaths, ids
        )
        jobs = list(zip(sources, ids, bodies, strict=True))
        if not self.channel.jobs.push(msgspec.msgpack.encode(JobFrame(self.table.head, jobs))):
            return False
        self.table.head += len(frame)
        return True

    def settled(self, rows: range) -> None:
        """These rows are in the store now."""
        self.table.settle(rows)
        self._finished += len(rows)

    def update_rate(self, mono_now_s: float) -> None:
        """Take the pace from what was finished since the last time."""
        elapsed = mono_now_s - self._measured_at
        if elapsed >= _MEASURE_EVERY_S:
            self._pace = self._finished / elapsed
            self._finished = 0
            self._measured_at = mono_now_s


def _one_frame(arrivals: Sequence[AdmittedJob], start: int) -> Sequence[AdmittedJob]:
    """The next arrivals that go together: at least one, then up to the limits."""
    size, stop = 0, start
    while stop < len(arrivals) and stop - start < _FRAME_JOBS:
        size += len(arrivals[stop].entry.data or b"")
        if size > _FRAME_BYTES and stop > start:
            break
        stop += 1
    return arrivals[start:stop]


def dispatch_exclusive(
    workers: Sequence[WorkerHandle], waiting: deque[AdmittedJob], handed: Callable[[AdmittedJob], None]
) -> None:
    """Give these jobs to empty workers, one each, and tell of each; where no worker is empty, keep new work
    from the one with the least."""
    for worker in workers:
        if worker.alone and not len(worker.table) and not worker.gone:
            worker.alone = False
    if not waiting:
        return
    for worker in sorted(workers, key=_load):
        fit = _first_fit(worker, workers, waiting) if worker.open and not len(worker.table) else None
        if fit and worker.dispatch([fit]):
            waiting.remove(fit)
            worker.alone = True
            handed(fit)
    # Under steady load no worker is ever empty. One at a time is set aside, beside those that run for long.
    if not any(worker.alone and not worker.runs_long for worker in workers):
        busy = [worker for worker in workers if worker.open and _first_fit(worker, workers, waiting)]
        if busy:
            min(busy, key=_load).alone = True


def _load(worker: WorkerHandle) -> int:
    return len(worker.table)


def _first_fit(
    worker: WorkerHandle, workers: Sequence[WorkerHandle], waiting: deque[AdmittedJob]
) -> AdmittedJob | None:
    """The first job that this worker may have. Long ones never take the last worker of several."""
    return next(
        (
            one
            for one in waiting
            if worker.accepts(one.kind)
            and (not worker.is_long(one.kind) or _has_spare(worker, workers, one.kind))
        ),
        None,
    )


def _has_spare(worker: WorkerHandle, workers: Sequence[WorkerHandle], kind: int) -> bool:
    able = [one for one in workers if not (one.gone or one.retired) and one.accepts(kind)]
    return able == [worker] or any(one is not worker and not one.runs_long for one in able)
