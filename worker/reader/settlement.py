"""Settlement: turns outcomes into acknowledgements, retries and dead letters, in one script a stream."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from ..envelope import DeadJob, Envelope, dead_letter, read_envelope, with_retry
from ..ipc.channel import OutcomeFrame
from ..ipc.control import WorkerExited
from ..ipc.inflight import FAILED, QUEUED, SETTLED, STARTED, SUCCEEDED, InFlightJob
from ..keys import Source
from ..outcome import Failure, GiveUp, Reason, after_failure
from ..store.ports import Dead, Entry, Retry, Settlement
from ..telemetry import trace
from ..telemetry.current_job import log_fields
from .admission import AdmittedJob, RejectedEntry, reject_unread
from .circuit_breaker import CircuitBreakers
from .context import ReaderContext
from .crash_breaker import CrashKey
from .dispatch import WorkerHandle

log = logging.getLogger("jobworker.settlement")

#: Label of metrics for entries whose type is not known.
_UNKNOWN_TYPE = "unknown"
#: Bytes of jobs by stream number and entry id; entries that are gone from their stream are missing.
Bodies = Mapping[tuple[int, bytes], bytes]


class FailedJob(NamedTuple):
    """A job whose run failed, or whose worker died. ``data`` is its bytes, ``worker`` names the slot."""

    row: InFlightJob
    data: bytes
    failure: Failure
    worker: str
    #: Facts about the worker's death for the dead letter.
    details: dict[str, object] | None = None


class DeferredJob(NamedTuple):
    """A job whose dependency is unavailable, and what it reported."""

    job: AdmittedJob
    failure: Failure


class _Outcomes(NamedTuple):
    """Unsettled outcomes of one worker: runs of succeeded rows, failures by row, and the ring's new tail."""

    worker: WorkerHandle
    succeeded: list[range]
    failed: list[tuple[InFlightJob, Failure]]
    tail: int | None


class Reclaimed(NamedTuple):
    """Jobs of an exited worker that still have to run, oldest first."""

    unstarted: list[AdmittedJob]
    isolated: list[AdmittedJob]


class SettlementBatch:
    """Settlements of one tick, one for each stream, and what they mean for the circuit breakers."""

    def __init__(self) -> None:
        self.done: dict[int, list[bytes]] = defaultdict(list)
        self.retries: dict[int, list[Retry]] = defaultdict(list)
        self.dead: dict[int, list[Dead]] = defaultdict(list)
        self.counts: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
        #: Types whose dependencies answer: a job succeeded, or failed for a reason of its own.
        self.answered_types: set[int] = set()
        #: Jobs that were the only ones in a worker that died.
        self.worker_deaths: list[CrashKey] = []
        #: Jobs whose dependency is unavailable. They stay pending and use up no retry.
        self.deferred: list[DeferredJob] = []

    def settlements(self, streams: Sequence[Source]) -> list[Settlement]:
        """One settlement for each stream that has outcomes."""
        touched = sorted({*self.done, *self.retries, *self.dead})
        return [Settlement(streams[i], self.done[i], self.retries[i], self.dead[i]) for i in touched]


