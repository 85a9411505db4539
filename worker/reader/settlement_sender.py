"""Sends the settlements of a tick to the store, and records what the store answered."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from ..errors import Fenced, StoreUnavailable
from ..store.ports import Settled, Settlement, do_nothing
from .context import ReaderContext
from .settlement_batch import SettlementBatch

log = logging.getLogger("jobworker.settlement")


class SettlementSender:
    """One call of the store for all settlements of a tick.

    Only settled outcomes are counted; others are held. If the answer is lost, the outcomes are `unsure`: when
    the store refuses one of them the next time, the first call had settled it.
    """

    def __init__(self, context: ReaderContext) -> None:
        #: Outcomes that were perhaps settled already: the answer was lost, or an earlier reader died.
        self.unsure: set[tuple[int, bytes]] = set()
        self._store = context.store
        self._settings = context.settings
        self._streams = context.settings.streams
        self._type_names = tuple(context.settings.handlers)
        self._metrics = context.metrics
        self._faults = context.faults
        self._held = context.held
        self._lane_rules = context.lane_rules
        self._lost_leases = context.lost_leases
        self._cancels = context.cancels
        self._mono_s = context.mono_s

    def send(self, batch: SettlementBatch, meanwhile: Callable[[], None] = do_nothing) -> None:
        """Settle the batch in the store, then count its outcomes: they are final now."""
        versions = {stream_no: version for stream_no, (_, version) in self._lane_rules.items()}
        ttl_s = self._settings.result_ttl_s
        settlements = batch.settlements(self._streams, versions, ttl_s, sure=self._has_fresh_leases())
        sent = {no: settlement for no, settlement in settlements.items() if no not in self._faults}
        results = self._settle(sent, meanwhile) if sent else []
        unsettled: set[tuple[int, bytes]] = set()
        uncounted: set[tuple[int, bytes]] = set()
        for stream_no, result in zip(sent, results, strict=True):
            self._held.clear(stream_no)
            if result.error:
                self._faults.isolate(stream_no, result.error)
            if not result.is_replicated:
                self._report_unreplicated(stream_no, len(sent[stream_no].ids))
            lost = self._lost(stream_no, sent[stream_no], result)
            unsettled.update((stream_no, entry_id) for entry_id in result.unsettled | result.cancelled.keys())
            self._cancels.update({(stream_no, id): keeps for id, keeps in result.cancelled.items()})
            uncounted.update((stream_no, entry_id) for entry_id in lost)
            self._count_done(batch, stream_no, lost | result.unsettled)
        for stream_no in settlements.keys() - sent:
            unsettled.update((stream_no, entry_id) for entry_id in settlements[stream_no].ids)
        self._hold(batch, unsettled)
        self._end_cancels(batch, unsettled | uncounted)
        for key, counts in batch.counts.items():
            for name, labels in counts if key not in unsettled and key not in uncounted else ():
                self._metrics.count(name, labels)
        batch.deferred = [one for one in batch.deferred if one.job.stream_no not in self._faults]

    def _report_unreplicated(self, stream_no: int, jobs: int) -> None:
        """Fewer replicas than --wait-replicas have a settlement. A failover now would run its jobs again."""
        stream = self._streams[stream_no].stream
        self._metrics.count("z_novel_settlements_unreplicated_total", (stream,), jobs)
        log.warning(
            "settle.not_replicated",
            extra={"stream": stream, "jobs": jobs, "replicas": self._settings.wait_replicas},
        )

    def _has_fresh_leases(self) -> bool:
        """Whether no other consumer can have claimed what is in flight, and no outcome was sent before."""
        since_s = self._mono_s() - self._lost_leases.mono_renewed_s
        return not self.unsure and not self._faults.isolated and since_s < self._settings.lease_s / 2

    def _settle(self, settlements: Mapping[int, Settlement], meanwhile: Callable[[], None]) -> list[Settled]:
        """Settle in the store. If the answer is lost, the outcomes may be settled or not."""
        try:
            return self._store.settle(list(settlements.values()), meanwhile)
        except (StoreUnavailable, Fenced):
            self.unsure.update((no, entry_id) for no, one in settlements.items() for entry_id in one.ids)
            raise

    def _lost(self, stream_no: int, settlement: Settlement, result: Settled) -> set[bytes]:
        """The ids that another consumer has taken over; they are counted as lost leases.

        A refused id whose settlement was sent before is ours: that one has arrived.
        """
        if not (result.refused or self.unsure):
            return result.refused
        ids = set(settlement.ids)
        lost = {entry_id for entry_id in result.refused if (stream_no, entry_id) not in self.unsure}
        settled = ids - result.unsettled - result.cancelled.keys()
        self._lost_leases.record_settlement(stream_no, lost, settled)
        self.unsure.difference_update((stream_no, entry_id) for entry_id in settled)
        return lost

    def _hold(self, batch: SettlementBatch, unsettled: set[tuple[int, bytes]]) -> None:
        """Keep the outcomes that the store did not take. Rejected entries, and jobs under which workers died,
        are listed again instead."""
        for stream_no in {stream_no for stream_no, _ in unsettled}:
            for entry_id, type_no in zip(batch.done[stream_no], batch.done_types[stream_no], strict=True):
                if (stream_no, entry_id) in unsettled:
                    self._held.done[stream_no][entry_id] = type_no
        for key in unsettled & batch.failed.keys():
            self._held.failed[key[0]][key[1]] = batch.failed[key]
        for key in unsettled & batch.kept_jobs.keys():
            self._held.kept[key[0]][key[1]] = batch.kept_jobs[key]

    def _count_done(self, batch: SettlementBatch, stream_no: int, others: set[bytes]) -> None:
        """Count the jobs that are completed: all but ``others``."""
        type_nos = batch.done_types[stream_no]
        if others:
            done = zip(batch.done[stream_no], type_nos, strict=True)
            type_nos = [type_no for entry_id, type_no in done if entry_id not in others]
        for type_no, count in Counter(type_nos).items():
            self._metrics.count("z_novel_jobs_completed_total", (self._type_names[type_no],), count)

    def _end_cancels(self, batch: SettlementBatch, others: set[tuple[int, bytes]]) -> None:
        """Forget requests to cancel jobs that have ended: all of the batch but ``others``."""
        for stream_no, entry_ids in batch.cancelled.items():
            ids = [entry_id for entry_id in entry_ids if (stream_no, entry_id) not in others]
            for entry_id in ids:
                self._cancels.pop((stream_no, entry_id), None)
            if ids:
                # The outcomes are settled: an error must not repeat them. The requests expire.
                with suppress(StoreUnavailable):
                    self._store.end_cancels(self._streams[stream_no], ids)
