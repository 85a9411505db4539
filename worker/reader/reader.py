"""Reader role: owns the consumer groups, dispatches jobs to workers, settles outcomes, recovers lost jobs.

One loop waits for all events at once: answers to blocking reads (one connection for each stream), wake-ups of
workers, messages of the supervisor. All state is also in the store or in the workers' in-flight tables, so a
new reader continues where a dead one stopped.
"""

import logging
import random
import selectors
import time
from collections.abc import Callable

from ..errors import Fenced, NameHeld, StoreRefused, StoreUnavailable
from ..ipc.channel import Channel, clear_eventfd
from ..ipc.control import (
    ALIVE_EVERY_S,
    Attach,
    Configure,
    ControlSocket,
    Drain,
    ExitReclaimed,
    HeldElsewhere,
    Message,
    Ready,
    Retire,
    SyncDone,
    WorkerExited,
)
from ..ipc.crash_marks import CrashMarks
from ..ipc.inflight import FAILED, STARTED, SUCCEEDED
from ..outcome import Failure
from ..settings import Settings
from ..store.backoff import ReconnectBackoff
from ..store.faults import describe
from ..store.ports import ReaderStore
from .admission import AdmittedJob
from .circuit_breaker import CircuitBreakers
from .context import EARLY, ReaderContext
from .dispatch import Dispatcher, WorkerHandle
from .intake import Intake
from .prefetch import PrefetchBuffer
from .rebalance import Rebalancer
from .settlement import Settler

log = logging.getLogger("jobworker.reader")

#: Interval of reports to the supervisor, and longest sleep while there are jobs.
_REPORT_EVERY_S = 0.25
#: Longest sleep without a job. The store is asked more often.
_IDLE_SLEEP_S = 1.0
#: Longest interval of renewing the instance's name. Another service needs this long to see that it is in use.
_RENEW_NAME_EVERY_S = 1.8
#: Interval at which a name that another service holds is tried again.
_RETRY_NAME_EVERY_S = 0.5


