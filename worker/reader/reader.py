"""The reader role: owns the consumer groups, dispatches jobs to workers, settles outcomes.

One loop waits for everything at once: answers to blocking reads (one connection for each stream), the
workers' wake-ups, the supervisor's messages. All state is also in the store or in the workers' tables, so
the next reader continues where a dead one stopped.
"""

import logging
import random
import selectors
import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import or_

from ..envelope import OVERSIZED_KEPT_BYTES
from ..errors import AnswerTooLarge, Fenced, NameHeld, StoreUnavailable
from ..ipc.channel import Channel, clear_eventfd
from ..ipc.control import (
    Attach,
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
from ..ipc.marks import Marks
from ..outcome import Reason
from ..settings import Settings
from ..store.backoff import ReconnectBackoff
from ..store.ports import Entry, ReaderStore
from ..telemetry import trace
from ..telemetry.metrics import MetricsBuffer
from .admission import READER_DIED, Admission, AdmittedJob, RejectedEntry
from .dispatch import WorkerHandle, dispatch_exclusive
from .leases import LeaseKeeper
from .prefetch import PrefetchBuffer
from .settlement import Settler

log = logging.getLogger("jobworker.reader")

#: How long a read blocks; only bounds how soon a silently dead connection is noticed.
_BLOCK_MS = 2000
#: How long an answer may take beyond the time that a read blocks.
_ANSWER_MARGIN_S = 2.0
_REPORT_EVERY_S = 0.25
#: How often the types that operators have paused are asked for: one short answer of the store.
_PAUSES_EVERY_S = 0.5
#: How often the instance's name is renewed at most; a second service needs this long to see that we live.
_HOLD_EVERY_S = 2.0
#: How often a name that another service holds is asked for.
_NAME_EVERY_S = 0.5
#: Entries that are read beyond jobs that wait for certain workers: the others may find work behind them.
_LOOK_PAST = 1024


class Reader:
    """The role. `run` returns once drained."""

    def __init__(
        self,
        store: ReaderStore,
        settings: Settings,
        link: ControlSocket,
        *,
        marks: Marks | None = None,
        mono_s: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._sources = settings.streams
        self._link = link
        # What readers before this one were reading when they ended; without a supervisor there were none.
        self._marks = marks or Marks.create()
        self._mono_s = mono_s
        self._rng = rng or random.Random()
        self._tally = MetricsBuffer()
        kinds = {kind: number for number, kind in enumerate(settings.handlers)}
        self._admission = Admission(kinds, settings.max_payload, settings.max_deaths)
        self._buffer = PrefetchBuffer(list(settings.handlers))
        self._settler = Settler(
            store, settings, self._tally, self._rng, self._buffer.is_within_grace, self._marks
        )
        self._workers: list[WorkerHandle] = []
        self._leases = LeaseKeeper(
            store, settings, self._workers, self._buffer, self._tally, self._admit, self._marks, mono_s()
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(link, selectors.EVENT_READ)
        self._briefed = False
        self._draining = False
        self._connected = False
        self._trouble: str | None = None
        self._backoff = ReconnectBackoff(self._rng)
        self._retry_at = 0.0
        self._reported_at = 0.0
        self._pauses_refreshed_at = 0.0
        self._held_at = 0.0
        # Stream -> the renewal by another service that was seen first.
        self._renewals: dict[str, str] = {}
        # When the answer to each read under way must be there: a network that swallows packets says nothing.
        self._answer_by: dict[int, float] = {}
        self._progress = 0

    def run(self) -> None:
        """Go round until drained. A store that does not answer is waited for; jobs in flight are kept."""
        while not self.drained:
            self.run_once(_REPORT_EVERY_S)
        self._leases.release_unstarted()
        self._store.close()
        self._marks.close()
        self.report()
        self._selector.close()

    @property
    def drained(self) -> bool:
        """Whether it was told to drain and no worker is left."""
        return self._draining and not self._workers

    def run_once(self, sleep_s: float) -> None:
        """One round of the loop, which waits at most so long for something to happen."""
        now = self._mono_s()
        if now - self._reported_at >= _REPORT_EVERY_S:
            self.report()
        if now < self._retry_at:
            return self._wait(min(sleep_s, self._retry_at - now))
        try:
            self._tick(now, sleep_s)
            self._backoff.reset()
            self._trouble = None
        except StoreUnavailable as error:
            self._back_off(error)
        except Fenced as error:
            self._lose_name(error)

    def _tick(self, now: float, sleep_s: float) -> None:
        if not self._briefed:
            return self._wait(sleep_s)
        if not self._connected:
            self._connect()
        self._hold_name(now)
        if now - self._pauses_refreshed_at >= _PAUSES_EVERY_S:
            self._refresh_pauses()
        settled = self._settler.settle(self._workers)
        self._buffer.answered(settled.answered)
        for arrival in settled.unavailable:
            self._pause(arrival, now)
        self._buffer.release_probes(now)
        self._reclaim_exited_workers()
        for worker in self._workers:
            worker.update_rate(now)
        if not self._draining:
            self._dispatch()
            self._leases.list_pending()
            self._read_all()
        self._leases.renew_and_claim(now, draining=self._draining)
        self._wait(0.0 if self._leases.listing_one_by_one else sleep_s)
        if self._answer_by and min(self._answer_by.values()) < self._mono_s():
            raise StoreUnavailable("a blocking read was not answered in time")

    # -- waiting

    def _wait(self, timeout_s: float) -> None:
        """Sleep until something happens, and take in what did."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._receive()
            elif isinstance(key.data, WorkerHandle):
                clear_eventfd(key.fd)
            elif key.data in self._answer_by:  # else a Drain heard in this very round has ended the read
                self._selector.unregister(key.fd)
                del self._answer_by[key.data]
                self._on_read_ready(key.data)
                self._count_cycle()

    def _finish_read(self, source: int) -> list[Entry]:
        """The answer. One that is too large was dropped: it is asked for again, an entry at a time."""
        try:
            return self._store.finish_read(self._sources[source])
        except AnswerTooLarge as error:
            log.warning("read.oversized", extra={"stream": self._sources[source].stream, "error": str(error)})
            self._leases.dropped(source)
            return []

    def _receive(self) -> None:
        try:
            while (received := self._link.receive()) is not None:
                self._handle_message(*received)
        except EOFError:
            raise SystemExit("the supervisor is gone") from None

    def _handle_message(self, message: Message, fds: list[int]) -> None:
        match message:
            case Attach(slot, generation):
                worker = WorkerHandle(slot, generation, Channel(*fds), self._mono_s())
                self._workers.append(worker)
                self._selector.register(fds[2], selectors.EVENT_READ, worker)
            case WorkerExited(slot, generation):
                for worker in self._of(slot, generation):
                    worker.gone = message
            case Retire(slot, generation):
                for worker in self._of(slot, generation):
                    worker.retired = True
            case SyncDone():
                self._briefed = True
            case Drain():
                self._draining = True
                self._stop_reading()
            case _:
                log.error("control.unexpected_message", extra={"message": type(message).__name__})

    def _of(self, slot: int, generation: int) -> Iterator[WorkerHandle]:
        return (worker for worker in self._workers if (worker.slot, worker.generation) == (slot, generation))

    # -- the store comes and goes

    def _connect(self) -> None:
        """Take the consumer's name, then begin to find what it was given before."""
        self._store.acquire(self._sources)
        self._connected = True
        self._held_at = self._mono_s()
        self._renewals.clear()
        # What waits here was found under the earlier connection; the listing below finds it again.
        self._buffer.clear()
        self._refresh_pauses()
        self._leases.begin()
        # Before the entries are looked at: one that ends readers must not look like a start that failed.
        self._link.send(Ready())
        self._leases.list_pending()
        counts = {"streams": len(self._sources), "pending": len(self._buffer.ready)}
        log.info("reader.connected", extra=counts)

    def _hold_name(self, now: float) -> None:
        """Renew the instance's name. First in a turn: a reader that was suspended must not read first."""
        if now - self._held_at >= min(_HOLD_EVERY_S, self._settings.lease_s / 3):
            self._store.renew_name(self._sources)
            self._held_at = now

    def _lose_name(self, error: Fenced) -> None:
        """Another service holds the instance's name: read nothing, and keep asking for the name.

        Workers and their tables stay: what they finish is settled once the name is ours again.
        """
        self._stop_reading()
        self._connected = False
        self._retry_at = self._mono_s() + _NAME_EVERY_S * self._rng.uniform(0.5, 1.0)
        if isinstance(error, NameHeld):
            first = self._renewals.setdefault(error.stream, error.renewal)
            self._link.send(HeldElsewhere(error.by, error.left_s, renewed=first != error.renewal))
        trouble = f"instance {self._settings.instance!r}: {error}"
        known, self._trouble = self._trouble == trouble, trouble
        if not known:
            log.error("instance.name_lost", extra={"error": trouble})
            self.report()
        if self._draining:
            self._drop_ended_workers()

    def _refresh_pauses(self) -> None:
        """Park the types that an operator has paused, and resume those that are no longer paused."""
        self._pauses_refreshed_at = self._mono_s()
        paused = self._store.paused_types()
        numbers = {number for number, kind in enumerate(self._settings.handlers) if kind in paused}
        if numbers != self._buffer.paused_types:
            log.info("types.paused", extra={"task_types": sorted(paused)})
            self._buffer.set_paused_types(numbers)

    def _back_off(self, error: StoreUnavailable) -> None:
        """Wait longer each time, with jitter, so that many hosts do not come back in the same instant."""
        self._stop_reading()
        self._marks.clear()
        self._connected = False
        self._retry_at = self._mono_s() + self._backoff.next_wait_s()
        known, self._trouble = self._trouble is not None, str(error)
        if not known:
            log.error("store.unavailable", extra={"error": str(error)})
            self.report()  # at once: the next try may take as long as the store's timeout

    def _stop_reading(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, int):
                self._selector.unregister(key.fd)
        self._answer_by.clear()
        self._store.abandon_reads()

    def report(self) -> None:
        """Tell the supervisor what was counted."""
        self._reported_at = self._mono_s()
        for number, kind in enumerate(self._settings.handlers):
            self._tally.gauge("z_novel_circuit_open", (kind,), float(self._buffer.paused(number)))
            self._tally.gauge("z_novel_paused", (kind,), float(number in self._buffer.paused_types))
        self._link.report(self._tally, self._trouble, self._progress)

    # -- jobs in

    def _on_read_ready(self, source: int) -> None:
        """Take a read's answer. While small jobs are gone through here the server looks for more of them."""
        self._marks.open_window(source)
        entries = self._finish_read(source)
        if entries and self._leases.portions[source].largest and not self._draining:
            self._begin_read(source, self._capacity(source) - len(entries))
        self._admit(source, entries)
        self._marks.clear()

    def _admit(self, source: int, entries: list[Entry]) -> None:
        if self._marks.convicted:
            entries = [entry for entry in entries if not self._refuse_convicted(source, entry)]
        if len(entries) == 1:
            self._marks.mark(source, entries[0].id)
        arrivals, refusals = self._admission.sift(source, entries)
        self._buffer.extend(arrivals)
        for refusal in refusals:
            self._settler.refuse(refusal)
        if entries:
            self._leases.portions[source].learn(entries)
        self._marks.unmark()

    def _refuse_convicted(self, source: int, entry: Entry) -> bool:
        """Refuse an entry that has ended a reader, without looking into it."""
        if (source, entry.id) not in self._marks.convicted:
            return False
        if entry.data is not None and len(entry.data) > self._settings.max_payload:
            entry = entry._replace(data=entry.data[:OVERSIZED_KEPT_BYTES])
        self._settler.refuse(RejectedEntry(source, entry, Reason.POISON, READER_DIED))
        return True

    def _pause(self, arrival: AdmittedJob, now: float) -> None:
        kind = tuple(self._settings.handlers)[arrival.kind]
        if not self._buffer.paused(arrival.kind):
            log.warning("circuit.opened", extra={"task_type": kind})
        self._buffer.pause(arrival, now)

    def _capacity(self, source: int) -> int:
        """How many jobs of a source the workers can take beyond what waits here already."""
        credit = self._leases.credit()
        return credit and credit - self._buffer.waiting(source) + min(self._unmatched(), _LOOK_PAST)

    def _begin_read(self, source: int, room: int) -> None:
        stream = self._sources[source]
        if room > 0 and self._leases.listed(source) and not self._store.is_reading(stream):
            fd = self._store.begin_read(stream, min(room, self._leases.portions[source].entries), _BLOCK_MS)
            self._selector.register(fd, selectors.EVENT_READ, source)
            self._answer_by[source] = self._mono_s() + _BLOCK_MS / 1000 + _ANSWER_MARGIN_S

    def _read_all(self) -> None:
        """Ask each stream for what there is room for."""
        for number in range(len(self._sources)):
            room = self._capacity(number)
            self._begin_read(number, room)
            if room <= 0:
                self._count_cycle()  # all hands are full: nothing to be read is no standstill

    def _count_cycle(self) -> None:
        self._progress += 1
        self._tally.count("z_novel_read_cycles_total")

    # -- jobs out

    def _dispatch(self) -> None:
        self._buffer.set_exclusive_types(
            reduce(or_, (worker.channel.exclusive_types for worker in self._workers), 0)
        )
        dispatch_exclusive(self._workers, self._buffer.isolated, self._trace_exclusive)
        waiting = self._buffer.ready
        unfit: list[WorkerHandle] = []
        while waiting:
            workers = [worker for worker in self._workers if worker.credit > 0 and worker not in unfit]
            if not workers:
                return
            share = -(-len(waiting) // len(workers))
            worker = min(workers, key=lambda worker: len(worker.table))
            batch = self._buffer.take(min(share, worker.credit), worker.channel.unsupported_types)
            if not batch:
                unfit.append(worker)
                continue
            given = worker.dispatch(batch)
            self._trace_dispatched(batch[:given])
            waiting.extendleft(reversed(batch[given:]))
            if not given:
                return

    def _trace_exclusive(self, arrival: AdmittedJob) -> None:
        self._trace_dispatched([arrival])

    def _trace_dispatched(self, jobs: Sequence[AdmittedJob]) -> None:
        if trace.enabled():
            for job in jobs:
                trace.dispatched(self._sources[job.source].stream, job.entry.id, job.entry.data or b"")

    def _unmatched(self) -> int:
        """Jobs that wait for the workers that can run them, while one that cannot has nothing to do."""
        idle = any(worker.channel.unsupported_types and worker.credit for worker in self._workers)
        return len(self._buffer.ready) if idle else 0

    # -- workers end

    def _reclaim_exited_workers(self) -> None:
        for worker in [worker for worker in self._workers if worker.gone]:
            assert worker.gone is not None
            remains = self._settler.reclaim(worker, worker.gone)
            self._forget(worker)
            for source, entry in remains.isolated:
                self._admit(source, [entry])
            behind = list(self._buffer.ready)
            self._buffer.ready.clear()
            for source, entry in remains.unstarted:
                self._admit(source, [entry])
            self._buffer.ready.extend(behind)

    def _drop_ended_workers(self) -> None:
        """Forget ended workers without settling: their jobs stay pending for the holder of the name."""
        for worker in [worker for worker in self._workers if worker.gone]:
            self._forget(worker)

    def _forget(self, worker: WorkerHandle) -> None:
        self._selector.unregister(worker.channel.fds[2])
        self._workers.remove(worker)
        worker.channel.close()
        self._link.send(ExitReclaimed(worker.slot, worker.generation))
