"""Flow control of one reader: sorts jobs that wait into lanes and takes them out when it is their turn.

While little waits and no limit applies, entries pass straight to the prefetch buffer.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence

import msgspec

from ..flow import FlowConfig, LaneRules, read_flow_header
from ..keys import Source
from ..shards import logical_stream, shard_count
from ..store.ports import Entry, WaitingJob
from ..wakeups import EARLY_S, next_wakeup_s
from .admission import AdmittedJob
from .cancellation import Cancellations
from .context import ReaderContext
from .dispatch import Dispatcher

log = logging.getLogger("jobworker.reader")

#: A backlog is sorted if it takes longer than this to run (seconds), so no job waits longer behind others. To
#: sort a tiny job takes longer than to run it: a shorter backlog is gone sooner if it is not sorted.
_WINDOW_S = 2.0
#: A backlog that is not sorted, whatever the rate (jobs).
_SMALL_BACKLOG = 128
#: Interval at which a take is repeated after one that found no job within the limits: another host may have
#: ended one.
_TAKE_AGAIN_S = 0.1

_new = tuple.__new__  # a named tuple's own constructor takes four times as long, once per job


class _FlowState:
    """Flow control of one stream."""

    def __init__(self) -> None:
        #: Whether all new entries are sorted.
        self.sorts_all = False
        self.waiting = 0
        #: Types of which handlers asked jobs to wait.
        self.asked_types: frozenset[str] = frozenset()
        #: Whether limits and weights were looked for that a shard gets from its stream.
        self.has_inherited = False
        #: No take before this time, unless an event may have made room.
        self.mono_take_s = 0.0


class FlowControl:
    """Sorts entries of each stream into lanes and takes jobs out of them. Methods raise as the store does."""

    def __init__(
        self,
        context: ReaderContext,
        dispatcher: Dispatcher,
        cancels: Cancellations,
        unread: Container[int] = (),
    ) -> None:
        """Of the streams ``unread`` no new entries are read, however many there are."""
        self._cancels = cancels
        self._unread = unread
        self._store = context.store
        self._streams = context.settings.streams
        self._type_names = tuple(context.settings.handlers)
        self._faults = context.faults
        self._metrics = context.metrics
        self._mono_s = context.mono_s
        self._dispatcher = dispatcher
        self._buffer = dispatcher.buffer
        self._states = [_FlowState() for _ in self._streams]
        self._mono_checked_s = 0.0
        # The last two rates of all workers since there are jobs: one may fall between two groups of outcomes.
        # Before the first, no backlog is known to be long.
        self._rates: tuple[float, ...] = ()
        # Whether there were jobs at the last look.
        self._had_jobs = False
        #: Limits and weights of the configuration file that are not on the server yet.
        self.file = context.settings.flow
        self._rules = context.lane_rules
        self._rules.update({stream_no: (LaneRules(), 0) for stream_no in range(len(self._streams))})

    # -- state of the store

    @property
    def mono_due_s(self) -> float:
        """When `refresh` has something to do, at the latest."""
        return next_wakeup_s(self._mono_checked_s)

    @property
    def has_waiting(self) -> bool:
        """Whether jobs wait in lanes."""
        return any(state.waiting for state in self._states)

    def refresh(self, mono_now_s: float, *, at_once: bool = False) -> bool:
        """At a common wake-up, count waiting jobs, read changed limits and cancelled entries; else False."""
        if mono_now_s < self.mono_due_s - EARLY_S and not at_once:
            return False
        self._mono_checked_s = mono_now_s
        if not at_once:
            self._note_rate()
        works = [stream_no for stream_no in range(len(self._streams)) if stream_no not in self._faults]
        self._store.ask_state([self._streams[stream_no] for stream_no in works])
        for stream_no in works:
            with self._faults.guard(stream_no):
                self._apply_file(stream_no)
                self._check(stream_no)
        if not self._faults.isolated:
            self.file = None
        self._dispatcher.is_sorted = any(state.sorts_all for state in self._states)
        return True

    def _note_rate(self) -> None:
        """Note how fast the workers are, if there have been jobs since the last look: a rate of the first
        moments is far too low."""
        had_jobs = self._had_jobs
        self._had_jobs = not (self._dispatcher.is_idle and self._buffer.empty)
        if not self._had_jobs:
            self._rates = ()
        elif had_jobs:
            self._rates = (*self._rates, self._dispatcher.jobs_per_s)[-2:]

    def _apply_file(self, stream_no: int) -> None:
        """Store the file's limits and weights once: a restart does not undo later changes by operators."""
        while self.file is not None:
            present = self._store.flow_config(self._streams[stream_no])
            new = msgspec.structs.replace(self.file, version=present.version)
            if present.origin == new.origin or self._store.configure(self._streams[stream_no], new):
                return

    def _check(self, stream_no: int) -> None:
        state, source = self._states[stream_no], self._streams[stream_no]
        backlog = self._store.backlog(source)
        if not backlog.version and not state.has_inherited:
            self._inherit(stream_no)
            backlog = self._store.backlog(source)
        state.has_inherited = True
        self._cancels.refresh(stream_no, backlog.cancels, backlog.cancelled)
        if backlog.version != self._rules[stream_no][1]:
            config = self._store.flow_config(source)
            self._check_limits(source.stream, config)
            self._rules[stream_no] = LaneRules(config.limits), config.version
            log.info("limits.changed", extra={"stream": source.stream, "version": config.version})
            self._sort_prefetched(stream_no)
        unlimited = any(
            count for name, count in backlog.waiting.items() if name not in self._limited(stream_no)
        )
        state.asked_types = backlog.asked_types
        sorts_all = unlimited or (backlog.lag > self._window() and stream_no not in self._unread)
        if sorts_all != state.sorts_all:
            fields = {
                "stream": source.stream,
                "queued": backlog.lag,
                "waiting": sum(backlog.waiting.values()),
            }
            if sorts_all:
                log.info("backlog.sorted", extra=fields)
            else:
                log.info("backlog.ended", extra=fields)
        state.sorts_all = sorts_all
        self._metrics.replace("z_novel_lane_jobs", (source.stream,), backlog.waiting)
        state.waiting = sum(backlog.waiting.values()) + backlog.in_series

    def _inherit(self, stream_no: int) -> None:
        """Give a new shard the limits and weights that were set for its stream."""
        source = self._streams[stream_no]
        stream = Source(logical_stream(source.stream), source.group)
        if stream != source:
            config = self._store.flow_config(stream)
            if config.version:
                self._store.configure(source, msgspec.structs.replace(config, version=0))

    def _check_limits(self, stream: str, config: FlowConfig) -> None:
        """Say that a limit holds in each shard by itself, if it spans tenants."""
        uneven = [limit.name for limit in config.limits if limit.key != "tenant"]
        if uneven and shard_count(stream):
            hint = "only limits of key tenant are exact with shards: clear the others"
            log.error("limits.per_shard", extra={"stream": stream, "limits": uneven, "hint": hint})

    def _window(self) -> float:
        """Number of jobs that may wait unsorted."""
        return max(_SMALL_BACKLOG, max(self._rates, default=math.inf) * _WINDOW_S)

    def _sort_prefetched(self, stream_no: int) -> None:
        """Limits have changed: prefetched jobs without the slots that they need now must wait for them."""
        limited = self._limited(stream_no)
        jobs = [
            job
            for job in self._buffer
            if job.stream_no == stream_no and self._type_names[job.type_no] in limited
        ]
        kept = {job.entry.id for job in self._with_slots(stream_no, jobs)}
        must_wait = [job for job in jobs if job.entry.id not in kept]
        if must_wait:
            self._buffer.discard(stream_no, {job.entry.id for job in must_wait})
            self._buffer.requeue(self._sort(stream_no, must_wait))

    # -- into lanes

    def sorts_all(self, stream_no: int) -> bool:
        """Whether all new entries of a stream are sorted, so that reading needs no credit of workers."""
        return self._states[stream_no].sorts_all

    def sorts_some(self, stream_no: int) -> bool:
        """Whether new entries of a stream may have to be sorted."""
        return self.sorts_all(stream_no) or bool(self._limited(stream_no))

    def divert(
        self, stream_no: int, jobs: Sequence[AdmittedJob], *, is_new: bool, in_series: bool = False
    ) -> Sequence[AdmittedJob]:
        """Sort the jobs that must wait for their turn; returns the others.

        Jobs that are not new were delivered before: they wait only if they lack the slots of a limit.
        ``in_series``: whether jobs may have a supersede key. These take turns within their series.
        """
        state = self._states[stream_no]
        limited = self._limited(stream_no)
        sorts_all = is_new and state.sorts_all
        if not jobs or not (limited or sorts_all or in_series):
            return jobs
        if sorts_all:
            return self._sort(stream_no, jobs)
        must_wait = [
            job
            for job in jobs
            if self._type_names[job.type_no] in limited
            or (job.conditions is not None and job.conditions.series)
        ]
        if must_wait and not is_new:
            with_slots = {job.entry.id for job in self._with_slots(stream_no, must_wait)}
            must_wait = [job for job in must_wait if job.entry.id not in with_slots]
        if not must_wait:
            return jobs
        left = {job.entry.id for job in self._sort(stream_no, must_wait)}
        waiting_ids = {job.entry.id for job in must_wait} - left
        return [job for job in jobs if job.entry.id not in waiting_ids]

    def is_limited(self, stream_no: int, type_no: int) -> bool:
        """Whether jobs of a type hold slots of limits."""
        return self._type_names[type_no] in self._limited(stream_no)

    def _limited(self, stream_no: int) -> frozenset[str]:
        """Types whose jobs must be taken out of lanes."""
        return self._rules[stream_no][0].limited_types | self._states[stream_no].asked_types

    def _with_slots(self, stream_no: int, jobs: Sequence[AdmittedJob]) -> list[AdmittedJob]:
        ids = [job.entry.id for job in jobs]
        holders = self._store.slot_holders(self._streams[stream_no], ids) if ids else set()
        return [job for job in jobs if job.entry.id in holders]

    def _sort(self, stream_no: int, jobs: Iterable[AdmittedJob]) -> list[AdmittedJob]:
        """Put jobs into lanes; returns those that have none, because they are malformed: a worker says so."""
        state, (rules, version) = self._states[stream_no], self._rules[stream_no]
        lanes: defaultdict[bytes, list[WaitingJob]] = defaultdict(list)
        malformed: list[AdmittedJob] = []
        for job in jobs:
            _, _, (entry_id, data, _, _), _, _, _ = job
            assert data is not None, "an admitted job has data"
            try:
                name = rules.name_of(read_flow_header(data))
            except (ValueError, RecursionError):  # the stack is deeper here than at the admission
                malformed.append(job)
                continue
            lanes[name].append(_new(WaitingJob, (entry_id, len(data))))
        refused = self._store.sort(self._streams[stream_no], version, lanes)
        state.waiting += sum(map(len, lanes.values())) - len(refused)
        state.mono_take_s = 0.0
        return malformed

    # -- out of lanes

    def wanted(self) -> list[int]:
        """Streams of which jobs may be taken now."""
        now_s = self._mono_s()
        return [
            stream_no
            for stream_no, state in enumerate(self._states)
            if state.waiting and state.mono_take_s <= now_s and stream_no not in self._faults
        ]

    def take(self, stream_no: int, count: int) -> list[Entry]:
        """Take jobs whose turn it is; sorts those again whose limits have changed."""
        state, source = self._states[stream_no], self._streams[stream_no]
        taken = self._store.take(source, self._runnable_types(), count)
        state.waiting = taken.waiting
        for name, number in taken.limited.items():
            self._metrics.count("z_novel_jobs_limited_total", (name,), number)
        if taken.outdated:
            self._check(stream_no)
            jobs = (
                AdmittedJob(stream_no, 0, entry, False) for entry in taken.outdated if entry.data is not None
            )
            self._buffer.requeue(self._sort(stream_no, jobs))
        elif not taken.entries:
            wait_s = _TAKE_AGAIN_S if taken.due_s is None else min(_TAKE_AGAIN_S, taken.due_s)
            state.mono_take_s = self._mono_s() + wait_s
        return taken.entries

    def _runnable_types(self) -> list[str]:
        return [name for type_no, name in enumerate(self._type_names) if not self._buffer.is_parked(type_no)]

    def record_settled(self, put_back: Mapping[int, Sequence[object]]) -> None:
        """Jobs have ended: their slots may let others start. Some were put back into lanes."""
        for stream_no, state in enumerate(self._states):
            state.mono_take_s = 0.0
            if stream_no in put_back:
                with self._faults.guard(stream_no):
                    self._check(stream_no)

    def sleep_s(self, limit_s: float) -> float:
        """Longest sleep before the next take."""
        now_s = self._mono_s()
        waits = [max(0.0, one.mono_take_s - now_s) for one in self._states if one.waiting and one.mono_take_s]
        return min([limit_s, *waits]) if self._dispatcher.credit else limit_s
