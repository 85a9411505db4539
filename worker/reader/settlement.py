"""Settlement: turns outcomes into acknowledgements, retries and dead letters, in one script a stream."""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from ..envelope import Envelope, dead_letter, read_envelope, with_retry
from ..ipc.channel import OutcomeFrame
from ..ipc.control import WorkerExited
from ..ipc.inflight import FAILED, QUEUED, SETTLED, STARTED, SUCCEEDED, Held
from ..ipc.marks import Marks
from ..keys import Source
from ..outcome import Failure, GiveUp, Reason, after_failure
from ..settings import Settings
from ..store.ports import Dead, Entry, ReaderStore, Retry, Settlement
from ..telemetry import trace
from ..telemetry.current_job import log_fields
from ..telemetry.metrics import MetricsBuffer
from .admission import READER_DIED, AdmittedJob, RejectedEntry
from .dispatch import WorkerHandle

log = logging.getLogger("jobworker.settlement")


class FailedJob(NamedTuple):
    """A row whose try failed, and why."""

    held: Held
    failure: Failure
    worker: str


class Reclaimed(NamedTuple):
    """What a worker left behind that is still to be run: by source, oldest first."""

    unstarted: list[tuple[int, Entry]]
    isolated: list[tuple[int, Entry]]


class SettlementResult(NamedTuple):
    """What one turn came to: the types whose jobs got through, and the jobs that could not be run now."""

    answered: set[int]
    unavailable: list[AdmittedJob]


class SettlementBatch:
    """One settlement for each source, being filled."""

    def __init__(self) -> None:
        self.done: dict[int, list[bytes]] = defaultdict(list)
        self.retries: dict[int, list[Retry]] = defaultdict(list)
        self.dead: dict[int, list[Dead]] = defaultdict(list)
        self.counts: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
        self.answered: set[int] = set()
        self.unavailable: list[AdmittedJob] = []

    def settlements(self, sources: Sequence[Source]) -> list[Settlement]:
        """One for each source that anything happened on."""
        touched = sorted({*self.done, *self.retries, *self.dead})
        return [Settlement(sources[i], self.done[i], self.retries[i], self.dead[i]) for i in touched]


