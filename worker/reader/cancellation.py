"""Cancellation of jobs that this reader has: those in the prefetch buffer and those in flight."""

from collections.abc import Sequence

from ..envelope import DeadJob, read_header
from ..ipc.inflight import STARTED
from ..outcome import Reason
from ..store.ports import Entry
from .admission import AdmittedJob, RejectedEntry
from .context import ReaderContext
from .dispatch import Dispatcher, WorkerHandle

#: Error of a job that was cancelled before it started.
_NOT_STARTED = "JobCancelled: it was cancelled before it started"


class Cancellations:
    """Cancelled entries of each stream, as the store has them, and what follows for the jobs of this reader.

    A cancelled job that a worker has is marked in the shared memory: the worker does not start it, and its
    handler can see it. The supervisor ends the worker if it still runs after the grace time.
    """

    def __init__(self, context: ReaderContext, dispatcher: Dispatcher) -> None:
        self._store = context.store
        self._streams = context.settings.streams
        self._grace_s = context.settings.cancel_grace_s
        self._metrics = context.metrics
        self._mono_s = context.mono_s
        self._dispatcher = dispatcher
        self._entries = context.cancels
        self._versions = [0] * len(self._streams)
        # Running jobs that were cancelled, and when their worker is ended.
        self._mono_end_s: dict[tuple[int, bytes], float] = {}

    def refresh(self, stream_no: int, version: int, waiting: int) -> None:
        """Read the cancelled entries of a stream if there are new ones. Raises as the store does.

        ``waiting`` counts the jobs that were cancelled while they waited.
        """
        stream = self._streams[stream_no].stream
        self._metrics.gauge("z_novel_jobs_cancelled_waiting", (stream,), waiting)
        if version == self._versions[stream_no]:
            return
        found = self._store.cancels(self._streams[stream_no])
        for key in [key for key in self._entries if key[0] == stream_no]:
            del self._entries[key]
        self._entries.update({(stream_no, entry_id): keeps for entry_id, keeps in found.items()})
        self._versions[stream_no] = version

    def reject(self, jobs: Sequence[AdmittedJob]) -> tuple[Sequence[AdmittedJob], list[RejectedEntry]]:
        """The jobs that may run, and the cancelled ones."""
        if not self._entries:
            return jobs, []
        cancelled = [job for job in jobs if (job.stream_no, job.entry.id) in self._entries]
        if not cancelled:
            return jobs, []
        left = [job for job in jobs if (job.stream_no, job.entry.id) not in self._entries]
        return left, [_rejected(job.stream_no, job.entry) for job in cancelled]

    def enforce(self) -> list[RejectedEntry]:
        """Take cancelled jobs out of the prefetch buffer and mark those in flight; returns the former."""
        if not self._entries:
            return []
        buffer = self._dispatcher.buffer
        _, rejected = self.reject(list(buffer))
        for stream_no in {entry.stream_no for entry in rejected}:
            buffer.discard(stream_no, {one.job.entry_id for one in rejected if one.stream_no == stream_no})
        running: set[tuple[int, bytes]] = set()
        for worker in self._dispatcher.workers:
            running |= self._mark(worker)
        self._mono_end_s = {key: end_s for key, end_s in self._mono_end_s.items() if key in running}
        return rejected

    def _mark(self, worker: WorkerHandle) -> set[tuple[int, bytes]]:
        """Mark the cancelled jobs of a worker; returns those that run."""
        rows = [row for row in worker.table.unsettled() if row.key in self._entries]
        for row in rows:
            if not worker.table.is_cancelled(row.row):
                worker.channel.cancel(row.row)
        running = {row.key for row in rows if worker.table.state(row.row) == STARTED}
        for key in running:
            self._mono_end_s.setdefault(key, self._mono_s() + self._grace_s)
        worker.channel.mono_cancel_by_s = max([self._mono_end_s[key] for key in running], default=0.0)
        return running


def _rejected(stream_no: int, entry: Entry) -> RejectedEntry:
    assert entry.data is not None, "an admitted job has data"
    header = read_header(entry.data)
    job = DeadJob(entry.data, entry.id, Reason.CANCELLED, _NOT_STARTED, header, entry.deaths)
    return RejectedEntry(stream_no, job)
