"""Rebalancing: takes back jobs that wait behind a long one, for other workers here or on idle hosts.

A worker has a few jobs queued, so that it never runs dry. They are meant to start within a moment. Where the
running job takes long, another worker starts them sooner: one of this host, which gets them through the
prefetch buffer, or of an idle host, which reads them from the stream again.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from ..conditions import has_keys
from ..envelope import read_header, with_first_id
from ..errors import MalformedJob, StoreUnavailable
from ..ipc.inflight import RETURNED, SETTLED, InFlightJob
from ..store.ports import Entry
from .admission import AdmittedJob
from .context import ReaderContext
from .dispatch import Dispatcher, WorkerHandle
from .flow_control import FlowControl
from .settlement import runnable_jobs

log = logging.getLogger("jobworker.reader")

#: Interval of looking for jobs that wait behind a long one (seconds).
_LOOK_EVERY_S = 0.25
#: Interval of asking the store whether another host is idle, and the wait after a hand-back that failed.
_ASK_EVERY_S, _AFTER_FAILURE_S = 1.0, 30.0


class Rebalancer:
    """Moves unstarted jobs of held-up workers. No job runs twice by it: see ``ipc/inflight.py``.

    Isolated jobs stay where they are, and so do all while jobs of a tenant kill workers. Jobs of types with
    limits stay on this host, because they hold slots. ``requeue`` gets the jobs that came back. Methods raise
    as the store does; jobs that were taken back stay pending then, and the next listing finds them.
    """

    def __init__(
        self,
        context: ReaderContext,
        dispatcher: Dispatcher,
        flow: FlowControl,
        requeue: Callable[[Sequence[AdmittedJob]], None],
    ) -> None:
        self._store = context.store
        self._streams = context.settings.streams
        self._faults = context.faults
        self._mono_s = context.mono_s
        self._dispatcher = dispatcher
        self._buffer = dispatcher.buffer
        self._flow = flow
        self._requeue = requeue
        self._mono_looked_s = self._mono_asked_s = context.mono_s()

    def run(self) -> None:
        """Collect jobs that workers returned, then move jobs that wait behind a long one, if it is time."""
        self._collect_returned()
        now = self._mono_s()
        for worker in self._dispatcher.workers:
            worker.note_running(now)
        if now - self._mono_looked_s < _LOOK_EVERY_S:
            return
        self._mono_looked_s = now
        self._take_back(now)
        held_up = [one for one in self._dispatcher.workers if one.held_up and not one.exited]
        if not held_up or self._buffer.crashes.watching:
            return
        others = [one for one in self._dispatcher.workers if one.credit]
        if others:
            self._ask_for(others, held_up)
        elif now - self._mono_asked_s >= _ASK_EVERY_S:
            self._mono_asked_s = now
            self._hand_back(held_up, now)

    def _collect_returned(self) -> None:
        """Free the rows that workers passed over, and queue the jobs that were only asked for until then."""
        for worker in self._dispatcher.workers:
            if not worker.has_asked:
                continue
            asked = worker.table.asked_back()
            passed = [row for row in asked if worker.table.state(row) == RETURNED]
            came_back = [worker.table.job(row) for row in passed if not worker.table.is_taken_back(row)]
            self._requeue(self._fetch(came_back))
            worker.table.mark(passed, SETTLED)
            worker.table.advance()
            worker.has_asked = len(passed) < len(asked)

    def _take_back(self, mono_now_s: float) -> None:
        """Queue the jobs again, in front, that were asked for and are not started."""
        for worker in self._dispatcher.workers:
            jobs = {job.entry.id: job for job in self._fetch(worker.asked_unstarted(mono_now_s))}
            rows = [row for row in worker.asked_unstarted(mono_now_s) if row.entry_id in jobs]
            taken = set(worker.table.take_back([row.row for row in rows]))
            self._requeue([jobs[row.entry_id] for row in rows if row.row in taken])

    def _ask_for(self, others: Sequence[WorkerHandle], held_up: Sequence[WorkerHandle]) -> None:
        """Ask held-up workers for as many jobs as other workers of this host can take."""
        room = sum(worker.credit for worker in others) - len(self._buffer.ready)
        for worker in held_up:
            rows = [row for row in _movable(worker) if any(one.may_queue(row.type_no) for one in others)]
            worker.ask_back(rows[: max(0, room)], self._mono_s)
            room -= len(rows)

    def _hand_back(self, held_up: Sequence[WorkerHandle], mono_now_s: float) -> None:
        """Give what waits here back to the streams on which another host is idle.

        Jobs that workers have queued are asked for: they are in the prefetch buffer at the next look.
        """
        for stream_no, source in enumerate(self._streams):
            if stream_no in self._faults or self._flow.sorts_all(stream_no) or self._store.is_reading(source):
                continue  # a read under way would get the jobs back
            queued = {one: self._may_leave(one, stream_no) for one in held_up}
            waiting = [job for job in self._buffer.ready if self._may_leave_buffer(job, stream_no)]
            if not waiting and not any(queued.values()):
                continue
            with self._faults.guard(stream_no):
                if self._store.idle_readers(source):
                    for worker, rows in queued.items():
                        worker.ask_back(rows, self._mono_s)
                    if any(queued.values()):
                        self._mono_asked_s = mono_now_s - _ASK_EVERY_S  # give them at the next look
                    self._buffer.discard(stream_no, {job.entry.id for job in waiting})
                    self._give(stream_no, waiting)

    def _give(self, stream_no: int, jobs: Sequence[AdmittedJob]) -> None:
        source = self._streams[stream_no]
        try:
            given = self._store.hand_back(source, {job.entry.id: _as_moved(job.entry) for job in jobs})
        except StoreUnavailable:  # a full server still takes acknowledgements: do not disturb it again soon
            self._mono_asked_s = self._mono_s() + _AFTER_FAILURE_S
            raise
        if given:
            log.info("jobs.handed_back", extra={"entries": given, "stream": source.stream})

    def _may_leave(self, worker: WorkerHandle, stream_no: int) -> list[InFlightJob]:
        return [
            row
            for row in _movable(worker)
            if row.stream_no == stream_no and not self._flow.is_limited(stream_no, row.type_no)
        ]

    def _may_leave_buffer(self, job: AdmittedJob, stream_no: int) -> bool:
        is_fresh = job.stream_no == stream_no and not job.isolated and not job.entry.deaths
        return is_fresh and not self._flow.is_limited(stream_no, job.type_no)

    def _fetch(self, rows: Iterable[InFlightJob]) -> list[AdmittedJob]:
        by_stream: defaultdict[int, list[InFlightJob]] = defaultdict(list)
        for row in rows:
            by_stream[row.stream_no].append(row)
        jobs: list[AdmittedJob] = []
        for stream_no, some in by_stream.items():
            if stream_no in self._faults:
                continue
            with self._faults.guard(stream_no):
                found = self._store.fetch(self._streams[stream_no], [row.entry_id for row in some])
                bodies = {(stream_no, entry_id): data for entry_id, data in found.items() if data is not None}
                jobs += runnable_jobs(some, bodies)
        return jobs


def _as_moved(entry: Entry) -> bytes:
    """The job for its new entry: one that is compared with others keeps the id of its first entry."""
    data = entry.data or b""
    try:
        header = read_header(data)
    except MalformedJob:  # its worker will say so
        return data
    if not has_keys(header) or header.first_id:
        return data
    return with_first_id(data, entry.id.decode())


def _movable(worker: WorkerHandle) -> list[InFlightJob]:
    """The unstarted jobs of a worker that may run elsewhere."""
    return [row for row in worker.table.queued() if not row.isolated and not row.deaths]
