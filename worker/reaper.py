"""The reaper role: promotes due retries, trims streams, removes idle consumers. It does not recover jobs of
dead workers: the reader does."""

import logging
import random
import select
import time
from collections.abc import Callable

from .errors import StoreUnavailable
from .ipc.control import ControlSocket, Drain, Ready
from .keys import consumer_name
from .settings import Settings
from .store.backoff import ReconnectBackoff
from .store.ports import Depths, ReaperStore
from .telemetry.metrics import MetricsBuffer

log = logging.getLogger("jobworker.reaper")

#: Longest sleep: a retry may be scheduled by another host at any moment, with a due time before ours.
_LOOK_EVERY_S = 0.5
#: Retries moved in one atomic step: short enough not to hold the server up.
_PROMOTE_AT_ONCE = 200
_COUNT_EVERY_S = 2.0
_TRIM_EVERY_S = 10.0
#: Leases that a foreign consumer must have been silent for before its empty name is removed.
_CONSUMER_GONE_LEASES = 20


class Reaper:
    """The role. `run` returns when told to drain."""

    def __init__(
        self,
        store: ReaperStore,
        settings: Settings,
        link: ControlSocket,
        *,
        mono_s: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._link = link
        self._mono_s = mono_s
        self._tally = MetricsBuffer()
        self._trouble: str | None = None
        self._backoff = ReconnectBackoff(rng or random.Random())
        self._counted_at = -_COUNT_EVERY_S
        self._trimmed_at = mono_s()

    def run(self) -> None:
        """Sleep until the next retry is due, move it, now and then count and trim."""
        ready = False
        while True:
            try:
                sleep_s = self.run_once(self._mono_s())
                self._trouble = None
                self._backoff.reset()
                ready = ready or self._link.send(Ready())
            except StoreUnavailable as error:
                sleep_s = self._back_off(error)
            self._link.report(self._tally, self._trouble)
            if self._told_to_stop(sleep_s):
                self._store.close()
                return

    def run_once(self, now: float) -> float:
        """Do everything that is due; returns how long to sleep (seconds). Raises as the store does."""
        sleep_s = min([_LOOK_EVERY_S, *(self._promote(source.stream) for source in self._settings.streams)])
        if now - self._counted_at >= _COUNT_EVERY_S:
            self._counted_at = now
            self._count()
        if now - self._trimmed_at >= _TRIM_EVERY_S:
            self._trimmed_at = now
            self._tidy()
        return sleep_s

    def _promote(self, stream: str) -> float:
        """Move all that is due; returns seconds until the next."""
        while True:
            moved, next_due_s = self._store.promote(stream, _PROMOTE_AT_ONCE)
            if moved < _PROMOTE_AT_ONCE:
                return _LOOK_EVERY_S if next_due_s is None else max(0.0, next_due_s)

    def _count(self) -> None:
        for source in self._settings.streams:
            depths = self._store.depths(source)
            for name, labels, value in _gauges(source.stream, source.group, depths):
                self._tally.gauge(name, labels, value)

    def _tidy(self) -> None:
        me = consumer_name(self._settings.host, self._settings.instance)
        idle_ms = int(self._settings.lease_s * 1000 * _CONSUMER_GONE_LEASES)
        for source in self._settings.streams:
            trimmed = self._store.trim(source.stream)
            removed = self._store.remove_idle_consumers(source, me, idle_ms)
            if trimmed or removed:
                log.debug(
                    "stream.trimmed",
                    extra={"stream": source.stream, "trimmed": trimmed, "consumers": removed},
                )

    def _back_off(self, error: StoreUnavailable) -> float:
        if self._trouble is None:
            log.error("store.unavailable", extra={"error": str(error)})
        self._trouble = str(error)
        return self._backoff.next_wait_s()

    def _told_to_stop(self, sleep_s: float) -> bool:
        """Sleep, listening to the supervisor. True when it says drain, or is gone."""
        select.select([self._link], [], [], sleep_s)
        try:
            while (received := self._link.receive()) is not None:
                if isinstance(received[0], Drain):
                    return True
        except EOFError:
            return True
        return False


def _gauges(stream: str, group: str, depths: Depths) -> list[tuple[str, tuple[str, ...], float]]:
    return [
        ("z_novel_jobs_queued", (stream,), depths.queued),
        ("z_novel_jobs_pending", (stream,), depths.pending),
        ("z_novel_oldest_queued_seconds", (stream,), depths.oldest_age_s),
        ("z_novel_redis_stream_lag", (stream, group), depths.lag),
        ("z_novel_dlq_length", (stream,), depths.dead),
        ("z_novel_retry_scheduled", (stream,), depths.retrying),
    ]
