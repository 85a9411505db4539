"""Shares of the shards: which of them this reader serves first.

While all readers are busy, each shard is read by one of them, and its server gets the commands of one. A
reader with an idle worker, or that owns nothing, reads all shards.
"""

import logging
import math

from ..errors import Fenced, StoreUnavailable
from ..shards import shard_names
from .context import EARLY, ReaderContext
from .dispatch import Dispatcher

log = logging.getLogger("jobworker.reader")

#: Longest interval between renewals, and number of intervals after which a silent reader's shards are free.
_RENEW_EVERY_S = 1.8
_INTERVALS = 3


class ShardLeases:
    """The shards that this reader owns, by stream number. Methods raise as the store does."""

    def __init__(self, context: ReaderContext, dispatcher: Dispatcher) -> None:
        settings = context.settings
        self._store = context.store
        self._faults = context.faults
        self._dispatcher = dispatcher
        self._count = settings.shards
        self._streams = settings.streams
        #: Streams whose new entries are moved into shards: nothing is read from them.
        self.spread = frozenset(settings.spread_streams)
        numbers = {source.stream: stream_no for stream_no, source in enumerate(settings.streams)}
        #: Stream number of a spread stream -> stream numbers of its shards.
        self._shard_nos = {
            stream_no: [numbers[name] for name in shard_names(self._streams[stream_no].stream, self._count)]
            for stream_no in settings.spread_streams
        }
        self._shared = frozenset(number for shard_nos in self._shard_nos.values() for number in shard_nos)
        #: Stream number of a spread stream -> stream numbers of the own shards.
        self._owned: dict[int, frozenset[int]] = {}
        self._interval_s = min(_RENEW_EVERY_S, settings.lease_s / 3)
        self._mono_renewed_s = -self._interval_s

    @property
    def mono_due_s(self) -> float:
        """When `refresh` has something to do, at the latest."""
        return self._mono_renewed_s + self._interval_s if self.spread else math.inf

    def refresh(self, mono_now_s: float) -> None:
        """If it is time, renew the share and adapt it to the number of readers."""
        if not self.spread or mono_now_s - self._mono_renewed_s < self._interval_s * EARLY:
            return
        self._mono_renewed_s = mono_now_s
        for stream_no, shard_nos in self._shard_nos.items():
            if stream_no in self._faults:
                continue
            with self._faults.guard(stream_no):
                name = self._streams[stream_no].stream
                mine = self._store.share_shards(name, _INTERVALS * self._interval_s, self._count)
                owned = frozenset(shard_nos[number] for number in mine)
                if owned != self._owned.get(stream_no):
                    self._owned[stream_no] = owned
                    fields = {"stream": name, "shards": sorted(mine), "of": self._count}
                    log.info("shards.shared", extra=fields)

    def readable(self) -> frozenset[int]:
        """Numbers of the streams of which new jobs may be taken now."""
        every = frozenset(range(len(self._streams)))
        if not self.spread:
            return every
        owned = frozenset[int]().union(*self._owned.values())
        if not owned or self._dispatcher.has_idle_worker:
            return every - self.spread
        return every - self.spread - (self._shared - owned)

    def leave(self) -> None:
        """Before exit: free the own shards at once. They expire if that fails."""
        for stream_no in self.spread:
            try:
                self._store.share_shards(self._streams[stream_no].stream, 0.0, self._count)
            except (StoreUnavailable, Fenced):
                return
