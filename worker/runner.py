"""Worker role: takes jobs from the ring, runs their handlers, reports outcomes."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from .conditions import EXPIRES_AT, expires_s
from .envelope import (
    MAX_TIMEOUT_S,
    MIN_TIMEOUT_S,
    Header,
    Job,
    cancellation,
    job_of,
    job_parser,
    why_malformed,
)
from .errors import MalformedJob, MalformedPayload, PermanentError
from .fork_guard import ForkGuard, generation, leave_if_forked
from .handler import BoundHandler, Outcomes
from .health_check import HealthChecks
from .ipc.channel import READY, STOPPING, Channel, JobFrame, KeptValue, OutcomeFrame, job_frames
from .ipc.control import ControlSocket, Ready
from .ipc.inflight import FAILED, STARTED, SUCCEEDED
from .outcome import Failure
from .results import KEEP_RESULT, Returned, encode_value, is_kept
from .telemetry.current_job import current, log_fields
from .telemetry.failure import error_text, failure_of
from .telemetry.handler_counters import HandlerCounters
from .telemetry.metrics import MetricsBuffer

log = logging.getLogger("jobworker.runner")

#: Longest delay of the reader's wake-up while there are more jobs to run. It lets a stream of tiny jobs share
#: one wake-up and one settlement, and is short against real work of a handler.
_FLUSH_AFTER_S = 0.004
#: Interval of reports to the supervisor while there is anything to report.
_REPORT_EVERY_S = 0.5
#: Interval at which an idle worker checks the dependencies of its handlers, and its longest sleep. Jobs and
#: the supervisor wake it, and its heartbeat may be 15 s old.
_HEALTH_EVERY_S = 5.0
#: Longest wait for room in the outcome ring. Only a reader that is not restarted leaves it full.
_ROOM_WITHIN_S = 60.0
#: Most bytes of queued jobs. Large jobs stay in the ring, whose size is bounded, and no batch is much larger.
_AHEAD_BYTES = 32 * 1024 * 1024
#: Shortest timeout of poll(), which rounds up. A shorter rest of the linger time is not waited for.
_SHORTEST_POLL_S = 0.001
#: Outcome of a job that was cancelled before it started.
_CANCELLED = Failure("JobCancelled: it was cancelled before it started", cancelled=True)


class QueuedJob(NamedTuple):
    """A job that was taken from the ring and not started."""

    row: int
    stream_no: int
    entry_id: bytes
    envelope: Header
    size_bytes: int


class Runner:
    """Worker role. It runs one job or one batch at a time.

    ``stop`` may be set from a signal handler, and the supervisor requests the same in the channel: the
    running job is finished, no other is started. The state byte in the in-flight table changes before and
    after each run, so that the reader knows which jobs had started when the worker dies.
    """

    def __init__(
        self,
        channel: Channel,
        control: ControlSocket,
        handlers: dict[str, BoundHandler],
        streams: Sequence[str],
        *,
        linger_s: float = 0.0,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._stop = False
        self._channel = channel
        self._states = channel.table.states
        self._cancelled = channel.table.cancelled
        self._asked = channel.table.asked
        self._rows = len(self._states)
        self._begin_row = channel.table.begin
        self._control = control
        self._handlers = handlers
        self._parse = job_parser(
            {name for name, handler in handlers.items() if handler.exact_numbers},
            {name for name, handler in handlers.items() if handler.validates},
        )
        self._streams = streams
        self._linger_s = linger_s
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._queue: deque[QueuedJob] = deque()
        self._lookahead = max((handler.max_batch for handler in handlers.values()), default=1)
        self._metrics = MetricsBuffer()
        self._durations = {
            name: self._metrics.histogram("z_novel_job_duration_seconds", (name,)) for name in handlers
        }
        self._waits = {
            name: self._metrics.histogram("z_novel_job_wait_seconds", (name,)) for name in handlers
        }
        self._busy_s = dict.fromkeys(handlers, 0.0)
        self._batches = self._metrics.histogram("z_novel_batch_jobs")
        self._counters = HandlerCounters({name: handler.counters for name, handler in handlers.items()})
        self._unflushed_since: float | None = None
        self._reported_at = self._health_checked_at = 0.0
        self._health = HealthChecks(handlers.values())
        self._trouble: str | None = None
        # Seconds by which progress extends the deadline, and the latest deadline after the start, 0 for none.
        self._progress_s = self._max_timeout_s = 0.0

    @property
    def stop(self) -> bool:
        """Whether no other job may be started."""
        return self._stop or self._channel.stop_requested

    @stop.setter
    def stop(self, value: bool) -> None:
        self._stop = value

    def run(self) -> None:
        """Run until `stop` is set. The reader dispatches the jobs that were not started to other workers."""
        self.begin()
        # After the phase, which the reader checks: then a ready worker can really get jobs.
        self._control.send(Ready())
        while not self.stop:
            self.run_once(self._sleep_s())
        self._channel.phase = STOPPING
        self._channel.wake_reader()
        self.report()

    def begin(self) -> None:
        """Publish that jobs may be dispatched to this worker."""
        self._channel.batch_hint = min((handler.max_batch for handler in self._handlers.values()), default=1)
        self._channel.heartbeat(self._mono_s())
        self._channel.phase = READY
        self._channel.wake_reader()

    def _sleep_s(self) -> float:
        """Time until the next report or check of dependencies. Everything else wakes the worker."""
        if self._metrics:
            return _REPORT_EVERY_S
        return max(0.0, self._health_checked_at + _HEALTH_EVERY_S - self._mono_s())

    def run_once(self, sleep_s: float) -> None:
        """One cycle of the loop: run a job or a batch, or wait at most ``sleep_s`` for jobs."""
        now = self._mono_s()
        self._channel.heartbeat(now)
        self._pull_frames()
        if self._queue:
            self._run_next()
        else:
            self._idle(now, sleep_s)
        if self._mono_s() - self._reported_at >= _REPORT_EVERY_S:
            self.report()

    def _pull_frames(self, *, everything: bool = False) -> None:
        """Move a few frames from the ring into the queue, and release their space at once."""
        most, most_bytes = (math.inf, math.inf) if everything else (self._lookahead, _AHEAD_BYTES)
        ahead_bytes = sum([job.size_bytes for job in self._queue])
        if len(self._queue) >= most or ahead_bytes >= most_bytes:
            return
        for frame, tail in self._channel.jobs.frames():
            decoded = job_frames.decode(frame)
            self._channel.table.taken = decoded.first_row + len(decoded.jobs)
            self._channel.jobs.release(tail)
            self._queue_jobs(decoded)
            ahead_bytes += len(frame)
            if len(self._queue) >= most or ahead_bytes >= most_bytes:
                return

    def _queue_jobs(self, frame: JobFrame) -> None:
        try:
            envelopes = self._parse([data for _, _, data in frame.jobs])
        except (MalformedJob, ValueError, RecursionError):
            return self._queue_valid_jobs(frame)
        # A named tuple's own constructor takes four times as long, once per job.
        self._queue.extend([
            tuple.__new__(QueuedJob, (row, stream_no, entry_id, envelope, len(data)))
            for row, ((stream_no, entry_id, data), envelope) in enumerate(
                zip(frame.jobs, envelopes, strict=True), frame.first_row
            )
        ])  # fmt: skip

    def _queue_valid_jobs(self, frame: JobFrame) -> None:
        """Queue the jobs of a frame one by one, and fail those that are malformed."""
        for row, (stream_no, entry_id, data) in enumerate(frame.jobs, frame.first_row):
            try:
                (envelope,) = self._parse((data,))
            except (MalformedJob, ValueError, RecursionError) as error:
                if not self._begin(row):
                    continue
                self._fail(row, Failure(f"MalformedJob: {why_malformed(error)}", malformed=True))
                self._channel.finished += 1
                self._unflushed_since = self._unflushed_since or self._mono_s()
                continue
            self._queue.append(QueuedJob(row, stream_no, entry_id, envelope, len(data)))

    def _idle(self, now: float, sleep_s: float) -> None:
        self._flush_outcomes()
        if now - self._health_checked_at >= _HEALTH_EVERY_S:
            self._health_checked_at = now
            self._check_health()
        if self._channel.wait_for_jobs(sleep_s, self._control.fileno()).control:
            self._receive()

    def _receive(self) -> None:
        """Stop when the supervisor exits. It sends a worker no messages that matter here."""
        try:
            while self._control.receive():
                pass
        except EOFError:
            self.stop = True

    def _run_next(self) -> None:
        """Run the oldest queued job, together with others of its type if the handler takes batches."""
        handler = self._handlers[self._queue[0].envelope.type]
        if reason := self._health.unfinished(handler):
            self._return_queued(handler.type_name, Failure(reason, unavailable=True))
            self._unflushed_since = None
            self._channel.wake_reader()
            return
        self._set_batch_hint(handler.max_batch)
        current.extend_deadline = self._extend_deadline
        cancellation.of_job, cancellation.of_all = self._is_cancelled, self._are_all_cancelled
        try:
            if handler.handle_batch is None:
                self._run_singly(handler)
            else:
                self._linger(handler)
                if self.stop:
                    return
                self._run_batch(handler, self._take_batch(handler))
        finally:
            current.extend_deadline = cancellation.of_job = cancellation.of_all = None
        self._set_batch_hint(handler.max_batch)
        if self._unflushed_since is not None and (
            not self._queue or self._mono_s() - self._unflushed_since > _FLUSH_AFTER_S
        ):
            self._flush_outcomes()

    def _is_cancelled(self, job: Job) -> bool:
        """Whether a running job was cancelled. It may be called in another thread."""
        if not self._channel.has_cancels:
            return False
        return any(
            self._channel.table.is_cancelled(row.row)
            for row in self._channel.table.started()
            if (self._streams[row.stream_no], row.entry_id.decode()) == (job.stream, job.entry_id)
        )

    def _are_all_cancelled(self) -> bool:
        return self._channel.has_cancels and self._channel.table.runs_only_cancelled()

    def _set_batch_hint(self, jobs: int) -> None:
        """Tell the reader how many jobs to prefetch for this worker: about two batches.

        More would starve idle workers of this host and others.
        """
        if jobs == self._channel.batch_hint:
            return
        self._channel.batch_hint, has_grown = jobs, jobs > self._channel.batch_hint
        if has_grown:
            self._channel.wake_reader()

    def _linger(self, handler: BoundHandler) -> None:
        """Wait up to the linger time for more jobs, while only part of a batch is queued."""
        give_up_at = self._mono_s() + self._linger_s
        while not self.stop and self._has_room(handler):
            left_s = give_up_at - self._mono_s()
            if left_s < _SHORTEST_POLL_S:
                return
            self._flush_outcomes()
            if self._channel.wait_for_jobs(left_s, self._control.fileno()).control:
                self._receive()
            self._pull_frames()

    def _has_room(self, handler: BoundHandler) -> bool:
        size_bytes = sum(job.size_bytes for job in self._queue)
        return (
            len(self._queue) < handler.max_batch
            and size_bytes < handler.max_batch_bytes
            and all(job.envelope.type == handler.type_name for job in self._queue)
        )

    def _take_batch(self, handler: BoundHandler) -> list[QueuedJob]:
        """The oldest job and queued ones of its type, in order, up to the handler's limits.

        Other jobs keep their places in the queue.
        """
        batch: list[QueuedJob] = []
        others: list[QueuedJob] = []
        size_bytes, most_bytes = 0, handler.max_batch_bytes
        while self._queue and len(batch) < handler.max_batch:
            queued = self._queue.popleft()
            if queued.envelope.type != handler.type_name:
                others.append(queued)
                continue
            if self._is_expired(queued):
                continue
            size_bytes += queued.size_bytes
            if batch and size_bytes > most_bytes:
                others.append(queued)
                break
            batch.append(queued)
        self._queue.extendleft(reversed(others))
        return batch

    def _is_expired(self, queued: QueuedJob) -> bool:
        """Fail a job whose latest start passed while it was queued; False if it may start."""
        metadata = queued.envelope.metadata
        if not metadata or EXPIRES_AT not in metadata or expires_s(queued.envelope) > self._wall_s():
            return False
        if not self._begin(queued.row):
            return True  # the reader has it back, or gets it back
        self._fail(queued.row, Failure(f"ExpiredJob: not started by {metadata[EXPIRES_AT]}", expired=True))
        self._channel.finished += 1
        self._unflushed_since = self._unflushed_since or self._mono_s()
        return True

    def _limit_s(self, handler: BoundHandler, envelope: Header) -> float:
        if envelope.timeout is None:
            return handler.timeout_s
        return min(max(envelope.timeout, MIN_TIMEOUT_S), MAX_TIMEOUT_S)

    def _allow_progress(self, handler: BoundHandler, limit_s: float, envelopes: Sequence[Header]) -> None:
        """Let progress extend the deadline, unless a producer has set the timeout of one of the jobs."""
        extends = all(envelope.timeout is None for envelope in envelopes)
        self._progress_s = limit_s
        self._max_timeout_s = handler.max_timeout_s if extends else 0.0

    def _extend_deadline(self) -> None:
        """The running job has made progress: its timeout starts again. It may be called in another thread."""
        now, since, deadline_s = self._mono_s(), self._channel.mono_since_s, self._channel.mono_deadline_s
        extended_s = min(now + self._progress_s, since + self._max_timeout_s)
        if not deadline_s or extended_s <= deadline_s:
            return
        self._channel.extend_deadline(extended_s)
        if now > since + self._progress_s:
            self._channel.batch_hint = 0  # no more jobs are to wait behind a long one

    def _job(self, queued: QueuedJob) -> Job:
        return job_of(queued.envelope, self._streams[queued.stream_no], queued.entry_id.decode())

    def _run_singly(self, handler: BoundHandler) -> None:
        """Run queued jobs of one type, oldest first, until it is time to wake the reader.

        The end of each job is the start of the next: this reads the clock once a job.
        """
        queue, type_name = self._queue, handler.type_name
        self._max_timeout_s = 0.0
        started = self._mono_s()
        wall_ahead_s = self._wall_s() - started
        if self._unflushed_since is None:
            self._unflushed_since = started
        flush_at = self._unflushed_since + _FLUSH_AFTER_S
        took_s: list[float] = []
        created: list[tuple[str, float]] = []
        while queue and queue[0].envelope.type == type_name and started <= flush_at and not self.stop:
            job = queue.popleft()
            # Calls cost as much as the rest of the loop: none is made where the metadata decides.
            if (metadata := job.envelope.metadata) and EXPIRES_AT in metadata and self._is_expired(job):
                continue
            ended = self._run_one(handler, job, started)
            if ended is None:
                continue
            created.append((job.envelope.created_at, started + wall_ahead_s))
            took_s.append(ended - started)
            started = ended
        current.jobs = ()
        self._channel.set_running(0.0, 0.0)
        self._channel.finished += len(took_s)
        self._durations[type_name].extend(took_s)
        self._busy_s[type_name] += sum(took_s)
        self._waits[type_name].extend(_waits_s(created))
        self._batches.add(1, len(took_s))

    def _begin(self, row: int) -> bool:
        """Mark a row STARTED; False if its job must not run: the reader has it back, or gets it back."""
        if self._begin_row(row):
            return True
        if self._unflushed_since is None:
            self._unflushed_since = self._mono_s()
        return False

    def _run_one(self, handler: BoundHandler, queued: QueuedJob, started: float) -> float | None:
        """Run a job; returns the time of its end, or None if the reader has it back."""
        at = queued.row % self._rows
        if self._cancelled[at]:
            if not self._begin(queued.row):
                return None
            self._fail(queued.row, _CANCELLED)
            return started
        limit_s = self._limit_s(handler, queued.envelope)
        if handler.max_timeout_s:
            self._allow_progress(handler, limit_s, (queued.envelope,))
        self._channel.set_running(started, started + limit_s)
        entered = generation()
        self._states[at] = STARTED
        if self._asked[at] and not self._begin(queued.row):  # `_begin` costs a call for each job
            return None
        try:
            current.jobs = job = self._job(queued)
            result = handler.handle(job)
            leave_if_forked(entered)
        except (SystemExit, KeyboardInterrupt) as error:
            leave_if_forked(entered, error)
            raise
        except BaseException as error:  # among them cancellations of asyncio and other libraries
            leave_if_forked(entered, error)
            failure = _failure_of(error)
            self._fail(queued.row, failure)
            if failure.unavailable:
                self._return_queued(handler.type_name, failure)
        else:
            # Without a call for jobs that do not ask: this is done once a job.
            if (metadata := queued.envelope.metadata) and KEEP_RESULT in metadata and is_kept(metadata):
                self._keep(queued, result)
            else:
                self._states[at] = SUCCEEDED
        return self._mono_s()

    def _run_batch(self, handler: BoundHandler, batch: list[QueuedJob]) -> None:
        assert handler.handle_batch is not None
        if self._channel.has_cancels:
            batch = self._without_cancelled(batch)
        if not batch:  # all have expired or were cancelled
            return
        started = self._mono_s()
        limits_s = [self._limit_s(handler, queued.envelope) for queued in batch]
        limit_s = min(sum(limits_s), max(handler.batch_timeout_s, *limits_s))
        self._allow_progress(handler, limit_s, [queued.envelope for queued in batch])
        self._channel.set_running(started, started + limit_s)
        batch = [queued for queued in batch if self._begin(queued.row)]
        if not batch:
            self._channel.set_running(0.0, 0.0)
            return
        current.jobs = jobs = [self._job(queued) for queued in batch]
        outcomes = self._outcomes(handler.handle_batch, jobs)
        current.jobs = ()
        self._report_batch(handler, batch, outcomes)
        self._channel.set_running(0.0, 0.0)
        if self._unflushed_since is None:
            self._unflushed_since = started
        self._channel.finished += len(batch)
        self._record_metrics(
            handler.type_name, [queued.envelope for queued in batch], self._mono_s() - started
        )

    def _without_cancelled(self, batch: list[QueuedJob]) -> list[QueuedJob]:
        """The jobs of a batch that were not cancelled; the others are reported."""
        cancelled = [queued for queued in batch if self._cancelled[queued.row % self._rows]]
        for queued in cancelled:
            if self._begin(queued.row):
                self._fail(queued.row, _CANCELLED)
        if cancelled:
            self._channel.finished += len(cancelled)
            self._unflushed_since = self._unflushed_since or self._mono_s()
        return [queued for queued in batch if queued not in cancelled]

    def _report_batch(self, handler: BoundHandler, batch: list[QueuedJob], outcomes: Outcomes) -> None:
        # One exception often fails all jobs of a batch; its traceback is formatted once.
        failures = {id(one): _failure_of(one) for one in outcomes if isinstance(one, BaseException)}
        for queued, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._fail(queued.row, failures[id(outcome)])
            elif is_kept(queued.envelope.metadata):
                self._keep(queued, outcome.value if isinstance(outcome, Returned) else None)
            else:
                self._states[queued.row % self._rows] = SUCCEEDED
        if all(id(one) in failures for one in outcomes) and all(one.unavailable for one in failures.values()):
            self._return_queued(handler.type_name, failures[id(outcomes[0])])

    def _outcomes(self, handle_batch: Callable[[Sequence[Job]], Outcomes], jobs: list[Job]) -> Outcomes:
        """One outcome for each job, also if the handler raises."""
        try:
            with ForkGuard():
                return handle_batch(jobs)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            return [error] * len(jobs)

    def _return_queued(self, type_name: str, failure: Failure) -> None:
        """Return the queued jobs of a type whose dependency is unavailable; the reader parks them.

        Here each would run into its own timeout, and jobs of other types would wait behind them.
        """
        failure = msgspec.structs.replace(failure, traceback="")  # they did not raise it
        self._pull_frames(everything=True)
        queued = list(self._queue)
        self._queue.clear()
        for job in queued:
            if job.envelope.type == type_name and self._begin(job.row):
                self._fail(job.row, failure)
            elif job.envelope.type == type_name:
                continue
            else:
                self._queue.append(job)

    def _fail(self, row: int, failure: Failure) -> None:
        self._report_frame(OutcomeFrame(row, failure))

    def _keep(self, queued: QueuedJob, result: object) -> None:
        """Report a success whose result is kept. A result that cannot be kept is no failure: the work is
        done."""
        value, error = b"null", ""
        try:
            value = encode_value(result)
        except ValueError as refused:
            error = str(refused)
            log.warning("result.dropped", extra={**log_fields(queued.envelope), "error": error})
        self._report_frame(OutcomeFrame(queued.row, None, KeptValue(queued.envelope.id, value, error)))

    def _report_frame(self, outcome: OutcomeFrame) -> None:
        """Mark the row FAILED, then push the frame: a reader that sees the frame may reuse the row."""
        self._states[outcome.row % self._rows] = FAILED
        frame = msgspec.msgpack.encode(outcome)
        give_up_at = self._mono_s() + _ROOM_WITHIN_S
        while not self._channel.outcomes.push(frame):
            self._channel.wake_reader()
            if self._mono_s() > give_up_at:
                raise TimeoutError("the reader does not settle outcomes")
            time.sleep(0.001)  # the ring is full of frames; the reader releases them without a wake-up

    def _flush_outcomes(self) -> None:
        if self._unflushed_since is not None:
            self._unflushed_since = None
            self._channel.wake_reader()

    def _record_metrics(self, type_name: str, envelopes: Sequence[Header], took_s: float) -> None:
        self._durations[type_name].add(took_s, len(envelopes))
        self._busy_s[type_name] += took_s
        self._batches.add(len(envelopes))
        started_wall_s = self._wall_s() - took_s
        created = [(envelope.created_at, started_wall_s) for envelope in envelopes]
        self._waits[type_name].extend(_waits_s(created))

    def _check_health(self) -> None:
        self._trouble = self._health.trouble(lambda: self._channel.heartbeat(self._mono_s()))

    def report(self) -> None:
        """Send the metrics to the supervisor, with the handlers' own counters."""
        self._reported_at = self._mono_s()
        for name, by in self._counters.take():
            self._metrics.count(name, (), by)
        for type_name, busy_s in self._busy_s.items():
            if busy_s:
                self._metrics.count("z_novel_worker_busy_seconds_total", (type_name,), busy_s)
                self._busy_s[type_name] = 0.0
        self._control.report(self._metrics, self._trouble)


def _failure_of(error: BaseException) -> Failure:
    if isinstance(error, MalformedPayload):  # its traceback says nothing that the message does not
        return Failure(error_text(error), malformed=True)
    return failure_of(error, isinstance(error, PermanentError | MalformedJob))


def _waits_s(created: Iterable[tuple[str, float]]) -> list[float]:
    """Seconds from creation (RFC 3339) to start (unix seconds); an invalid time only costs a metric."""
    waits_s = []
    for created_at, started_wall_s in created:
        try:
            created_wall_s = datetime.fromisoformat(created_at).timestamp()
        except (ValueError, OverflowError):
            continue
        if created_wall_s > 0:  # Go writes the year 1 for a time never set
            waits_s.append(max(0.0, started_wall_s - created_wall_s))
    return waits_s
