"""Forwarder: moves the entries of spread streams into their shards.

Producers that know nothing of shards write to the stream itself. The forwarders of several hosts may run at
once: the store lets one move at a time, and a repeated step has no effect.
"""

import logging
import math
import select
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping

from .envelope import BATCH_FIELD, is_batch_id
from .keys import consumer_name
from .settings import Settings
from .shards import shard_names, shard_number_of
from .store.faults import StreamFaults
from .store.forwarding import ForwardEntry, Forwarding
from .store.ports import ReaperStore
from .telemetry.metrics import MetricsBuffer

log = logging.getLogger("jobworker.reaper")

#: Time for which no other host moves entries: a host that is lost delays them by this much.
_LEASE_S = 2.0
#: Entries of one step, and steps of one cycle: the reaper has other duties.
_PART, _PARTS = 1000, 20
#: A network that drops packets answers no wait.
_OVERDUE_S = 5.0
#: Time for which drained shards must stay empty before they are forgotten: producers learn the number of
#: shards within a shorter time.
_EMPTY_S = 120.0
#: Batches of which it is known that a shard counts their jobs.
_KNOWN_BATCHES = 10_000


class Forwarder:
    """Moves entries of spread streams, in `run_once`. Methods raise as the store does.

    ``descriptors`` become readable when there is something to move. ``warnings`` name shards with jobs that
    this service does not read.
    """

    def __init__(
        self,
        store: ReaperStore,
        settings: Settings,
        metrics: MetricsBuffer,
        faults: StreamFaults,
        mono_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._faults = faults
        self._mono_s = mono_s
        self._by = consumer_name(settings.host, settings.instance)
        self._streams = settings.streams
        self._spread = settings.spread_streams
        self._read = frozenset(source.stream for source in settings.streams)
        #: Stream number -> descriptor of its watch, and when it is overdue.
        self._watches: dict[int, tuple[int, float]] = {}
        self._batches: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._unread: dict[str, str] = {}
        #: Stream and number of shards that are drained -> since when they are empty.
        self._mono_empty_s: dict[tuple[str, int], float] = {}
        for stream_no in self._spread:
            self._metrics.count("z_novel_jobs_forwarded_total", (self._streams[stream_no].stream,), 0)

    @property
    def is_active(self) -> bool:
        """Whether any stream is spread."""
        return bool(self._spread)

    @property
    def descriptors(self) -> list[int]:
        """Descriptors of the waits for new entries."""
        return [fd for fd, _ in self._watches.values()]

    def warnings(self) -> list[str]:
        """One text for each stream with shards that are not read."""
        return list(self._unread.values())

    def run_once(self) -> bool:
        """Move what is there; whether there may be more."""
        more = False
        for stream_no in self._spread:
            if stream_no not in self._faults:
                with self._faults.guard(stream_no):
                    self._end_watch(stream_no)
                    more = self._move(stream_no) or more
        return more

    def _end_watch(self, stream_no: int) -> None:
        """End the wait for new entries if it was answered, or should have been."""
        fd, mono_overdue_s = self._watches.get(stream_no, (-1, math.inf))
        if self._mono_s() >= mono_overdue_s or (fd >= 0 and _is_readable(fd)):
            del self._watches[stream_no]
            self._store.end_watch(self._streams[stream_no].stream)

    def _move(self, stream_no: int) -> bool:
        source = self._streams[stream_no]
        for _ in range(_PARTS):
            part = self._store.forward_take(source, self._by, _LEASE_S, self._settings.shards, _PART)
            if part is None:
                return False
            if not part.entries:
                self._watch(stream_no, part.taken)
                return False
            self._send(source.stream, part)
            self._store.forward_done(source.stream, [entry.id for entry in part.entries])
            self._metrics.count("z_novel_jobs_forwarded_total", (source.stream,), len(part.entries))
        return True

    def _watch(self, stream_no: int, after: bytes) -> None:
        if stream_no not in self._watches:
            fd = self._store.begin_watch(self._streams[stream_no].stream, after)
            if fd is not None:
                self._watches[stream_no] = fd, self._mono_s() + _OVERDUE_S

    def _send(self, stream: str, part: Forwarding) -> None:
        """Append entries to their shards. All must be there before later ones are sent, because a shard tells
        by the last one which it has."""
        names = shard_names(stream, part.shards)
        by_shard: defaultdict[str, list[ForwardEntry]] = defaultdict(list)
        for entry in part.entries:
            number, metadata = shard_number_of(part.shards, entry.value)
            by_shard[names[number]].append(entry)
            self._count_in_shard(stream, names[number], metadata)
        for shard, entries in by_shard.items():
            if not self._store.forward_add(shard, stream, entries):
                extra = {"stream": shard, "jobs": len(entries), "replicas": self._settings.wait_replicas}
                log.warning("move.not_replicated", extra=extra)

    def _count_in_shard(self, stream: str, shard: str, metadata: Mapping[str, str]) -> None:
        """Let the shard count the end of a batch's job. Its own stream keeps it in the total."""
        batch = metadata.get(BATCH_FIELD, "")
        if not batch or not is_batch_id(batch) or (shard, batch) in self._batches:
            return
        record = self._store.batch_hash(stream, batch)
        home = record.home or stream if record else ""
        if not home or self._store.batch_hash(home, batch) is None:
            return
        self._store.batch_open(home, batch, {f"stream/{shard}": b"1"})
        self._store.batch_add(shard, batch, home, [])
        self._batches[shard, batch] = None
        if len(self._batches) > _KNOWN_BATCHES:
            self._batches.popitem(last=False)

    # -- shards of other numbers

    def check_used(self) -> None:
        """Look for shards that this service does not read, and forget drained ones that stay empty."""
        for stream_no, source in enumerate(self._streams):
            if source.stream in self._settings.logical_streams:
                with self._faults.guard(stream_no):
                    self._check_used(source.stream)

    def _check_used(self, stream: str) -> None:
        used = self._store.used_shards(stream)
        unread = sorted(count for count in used if not self._read.issuperset(shard_names(stream, count)))
        warned = stream in self._unread
        self._unread.pop(stream, None)
        if unread:
            hint = "give " + " ".join(f"--drain-shards {count}" for count in unread)
            self._unread[stream] = f"stream {stream} has shards that this service does not read: {hint}"
            if not warned:
                log.error("shards.unread", extra={"stream": stream, "shards": unread, "hint": hint})
        for count in used.intersection(self._settings.drain_shards):
            self._check_drained(stream, count)

    def _check_drained(self, stream: str, count: int) -> None:
        names = shard_names(stream, count)
        for source in [one for one in self._streams if one.stream in names]:
            depths = self._store.depths(source)
            if depths.queued or depths.pending or depths.retrying or depths.dead:
                self._mono_empty_s.pop((stream, count), None)
                return
        since_s = self._mono_empty_s.setdefault((stream, count), self._mono_s())
        if self._mono_s() - since_s >= _EMPTY_S:
            self._store.forget_shards(stream, count)
            log.info(
                "shards.drained", extra={"stream": stream, "shards": count, "hint": "drop --drain-shards"}
            )


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
