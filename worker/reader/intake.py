"""Intake: reads new entries, recovers pending ones, renews and claims leases, and admits all of them."""

import logging
import math
import selectors
from collections.abc import Sequence

from ..envelope import OVERSIZED_KEPT_BYTES, OWN_FIELDS_BYTES
from ..errors import AnswerTooLarge, Fenced, StoreRefused, StoreUnavailable
from ..ipc.crash_marks import SKIP_FETCH_AT_STRIKES
from ..store.ports import Entry
from ..telemetry import trace
from ..wakeups import EARLY_S, next_wakeup_s
from .admission import Admission, AdmittedJob, RejectedEntry, reject_unread
from .cancellation import Cancellations
from .claims import Claims
from .context import ReaderContext
from .dispatch import Dispatcher
from .flow_control import FlowControl
from .screening import Screening, has_series
from .shard_leases import ShardLeases

log = logging.getLogger("jobworker.reader")

#: A read blocks until shortly before this wake-up. The time only bounds how soon a silently dead connection
#: is noticed.
_BLOCK_WAKEUPS = 2
#: Time that an answer may take beyond the block time.
_ANSWER_MARGIN_S = 2.0
#: Most entries of one answer: enough to spread the cost of a round trip, and no more than one script takes.
_MOST_ENTRIES = 1000
#: Target size of an answer (bytes).
_ANSWER_BYTES = 4 * 1024 * 1024
#: Entries of an answer that are worth reading on before they are admitted.
_MANY = 64
#: Entries of the first read, while no size is known: as many of the largest jobs as a host can hold.
_FIRST_ENTRIES = 8
#: Most entries of a page of the pending list.
_PAGE = 256
#: Most rejected entries and their bytes that wait for the next settlement. They fill no prefetch buffer.
_REJECTED, _REJECTED_BYTES = 1024, 16 * 1024 * 1024
#: Entry id where a listing of pending entries starts and, for claims, ends.
_START = b"0-0"
#: Entries that one tick lists one by one: they are dispatched before the next crash of a reader.
_ONE_BY_ONE = 8


