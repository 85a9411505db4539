"""Settlement: turns outcomes into acknowledgements, retries and dead letters, in one script a stream."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from ..conditions import expires_s, has_keys, unique_bucket, unique_name
from ..envelope import DeadJob, Header, dead_letter, read_header, with_retry
from ..errors import MalformedJob
from ..flow import JOB_KEY, read_flow_header, tenant_key
from ..ipc.channel import outcome_frames
from ..ipc.control import WorkerExited
from ..ipc.inflight import FAILED, QUEUED, RETURNED, SETTLED, STARTED, SUCCEEDED, InFlightJob
from ..outcome import Drop, Failure, GiveUp, Reason, TryAgain, after_failure
from ..results import CANCELLED, DEAD, encode_result, is_kept
from ..results import SUCCEEDED as RESULT_SUCCEEDED
from ..store.ports import (
    Dead,
    Entry,
    Kept,
    OwnedKey,
    PutBack,
    Retry,
    WaitingJob,
    do_nothing,
)
from ..telemetry import trace
from ..telemetry.current_job import log_fields
from .admission import AdmittedJob, RejectedEntry, reject_malformed, reject_unread
from .circuit_breaker import CircuitBreakers
from .context import ReaderContext
from .crash_breaker import CrashKey
from .dispatch import WorkerHandle
from .held_outcomes import FailedJob, KeptJob
from .settlement_batch import DeferredJob, SettlementBatch
from .settlement_sender import SettlementSender

log = logging.getLogger("jobworker.settlement")

#: Label of metrics for entries whose type is not known.
_UNKNOWN_TYPE = "unknown"
#: Bytes of jobs by stream number and entry id; entries that are gone from their stream are missing.
Bodies = Mapping[tuple[int, bytes], bytes]


class _Outcomes(NamedTuple):
    """Unsettled outcomes of one worker: runs of succeeded rows, failures and successes with a result by row,
    and the ring's new tail."""

    worker: WorkerHandle
    succeeded: list[range]
    failed: list[FailedJob]
    kept: list[KeptJob]
    tail: int | None

    @property
    def framed(self) -> list[InFlightJob]:
        """The rows whose outcome was in a frame."""
        return [*(job.row for job in self.failed), *(job.row for job in self.kept)]


class Reclaimed(NamedTuple):
    """Jobs of an exited worker that still have to run, oldest first."""

    unstarted: list[AdmittedJob]
    isolated: list[AdmittedJob]