class Settler:
    """Collects outcomes from the lanes and carries them out; a call that raises has lost nothing."""

    def __init__(
        self,
        store: ReaderStore,
        settings: Settings,
        tally: MetricsBuffer,
        rng: random.Random,
        is_within_grace: Callable[[int, int, bytes], bool],
        marks: Marks,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._settings = settings
        self._sources = settings.streams
        self._kinds = tuple(settings.handlers)
        self._tally = tally
        self._rng = rng
        self._excused = is_within_grace
        self._marks = marks
        self._now = now
        self._refusals: list[RejectedEntry] = []
        self._outcomes = msgspec.msgpack.Decoder(OutcomeFrame)

    def refuse(self, refusal: RejectedEntry) -> None:
        """Remember to dead-letter this with the next settlement."""
        self._refusals.append(refusal)

    def settle(self, workers: Iterable[WorkerHandle]) -> SettlementResult:
        """Carry out all that has ended. Raises as the store does."""
        batch = SettlementBatch()
        runs = [(worker, list(worker.table.succeeded())) for worker in workers]
        frames = [(worker, *self._failures(worker)) for worker, _ in runs]
        for worker, rows in runs:
            for run in rows:
                self._acknowledge(batch, worker, run)
        failures = [failed for _, failed_rows, _ in frames for failed in failed_rows]
        self._decide(batch, failures)
        refusals, self._refusals = self._refusals, []
        try:
            self._refuse(batch, refusals)
            self._commit(batch)
        except BaseException:
            self._refusals = refusals + self._refusals
            raise
        self._release(runs, frames)
        return SettlementResult(batch.answered, batch.unavailable)

    def _failures(self, worker: WorkerHandle) -> tuple[list[FailedJob], int | None]:
        """What a worker said of failed jobs, and the ring's tail once that is settled."""
        failed, end = [], None
        for frame, tail in worker.channel.outcomes.frames():
            outcome = self._outcomes.decode(frame)
            end = tail
            if worker.table.state(outcome.row) == FAILED:  # a reader before us may have settled it
                failed.append(
                    FailedJob(worker.table.held(outcome.row), outcome.failure, self._worker(worker))
                )
        return failed, end

    def _acknowledge(self, batch: SettlementBatch, worker: WorkerHandle, run: range) -> None:
        sources, kinds, ids = worker.table.columns(run)
        for kind in set(kinds):
            batch.answered.add(kind)
            batch.counts["z_novel_jobs_completed_total", (self._kinds[kind],)] += kinds.count(kind)
        present = set(sources)
        for source in present:
            mine = (
                ids
                if len(present) == 1
                else [one for one, s in zip(ids, sources, strict=True) if s == source]
            )
            batch.done[source] += mine

    def _decide(self, batch: SettlementBatch, failures: Sequence[FailedJob]) -> None:
        """Retry or give up; the job's own bytes are read back from the stream, for few jobs fail."""
        bodies = self._bodies([failed.held for failed in failures])
        for failed in failures:
            held = failed.held
            data = bodies.get((held.source, held.entry_id))
            if failed.failure.unavailable and data is not None and self._defer(batch, held, data):
                continue
            batch.counts["z_novel_jobs_failed_total", (self._kinds[held.kind],)] += 1
            if data is None:
                log.error("entry.missing", extra={"entry_id": held.entry_id.decode()})
                batch.done[held.source].append(held.entry_id)
            elif (held.source, held.entry_id) in self._marks.convicted:
                self._dead_letter_unread(batch, held, data, failed.worker)
            else:
                self._marks.mark(held.source, held.entry_id, settling=True)
                self._decide_one(batch, failed, data)
        self._marks.unmark()

    def _defer(self, batch: SettlementBatch, held: Held, data: bytes) -> bool:
        """Take a job back that found its store unavailable; it stays pending and no retry is used up."""
        if not self._excused(held.kind, held.source, held.entry_id):
            return False
        entry = Entry(held.entry_id, data, deaths=held.deaths)
        batch.unavailable.append(AdmittedJob(held.source, held.kind, entry, held.deaths > 0))
        return True

    def _decide_one(self, batch: SettlementBatch, failed: FailedJob, data: bytes) -> None:
        held, failure = failed.held, failed.failure
        if not failure.timed_out and not failure.unavailable:
            batch.answered.add(held.kind)
        envelope = read_envelope(data)
        decision = after_failure(failure, envelope.retry_count, held.deaths, self._settings.retry, self._rng)
        deaths = envelope.deaths + held.deaths
        told = {**log_fields(envelope), "retry_count": envelope.retry_count, "error": failure.error}
        if isinstance(decision, GiveUp):
            log.error("job.dead_lettered", extra={**told, "reason": decision.reason})
            self._trace("give up", envelope, held, failure.error, reason=decision.reason)
            self._dead_letter(
                batch, held, data, decision.reason, failure.error, envelope.retry_count, deaths, failed.worker
            )
            return
        log.warning("job.retry_scheduled", extra={**told, "delay_s": round(decision.delay_s, 3)})
        self._trace("retry", envelope, held, failure.error, delay_s=decision.delay_s)
        batch.counts["z_novel_jobs_retried_total", (envelope.type,)] += 1
        again = with_retry(data, decision.retry_count, deaths)
        batch.retries[held.source].append(Retry(held.entry_id, decision.delay_s, again))

    def _trace(
        self, what: str, envelope: Envelope, held: Held, error: str, **attributes: str | int | float
    ) -> None:
        stream = self._sources[held.source].stream
        trace.settled(what, envelope, stream, held.entry_id, error=error, **attributes)

    def _dead_letter(
        self, batch: SettlementBatch, held: Held, data: bytes, reason: Reason, error: str,
        retry_count: int, deaths: int, worker: str, details: dict[str, object] | None = None,
        *, unread: bool = False,
    ) -> None:  # fmt: skip
        batch.counts["z_novel_jobs_dead_total", (self._kinds[held.kind], reason)] += 1
        letter = dead_letter(
            data, error=error, reason=reason, failed_at=self._stamp(), entry_id=held.entry_id, worker=worker,
            stream=self._sources[held.source].stream, deaths=deaths, retry_count=retry_count, details=details,
            unread=unread,
        )  # fmt: skip
        batch.dead[held.source].append(Dead(held.entry_id, letter))

    def _dead_letter_unread(self, batch: SettlementBatch, held: Held, data: bytes, worker: str) -> None:
        """A reader has ended as it read this job: no other reads it."""
        log.error("job.dead_lettered", extra={
            "entry_id": held.entry_id.decode(), "reason": Reason.POISON, "error": READER_DIED,
        })  # fmt: skip
        self._dead_letter(batch, held, data, Reason.POISON, READER_DIED, 0, held.deaths, worker, unread=True)

    def _refuse(self, batch: SettlementBatch, refusals: Sequence[RejectedEntry]) -> None:
        for refusal in refusals:
            self._marks.mark(refusal.source, refusal.entry.id, settling=True)
            envelope = refusal.envelope
            stream = self._sources[refusal.source].stream
            kind = envelope.type if envelope and envelope.type in self._kinds else "unknown"
            batch.counts["z_novel_jobs_dead_total", (kind, refusal.reason)] += 1
            log.error("job.rejected", extra={
                "stream": stream, "entry_id": refusal.entry.id.decode(), "reason": refusal.reason,
                "error": refusal.error, **(log_fields(envelope) if envelope else {}),
            })  # fmt: skip
            letter = dead_letter(
                refusal.entry.data, error=refusal.error, reason=refusal.reason, failed_at=self._stamp(),
                stream=stream, entry_id=refusal.entry.id, worker=self._worker(None),
                deaths=refusal.entry.deaths + (envelope.deaths if envelope else 0),
                retry_count=envelope.retry_count if envelope else None, unread=envelope is None,
            )  # fmt: skip
            batch.dead[refusal.source].append(Dead(refusal.entry.id, letter))
        self._marks.unmark()

    def _commit(self, batch: SettlementBatch) -> None:
        """Hand the batch to the store and count what is now final."""
        settlements = batch.settlements(self._sources)
        if settlements and (refused := self._store.settle(settlements)):
            log.warning("settle.refused", extra={"entries": len(refused)})
        for (name, labels), count in batch.counts.items():
            self._tally.count(name, labels, count)

    def _release(
        self,
        runs: Sequence[tuple[WorkerHandle, list[range]]],
        frames: Sequence[tuple[WorkerHandle, list[FailedJob], int | None]],
    ) -> None:
        """Give rows and frames back: marks first, so that a reader after us skips what is settled."""
        for worker, rows in runs:
            for run in rows:
                worker.settled(run)
        for worker, failed, tail in frames:
            for one in failed:
                worker.settled(range(one.held.row, one.held.row + 1))
            if tail is not None:
                worker.channel.outcomes.release(tail)
        for worker, _ in runs:
            worker.table.advance()

    def reclaim(self, worker: WorkerHandle, gone: WorkerExited) -> Reclaimed:
        """Deal with what a dead worker held, after `settle`: charge what it had started, free the rest.

        Raises as the store does; then nothing has changed that a second call would do twice.
        """
        rows = worker.table.unsettled()
        assert all(worker.table.state(held.row) != SUCCEEDED for held in rows)
        started = [held for held in rows if worker.table.state(held.row) in (STARTED, FAILED)]
        free = [held for held in rows if worker.table.state(held.row) == QUEUED]
        if not gone.charge:
            free, started = sorted(free + started), []
        bodies = self._bodies(rows)
        batch, isolated = SettlementBatch(), []
        if gone.timed_out and len(started) == 1:
            failure = Failure(f"TimeoutError: {gone.cause}", timed_out=True)
            self._decide(batch, [FailedJob(started[0], failure, self._worker(worker))])
        else:
            isolated = self._count_deaths(batch, worker, gone, started, bodies)
        self._commit(batch)
        worker.table.mark([held.row for held in rows], SETTLED)
        worker.table.advance()
        return Reclaimed(_entries(free, bodies), isolated)

    def _count_deaths(
        self, batch: SettlementBatch, worker: WorkerHandle, gone: WorkerExited, started: Sequence[Held],
        bodies: dict[tuple[int, bytes], bytes],
    ) -> list[tuple[int, Entry]]:  # fmt: skip
        """Count a death against each job under way; give up what has had too many, the others run alone."""
        counts: dict[tuple[int, bytes], int] = {}
        for source in {held.source for held in started}:
            deaths = {held.entry_id: held.deaths + 1 for held in started if held.source == source}
            charged = self._store.set_deaths(self._sources[source], deaths)
            counts |= {(source, entry_id): n for entry_id, n in charged.items()}
        isolated = []
        gone.details["batch"] = [held.entry_id.decode() for held in started]
        for held in started:
            data = bodies.get((held.source, held.entry_id))
            if data is None or (held.source, held.entry_id) not in counts:
                continue  # no longer ours
            entry = Entry(held.entry_id, data, deaths=counts[held.source, held.entry_id])
            if not self._poisonous(batch, held, entry, gone, self._worker(worker), sole=len(started) == 1):
                isolated.append((held.source, entry))
        self._marks.unmark()
        return isolated

    def _poisonous(
        self, batch: SettlementBatch, held: Held, entry: Entry, gone: WorkerExited, worker: str, *, sole: bool
    ) -> bool:
        """Whether the job is given up for its deaths. A death is a failed try, but only a job that was
        alone in its worker is proven to have caused it."""
        data = entry.data or b""
        if (held.source, held.entry_id) in self._marks.convicted:
            self._dead_letter_unread(batch, held, data, worker)
            return True
        self._marks.mark(held.source, held.entry_id, settling=True)
        envelope = read_envelope(data)
        deaths = envelope.deaths + entry.deaths
        batch.counts["z_novel_jobs_failed_total", (envelope.type,)] += 1
        used_up = sole and envelope.retry_count + entry.deaths > self._settings.retry.max_retries
        log.error("job.worker_died", extra={**log_fields(envelope), "deaths": deaths, "cause": gone.cause})
        self._trace("worker died", envelope, held, gone.cause, deaths=deaths)
        if deaths < self._settings.max_deaths and not used_up:
            return False
        error = f"WorkerDied: {gone.cause}"
        self._dead_letter(
            batch, held, data, Reason.POISON, error, envelope.retry_count, deaths, worker, gone.details
        )
        return True

    def _bodies(self, rows: Sequence[Held]) -> dict[tuple[int, bytes], bytes]:
        found = {}
        for source in {held.source for held in rows}:
            ids = [held.entry_id for held in rows if held.source == source]
            for entry_id, data in self._store.fetch(self._sources[source], ids).items():
                if data is not None:
                    found[source, entry_id] = data
        return found

    def _worker(self, worker: WorkerHandle | None) -> str:
        slot = "reader" if worker is None else str(worker.slot)
        return f"{self._settings.host}/{self._settings.instance}/{slot}"

    def _stamp(self) -> str:
        return self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _entries(rows: Sequence[Held], bodies: dict[tuple[int, bytes], bytes]) -> list[tuple[int, Entry]]:
    """Rows with their bytes again; entries that are no longer in the stream are left out."""
    return [
        (held.source, Entry(held.entry_id, data, deaths=held.deaths))
        for held in rows
        if (data := bodies.get((held.source, held.entry_id))) is not None
    ]
