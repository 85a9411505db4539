"""Lost leases: entries in flight here that another consumer has taken over. Each is counted once."""

import logging
from collections import defaultdict
from collections.abc import Sequence

from ..keys import Source
from ..telemetry.metrics import MetricsBuffer

log = logging.getLogger("jobworker.reader")


class LostLeases:
    """Lost entries by stream number, as far as they are still in flight here.

    A loss shows when a lease is renewed or when the outcome is refused, whichever is first.
    """

    def __init__(self, streams: Sequence[Source], metrics: MetricsBuffer) -> None:
        self._streams = streams
        self._metrics = metrics
        self._lost: dict[int, set[bytes]] = defaultdict(set)
        #: When the leases of all streams were last renewed. Entries that were read since have newer ones.
        self.mono_renewed_s = 0.0
        for source in streams:  # start at 0, so that alerts see the first event as a rise
            metrics.count("z_novel_leases_lost_total", (source.stream,), 0)

    def in_flight(self, stream_no: int) -> set[bytes]:
        """The lost entries of a stream that were in flight at its last renewal."""
        return self._lost[stream_no]

    def record_renewal(self, stream_no: int, lost: set[bytes]) -> None:
        """The renewal of all entries of a stream found these lost; any other one is ours, perhaps again."""
        if new := lost - self._lost[stream_no]:
            log.warning("lease.lost", extra=self._count(stream_no, new))
        self._lost[stream_no] = lost

    def record_settlement(self, stream_no: int, refused: set[bytes], ids: set[bytes]) -> None:
        """Of the outcomes of ``ids`` these were refused. None of them is in flight any more."""
        if refused:
            fields = self._count(stream_no, refused - self._lost[stream_no])
            log.warning("settle.refused", extra={**fields, "entries": len(refused)})
        self._lost[stream_no] -= ids

    def _count(self, stream_no: int, entry_ids: set[bytes]) -> dict[str, object]:
        """Count lost entries; returns the fields of the log line."""
        stream = self._streams[stream_no].stream
        self._metrics.count("z_novel_leases_lost_total", (stream,), len(entry_ids))
        return {"entries": len(entry_ids), "stream": stream}