class Settler:
    """Settles the outcomes that workers report, the rejected entries, and the jobs of exited workers.

    A call that raises, as the store does, has changed nothing that a second call would do twice: rows and
    frames are released only after the store has settled them. Outcomes of an isolated stream are held and
    their rows released, because the rows are shared with the other streams.
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
        self._faults = context.faults
        self._held = context.held
        self._lane_rules = context.lane_rules
        self._cancels = context.cancels
        self._sender = SettlementSender(context)
        self._breakers = breakers
        self._crashes = breakers.crashes
        self._mono_s = context.mono_s
        self._wall_s = context.wall_s
        self._wall_now = wall_now

    # -- outcomes

    def settle(
        self, workers: Sequence[WorkerHandle], rejected: Sequence[RejectedEntry],
        meanwhile: Callable[[], None] = do_nothing,
    ) -> SettlementBatch:  # fmt: skip
        """Settle all outcomes of these workers and the held ones, and dead-letter the rejected entries.

        ``meanwhile`` may be called while the store settles.
        """
        batch = SettlementBatch()
        if not (rejected or self._held.stream_nos() or any(len(one.table) for one in workers)):
            # An idle service: a new job waits for the end of this tick.
            self._sender.unsure.clear()
            for worker in workers:
                worker.is_new = False
            return batch
        outcomes = [self._collect(worker) for worker in workers]
        for one in outcomes:
            for run in one.succeeded:
                self._acknowledge(batch, one.worker, run)
        for one in outcomes:
            for row in one.framed:
                self._crashes.record_survival(row.stream_no, [row.entry_id])
            for job in one.kept:
                self._keep(batch, job)
        held = self._acknowledge_held(batch)
        self._settle_failures(batch, [*held, *(job for one in outcomes for job in one.failed)])
        for entry in rejected:
            self._settle_rejected(batch, entry)
        self._marks.unmark()
        self._sender.send(batch, meanwhile)
        for one in outcomes:
            self._release(one)
        if self._sender.unsure:  # what is not in flight any more was never sent again
            in_flight = {row.key for one in outcomes for row in one.worker.table.unsettled()}
            self._sender.unsure &= in_flight | self._held.keys()
        return batch

    def _collect(self, worker: WorkerHandle) -> _Outcomes:
        succeeded = list(worker.table.succeeded())
        failed, kept, end = [], [], None
        for frame, tail in worker.channel.outcomes.frames():
            outcome = outcome_frames.decode(frame)
            end = tail
            if worker.table.state(outcome.row) == FAILED:  # an earlier reader may have settled it
                row, name = worker.table.job(outcome.row), self._worker_name(worker)
                if outcome.failure is not None:
                    failed.append(FailedJob(row, outcome.failure, name))
                elif outcome.kept is not None:
                    kept.append(KeptJob(row, outcome.kept))
        outcomes = _Outcomes(worker, succeeded, failed, kept, end)
        if worker.is_new:
            worker.is_new = False
            rows = [worker.table.job(row) for run in succeeded for row in run]
            self._sender.unsure.update(row.key for row in (*rows, *outcomes.framed))
        return outcomes

    def _acknowledge(self, batch: SettlementBatch, worker: WorkerHandle, run: range) -> None:
        stream_nos, type_nos, ids = worker.table.columns(run)
        batch.answered_types.update(type_nos)
        present = set(stream_nos)
        for stream_no in present:
            if len(present) == 1:
                batch.done[stream_no] += ids
                batch.done_types[stream_no] += type_nos
            else:
                own = [i for i, owner in enumerate(stream_nos) if owner == stream_no]
                batch.done[stream_no] += [ids[i] for i in own]
                batch.done_types[stream_no] += [type_nos[i] for i in own]
            if self._crashes.watching:
                self._crashes.record_survival(stream_no, batch.done[stream_no])

    def _acknowledge_held(self, batch: SettlementBatch) -> list[FailedJob]:
        """Acknowledge the held successes of streams that work again; returns the held failures."""
        resumed = [stream_no for stream_no in self._held.stream_nos() if stream_no not in self._faults]
        for stream_no in resumed:
            done = self._held.done.get(stream_no, {})
            batch.done[stream_no] += done.keys()
            batch.done_types[stream_no] += done.values()
            for job in self._held.kept.get(stream_no, {}).values():
                self._keep(batch, job)
        return [job for stream_no in resumed for job in self._held.failed.get(stream_no, {}).values()]

    def _keep(self, batch: SettlementBatch, job: KeptJob) -> None:
        """Acknowledge a job and keep its result."""
        row, kept = job.row, job.kept
        batch.answered_types.add(row.type_no)
        batch.kept_jobs[row.key] = job
        type_name = self._type_names[row.type_no]
        batch.counts[row.key].append(("z_novel_jobs_completed_total", (type_name,)))
        record = encode_result(RESULT_SUCCEEDED, self._now_text(), value=kept.value, error=kept.error)
        batch.kept[row.stream_no].append(Kept(row.entry_id, kept.job_id, record))

    def _settle_failures(self, batch: SettlementBatch, jobs: Sequence[FailedJob]) -> None:
        """Settle failed jobs. Their bytes are fetched from the stream again, because few jobs fail."""
        bodies = self._fetch([job.row for job in jobs])
        for job in jobs:
            batch.failed[job.row.key] = job
            if job.row.stream_no in self._faults:
                self._held.failed[job.row.stream_no][job.row.entry_id] = job
            else:
                self._settle_failure(batch, job, bodies.get(job.row.key))
        self._marks.unmark()

    def _settle_failure(self, batch: SettlementBatch, job: FailedJob, data: bytes | None) -> None:
        row, failure = job.row, job.failure
        if data is not None and (failure.cancelled or row.key in self._cancels):
            self._cancel(batch, job, data)
            return
        if data is not None and failure.unavailable and self._breakers.is_within_grace(row.type_no, row.key):
            batch.deferred.append(DeferredJob(_runnable(row, data), failure))
            return
        if data is None:
            self._count_failed(batch, job)
            log.error("entry.missing", extra={"entry_id": row.entry_id.decode()})
            batch.missing[row.stream_no].append(row.entry_id)
        elif row.key in self._marks.poison:
            self._count_failed(batch, job)
            self._dead_letter_unread(batch, job, data)
        elif (header := self._header_of(batch, job, data)) is None:
            return
        elif failure.wait_s is not None:
            (self._delay if failure.wait_key == JOB_KEY else self._put_back)(batch, job, data, header)
        else:
            self._count_failed(batch, job)
            self._retry_or_give_up(batch, job, data, header)

    def _count_failed(self, batch: SettlementBatch, job: FailedJob) -> None:
        if not job.failure.expired:
            counts = batch.counts[job.row.key]
            counts.append(("z_novel_jobs_failed_total", (self._type_names[job.row.type_no],)))

    def _header_of(self, batch: SettlementBatch, job: FailedJob, data: bytes) -> Header | None:
        """The header of a job; None if it is malformed, which its admission by the route did not see. Then it
        is rejected.

        Any failure may be that of a malformed job: a worker that is ended while it reports one leaves another
        failure, and a worker parses deeper payloads than the reader if its stack has more room.
        """
        row = job.row
        self._marks.mark(row.stream_no, row.entry_id, settling=True)
        try:
            return read_header(data)
        except MalformedJob as error:
            self._reject_malformed(batch, job, data, error)
            self._breakers[row.type_no].repeat_probe(self._mono_s())
            return None

    def _reject_malformed(
        self, batch: SettlementBatch, job: FailedJob, data: bytes, error: MalformedJob
    ) -> None:
        entry = Entry(job.row.entry_id, data, deaths=job.row.deaths)
        self._settle_rejected(batch, reject_malformed(job.row.stream_no, entry, error))

    def _put_back(self, batch: SettlementBatch, job: FailedJob, data: bytes, envelope: Header) -> None:
        """Let a job wait in its lane, and the jobs of its key with it. No retry is used up."""
        row, failure = job.row, job.failure
        assert failure.wait_s is not None
        batch.answered_types.add(row.type_no)
        header = read_flow_header(data)
        rules, _ = self._lane_rules[row.stream_no]
        key = rules.wait_key(header, failure.wait_key) or tenant_key(header.type, header.tenant_id)
        log.info("job.rate_limited", extra={**log_fields(envelope), "key": key, "wait_s": failure.wait_s})
        waiting = WaitingJob(row.entry_id, len(data))
        batch.counts[row.key].append(("z_novel_jobs_limited_total", (header.type,)))
        batch.put_back[row.stream_no].append(PutBack(waiting, rules.name_of(header), key, failure.wait_s))

    def _delay(self, batch: SettlementBatch, job: FailedJob, data: bytes, envelope: Header) -> None:
        """Let a job wait in the set of retries, and no other job. No retry is used up; deaths stay tries."""
        row, failure = job.row, job.failure
        assert failure.wait_s is not None
        batch.answered_types.add(row.type_no)
        log.info("job.rate_limited", extra={**log_fields(envelope), "key": JOB_KEY, "wait_s": failure.wait_s})
        batch.counts[row.key].append(("z_novel_jobs_limited_total", (envelope.type,)))
        again = TryAgain(envelope.retry_count + row.deaths, failure.wait_s)
        self._schedule(batch, job, data, envelope, again)

    def _retry_or_give_up(
        self, batch: SettlementBatch, job: FailedJob, data: bytes, envelope: Header
    ) -> None:
        row, failure = job.row, job.failure
        if not failure.timed_out and not failure.unavailable:
            batch.answered_types.add(row.type_no)
        if failure.timed_out:
            batch.worker_deaths.append(CrashKey(row.type_no, envelope.tenant_id))
        decision = after_failure(failure, envelope.retry_count, row.deaths, self._settings.retry, self._rng)
        if isinstance(decision, TryAgain) and self._wall_s() + decision.delay_s >= expires_s(envelope):
            decision = GiveUp(Reason.EXPIRED)
        fields = {**log_fields(envelope), "retry_count": envelope.retry_count, "error": failure.error}
        if failure.traceback:
            fields["exception"] = failure.traceback
        if isinstance(decision, GiveUp):
            log.error("job.dead_lettered", extra={**fields, "reason": decision.reason})
            self._trace("give up", envelope, row, failure.error, reason=decision.reason)
            self._dead_letter(batch, job, data, decision.reason, envelope)
            return
        log.warning("job.retry_scheduled", extra={**fields, "delay_s": round(decision.delay_s, 3)})
        self._trace("retry", envelope, row, failure.error, delay_s=decision.delay_s)
        batch.counts[row.key].append(("z_novel_jobs_retried_total", (envelope.type,)))
        self._schedule(batch, job, data, envelope, decision)

    def _schedule(
        self, batch: SettlementBatch, job: FailedJob, data: bytes, envelope: Header, again: TryAgain
    ) -> None:
        row, error = job.row, job.failure.error
        deaths, max_payload = envelope.deaths + row.deaths, self._settings.max_payload
        first_id = "" if envelope.first_id or not has_keys(envelope) else row.entry_id.decode()
        try:
            retry = with_retry(data, again.retry_count, deaths, error, max_payload, first_id)
        except RecursionError:  # the stack is deeper here than where the header was read
            return self._reject_malformed(batch, job, data, MalformedJob("nested too deeply"))
        batch.retries[row.stream_no].append(Retry(row.entry_id, again.delay_s, retry))

    def _trace(
        self, what: str, envelope: Header, row: InFlightJob, error: str, **attributes: str | int | float
    ) -> None:
        stream = self._streams[row.stream_no].stream
        trace.settled(what, envelope, stream, row.entry_id, error=error, **attributes)

    # -- cancelled jobs

    def _cancel(self, batch: SettlementBatch, job: FailedJob, data: bytes) -> None:
        """Settle a job that was cancelled, instead of a retry."""
        row = job.row
        self._marks.mark(row.stream_no, row.entry_id, settling=True)
        details = {**(job.details or {}), **_traceback(job.failure)}
        dead_job = DeadJob(
            *(data, row.entry_id, Reason.CANCELLED, job.failure.error, read_header(data)), row.deaths,
            details or None,
        )  # fmt: skip
        self._settle_cancelled(batch, RejectedEntry(row.stream_no, dead_job), job.worker)

    def _settle_cancelled(self, batch: SettlementBatch, rejected: RejectedEntry, worker: str) -> None:
        """Make a cancelled job a dead letter, or drop it, as the request to cancel it says."""
        stream_no, job = rejected
        envelope = job.envelope
        assert envelope is not None, "only a valid job is cancelled"
        is_kept_letter = self._cancels.get((stream_no, job.entry_id), True)
        log.info("job.cancelled", extra={
            **log_fields(envelope), "error": job.error, "dead_letter": is_kept_letter,
        })  # fmt: skip
        counts = batch.counts[stream_no, job.entry_id]
        counts.append(("z_novel_jobs_cancelled_total", (envelope.type,)))
        batch.cancelled[stream_no].append(job.entry_id)
        if is_kept_letter:
            self._add_dead_letter(batch, rejected, envelope.type, worker)
        else:
            key, record = self._owned_key(job), self._result_of(job)
            dropped = Dead(job.entry_id, b"", key, envelope.id, record)
            batch.dead[stream_no].append(dropped)

    # -- dead letters

    def _settle_rejected(self, batch: SettlementBatch, rejected: RejectedEntry) -> None:
        stream_no, job = rejected
        self._marks.mark(stream_no, job.entry_id, settling=True)
        envelope = job.envelope
        if isinstance(job.reason, Drop):
            return self._drop(batch, rejected)
        if job.reason == Reason.CANCELLED:
            self._settle_cancelled(batch, rejected, self._worker_name(None))
            return
        log.error("job.rejected", extra={
            "stream": self._streams[stream_no].stream, "entry_id": job.entry_id.decode(),
            "reason": job.reason, "error": job.error, **(log_fields(envelope) if envelope else {}),
        })  # fmt: skip
        type_name = envelope.type if envelope and envelope.type in self._type_names else _UNKNOWN_TYPE
        self._add_dead_letter(batch, rejected, type_name, self._worker_name(None))

    def _drop(self, batch: SettlementBatch, dropped: RejectedEntry) -> None:
        """Acknowledge a job in favour of another one."""
        stream_no, job = dropped
        assert job.envelope is not None
        fields = {"stream": self._streams[stream_no].stream, "entry_id": job.entry_id.decode()}
        fields |= {"by": job.error, **log_fields(job.envelope)}
        if job.reason == Drop.DUPLICATE:
            log.info("job.duplicate", extra=fields)
        else:
            log.info("job.superseded", extra=fields)
        name = f"z_novel_jobs_{job.reason}_total"
        batch.counts[stream_no, job.entry_id].append((name, (job.envelope.type,)))
        if record := self._result_of_dropped(stream_no, job):
            batch.kept[stream_no].append(Kept(job.entry_id, job.envelope.id, record, is_dropped=True))
        else:
            batch.dropped[stream_no].append(job.entry_id)

    def _result_of_dropped(self, stream_no: int, job: DeadJob) -> bytes:
        """The record of a job that gives way to another one; empty if it does not ask for its result."""
        if job.envelope is None or not is_kept(job.envelope.metadata):
            return b""
        other, data = job.error.encode(), None
        with self._faults.guard(stream_no):
            data = self._store.fetch(self._streams[stream_no], [other]).get(other)
        if data is not None and read_header(data).id == job.envelope.id:
            return b""  # it was sent twice with one id: the result of the one that runs is that of both
        error = f"not run: {job.reason}, the job in entry {job.error} took its place"
        return encode_result(job.reason, self._now_text(), error=error, reason=job.reason)

    def _dead_letter(
        self, batch: SettlementBatch, job: FailedJob, data: bytes, reason: Reason, envelope: Header
    ) -> None:
        row = job.row
        details = {**(job.details or {}), **_traceback(job.failure)} or job.details
        dead_job = DeadJob(*(data, row.entry_id, reason, job.failure.error, envelope), row.deaths, details)
        type_name = self._type_names[row.type_no]
        self._add_dead_letter(batch, RejectedEntry(row.stream_no, dead_job), type_name, job.worker)

    def _dead_letter_unread(self, batch: SettlementBatch, job: FailedJob, data: bytes) -> None:
        """Dead-letter a job that made a reader exit, without parsing it."""
        row = job.row
        rejected = reject_unread(row.stream_no, Entry(row.entry_id, data, deaths=row.deaths))
        log.error("job.dead_lettered", extra={
            "entry_id": row.entry_id.decode(), "reason": rejected.job.reason, "error": rejected.job.error,
        })  # fmt: skip
        self._add_dead_letter(batch, rejected, self._type_names[row.type_no], job.worker)

    def _add_dead_letter(
        self, batch: SettlementBatch, rejected: RejectedEntry, type_name: str, worker: str
    ) -> None:
        stream_no, job = rejected
        batch.counts[stream_no, job.entry_id].append(("z_novel_jobs_dead_total", (type_name, job.reason)))
        stream = self._streams[stream_no].stream
        letter = dead_letter(job, stream=stream, worker=worker, failed_at=self._now_text())
        job_id = job.envelope.id if job.envelope else ""
        batch.dead[stream_no].append(
            Dead(job.entry_id, letter, self._owned_key(job), job_id, self._result_of(job))
        )

    def _result_of(self, job: DeadJob) -> bytes:
        """The record of a job that is given up or cancelled; empty if it does not ask for its result."""
        if job.envelope is None or not is_kept(job.envelope.metadata):
            return b""
        state = CANCELLED if job.reason == Reason.CANCELLED else DEAD
        return encode_result(state, self._now_text(), error=job.error, reason=job.reason)

    def _now_text(self) -> str:
        return self._wall_now().isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _owned_key(self, job: DeadJob) -> OwnedKey | None:
        """The idempotency key that a dead letter frees, if the job owns it."""
        window_s = self._settings.unique_window_s
        if job.envelope is None or not window_s or not (name := unique_name(job.envelope)):
            return None
        first_id = job.envelope.first_id.encode() or job.entry_id
        return OwnedKey(unique_bucket(first_id, window_s), name, first_id)

    # -- rows of workers

    def _release(self, outcomes: _Outcomes) -> None:
        """Release settled rows, then their frames: a successor skips frames whose row is settled."""
        worker = outcomes.worker
        for run in outcomes.succeeded:
            worker.record_settled(run)
        for row in outcomes.framed:
            worker.record_settled(range(row.row, row.row + 1))
        if outcomes.tail is not None:
            worker.channel.outcomes.release(outcomes.tail)
        worker.table.advance()

    def _fetch(self, rows: Sequence[InFlightJob]) -> Bodies:
        """The bytes of the jobs in rows. Isolated streams are left out."""
        bodies = {}
        for stream_no in {row.stream_no for row in rows}.difference(self._faults.isolated):
            ids = [row.entry_id for row in rows if row.stream_no == stream_no]
            with self._faults.guard(stream_no):
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
        timeout of a single job, that job is retried or given up instead. Jobs of isolated streams stay
        pending without a charge: the store takes none.
        """
        rows = worker.table.unsettled()
        assert all(worker.table.state(row.row) != SUCCEEDED for row in rows)
        started = [row for row in rows if worker.table.state(row.row) in (STARTED, FAILED)]
        unstarted = [row for row in rows if worker.table.state(row.row) in (QUEUED, RETURNED)]
        if not exit_.charge:
            unstarted, started = sorted(unstarted + started), []
        bodies = self._fetch(rows)
        batch, isolated, name = SettlementBatch(), [], self._worker_name(worker)
        cancelled = [row for row in rows if row.key in self._cancels or worker.table.is_cancelled(row.row)]
        if cancelled:
            unstarted = [row for row in unstarted if row not in cancelled]
            started = [row for row in started if row not in cancelled]
            failure = Failure(f"JobCancelled: {exit_.cause}", cancelled=True)
            self._settle_failures(batch, [FailedJob(row, failure, name, exit_.details) for row in cancelled])
        if exit_.timed_out and len(started) == 1:
            failure = Failure(f"TimeoutError: {exit_.cause}", timed_out=True)
            self._settle_failures(batch, [FailedJob(started[0], failure, name, exit_.details)])
        else:
            isolated = self._charge_deaths(batch, worker, exit_, started, bodies)
        self._marks.unmark()
        self._sender.send(batch)
        for key in batch.worker_deaths:
            self._crashes.record_death(key, self._mono_s())
        worker.table.mark([row.row for row in rows], SETTLED)
        worker.table.advance()
        return Reclaimed(runnable_jobs(unstarted, bodies), isolated)

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
            job = FailedJob(charged, failure, self._worker_name(worker), exit_.details)
            if not self._is_given_up(batch, job, data, exit_.cause, sole=len(started) == 1):
                isolated.append(_runnable(charged, data))
        return isolated

    def _store_deaths(self, started: Sequence[InFlightJob]) -> dict[tuple[int, bytes], int]:
        """Store the new count of deaths of each job; returns those of entries that are still ours."""
        stored: dict[tuple[int, bytes], int] = {}
        for stream_no in {row.stream_no for row in started}.difference(self._faults.isolated):
            counts = {row.entry_id: row.deaths + 1 for row in started if row.stream_no == stream_no}
            with self._faults.guard(stream_no):
                own_counts = self._store.set_deaths(self._streams[stream_no], counts)
                stored |= {(stream_no, entry_id): count for entry_id, count in own_counts.items()}
        return stored

    def _is_given_up(
        self, batch: SettlementBatch, job: FailedJob, data: bytes, cause: str, *, sole: bool
    ) -> bool:
        """Dead-letter a job with too many deaths; False if it may run again.

        Only the job that was alone in its worker (``sole``) is proven to have caused the death. The limit of
        retries does not count here: deaths have a limit of their own. They count as tries once the job fails
        otherwise (see `after_failure`).
        """
        row = job.row
        if row.key in self._marks.poison:
            self._dead_letter_unread(batch, job, data)
            return True
        if (envelope := self._header_of(batch, job, data)) is None:
            return True
        deaths = envelope.deaths + row.deaths
        if sole:
            batch.worker_deaths.append(CrashKey(row.type_no, envelope.tenant_id))
        batch.counts[row.key].append(("z_novel_jobs_failed_total", (envelope.type,)))
        log.error("job.worker_died", extra={**log_fields(envelope), "deaths": deaths, "cause": cause})
        self._trace("worker died", envelope, row, cause, deaths=deaths)
        if deaths < self._settings.max_deaths:
            return False
        self._dead_letter(batch, job, data, Reason.POISON, envelope)
        return True


def _traceback(failure: Failure) -> dict[str, object]:
    return {"traceback": failure.traceback} if failure.traceback else {}


def _runnable(row: InFlightJob, data: bytes) -> AdmittedJob:
    """The job of a row as it was admitted; it is not validated again."""
    entry = Entry(row.entry_id, data, deaths=row.deaths)
    return AdmittedJob(row.stream_no, row.type_no, entry, row.isolated or row.deaths > 0)


def runnable_jobs(rows: Iterable[InFlightJob], bodies: Bodies) -> list[AdmittedJob]:
    """Jobs of rows; entries that are gone from their stream are left out."""
    return [_runnable(row, data) for row in rows if (data := bodies.get(row.key)) is not None]
