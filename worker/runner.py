"""The worker role: takes jobs from the ring, runs their handlers, reports outcomes."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import chain
from typing import NamedTuple

import msgspec

from .envelope import Envelope, Job, job_of, reread_envelope
from .errors import MalformedJob, PermanentError
from .handler import BoundHandler
from .ipc.channel import READY, STOPPING, Channel, JobFrame, OutcomeFrame
from .ipc.control import ControlSocket, Ready
from .ipc.inflight import FAILED, STARTED, SUCCEEDED
from .outcome import Failure, failure_of
from .telemetry.current_job import current
from .telemetry.metrics import MetricsBuffer

#: How long finished jobs may wait before the reader is told while there are more to run: long enough that a
#: stream of tiny jobs costs one wake-up and one settlement for many, short against anything a handler does.
_FLUSH_AFTER_S = 0.004
#: How often counts go to the supervisor, and how long an idle worker sleeps at most.
_REPORT_EVERY_S = 0.5
#: How often an idle worker asks its handlers whether what they need still answers.
_HEALTH_EVERY_S = 5.0
#: How long to wait for room in the outcome ring: only a reader that is gone for good leaves it full.
_ROOM_WITHIN_S = 60.0
#: Bytes of jobs taken ahead of the one that runs: large ones stay in the ring, whose size is bounded, and
#: no batch is much larger.
_AHEAD_BYTES = 32 * 1024 * 1024
#: What a poll can wait for at the least; it rounds up, and jobs must not wait longer than they may.
_SHORTEST_POLL_S = 0.001


class QueuedJob(NamedTuple):
    """A job taken from the ring and not yet started."""

    row: int
    source: int
    entry_id: bytes
    envelope: Envelope
    size_bytes: int


class Runner:
    """The loop. ``stop`` may be set from a signal handler: the job under way is finished, no other begun."""

    def __init__(
        self,
        channel: Channel,
        link: ControlSocket,
        handlers: dict[str, BoundHandler],
        streams: Sequence[str],
        *,
        linger_s: float = 0.0,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.stop = False
        self._channel = channel
        self._states = channel.table.states
        self._rows = len(self._states)
        self._link = link
        self._handlers = handlers
        self._streams = streams
        self._linger_s = linger_s
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._waiting: deque[QueuedJob] = deque()
        self._lookahead = max((handler.max_batch for handler in handlers.values()), default=1)
        self._frames = msgspec.msgpack.Decoder(JobFrame)
        self._tally = MetricsBuffer()
        self._durations = {
            kind: self._tally.histogram("z_novel_job_duration_seconds", (kind,)) for kind in handlers
        }
        self._waits = {kind: self._tally.histogram("z_novel_job_wait_seconds", (kind,)) for kind in handlers}
        self._batches = self._tally.histogram("z_novel_batch_jobs")
        self._counted: dict[tuple[int, str], int] = {}
        self._unflushed_since: float | None = None
        self._reported_at = 0.0
        self._checked_at = 0.0
        self._trouble: str | None = None

    def run(self) -> None:
        """Until told to stop; what was not started then stays for the reader to hand to another."""
        self.begin()
        # Behind the phase, which the reader goes by: who is told "ready" may rely on jobs being taken here.
        self._link.send(Ready())
        while not self.stop:
            self.run_once(_REPORT_EVERY_S)
        self._channel.phase = STOPPING
        self._channel.wake_reader()
        self.report()

    def begin(self) -> None:
        """Say that jobs may come."""
        self._channel.batch_hint = min((handler.max_batch for handler in self._handlers.values()), default=1)
        self._channel.heartbeat(self._mono_s())
        self._channel.phase = READY
        self._channel.wake_reader()

    def run_once(self, sleep_s: float) -> None:
        """One round of the loop: run what goes together, or wait at most so long for jobs."""
        now = self._mono_s()
        self._channel.heartbeat(now)
        self._pull_frames()
        if self._waiting:
            self._run_next()
        else:
            self._idle(now, sleep_s)
        if now - self._reported_at > _REPORT_EVERY_S:
            self.report()

    def _pull_frames(self, *, everything: bool = False) -> None:
        """Move frames from the ring into the queue, a few ahead, giving their space back at once."""
        most, most_bytes = (math.inf, math.inf) if everything else (self._lookahead, _AHEAD_BYTES)
        ahead_bytes = sum([waiting.size_bytes for waiting in self._waiting])
        if len(self._waiting) >= most or ahead_bytes >= most_bytes:
            return
        for frame, tail in self._channel.jobs.frames():
            decoded = self._frames.decode(frame)
            self._channel.table.taken = decoded.first_row + len(decoded.jobs)
            self._channel.jobs.release(tail)
            # A named tuple's own constructor takes four times as long, once per job.
            self._waiting.extend(
                tuple.__new__(QueuedJob, (row, source, entry_id, reread_envelope(data), len(data)))
                for row, (source, entry_id, data) in enumerate(decoded.jobs, decoded.first_row)
            )
            ahead_bytes += len(frame)
            if len(self._waiting) >= most or ahead_bytes >= most_bytes:
                return

    def _idle(self, now: float, sleep_s: float) -> None:
        self._flush_outcomes()
        if now - self._checked_at > _HEALTH_EVERY_S:
            self._checked_at = now
            self._check_health()
        self._channel.wait_for_jobs(sleep_s, self._link.fileno())
        self._receive()

    def _receive(self) -> None:
        """The supervisor has nothing to say to a worker but its own end, which ends the worker too."""
        try:
            while self._link.receive():
                pass
        except EOFError:
            self.stop = True

    def _run_next(self) -> None:
        """Start the oldest waiting job, with others of its type where the handler takes several."""
        handler = self._handlers[self._waiting[0].envelope.type]
        self._set_batch_hint(handler.max_batch)
        if handler.handle_batch is None:
            self._run_singly(handler)
        else:
            self._await_more(handler)
            if self.stop:
                return
            self._run_batch(handler, self._take_batch(handler))
        if self._unflushed_since is not None and (
            not self._waiting or self._mono_s() - self._unflushed_since > _FLUSH_AFTER_S
        ):
            self._flush_outcomes()

    def _set_batch_hint(self, jobs: int) -> None:
        """Let the reader keep some batches of the type at hand here, and not more: jobs that wait behind
        others here are not taken by an idle worker, of this host or another."""
        if jobs == self._channel.batch_hint:
            return
        self._channel.batch_hint, more = jobs, jobs > self._channel.batch_hint
        if more:
            self._channel.wake_reader()

    def _await_more(self, handler: BoundHandler) -> None:
        """Wait a moment for more jobs, where nothing but part of a batch is there."""
        give_up_at = self._mono_s() + self._linger_s
        while not self.stop and self._has_room(handler):
            left_s = give_up_at - self._mono_s()
            if left_s < _SHORTEST_POLL_S:
                return
            self._flush_outcomes()
            self._channel.wait_for_jobs(left_s, self._link.fileno())
            self._receive()
            self._pull_frames()

    def _has_room(self, handler: BoundHandler) -> bool:
        size_bytes = sum(waiting.size_bytes for waiting in self._waiting)
        return (
            len(self._waiting) < handler.max_batch
            and size_bytes < handler.max_batch_bytes
            and all(waiting.envelope.type == handler.kind for waiting in self._waiting)
        )

    def _take_batch(self, handler: BoundHandler) -> list[QueuedJob]:
        """The oldest job, and waiting ones of its type up to the handler's limits, in order; the others keep
        their places."""
        batch: list[QueuedJob] = []
        others: list[QueuedJob] = []
        size_bytes, most_bytes = 0, handler.max_batch_bytes
        while self._waiting and len(batch) < handler.max_batch:
            waiting = self._waiting.popleft()
            if waiting.envelope.type != handler.kind:
                others.append(waiting)
                continue
            size_bytes += waiting.size_bytes
            if batch and size_bytes > most_bytes:
                others.append(waiting)
                break
            batch.append(waiting)
        self._waiting.extendleft(reversed(others))
        return batch

    def _limit_s(self, handler: BoundHandler, envelope: Envelope) -> float:
        return handler.timeout_s if envelope.timeout is None else envelope.timeout

    def _job(self, waiting: QueuedJob) -> Job:
        return job_of(waiting.envelope, self._streams[waiting.source], waiting.entry_id.decode())

    def _run_singly(self, handler: BoundHandler) -> None:
        """Run waiting jobs of one type, oldest first, until it is time to tell the reader. Each job's end is
        the next one's start: one look at the clock a job."""
        waiting, kind = self._waiting, handler.kind
        started = self._mono_s()
        wall_ahead_s = self._wall_s() - started
        if self._unflushed_since is None:
            self._unflushed_since = started
        flush_at = self._unflushed_since + _FLUSH_AFTER_S
        took_s: list[float] = []
        waited_s: list[float] = []
        while waiting and waiting[0].envelope.type == kind and started <= flush_at and not self.stop:
            job = waiting.popleft()
            waited_s += _waited_s(job.envelope, started + wall_ahead_s)
            ended = self._run_one(handler, job, started)
            took_s.append(ended - started)
            started = ended
        current.jobs = ()
        self._channel.running(0.0, 0.0)
        self._channel.finished += len(took_s)
        self._durations[kind].extend(took_s)
        self._waits[kind].extend(waited_s)
        self._batches.add(1, len(took_s))

    def _run_one(self, handler: BoundHandler, waiting: QueuedJob, started: float) -> float:
        """Run a job; returns when it ended."""
        self._channel.running(started, started + self._limit_s(handler, waiting.envelope))
        at = waiting.row % self._rows
        self._states[at] = STARTED
        try:
            current.jobs = job = self._job(waiting)
            handler.handle(job)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # asyncio's and other libraries' cancellations among them
            if self._fail(waiting, error).unavailable:
                self._return_queued(handler.kind, error)
        else:
            self._states[at] = SUCCEEDED
        return self._mono_s()

    def _run_batch(self, handler: BoundHandler, batch: list[QueuedJob]) -> None:
        assert handler.handle_batch is not None
        jobs = [self._job(waiting) for waiting in batch]
        started = self._mono_s()
        limits_s = [self._limit_s(handler, waiting.envelope) for waiting in batch]
        limit_s = min(sum(limits_s), max(handler.batch_timeout_s, *limits_s))
        self._channel.running(started, started + limit_s)
        self._channel.table.mark([waiting.row for waiting in batch], STARTED)
        current.jobs = jobs
        outcomes = self._outcomes(handler.handle_batch, jobs)
        current.jobs = ()
        unavailable = 0
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                self._states[waiting.row % self._rows] = SUCCEEDED
            else:
                unavailable += self._fail(waiting, outcome).unavailable
        if outcomes[0] is not None and unavailable == len(batch):
            self._return_queued(handler.kind, outcomes[0])
        self._channel.running(0.0, 0.0)
        if self._unflushed_since is None:
            self._unflushed_since = started
        self._channel.finished += len(batch)
        self._record_metrics(handler.kind, [waiting.envelope for waiting in batch], self._mono_s() - started)

    def _outcomes(
        self, handle_batch: Callable[[Sequence[Job]], Sequence[BaseException | None]], jobs: list[Job]
    ) -> Sequence[BaseException | None]:
        """One outcome a job, also where the handler raises."""
        try:
            return handle_batch(jobs)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            return [error] * len(jobs)

    def _return_queued(self, kind: str, error: BaseException) -> None:
        """What a type needs is away: its jobs that wait here would find that out too, one time limit after
        another, and hold up those of other types meanwhile. The reader keeps them until it is back."""
        self._pull_frames(everything=True)
        queued = list(self._waiting)
        self._waiting.clear()
        for waiting in queued:
            if waiting.envelope.type == kind:
                self._fail(waiting, error)
            else:
                self._waiting.append(waiting)

    def _fail(self, waiting: QueuedJob, error: BaseException) -> Failure:
        """Say FAILED, then push why: once the reader has seen the frame, the row is no longer ours."""
        failure = failure_of(error, isinstance(error, PermanentError | MalformedJob))
        self._states[waiting.row % self._rows] = FAILED
        frame = msgspec.msgpack.encode(OutcomeFrame(waiting.row, failure))
        give_up_at = self._mono_s() + _ROOM_WITHIN_S
        while not self._channel.outcomes.push(frame):
            self._channel.wake_reader()
            if self._mono_s() > give_up_at:
                raise TimeoutError("the reader does not take outcomes")
            time.sleep(0.001)  # the ring is full of failures; the reader is settling them
        return failure

    def _flush_outcomes(self) -> None:
        if self._unflushed_since is not None:
            self._unflushed_since = None
            self._channel.wake_reader()

    def _record_metrics(self, kind: str, envelopes: Sequence[Envelope], took_s: float) -> None:
        self._durations[kind].add(took_s, len(envelopes))
        self._batches.add(len(envelopes))
        started_wall_s = self._wall_s() - took_s
        waits_s = [_waited_s(envelope, started_wall_s) for envelope in envelopes]
        self._waits[kind].extend(list(chain.from_iterable(waits_s)))

    def _check_health(self) -> None:
        for handler in self._handlers.values():
            try:
                if handler.healthy is not None:
                    handler.healthy()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # asyncio's cancellation among them
                self._trouble = f"{handler.kind}: {failure_of(error, False).error}"
                return
        self._trouble = None

    def report(self) -> None:
        """Tell the supervisor what was counted, the handlers' own counters too."""
        self._reported_at = self._mono_s()
        for handler in self._handlers.values():
            for name, total in handler.counters.items():
                key = (id(handler.counters), name)  # one handler may serve several types
                self._tally.count(f"z_novel_{name}_total", (), total - self._counted.get(key, 0))
                self._counted[key] = total
        self._link.report(self._tally, self._trouble)


def _waited_s(envelope: Envelope, started_wall_s: float) -> tuple[float, ...]:
    """How long a job has waited, where it says since when."""
    created_wall_s = _unix_s(envelope.created_at)
    return () if created_wall_s is None else (max(0.0, started_wall_s - created_wall_s),)


def _unix_s(created_at: str) -> float | None:
    """RFC 3339 to unix seconds; None for what is no time, which costs a metric and nothing else."""
    try:
        created_wall_s = datetime.fromisoformat(created_at).timestamp()
    except (ValueError, OverflowError):
        return None
    return created_wall_s if created_wall_s > 0 else None  # Go writes the year 1 for a time never set