class Settler:
    """Settles the outcomes that workers report, the rejected entries, and the jobs of exited workers.

    A call that raises, as the store does, has changed nothing that a second call would do twice: rows and
    frames are released only after the store has settled them.
    """

    def __init__(
        self,
        context: ReaderContext,
        breakers: CircuitBreakers,
        wall_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = context.store
        self._settings = context.settings
        self._streams = context.settings.streams
        self._type_names = tuple(context.settings.handlers)
        self._metrics = context.metrics
        self._rng = context.rng
        self._marks = context.crash_marks
        self._breakers = breakers
        self._crashes = breakers.crashes
        self._mono_s = context.mono_s
        self._wall_now = wall_now
        self._decoder = msgspec.msgpack.Decoder(OutcomeFrame)

    # -- outcomes

    def settle(self, workers: Iterable[WorkerHandle], rejected: Sequence[RejectedEntry]) -> SettlementBatch:
        """Settle all outcomes of these workers, and dead-letter the rejected entries."""
        batch = SettlementBatch()
        outcomes = [self._collect(worker) for worker in workers]
        for one in outcomes:
            for run in one.succeeded:
                self._acknowledge(batch, one.worker, run)
            for row, _ in one.failed:
                self._crashes.record_survival(row.stream_no, [row.entry_id])
        self._settle_failures(batch, outcomes)
        for entry in rejected:
            self._settle_rejected(batch, entry)
        self._marks.unmark()
        self._commit(batch)
        for one in outcomes:
            self._release(one)
        return batch

    def _collect(self, worker: WorkerHandle) -> _Outcomes:
        succeeded = list(worker.table.succeeded())
        failed, end = [], None
        for frame, tail in worker.channel.outcomes.frames():
            outcome = self._decoder.decode(frame)
            end = tail
            if worker.table.state(outcome.row) == FAILED:  # an earlier reader may have settled it
                failed.append((worker.table.job(outcome.row), outcome.failure))
        return _Outcomes(worker, succeeded, failed, end)

    def _acknowledge(self, batch: SettlementBatch, worker: WorkerHandle, run: range) -> None:
        stream_nos, type_nos, ids = worker.table.columns(run)
        for type_no in set(type_nos):
            batch.answered_types.add(type_no)
            key = ("z_novel_jobs_completed_total", (self._type_names[type_no],))
            batch.counts[key] += type_nos.count(type_no)
        present = set(stream_nos)
        for stream_no in present:
            batch.done[stream_no] += (
                ids
                if len(present) == 1
                else [one for one, owner in zip(ids, stream_nos, strict=True) if owner == stream_no]
            )
            if self._crashes.watching:
                self._crashes.record_survival(stream_no, batch.done[stream_no])

    def _settle_failures(self, batch: SettlementBatch, outcomes: Sequence[_Outcomes]) -> None:
        """Settle failed jobs. Their bytes are fetched from the stream again, because few jobs fail."""
        bodies = self._fetch([row for one in outcomes for row, _ in one.failed])
        for one in outcomes:
            for row, failure in one.failed:
                self._settle_failure(batch, row, bodies.get(row.key), failure, self._worker_name(one.worker))
        self._marks.unmark()

    def _settle_failure(
        self, batch: SettlementBatch, row: InFlightJob, data: bytes | None, failure: Failure, worker: str,
        details: dict[str, object] | None = None,
    ) -> None:  # fmt: skip
        if data is not None and failure.unavailable and self._breakers.is_within_grace(row.type_no, row.key):
            batch.deferred.append(DeferredJob(_runnable(row, data), failure))
            return
        batch.counts["z_novel_jobs_failed_total", (self._type_names[row.type_no],)] += 1
        if data is None:
            log.error("entry.missing", extra={"entry_id": row.entry_id.decode()})
            batch.done[row.stream_no].append(row.entry_id)
            return
        job = FailedJob(row, data, failure, worker, details)
        if row.key in self._marks.poison:
            self._dead_letter_unread(batch, job)
        else:
            self._marks.mark(row.stream_no, row.entry_id, settling=True)
            self._retry_or_give_up(batch, job)

    def _retry_or_give_up(self, batch: SettlementBatch, job: FailedJob) -> None:
        row, failure = job.row, job.failure
        if not failure.timed_out and not failure.unavailable:
            batch.answered_types.add(row.type_no)
        envelope = read_envelope(job.data)
        if failure.timed_out:
            batch.worker_deaths.append(CrashKey(row.type_no, envelope.tenant_id))
        decision = after_failure(failure, envelope.retry_count, row.deaths, self._settings.retry, self._rng)
        fields = {**log_fields(envelope), "retry_count": envelope.retry_count, "error": failure.error}
        if failure.traceback:
            fields["exception"] = failure.traceback
        if isinstance(decision, GiveUp):
            log.error("job.dead_lettered", extra={**fields, "reason": decision.reason})
            self._trace("give up", envelope, row, failure.error, reason=decision.reason)
            self._dead_letter(batch, job, decision.reason, envelope)
            return
        log.warning("job.retry_scheduled", extra={**fields, "delay_s": round(decision.delay_s, 3)})
        self._trace("retry", envelope, row, failure.error, delay_s=decision.delay_s)
        batch.counts["z_novel_jobs_retried_total", (envelope.type,)] += 1
        deaths, max_payload = envelope.deaths + row.deaths, self._settings.max_payload
        retry = with_retry(job.data, decision.retry_count, deaths, failure.error, max_payload)
        batch.retries[row.stream_no].append(Retry(row.entry_id, decision.delay_s, retry))

    def _trace(
        self, what: str, envelope: Envelope, row: InFlightJob, error: str, **attributes: str | int | float
    ) -> None:
        stream = self._streams[row.stream_no].stream
        trace.settled(what, envelope, stream, row.entry_id, error=error, **attributes)

    # -- dead letters

    def _settle_rejected(self, batch: SettlementBatch, rejected: RejectedEntry) -> None:
        stream_no, job = rejected
        self._marks.mark(stream_no, job.entry_id, settling=True)
        envelope = job.envelope
        log.error("job.rejected", extra={
            "stream": self._streams[stream_no].stream, "entry_id": job.entry_id.decode(),
            "reason": job.reason, "error": job.error, **(log_fields(envelope) if envelope else {}),
        })  # fmt: skip
        type_name = envelope.type if envelope and envelope.type in self._type_names else _UNKNOWN_TYPE
        self._add_dead_letter(batch, rejected, type_name, self._worker_name(None))

    def _dead_letter(
        self, batch: SettlementBatch, job: FailedJob, reason: Reason, envelope: Envelope
    ) -> None:
        row = job.row
        details = job.details
        if job.failure.traceback:
            details = {**(details or {}), "traceback": job.failure.traceback}
        dead_job = DeadJob(
            *(job.data, row.entry_id, reason, job.failure.error, envelope), row.deaths, details
        )
        type_name = self._type_names[row.type_no]
        self._add_dead_letter(batch, RejectedEntry(row.stream_no, dead_job), type_name, job.worker)

    def _dead_letter_unread(self, batch: SettlementBatch, job: FailedJob) -> None:
        """Dead-letter a job that made a reader exit, without parsing it."""
        row = job.row
        rejected = reject_unread(row.stream_no, Entry(row.entry_id, job.data, deaths=row.deaths))
        log.error("job.dead_lettered", extra={
            "entry_id": row.entry_id.decode(), "reason": rejected.job.reason, "error": rejected.job.error,
        })  # fmt: skip
        self._add_dead_letter(batch, rejected, self._type_names[row.type_no], job.worker)

    def _add_dead_letter(
        self, batch: SettlementBatch, rejected: RejectedEntry, type_name: str, worker: str
    ) -> None:
        stream_no, job = rejected
        batch.counts["z_novel_jobs_dead_total", (type_name, job.reason)] += 1
        failed_at = self._wall_now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        letter = dead_letter(job, stream=self._streams[stream_no].stream, worker=worker, failed_at=failed_at)
        batch.dead[stream_no].append(Dead(job.entry_id, letter))

    # -- the store

    def _commit(self, batch: SettlementBatch) -> None:
        """Settle the batch in the store, then count its outcomes: they are final now."""
        settlements = batch.settlements(self._streams)
        if settlements and (refused := self._store.settle(settlements)):
            log.warning("settle.refused", extra={"entries": len(refused)})
        for (name, labels), count in batch.counts.items():
            self._metrics.count(name, labels, count)

    def _release(self, outcomes: _Outcomes) -> None:
        """Release settled rows, then their frames: a successor skips frames whose row is settled."""
        worker = outcomes.worker
        for run in outcomes.succeeded:
            worker.record_settled(run)
        for row, _ in outcomes.failed:
            worker.record_settled(range(row.row, row.row + 1))
        if outcomes.tail is not None:
            worker.channel.outcomes.release(outcomes.tail)
        worker.table.advance()

    def _fetch(self, rows: Sequence[InFlightJob]) -> Bodies:
        bodies = {}
        for stream_no in {row.stream_no for row in rows}:
            ids = [row.entry_id for row in rows if row.stream_no == stream_no]
            for entry_id, data in self._store.fetch(self._streams[stream_no], ids).items():
                if data is not None:
                    bodies[stream_no, entry_id] = data
        return bodies

    def _worker_name(self, worker: WorkerHandle | None) -> str:
        slot = "reader" if worker is None else str(worker.slot)
        return f"{self._settings.host}/{self._settings.instance}/{slot}"

    # -- exited workers

    def reclaim(self, worker: WorkerHandle, exit_: WorkerExited) -> Reclaimed:
        """Reclaim the jobs of an exited worker, after `settle`.

        A death is charged to the jobs that it had started; jobs that it had not started are free. After a
        timeout of a single job, that job is retried or given up instead.
        """
        rows = worker.table.unsettled()
        assert all(worker.table.state(row.row) != SUCCEEDED for row in rows)
        started = [row for row in rows if worker.table.state(row.row) in (STARTED, FAILED)]
        unstarted = [row for row in rows if worker.table.state(row.row) == QUEUED]
        if not exit_.charge:
            unstarted, started = sorted(unstarted + started), []
        bodies = self._fetch(rows)
        batch, isolated = SettlementBatch(), []
        if exit_.timed_out and len(started) == 1:
            failure = Failure(f"TimeoutError: {exit_.cause}", timed_out=True)
            data = bodies.get(started[0].key)
            name = self._worker_name(worker)
            self._settle_failure(batch, started[0], data, failure, name, exit_.details)
        else:
            isolated = self._charge_deaths(batch, worker, exit_, started, bodies)
        self._marks.unmark()
        self._commit(batch)
        for key in batch.worker_deaths:
            self._crashes.record_death(key, self._mono_s())
        worker.table.mark([row.row for row in rows], SETTLED)
        worker.table.advance()
        return Reclaimed(_runnable_jobs(unstarted, bodies), isolated)

    def _charge_deaths(
        self, batch: SettlementBatch, worker: WorkerHandle, exit_: WorkerExited,
        started: Sequence[InFlightJob], bodies: Bodies,
    ) -> list[AdmittedJob]:  # fmt: skip
        """Charge the worker's death to each started job; returns the jobs that run again, isolated."""
        deaths = self._store_deaths(started)
        exit_.details["batch"] = [row.entry_id.decode() for row in started]
        failure = Failure(f"WorkerDied: {exit_.cause}")
        isolated = []
        for row in started:
            data = bodies.get(row.key)
            if data is None or row.key not in deaths:
                continue  # no longer ours
            charged = row._replace(deaths=deaths[row.key], isolated=True)
            job = FailedJob(charged, data, failure, self._worker_name(worker), exit_.details)
            if not self._is_given_up(batch, job, exit_.cause, sole=len(started) == 1):
                isolated.append(_runnable(charged, data))
        return isolated

    def _store_deaths(self, started: Sequence[InFlightJob]) -> dict[tuple[int, bytes], int]:
        """Store the new count of deaths of each job; returns those of entries that are still ours."""
        stored: dict[tuple[int, bytes], int] = {}
        for stream_no in {row.stream_no for row in started}:
            counts = {row.entry_id: row.deaths + 1 for row in started if row.stream_no == stream_no}
            own_counts = self._store.set_deaths(self._streams[stream_no], counts)
            stored |= {(stream_no, entry_id): count for entry_id, count in own_counts.items()}
        return stored

    def _is_given_up(self, batch: SettlementBatch, job: FailedJob, cause: str, *, sole: bool) -> bool:
        """Dead-letter a job with too many deaths; False if it may run again.

        A death also counts as a failed try, but only if the job was the only one in its worker (``sole``):
        otherwise it is not proven to have caused the death.
        """
        row = job.row
        if row.key in self._marks.poison:
            self._dead_letter_unread(batch, job)
            return True
        self._marks.mark(row.stream_no, row.entry_id, settling=True)
        envelope = read_envelope(job.data)
        deaths = envelope.deaths + row.deaths
        if sole:
            batch.worker_deaths.append(CrashKey(row.type_no, envelope.tenant_id))
        batch.counts["z_novel_jobs_failed_total", (envelope.type,)] += 1
        retries_exhausted = sole and envelope.retry_count + row.deaths > self._settings.retry.max_retries
        log.error("job.worker_died", extra={**log_fields(envelope), "deaths": deaths, "cause": cause})
        self._trace("worker died", envelope, row, cause, deaths=deaths)
        if deaths < self._settings.max_deaths and not retries_exhausted:
            return False
        self._dead_letter(batch, job, Reason.POISON, envelope)
        return True


def _runnable(row: InFlightJob, data: bytes) -> AdmittedJob:
    """The job of a row as it was admitted; it is not validated again."""
    entry = Entry(row.entry_id, data, deaths=row.deaths)
    return AdmittedJob(row.stream_no, row.type_no, entry, row.isolated or row.deaths > 0)


def _runnable_jobs(rows: Iterable[InFlightJob], bodies: Bodies) -> list[AdmittedJob]:
    """Jobs of rows; entries that are gone from their stream are left out."""
    return [_runnable(row, data) for row in rows if (data := bodies.get(row.key)) is not None]
