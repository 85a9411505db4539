"""Import of a book into a batch: at a bounded rate, with a bounded number of jobs that wait, and resumable.

The job store counts the jobs of a batch in the step that enqueues them, and a book always gives the same jobs
in the same order. So the number of jobs in the batch says where an import continues that was killed or that
lost its connection, and no job is sent twice. The same step compares that number with the one that the
importer expects, so of two importers one is refused before it sends a job twice.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from jobworker.worker import BatchChanged, BatchCounts, NewJob, OpenBatch, StoreUnavailable

from .jobs import BookJob, RejectedLine

T = TypeVar("T")

#: Interval at which the batch is looked at (seconds).
POLL_S = 0.5
#: Limits of what one call of the store enqueues. Together they stay below those of one atomic step.
PART_JOBS, PART_BYTES = 100, 1024 * 1024
#: Parts a second at a bounded rate: the load stays even.
_PARTS_PER_S = 4


class ImportStopped(Exception):
    """The import cannot continue now; the same command continues it later. The message gives the reason."""


class Pace(NamedTuple):
    """Limits of an import: segments a second (None: no limit), jobs that wait, seconds without progress."""

    rate: float | None = None
    max_waiting: int = 1000
    stalled_after_s: float = 600.0


class ImportProgress(NamedTuple):
    """How far an import is. ``offset``: bytes of the file whose jobs are in the batch."""

    offset: int
    jobs: int
    counts: BatchCounts


class Tally:
    """What an import has sent and passed over."""

    def __init__(self) -> None:
        self.jobs = self.chapters = self.segments = 0
        #: Jobs that an earlier run has sent.
        self.known_jobs = 0
        self.rejected = 0

    def add(self, one: BookJob) -> None:
        """Count a job."""
        self.jobs += 1
        self.chapters += one.chapters
        self.segments += one.segments


class Importer:
    """Sends the jobs of a book into a batch, and follows it. Of two importers of a book, one is stopped.

    ``show`` gets the progress about twice a second, and ``reject`` each line that is left out.
    """

    def __init__(
        self,
        batch: OpenBatch,
        pace: Pace,
        *,
        show: Callable[[ImportProgress], None],
        reject: Callable[[RejectedLine], None],
        mono_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._batch, self._pace, self._show, self._reject = batch, pace, show, reject
        self._mono_s, self._sleep = mono_s, sleep
        self.tally = Tally()
        self._mono_due_s = self._mono_moved_s = self._mono_looked_s = mono_s()
        self._offset = 0
        self._counts = self._patiently(batch.counts)
        #: Jobs that the batch must have now.
        self._sent = self._counts.total

    @property
    def counts(self) -> BatchCounts:
        """The batch, as it was last looked at."""
        return self._counts

    def send(self, jobs: Iterable[BookJob | RejectedLine]) -> None:
        """Send what the batch does not have yet.

        Raises `ImportStopped`, and `BatchFinished` or ValueError if the batch is gone.
        """
        known = self._sent
        part, size, segments = list[BookJob](), 0, 0
        for one in jobs:
            if isinstance(one, RejectedLine):
                self.tally.rejected += 1
                self._reject(one)
                continue
            self.tally.add(one)
            if self.tally.jobs <= known:
                self.tally.known_jobs += 1
                self._offset = one.offset
                continue
            part.append(one)
            size += sum(map(len, one.job.payload["texts"]))
            segments += one.segments
            if len(part) >= PART_JOBS or size >= PART_BYTES or segments >= self._segments_a_part():
                self._send(part)
                part, size, segments = [], 0, 0
        self._send(part)
        self._refresh_counts()
        self._check_total(self.tally.jobs, self.tally.jobs)

    def close(self) -> None:
        """Make the number of jobs final, once all of them are sent. Raises as `send` does."""
        if self._counts.state == "open":
            self._patiently(self._batch.close)
            self._refresh_counts()

    def follow(self) -> None:
        """Wait until the batch has finished. Raises `ImportStopped` if no job ends for too long."""
        while self._counts.state != "finished":
            self._wait()

    def _segments_a_part(self) -> float:
        return max(1.0, self._pace.rate / _PARTS_PER_S) if self._pace.rate else float("inf")

    def _send(self, part: list[BookJob]) -> None:
        if not part:
            return
        if self._mono_s() - self._mono_looked_s > POLL_S:
            self._refresh_counts()
        # A part larger than the limit is sent once nothing waits.
        while self._counts.left and self._counts.left + len(part) > self._pace.max_waiting:
            self._wait()
        if self._pace.rate:
            while (early_s := self._mono_due_s - self._mono_s()) > 0:
                self._wait(min(POLL_S, early_s))
            segments = sum(one.segments for one in part)
            self._mono_due_s = max(self._mono_due_s, self._mono_s()) + segments / self._pace.rate
        self._enqueue(part)
        self._counts = self._counts._replace(total=self._sent)
        self._offset = part[-1].offset
        self._show_progress()

    def _enqueue(self, part: list[BookJob]) -> None:
        """Add a part to the batch, whatever of it earlier calls have added. Raises `ImportStopped`."""
        first, mono_began_s = self._sent, self._mono_s()
        last, unsure = first + len(part), False
        while self._sent < last:
            jobs = [self._job(one, self._sent + at) for at, one in enumerate(part[self._sent - first :])]
            try:
                self._batch.enqueue_many(jobs, expected_total=self._sent)
                self._sent = last
                continue
            except StoreUnavailable as error:
                if self._mono_s() - mono_began_s > self._pace.stalled_after_s:
                    raise ImportStopped(f"the job store takes no jobs ({error})") from error
                unsure = True
                self._wait()
                self._refresh_counts()
            except BatchChanged as error:
                self._refresh_counts()
                # A server that hung may have carried out the call that failed.
                if self._counts.total >= first and not (unsure and self._counts.total <= last):
                    raise self._other_import() from error
                unsure = False
            if self._counts.total > last:
                raise self._other_import()
            self._check_total(first, last)
            self._sent = self._counts.total

    def _other_import(self) -> ImportStopped:
        return ImportStopped(
            f"another import of this file is under way: batch {self._batch.id} has {self._counts.total} jobs "
            f"and not {self._sent}. No job was sent twice. Once that import has ended, the same command "
            "continues"
        )

    def _check_total(self, least: int, most: int) -> None:
        """Raises `ImportStopped` if the batch has fewer or more jobs than it can have."""
        if not least <= self._counts.total <= most:
            raise ImportStopped(
                f"batch {self._batch.id} has {self._counts.total} jobs, and {least} to {most} are expected: "
                "the job store has lost entries, or another import of the book ran at the same time. Import "
                "it again into a batch of another id (--batch): rows are overwritten"
            )

    def _job(self, one: BookJob, number: int) -> NewJob:
        """The job with its id. The key keeps a second import that runs at once from running it again."""
        id_ = f"{self._batch.id}:{number}"
        key = f"{id_}@{self._counts.wall_created_s:.0f}"
        return one.job._replace(id=id_, metadata={**(one.job.metadata or {}), "idempotency_key": key})

    def _wait(self, seconds: float = POLL_S) -> None:
        self._sleep(seconds)  # the job store sends no event
        self._refresh_counts()

    def _refresh_counts(self) -> None:
        before = self._counts
        self._counts = self._patiently(self._batch.counts)
        self._mono_looked_s = self._mono_s()
        if self._counts.ended != before.ended or self._counts.state != before.state or not self._counts.left:
            self._mono_moved_s = self._mono_s()
        self._check_stalled("no job of the batch has ended")
        self._show_progress()

    def _check_stalled(self, what: str) -> None:
        if self._mono_s() - self._mono_moved_s > self._pace.stalled_after_s:
            raise ImportStopped(
                f"{what} for {self._pace.stalled_after_s:.0f} s: see jobworker doctor. "
                "The same command continues"
            )

    def _patiently(self, call: Callable[[], T]) -> T:
        """The result of a call, once the store answers. Raises `ImportStopped` after too long."""
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                self._check_stalled(f"the job store does not answer ({error})")
            self._sleep(POLL_S)  # a store that is down sends no event

    def _show_progress(self) -> None:
        self._show(ImportProgress(self._offset, self.tally.jobs, self._counts))