class Reader:
    """Reader role. `run` returns once drained.

    A store that does not answer is retried with backoff; in-flight jobs keep running meanwhile. A stream that
    the store refuses is isolated: the others continue. A reader that lost the instance's name settles nothing
    until it has the name again.
    """

    def __init__(
        self,
        store: ReaderStore,
        settings: Settings,
        control: ControlSocket,
        *,
        marks: CrashMarks | None = None,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        slow_crashes: bool = True,
    ) -> None:
        self._store = store
        self._settings = settings
        self._streams = settings.streams
        self._control = control
        # Crash marks of earlier readers; without a supervisor there were none.
        self._marks = marks or CrashMarks.create()
        self._mono_s = mono_s
        self._rng = rng or random.Random()
        context = ReaderContext.create(store, settings, self._marks, self._rng, mono_s, wall_s)
        self._metrics, self._faults = context.metrics, context.faults
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._breakers = CircuitBreakers(len(settings.handlers), slow_crashes=slow_crashes)
        self._buffer = PrefetchBuffer(self._breakers)
        self._dispatcher = Dispatcher(settings.streams, self._buffer)
        self._intake = Intake(context, self._dispatcher, self._selector)
        self._settler = Settler(context, self._breakers)
        self._rebalancer = Rebalancer(context, self._dispatcher, self._intake.flow, self._intake.requeue)
        self._synced = False
        self._connected = False
        self._trouble: str | None = None
        # Why the paused types cannot be read; empty if they can.
        self._pauses_fault = ""
        # Stream numbers and descriptors of the reads whose answers have come.
        self._readable: list[tuple[int, int]] = []
        # Streams whose name was taken at least once.
        self._named: set[int] = set()
        self._backoff = ReconnectBackoff(self._rng)
        self._renew_name_every_s = min(_RENEW_NAME_EVERY_S, settings.lease_s / 3)
        self._retry_at = self._reported_at = self._name_renewed_at = 0.0
        # Stream -> renewal of the name by another service, as first observed.
        self._first_renewals: dict[str, str] = {}

    def run(self) -> None:
        """Run until drained, then release what was not started."""
        while not self.drained:
            self.run_once(_IDLE_SLEEP_S)
        if self._connected:
            self._intake.release_unstarted()
        elif self._trouble:
            log.warning("lease.release_failed", extra={"error": self._trouble})
        self._store.close()
        self._marks.close()
        self.report()
        self._selector.close()

    @property
    def drained(self) -> bool:
        """Whether a drain was requested and no worker is left."""
        return self._intake.draining and not self._dispatcher.workers

    def run_once(self, sleep_s: float) -> None:
        """One cycle of the loop; it waits at most ``sleep_s`` for an event."""
        now = self._mono_s()
        if now < self._retry_at:
            self._report_in_time()
            self._detach_idle_workers()
            return self._wait(min(sleep_s, _REPORT_EVERY_S, self._retry_at - now))
        try:
            self._tick(now, sleep_s)
            self._backoff.reset()
            self._trouble = None
        except StoreUnavailable as error:
            self._back_off(error)
        except Fenced as error:
            self._lose_name(error)

    def _tick(self, now: float, sleep_s: float) -> None:
        if not self._synced:
            self._report_in_time()
            return self._wait(min(sleep_s, _REPORT_EVERY_S))
        if not self._connected:
            self._connect()
        self._resume_streams()
        self._renew_name(now)
        if self._intake.refresh(now):
            self._refresh_pauses()
        self._settle(now)
        self._take_reads()
        self._intake.continue_claims()
        self._reclaim_exited_workers()
        self._log_slowdowns()
        if not self._intake.draining:
            self._rebalancer.run()
            self._intake.claim_in_turn()
            self._intake.take_waiting()
            self._intake.reject_expired()
            self._dispatcher.dispatch(now)
            self._intake.request_more()
        self._intake.renew_leases(now)
        self._report_in_time()
        self._wait(self._sleep_s(sleep_s))
        self._intake.check_reads()

    def _sleep_s(self, limit_s: float) -> float:
        """How long it may wait for an event. Without a job, only the store has to be asked in time."""
        if self._intake.must_continue:
            return 0.0
        left_s = min(self._intake.mono_due_s, self._mono_name_due_s) - self._mono_s()
        sleep_s = min(limit_s, max(0.0, left_s))
        if self._intake.is_idle and not (self._intake.draining or self._metrics or self._pauses_fault):
            return sleep_s
        return self._intake.flow.sleep_s(min(sleep_s, _REPORT_EVERY_S))

    def refresh(self) -> None:
        """Look at once at what changed in the store, such as cancelled jobs."""
        if self._connected:
            self._intake.refresh(self._mono_s(), at_once=True)

    # -- jobs

    def _settle(self, now: float) -> None:
        """Settle all outcomes and rejected entries. If the store fails, outcomes stay for the next tick, and
        rejected entries are listed again. While the store settles, the answers to reads are taken."""
        rejected, self._intake.rejected = self._intake.rejected, []
        batch = self._settler.settle(self._dispatcher.workers, rejected, self._take_reads)
        self._buffer.record_success(batch.answered_types)
        if batch.has_ended:
            self._intake.flow.record_settled(batch.put_back)
        for job, failure in batch.deferred:
            self._defer(job, failure, now)
        self._buffer.release_probes(now)

    def _defer(self, job: AdmittedJob, failure: Failure, now: float) -> None:
        if not self._breakers[job.type_no].open:
            exception = {"exception": failure.traceback} if failure.traceback else {}
            task_type = tuple(self._settings.handlers)[job.type_no]
            log.warning("circuit.opened", extra={"task_type": task_type, "error": failure.error, **exception})
        self._buffer.defer(job, now)

    def _reclaim_exited_workers(self) -> None:
        """Make jobs of exited workers runnable again: unstarted ones first in line, started ones isolated."""
        for worker in [worker for worker in self._dispatcher.workers if worker.exited]:
            assert worker.exited is not None
            if worker.exited.charge:
                self._dispatcher.record_exit(worker, self._mono_s())
            reclaimed = self._settler.reclaim(worker, worker.exited)
            self._detach(worker)
            for job in reclaimed.isolated:
                self._buffer.add(job, self._mono_s() + self._breakers.crashes.rerun_after_s(job.entry.deaths))
            self._buffer.requeue(reclaimed.unstarted)

    def _log_slowdowns(self) -> None:
        """Report tenants and types whose jobs kill worker after worker, or no longer do."""
        changes, self._breakers.crashes.changes = self._breakers.crashes.changes, []
        for key, is_open, deaths in changes:
            tenant = {} if key.tenant_id is None else {"tenant_id": key.tenant_id}
            fields = {"task_type": tuple(self._settings.handlers)[key.type_no], **tenant, "deaths": deaths}
            if is_open:
                log.error("crashes.slowed", extra=fields)
            else:
                log.info("crashes.ended", extra=fields)

    def _detach(self, worker: WorkerHandle) -> None:
        self._selector.unregister(worker.channel.fds[2])
        self._dispatcher.workers.remove(worker)
        worker.channel.close()
        self._control.send(ExitReclaimed(worker.slot, worker.generation))

    # -- events

    def _wait(self, timeout_s: float) -> None:
        """Wait for events and handle them; the answers to reads are taken in the next tick."""
        self._readable.clear()
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._receive()
            elif isinstance(key.data, WorkerHandle):
                clear_eventfd(key.fd)
            else:
                self._readable.append((key.data, key.fd))

    def _take_reads(self) -> None:
        """Take the answers to reads that have come."""
        readable, self._readable = self._readable, []
        for stream_no, fd in readable:
            self._intake.on_read_ready(stream_no, fd)

    def _receive(self) -> None:
        try:
            while (received := self._control.receive()) is not None:
                self._handle_message(*received)
        except EOFError:
            raise SystemExit("the supervisor is gone") from None

    def _handle_message(self, message: Message, fds: list[int]) -> None:
        match message:
            case Attach(slot, generation):
                worker = WorkerHandle(slot, generation, Channel(*fds), self._mono_s())
                self._dispatcher.workers.append(worker)
                self._selector.register(fds[2], selectors.EVENT_READ, worker)
            case WorkerExited(slot, generation):
                if worker_or_none := self._dispatcher.find(slot, generation):
                    worker_or_none.exited = message
            case Retire(slot, generation):
                if worker_or_none := self._dispatcher.find(slot, generation):
                    worker_or_none.retired = True
            case Configure(flow):
                self._intake.flow.file = flow
                self.refresh()
            case SyncDone():
                self._synced = True
            case Drain():
                self._intake.draining = True
                self._intake.stop_reading()
            case _:
                log.error("control.unexpected_message", extra={"message": type(message).__name__})

    def _report_in_time(self) -> None:
        if self._mono_s() - self._reported_at >= _REPORT_EVERY_S:
            self.report()

    def report(self) -> None:
        """Send what is new to the supervisor."""
        for type_no, name in enumerate(self._settings.handlers):
            self._metrics.gauge("z_novel_circuit_open", (name,), float(self._breakers[type_no].open))
            slowed = self._breakers.crashes.slowed(type_no)
            self._metrics.gauge("z_novel_crash_circuits_open", (name,), float(slowed))
            self._metrics.gauge("z_novel_paused", (name,), float(type_no in self._buffer.paused_types))
        warnings = self._faults.warnings()
        trouble = self._trouble
        if self._faults.all_isolated:
            trouble = trouble or "; ".join(warnings)
        if self._pauses_fault:
            warnings.append(self._pauses_fault)
        # While jobs are in flight, reports let the supervisor look at the timeouts of the workers.
        every_s = ALIVE_EVERY_S if self._dispatcher.is_idle else 0.0
        progress = self._intake.cycles
        if self._control.report(self._metrics, trouble, progress, warnings, at_least_every_s=every_s):
            self._reported_at = self._mono_s()

    # -- connection and name

    def _connect(self) -> None:
        """Take the consumer's name, then list the entries that are pending for it."""
        self._acquire_names()
        self._connected = True
        self._name_renewed_at = self._mono_s()
        self._first_renewals.clear()
        self._intake.begin_listing()
        self._refresh_pauses()
        self._intake.refresh(self._mono_s(), at_once=True)
        # Before any entry is read: a crash caused by an entry must not look like a failed start.
        self._control.send(Ready())
        self._intake.list_pending()
        streams = len(self._streams) - len(self._faults.isolated)
        log.info("reader.connected", extra={"streams": streams, "pending": len(self._buffer.ready)})

    def _acquire_names(self) -> None:
        """Take the name on each stream that works. Raises `StoreUnavailable` if none does."""
        due = set(self._faults.due())
        wanted = [no for no in range(len(self._streams)) if no not in self._faults or no in due]
        try:
            self._store.acquire([self._streams[no] for no in wanted])
            taken = wanted
        except StoreRefused:
            taken = self._acquire_each(wanted)
        self._named.update(taken)
        for stream_no in due.intersection(taken):
            self._faults.resume(stream_no)
        if self._faults.all_isolated:
            raise StoreUnavailable("; ".join(self._faults.warnings()))

    def _acquire_each(self, wanted: list[int]) -> list[int]:
        """Take the name on these streams one by one; isolates those that the store refuses."""
        taken: list[int] = []
        try:
            for stream_no in wanted:
                with self._faults.guard(stream_no):
                    self._store.acquire([self._streams[stream_no]])
                    taken.append(stream_no)
        except NameHeld:
            self._store.release_name([self._streams[no] for no in taken])
            raise
        return taken

    def _resume_streams(self) -> None:
        """Try the isolated streams whose wait is over."""
        for stream_no in self._faults.due() if self._faults.isolated else ():
            with self._faults.guard(stream_no):
                self._store.acquire([self._streams[stream_no]])
                self._named.add(stream_no)
                self._faults.resume(stream_no)
                self._intake.list_stream(stream_no)

    @property
    def _mono_name_due_s(self) -> float:
        """When the instance's name is to be renewed, at the latest."""
        return self._name_renewed_at + self._renew_name_every_s

    def _renew_name(self, now: float) -> None:
        """Renew the instance's name. First in a tick: a reader that was suspended must not read before."""
        if now - self._name_renewed_at < self._renew_name_every_s * EARLY:
            return
        for stream_no in self._named:
            with self._faults.guard(stream_no):
                self._store.renew_name([self._streams[stream_no]])
        self._name_renewed_at = now

    def _lose_name(self, error: Fenced) -> None:
        """Another service holds the instance's name: read nothing, and keep trying to take the name.

        Workers and their tables stay: their outcomes are settled once the name is ours again.
        """
        self._intake.stop_reading()
        self._connected = False
        self._retry_at = self._mono_s() + _RETRY_NAME_EVERY_S * self._rng.uniform(0.5, 1.0)
        if isinstance(error, NameHeld):
            first = self._first_renewals.setdefault(error.stream, error.renewal)
            self._control.send(HeldElsewhere(error.by, error.left_s, renewed=first != error.renewal))
        trouble = f"instance {self._settings.instance!r}: {error}"
        is_new, self._trouble = self._trouble != trouble, trouble
        if is_new:
            log.error("instance.name_lost", extra={"error": trouble})
            self.report()
        if self._intake.draining:
            self._detach_exited_workers()

    def _detach_exited_workers(self) -> None:
        """Detach exited workers without settling: their jobs stay pending for the holder of the name."""
        for worker in [worker for worker in self._dispatcher.workers if worker.exited]:
            self._detach(worker)

    def _detach_idle_workers(self) -> None:
        """Let a drain end while the store is unavailable: detach exited workers without an outcome to settle.

        Jobs that they had not started stay pending and run again.
        """
        if not self._intake.draining:
            return
        for worker in [worker for worker in self._dispatcher.workers if worker.exited]:
            if not _owes_settlement(worker):
                self._detach(worker)

    def _refresh_pauses(self) -> None:
        """Park the types that an operator has paused, and resume those that are no longer paused."""
        try:
            paused = self._store.paused_types()
        except StoreRefused as error:
            return self._keep_pauses(error)
        self._pauses_fault = ""
        type_nos = {type_no for type_no, name in enumerate(self._settings.handlers) if name in paused}
        if type_nos != self._buffer.paused_types:
            log.info("types.paused", extra={"task_types": sorted(paused)})
            self._buffer.set_paused_types(type_nos)

    def _keep_pauses(self, error: StoreRefused) -> None:
        """The paused types cannot be read: those that were paused stay paused."""
        faults = self._store.pause_faults()
        fault = f"the paused types cannot be read: {describe(faults) or error}"
        if fault != self._pauses_fault:
            self._pauses_fault = fault
            hint = "; ".join(one.repair for one in faults)
            log.error("pauses.damaged", extra={"error": fault, "hint": hint})

    def _back_off(self, error: StoreUnavailable) -> None:
        """Wait longer after each failure, with jitter so that hosts do not reconnect all at once."""
        self._intake.stop_reading()
        self._marks.clear()
        self._connected = False
        self._retry_at = self._mono_s() + self._backoff.next_wait_s()
        self._detach_idle_workers()
        is_new, self._trouble = self._trouble is None, str(error)
        if is_new:
            log.error("store.unavailable", extra={"error": str(error)})
            self.report()  # at once: the next attempt may take as long as the store's timeout


def _owes_settlement(worker: WorkerHandle) -> bool:
    """Whether an exited worker left an outcome, or a job that is charged with the exit."""
    assert worker.exited is not None
    states = {worker.table.state(row.row) for row in worker.table.unsettled()}
    return bool(states & {SUCCEEDED, FAILED}) or (STARTED in states and worker.exited.charge)