class ReadCount:
    """Number of entries that the next read of one stream requests.

    It doubles while entries are small. After a large entry, as many are requested as fit the target size.
    """

    def __init__(self) -> None:
        self.entries = _FIRST_ENTRIES

    def learn(self, answer: Sequence[Entry]) -> None:
        """Adapt to the largest entry of the newest answer: large jobs come in runs."""
        largest = max(1, max([len(entry.data or b"") for entry in answer], default=1))
        self.entries = max(1, min(_MOST_ENTRIES, 2 * self.entries, _ANSWER_BYTES // largest))

    @property
    def is_largest(self) -> bool:
        """Whether it has reached its limit, because all jobs were small."""
        return self.entries == _MOST_ENTRIES

    def record_overrun(self) -> None:
        """An answer was too large to receive: read one entry at a time until sizes are known."""
        self.entries = 1


class Intake:
    """Entries on their way from the store to the prefetch buffer.

    Lists the entries that are pending for this consumer before it reads any new one, so no entry is lost or
    taken twice. Requests new entries only for credit of the workers. `rejected` collects the entries that
    become dead letters, or are dropped, with the next settlement. A crash mark covers everything that it
    reads (see `crash_marks`). Methods raise as the store does, except `StoreRefused`; `begin_listing` then
    starts over. Of an isolated stream nothing is read or prefetched, but its leases are renewed.
    """

    def __init__(
        self, context: ReaderContext, dispatcher: Dispatcher, selector: selectors.BaseSelector
    ) -> None:
        settings = context.settings
        self.rejected: list[RejectedEntry] = []
        #: While draining, nothing new is taken in; leases are still renewed.
        self.draining = False
        #: Whether the last call of `renew_leases` claimed entries: they are dispatched in the next tick.
        self.has_claimed = False
        self._is_claims_turn = True
        # Whether the last call of `continue_claims` dropped entries: they are settled in the next tick.
        self._has_dropped = False
        #: Completed read cycles. The supervisor restarts a reader whose number does not grow.
        self.cycles = 0
        self._settings = settings
        self._streams = settings.streams
        self._store = context.store
        self._metrics = context.metrics
        self._marks = context.crash_marks
        self._faults = context.faults
        self._faults.on_isolated.append(self._drop_stream)
        self._held = context.held
        self._lost_leases = context.lost_leases
        self._claims = Claims(context)
        self._mono_s = context.mono_s
        self._dispatcher = dispatcher
        self._buffer = dispatcher.buffer
        self._selector = selector
        self._shards = ShardLeases(context, dispatcher)
        self._cancels = Cancellations(context, dispatcher)
        self.flow = FlowControl(context, dispatcher, self._cancels, self._shards.spread)
        type_nos = {name: type_no for type_no, name in enumerate(settings.handlers)}
        self._screening = Screening(context, self._buffer)
        self._admission = Admission(
            type_nos,
            settings.max_payload,
            settings.max_deaths,
            unique=settings.unique_window_s > 0,
            wall_s=context.wall_s,
        )
        #: Jobs by stream number whose idempotency keys are being claimed: neither prefetched nor in flight.
        self._claiming: dict[int, Sequence[AdmittedJob]] = {}
        # Those of them whose claim is sent after the next settlement.
        self._unsent: set[int] = set()
        self._read_counts = [ReadCount() for _ in settings.streams]
        # Streams whose pending entries are still being listed, and the last id that was listed.
        self._unlisted: dict[int, bytes] = {}
        # Time by which the answer to each read must arrive: a network that drops packets reports nothing.
        self._answer_by: dict[int, float] = {}
        # When all entries taken in so far were renewed. Entries that were read since have newer leases; those
        # that were listed may not.
        self._mono_all_renewed_s = -math.inf
        self._mono_renewed_s = self._lost_leases.mono_renewed_s = context.mono_s()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do before an event, or the time of `mono_due_s`."""
        if not self._dispatcher.is_idle or not self._buffer.empty or self.rejected:
            return False
        under_way = self._unlisted or self._claiming or self._claims.under_way or self.flow.has_waiting
        waits_for_repair = self._faults.isolated or self._held.stream_nos()
        return not (under_way or waits_for_repair or self._buffer.crashes.watching)

    @property
    def mono_due_s(self) -> float:
        """When the store has to be asked again, or a read has to be answered, at the latest."""
        leases_due_s = min(self._mono_renewed_s + self._settings.lease_s / 3, self._claims.mono_check_due_s)
        return min(self.flow.mono_due_s, self._shards.mono_due_s, leases_due_s, *self._answer_by.values())

    def refresh(self, mono_now_s: float, *, at_once: bool = False) -> bool:
        """If it is time, look at what changed in the store: backlogs, limits, cancelled jobs, own shards.

        Returns whether it looked at the backlogs.
        """
        self._shards.refresh(mono_now_s)
        has_looked = self.flow.refresh(mono_now_s, at_once=at_once)
        if has_looked:
            self.rejected += self._cancels.enforce()
        return has_looked

    # -- pending entries of this consumer

    def begin_listing(self) -> None:
        """Start over under a new connection: list all pending entries again, instead of those taken in."""
        self._buffer.clear()
        self._claiming.clear()
        self._unsent.clear()
        self.rejected.clear()
        self._unlisted = {no: _START for no in range(len(self._streams)) if no not in self._faults}

    def list_stream(self, stream_no: int) -> None:
        """List the pending entries of a stream that was isolated."""
        self._unlisted[stream_no] = _START

    def _drop_stream(self, stream_no: int) -> None:
        """Drop everything of a stream that was isolated: its entries stay pending."""
        if self._answer_by.pop(stream_no, None) is not None:
            self._unregister(stream_no)
        self._store.abandon_read(self._streams[stream_no])
        self._unlisted.pop(stream_no, None)
        self._claims.drop(stream_no)
        self._buffer.discard_stream(stream_no)
        self._claiming.pop(stream_no, None)
        self._unsent.discard(stream_no)
        self.rejected[:] = [entry for entry in self.rejected if entry.stream_no != stream_no]
        self._marks.clear()

    def list_pending(self) -> None:
        """Continue the listing: admit entries that are not in flight or prefetched, while there is room."""
        if not self._unlisted or self._full:
            return
        known = self._unsettled_keys()
        for stream_no, after in list(self._unlisted.items()):
            with self._faults.guard(stream_no):
                if self._marks.lists_one_by_one(stream_no):
                    self._list_one_by_one(stream_no, after, known)
                else:
                    self._list_pages(stream_no, after, known)
        self._marks.clear()

    def _list_pages(self, stream_no: int, after: bytes, known: set[tuple[int, bytes]]) -> None:
        while not self._full:
            self._marks.mark_answer(stream_no)
            page = self._store.own_pending(self._streams[stream_no], after, self._page(stream_no))
            if not page:
                return self._end_listing(stream_no)
            self._admit(stream_no, [entry for entry in page if (stream_no, entry.id) not in known])
            after = self._unlisted[stream_no] = page[-1].id

    @property
    def _full(self) -> bool:
        """Whether nothing more should be admitted before the next dispatch or settlement."""
        if self._buffer.full or len(self.rejected) >= _REJECTED:
            return True
        return sum(len(entry.job.data or b"") for entry in self.rejected) >= _REJECTED_BYTES

    def _end_listing(self, stream_no: int) -> None:
        del self._unlisted[stream_no]
        self._mono_all_renewed_s = -math.inf
        self._marks.end_one_by_one(stream_no)

    @property
    def must_continue(self) -> bool:
        """Whether the next tick follows at once: it dispatches claimed entries, or continues a listing or
        sweep: one by one, or after the settlement of what it rejected."""
        if self.has_claimed or self._has_dropped or self._claiming:
            return True
        if self.rejected and (self._unlisted or self._claims.under_way):
            return True
        return not self._full and any(map(self._marks.lists_one_by_one, self._unlisted))

    def _list_one_by_one(self, stream_no: int, after: bytes, known: set[tuple[int, bytes]]) -> None:
        """Fetch a few entries that made a reader exit, each under its own mark.

        Only a few in each tick, so that they are dispatched even if readers keep exiting.
        """
        ids = self._store.own_ids(self._streams[stream_no], after, _ONE_BY_ONE)
        for entry_id in ids:
            if self._full:
                return
            if (stream_no, entry_id) not in known:
                self._marks.mark(stream_no, entry_id)
                self._admit(stream_no, self._fetch_one(stream_no, after, entry_id))
                self._marks.unmark()
                self._marks.clear_strikes(stream_no, entry_id)
            after = self._unlisted[stream_no] = entry_id
        if not ids:
            self._end_listing(stream_no)

    def _fetch_one(self, stream_no: int, after: bytes, entry_id: bytes) -> list[Entry]:
        """The entry behind ``after``; empty if it was deleted from the stream."""
        if self._marks.poison.get((stream_no, entry_id), 0) >= SKIP_FETCH_AT_STRIKES:
            return [Entry(entry_id, None)]
        page = self._store.own_pending(self._streams[stream_no], after, 1)
        return [entry for entry in page if entry.id == entry_id]

    def _unsettled_keys(self) -> set[tuple[int, bytes]]:
        rejected = {(entry.stream_no, entry.job.entry_id) for entry in self.rejected}
        claiming = {(job.stream_no, job.entry.id) for jobs in self._claiming.values() for job in jobs}
        return self._dispatcher.unsettled_keys() | rejected | claiming | self._held.keys()

    def _page(self, stream_no: int) -> int:
        return min(_PAGE, self._read_counts[stream_no].entries)

    # -- new entries

    def request_more(self) -> None:
        """Continue the listing of pending entries, then request what the workers have credit for."""
        self.list_pending()
        for stream_no in self._shards.readable():
            capacity = 0 if stream_no in self._faults else self._capacity(stream_no)
            with self._faults.guard(stream_no):
                self._begin_read(stream_no, capacity)
            if capacity <= 0 and not self.flow.sorts_all(stream_no):
                self._count_cycle()  # all workers are busy: without a read there is progress, too

    def _capacity(self, stream_no: int) -> int:
        return self._dispatcher.capacity(stream_no) - len(self._claiming.get(stream_no, ()))

    def take_waiting(self) -> None:
        """Take jobs out of lanes for the workers' credit, which the streams share.

        Quick jobs are taken many at a time: a step of the server for each would take longer than the job.
        """
        if not self._dispatcher.runs_low:
            return
        readable = self._shards.readable() | self._shards.spread  # of which jobs may be in lanes
        wanted = [one for one in self.flow.wanted() if one in readable and one not in self._unlisted]
        shares = {one: -(-self._dispatcher.capacity(one) // len(wanted)) for one in wanted}
        for stream_no, share in shares.items():
            if share > 0:
                self._marks.mark_answer(stream_no)
                with self._faults.guard(stream_no):
                    self._admit(stream_no, self.flow.take(stream_no, share), is_taken=True)
        self._marks.clear()

    def _begin_read(self, stream_no: int, capacity: int) -> None:
        source = self._streams[stream_no]
        if self.flow.sorts_all(stream_no):
            capacity = _MOST_ENTRIES
        if capacity > 0 and stream_no not in self._unlisted and not self._store.is_reading(source):
            count = min(capacity, self._read_counts[stream_no].entries)
            now = self._mono_s()
            block_s = next_wakeup_s(now, _BLOCK_WAKEUPS) - EARLY_S - now
            fd = self._store.begin_read(source, count, round(block_s * 1000))
            self._selector.register(fd, selectors.EVENT_READ, stream_no)
            self._answer_by[stream_no] = now + block_s + _ANSWER_MARGIN_S

    def on_read_ready(self, stream_no: int, fd: int) -> None:
        """Take the answer of a read whose descriptor became readable.

        The next read starts before the entries are admitted if they are many, so that the server works in
        parallel. Else the workers come first: the server would compete with them.
        """
        if stream_no not in self._answer_by:
            return  # a Drain of the same select() has ended the read
        self._selector.unregister(fd)
        del self._answer_by[stream_no]
        self._marks.mark_answer(stream_no)
        with self._faults.guard(stream_no):
            entries = self._finish_read(stream_no)
            is_owned = stream_no in self._shards.readable()
            if (
                is_owned
                and len(entries) >= _MANY
                and self._read_counts[stream_no].is_largest
                and not self.draining
            ):
                self._begin_read(stream_no, self._capacity(stream_no) - len(entries))
            self._admit(stream_no, entries, is_new=True)
        self._marks.clear()
        self._count_cycle()

    def _finish_read(self, stream_no: int) -> list[Entry]:
        """The answer. If it was too large and dropped, its entries are listed again, one at a time."""
        source = self._streams[stream_no]
        try:
            return self._store.finish_read(source)
        except AnswerTooLarge as error:
            log.warning("read.oversized", extra={"stream": source.stream, "error": str(error)})
            self._read_counts[stream_no].record_overrun()
            self._unlisted[stream_no] = _START
            return []

    def _count_cycle(self) -> None:
        self.cycles += 1
        self._metrics.count("z_novel_read_cycles_total")

    def check_reads(self) -> None:
        """Raise `StoreUnavailable` if a read is overdue."""
        if self._answer_by and min(self._answer_by.values()) < self._mono_s():
            raise StoreUnavailable("a blocking read was not answered in time")

    def stop_reading(self) -> None:
        """Abandon all reads. Entries that they deliver stay pending."""
        for stream_no in self._answer_by:
            self._unregister(stream_no)
        self._answer_by.clear()
        self._store.abandon_reads()

    def _unregister(self, stream_no: int) -> None:
        """Watch the descriptor of a stream's read no more."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, int) and key.data == stream_no:
                self._selector.unregister(key.fd)

    # -- admission

    def _admit(
        self, stream_no: int, entries: list[Entry], *, is_new: bool = False, is_taken: bool = False
    ) -> None:
        if stream_no in self._claiming and not (is_new or is_taken):
            self._finish_claim(stream_no)  # one claim of a stream at a time
        if self._marks.poison:
            entries = [entry for entry in entries if not self._reject_poison(stream_no, entry)]
        if len(entries) == 1:
            self._marks.mark(stream_no, entries[0].id)
        jobs: Sequence[AdmittedJob]
        by_route = not trace.enabled() and (is_taken or not self.flow.sorts_some(stream_no))
        jobs, rejected = self._admission.check_all(stream_no, entries, by_route=by_route)
        jobs, cancelled = self._cancels.reject(jobs)
        rejected += cancelled
        batches = self._admission.take_batches()
        if is_new and stream_no in self._claiming:  # the server was claiming while these were checked
            self._finish_claim(stream_no)
        has_keys = any(job.unique for job in jobs)
        if has_keys and is_new and not (rejected or batches):
            self._begin_claim(stream_no, jobs)
        else:
            jobs, dropped = self._screen(stream_no, jobs, is_new=is_new, is_taken=is_taken)
            rejected += dropped
            if batches:
                # Jobs that wait in lanes or for their time are registered when they come from there.
                kept = [job.entry.id for job in jobs] + [one.job.entry_id for one in rejected]
                self._register(stream_no, {id: batches[id] for id in kept if id in batches})
            self.rejected += rejected
            self._buffer.extend(jobs)
        if entries and (is_new or is_taken):
            self._is_claims_turn = True
        if entries and not is_taken:
            self._read_counts[stream_no].learn(entries)
        self._marks.unmark()

    def _screen(
        self,
        stream_no: int,
        jobs: Sequence[AdmittedJob],
        *,
        is_new: bool = False,
        is_taken: bool = False,
        is_begun: bool = False,
    ) -> tuple[Sequence[AdmittedJob], list[RejectedEntry]]:
        """The jobs to be prefetched, and those that are dropped. The others wait for their turn or time."""
        dropped: list[RejectedEntry] = []
        conditional = [job for job in jobs if job.conditions is not None]
        in_series = has_series(conditional)
        if conditional or is_begun or any(job.unique for job in jobs):
            jobs, dropped = self._screening.screen(stream_no, jobs, is_taken=is_taken, is_begun=is_begun)
        if not is_taken:
            jobs = self.flow.divert(stream_no, jobs, is_new=is_new, in_series=in_series)
        return jobs, dropped

    def _begin_claim(self, stream_no: int, jobs: Sequence[AdmittedJob]) -> None:
        """Claim the keys of new jobs, few at once and many after the next settlement.

        The server claims many while the reader dispatches other jobs and checks the next answer. The workers
        have jobs meanwhile. If the settlement came after such a claim, the reader would wait for both.
        """
        self._claiming[stream_no] = jobs
        if len(jobs) < _MANY or self._dispatcher.is_idle:
            self._screening.begin(stream_no, jobs)
        else:
            self._unsent.add(stream_no)

    def continue_claims(self) -> None:
        """After a settlement: prefetch the jobs whose keys were claimed before it, and begin other claims.

        The replies to claims have come with that to the settlement: they take no round trip of their own.
        """
        self._has_dropped = False
        for stream_no in list(self._claiming):
            with self._faults.guard(stream_no):
                if stream_no in self._unsent:
                    self._unsent.remove(stream_no)
                    self._screening.begin(stream_no, self._claiming[stream_no])
                else:
                    self._finish_claim(stream_no)
        self._marks.clear()

    def _finish_claim(self, stream_no: int) -> None:
        jobs = self._claiming[stream_no]
        if stream_no in self._unsent:
            self._unsent.remove(stream_no)
            self._screening.begin(stream_no, jobs)
        self._marks.mark_answer(stream_no)
        if len(jobs) == 1:
            self._marks.mark(stream_no, jobs[0].entry.id)
        # Requests to cancel may have been read since the claim began.
        jobs, cancelled = self._cancels.reject(jobs)
        jobs, dropped = self._screen(stream_no, jobs, is_new=True, is_begun=True)
        del self._claiming[stream_no]
        self.rejected += cancelled + dropped
        self._has_dropped = self._has_dropped or bool(dropped or cancelled)
        self._buffer.extend(jobs)

    def _register(self, stream_no: int, batches: dict[bytes, str]) -> None:
        """Let the store count the end of these entries in their batches, before any of them can end."""
        source = self._streams[stream_no]
        unknown = self._store.register_batches(source, batches) if batches else ()
        for batch in sorted(unknown):
            log.warning("batch.unknown", extra={"batch": batch, "stream": source.stream})

    def _reject_poison(self, stream_no: int, entry: Entry) -> bool:
        """Reject an entry that made readers exit, without parsing it; False if it did not."""
        if (stream_no, entry.id) not in self._marks.poison:
            return False
        largest = self._settings.max_payload + OWN_FIELDS_BYTES
        if entry.data is not None and len(entry.data) > largest:
            entry = entry._replace(data=entry.data[:OVERSIZED_KEPT_BYTES])
        self.rejected.append(reject_unread(stream_no, entry))
        return True

    def reject_expired(self) -> None:
        """Reject the prefetched jobs whose latest start has passed."""
        self.rejected += self._screening.take_expired()

    # -- leases

    def renew_leases(self, mono_now_s: float) -> None:
        """Each third of a lease: renew all unsettled entries, then claim those of lost hosts. Claims continue
        in each tick until no expired entry is left."""
        if mono_now_s - self._mono_renewed_s > self._settings.lease_s / 3 or self._finds_lost():
            self._renew_all(mono_now_s)
        self.has_claimed = False
        if not self.draining:
            self._claim_all()
        self._claims.log()

    def _renew_all(self, mono_now_s: float) -> None:
        self._mono_renewed_s = mono_now_s
        known = self._unsettled_keys()
        isolated_before = len(self._faults.isolated)
        for stream_no in range(len(self._streams)):
            own_ids = [entry_id for owner_no, entry_id in known if owner_no == stream_no]
            with self._faults.guard(stream_no):
                self._renew(stream_no, own_ids)
                self._claims.begin(stream_no)
        if not isolated_before and not self._faults.isolated:
            self._lost_leases.mono_renewed_s = self._mono_all_renewed_s = mono_now_s

    def _renew(self, stream_no: int, ids: list[bytes]) -> None:
        """Renew leases, and forget entries that another consumer claimed. Their jobs may be running here: the
        store refuses their outcomes."""
        lost = self._store.renew(self._streams[stream_no], ids) if ids else set()
        self._lost_leases.record_renewal(stream_no, lost)
        if lost:
            self._buffer.discard(stream_no, lost)
            self._held.discard(stream_no, lost)
            if claiming := self._claiming.get(stream_no):
                self._claiming[stream_no] = [job for job in claiming if job.entry.id not in lost]

    def claim_in_turn(self) -> None:
        """In turns claim before new jobs use up the workers' credit, so that neither waits for the other."""
        if self._is_claims_turn and not self.draining:
            self._claim_all()

    def _finds_lost(self) -> bool:
        """Whether a service is gone: its jobs are claimed without waiting for the next sweep."""
        if self.draining or self._claims.under_way or not self._claims.is_check_due():
            return False
        found = False
        for stream_no in range(len(self._streams)):
            if stream_no not in self._faults and not found:
                with self._faults.guard(stream_no):
                    found = self._claims.has_lost(stream_no)
        return found

    def _claim_all(self) -> None:
        """Claim entries whose lease expired, while the workers have credit for them; streams take turns."""
        while turns := [no for no in self._claims.under_way if self._may_claim(no)]:
            for stream_no in turns:
                if (room := self._room(stream_no)) > 0:
                    with self._faults.guard(stream_no):
                        self._claim(stream_no, room)
            if not any(self._room(stream_no) > 0 for stream_no in turns):
                return

    def _may_claim(self, stream_no: int) -> bool:
        return stream_no not in self._faults and not self._marks.lists_one_by_one(stream_no)

    def _room(self, stream_no: int) -> int:
        """Number of entries that may be claimed now."""
        return 0 if self._full else self._dispatcher.credit - self._buffer.waiting(stream_no)

    def _claim(self, stream_no: int, room: int) -> None:
        """Claim a page. Entries of ours that were not renewed in time come with it."""
        self._marks.mark_answer(stream_no)
        entries = self._claims.claim(stream_no, min(room, self._read_counts[stream_no].entries))
        known = self._claimable_known(stream_no) if entries else set()
        claimed = [entry for entry in entries if entry.id not in known]
        if claimed:
            self.has_claimed, self._is_claims_turn = True, False
            self._claims.record(stream_no, len(claimed))
        self._admit(stream_no, claimed)
        self._marks.clear()

    def _claimable_known(self, stream_no: int) -> set[bytes]:
        """Ids that are in flight or prefetched here, as far as a claim can return them.

        While all leases are fresh, these are only those that another consumer had taken over.
        """
        renewed_s_ago = self._mono_s() - self._mono_all_renewed_s
        if renewed_s_ago < self._settings.lease_s / 2 and not self._unlisted:
            return self._lost_leases.in_flight(stream_no)
        return {entry_id for owner_no, entry_id in self._unsettled_keys() if owner_no == stream_no}

    def requeue(self, jobs: Sequence[AdmittedJob]) -> None:
        """Prefetch jobs again that came back from a worker. One that was cancelled meanwhile is rejected."""
        jobs, cancelled = self._cancels.reject(jobs)
        self.rejected += cancelled
        self._buffer.requeue(list(jobs))

    def release_unstarted(self) -> None:
        """Before exit: make prefetched entries and the instance's name available to any host at once."""
        self._shards.leave()
        for stream_no, source in enumerate(self._streams):
            try:
                claiming = self._claiming.get(stream_no, ())
                ids = [job.entry.id for job in (*self._buffer, *claiming) if job.stream_no == stream_no]
                if ids:
                    self._store.release(source, ids)
                self._store.release_name([source])
            except (StoreUnavailable, Fenced) as error:
                log.warning("lease.release_failed", extra={"stream": source.stream, "error": str(error)})
                if not isinstance(error, StoreRefused):
                    return
