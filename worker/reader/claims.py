"""Claims: sweeps through the pending entries of a stream for those whose lease has expired."""

import logging
from collections import Counter

from ..store.ports import Entry
from .context import EARLY, ReaderContext

log = logging.getLogger("jobworker.reader")

#: Longest interval between two looks for a service that is gone. Its name expires one lease after its last
#: heartbeat, so its jobs are taken over this much later at most.
_LOOK_EVERY_S = 1.8
#: Shortest interval between two log lines about one stream: a lost host may have had 100,000 jobs.
_LOG_EVERY_S = 1.0
#: Entry id where a sweep starts and ends.
_START = b"0-0"


class Claims:
    """Sweeps under way, by stream number.

    A sweep starts each third of a lease, and sooner if `has_lost` finds a service whose name has expired. It
    continues in each tick while the workers have credit, so the survivors share the jobs of a lost host by
    their pace. Methods raise as the store does.
    """

    def __init__(self, context: ReaderContext) -> None:
        self._store = context.store
        self._streams = context.settings.streams
        self._metrics = context.metrics
        self._mono_s = context.mono_s
        self._lease_s = context.settings.lease_s
        self._look_every_s = min(_LOOK_EVERY_S, self._lease_s / 3)
        self._cursors: dict[int, bytes] = {}
        self._mono_looked_s = context.mono_s()
        self._unlogged: Counter[int] = Counter()
        self._mono_logged_s: dict[int, float] = {}
        for source in self._streams:  # start at 0, so that alerts see the first event as a rise
            self._metrics.count("z_novel_leases_taken_over_total", (source.stream,), 0)

    @property
    def under_way(self) -> list[int]:
        """The streams whose sweep has not ended."""
        return list(self._cursors)

    def begin(self, stream_no: int) -> None:
        """Start a sweep, unless one is under way."""
        self._cursors.setdefault(stream_no, _START)

    def drop(self, stream_no: int) -> None:
        """End the sweep of a stream."""
        self._cursors.pop(stream_no, None)

    @property
    def mono_check_due_s(self) -> float:
        """When the next check is due, at the latest."""
        return self._mono_looked_s + self._look_every_s

    def is_check_due(self) -> bool:
        """Whether `has_lost` should be called for each stream now; true once an interval."""
        now = self._mono_s()
        if now - self._mono_looked_s < self._look_every_s * EARLY:
            return False
        self._mono_looked_s = now
        return True

    def has_lost(self, stream_no: int) -> bool:
        """Whether a service is gone and leases of it have expired."""
        return self._store.has_lost(self._streams[stream_no], self._idle_ms)

    def claim(self, stream_no: int, count: int) -> list[Entry]:
        """Continue the sweep of a stream: claim at most ``count`` entries. It ends when the list does."""
        source, cursor = self._streams[stream_no], self._cursors[stream_no]
        cursor, entries = self._store.claim(source, self._idle_ms, count, cursor)
        self._cursors[stream_no] = cursor
        if cursor == _START:
            self.drop(stream_no)
        return entries

    def record(self, stream_no: int, claimed: int) -> None:
        """Count entries that were taken over from another consumer."""
        stream = self._streams[stream_no].stream
        self._metrics.count("z_novel_leases_taken_over_total", (stream,), claimed)
        self._unlogged[stream_no] += claimed

    def log(self) -> None:
        """Log what was claimed since the last line of each stream, at most once a second."""
        now = self._mono_s()
        for stream_no, claimed in list(self._unlogged.items()):
            if now - self._mono_logged_s.get(stream_no, -_LOG_EVERY_S) >= _LOG_EVERY_S:
                self._mono_logged_s[stream_no] = now
                del self._unlogged[stream_no]
                fields = {"entries": claimed, "stream": self._streams[stream_no].stream}
                log.warning("lease.claimed", extra=fields)

    @property
    def _idle_ms(self) -> int:
        return int(self._lease_s * 1000)
