"""The reaper role: promotes due retries, enqueues cron jobs, finishes batches, trims streams, counts jobs.

It also moves entries into shards, removes idle consumers, and announces the types and streams of this
service in the job store.

It does not recover jobs of dead workers: the reader does. Reapers of several hosts may run at once, because
each step is atomic in the store.
"""

import logging
import math
import random
import select
import time
from collections.abc import Callable, Iterable

from .batches import BatchFinisher, batch_facts
from .cron.enqueuer import CronEnqueuer
from .errors import StoreUnavailable
from .forwarding import Forwarder
from .ipc.control import ALIVE_EVERY_S, BatchShown, ControlSocket, Drain, Ready, SetCron, ShowBatch
from .keys import OTHER_GROUP, Source, consumer_name
from .settings import Settings
from .shards import logical_stream
from .store.announcements import RENEW_INTERVAL_S
from .store.backoff import ReconnectBackoff
from .store.faults import StreamFaults
from .store.ports import Depths, ReaperStore, sum_depths
from .telemetry.metrics import MetricsBuffer
from .wakeups import next_wakeup_s

log = logging.getLogger("jobworker.reaper")

#: Longest sleep: another host may schedule a retry at any moment that is due before those we know.
_POLL_INTERVAL_S = 0.5
#: Time without a retry and a batch after which the reaper only wakes at the common wake-ups.
_QUIET_AFTER_S = 10.0
#: Retries per atomic step: a few ms in which the server runs nothing else.
_PROMOTE_BATCH = 200
#: Shorter than two common wake-ups, so that every second one counts.
_COUNT_INTERVAL_S = 1.7
_TRIM_INTERVAL_S = 10.0
#: Most characters of a tenant in a label: the length of a report is limited.
_TENANT_CHARS = 128
#: A consumer of another service without pending entries is removed after so much silence (in leases).
_IDLE_CONSUMER_LEASES = 20


class Reaper:
    """Loop of the reaper process.

    It survives an unavailable store: it retries with backoff. A stream that the store refuses is isolated;
    the others continue.
    """

    def __init__(
        self,
        store: ReaperStore,
        settings: Settings,
        control: ControlSocket,
        *,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._control = control
        self._mono_s = mono_s
        self._metrics = MetricsBuffer()
        self._error: str | None = None
        rng = rng or random.Random()
        self._backoff = ReconnectBackoff(rng)
        self._faults = StreamFaults(store, settings.streams, self._metrics.gauge, "reaper", rng, mono_s)
        self._known_groups: set[tuple[str, str]] = set()
        self._cron = CronEnqueuer(store, settings, self._metrics, mono_s)
        self._batches = BatchFinisher(store, settings, self._metrics, mono_s, wall_s)
        #: By stream number: where the next page of entries that belong to batches begins.
        self._mend_cursors = [b"0"] * len(settings.streams)
        self._forwarder = Forwarder(store, settings, self._metrics, self._faults, mono_s)
        #: When the other duties are due again, while entries are moved into shards in between.
        self._mono_due_s = -math.inf
        #: From when on there was no retry and no batch for so long that the reaper wakes less often.
        self._mono_quiet_s = mono_s() + _QUIET_AFTER_S
        self._mono_counted_s = -_COUNT_INTERVAL_S
        self._mono_announced_s = -RENEW_INTERVAL_S
        self._mono_trimmed_s = mono_s()

    def run(self) -> None:
        """Run cycles until the supervisor says drain or exits."""
        ready = connected = False
        while True:
            try:
                sleep_s = self.run_once(self._mono_s())
                if not connected:
                    log.info("reaper.connected")
                connected, self._error = True, None
                self._backoff.reset()
                ready = ready or self._control.send(Ready())
            except StoreUnavailable as error:
                connected = False
                sleep_s = self._back_off(error)
            self.report()
            if self._drain_requested(sleep_s):
                self._store.close()
                return

    def run_once(self, mono_now_s: float) -> float:
        """Run one cycle; returns seconds until the next. Raises `StoreUnavailable`."""
        if not self._forwarder.is_active:
            return self._run_duties(mono_now_s)
        if mono_now_s >= self._mono_due_s:
            self._mono_due_s = mono_now_s + self._run_duties(mono_now_s)
        more = self._forwarder.run_once()
        return 0.0 if more else max(0.0, self._mono_due_s - self._mono_s())

    def _run_duties(self, mono_now_s: float) -> float:
        for stream_no in self._faults.due() if self._faults.isolated else ():
            self._faults.resume(stream_no)
        works = [source.stream for no, source in enumerate(self._settings.streams) if no not in self._faults]
        self._store.ask_due(works, _PROMOTE_BATCH)
        next_due_s = [self._promote(stream_no) for stream_no in range(len(self._settings.streams))]
        cron_s = self._cron.run_once(self._faults.isolated)
        if self._finish_batches() or min(next_due_s, default=math.inf) < math.inf or self._faults.isolated:
            self._mono_quiet_s = mono_now_s + _QUIET_AFTER_S
        is_quiet = mono_now_s >= self._mono_quiet_s
        poll_s = next_wakeup_s(mono_now_s) - mono_now_s if is_quiet else _POLL_INTERVAL_S
        if mono_now_s - self._mono_counted_s >= _COUNT_INTERVAL_S:
            self._mono_counted_s = mono_now_s
            self._count()
        if mono_now_s - self._mono_announced_s >= RENEW_INTERVAL_S:
            self._mono_announced_s = mono_now_s
            self._announce()
        if mono_now_s - self._mono_trimmed_s >= _TRIM_INTERVAL_S:
            self._mono_trimmed_s = mono_now_s
            self._trim()
        return min(poll_s, cron_s, *next_due_s)

    def next_cron_s(self) -> float | None:
        """The time of the next tick of a cron table (unix seconds); None where there is none."""
        return self._cron.next_due_s()

    def report(self) -> None:
        """Send the supervisor metrics, error and warnings."""
        warnings = [*self._faults.warnings(), *self._cron.warnings(), *self._forwarder.warnings()]
        self._control.report(self._metrics, self._error, warnings=warnings, at_least_every_s=ALIVE_EVERY_S)

    def _promote(self, stream_no: int) -> float:
        """Move all due retries of a stream; returns seconds until the next is due, infinity without any."""
        stream = self._settings.streams[stream_no].stream
        while stream_no not in self._faults:
            with self._faults.guard(stream_no):
                moved, next_due_s = self._store.promote(stream, _PROMOTE_BATCH)
                if moved < _PROMOTE_BATCH:
                    return math.inf if next_due_s is None else max(0.0, next_due_s)
        return math.inf

    def _finish_batches(self) -> bool:
        """Whether a batch was due."""
        found = False
        for stream_no, source in enumerate(self._settings.streams):
            with self._faults.guard(stream_no):
                found = self._batches.run_once(source.stream) or found
        return found

    def _count(self) -> None:
        """Report the depths; those of shards count for the stream that they belong to."""
        found: dict[Source, list[Depths]] = {}
        for stream_no, source in enumerate(self._settings.streams):
            with self._faults.guard(stream_no):
                depths = self._store.depths(source)
                logical = Source(logical_stream(source.stream), source.group)
                found.setdefault(logical, []).append(depths)
                self._warn_of_groups(source, depths.other_groups)
        for source, parts in found.items():
            depths = sum_depths(parts)
            for name, labels, value in _gauges(source.stream, source.group, depths):
                self._metrics.gauge(name, labels, value)
            ages_s = {name[:_TENANT_CHARS]: age_s for name, age_s in depths.tenant_ages_s.items()}
            self._metrics.replace("z_novel_tenant_waiting_seconds", (source.stream,), ages_s)

    def _warn_of_groups(self, source: Source, others: Iterable[str]) -> None:
        """Warn once of each further group of a stream."""
        for other in others:
            if (source.stream, other) not in self._known_groups:
                self._known_groups.add((source.stream, other))
                log.warning(
                    "stream.other_group",
                    extra={
                        "stream": source.stream,
                        "group": source.group,
                        "other": other,
                        "hint": OTHER_GROUP,
                    },
                )

    def _announce(self) -> None:
        service = consumer_name(self._settings.host, self._settings.instance)
        self._store.announce(service, self._settings.handlers, self._settings.streams, self._settings.shards)

    def _trim(self) -> None:
        own_name = consumer_name(self._settings.host, self._settings.instance)
        idle_ms = int(self._settings.lease_s * 1000 * _IDLE_CONSUMER_LEASES)
        self._forwarder.check_used()
        for stream_no, source in enumerate(self._settings.streams):
            with self._faults.guard(stream_no):
                trimmed = self._store.trim(source.stream)
                self._store.forget_keys(source.stream)
                if freed := self._store.mend_slots(source):
                    log.warning("slots.freed", extra={"stream": source.stream, "entries": freed})
                self._mend_batches(stream_no, source)
                removed = self._store.remove_idle_consumers(source, own_name, idle_ms)
                if trimmed or removed:
                    log.debug(
                        "stream.trimmed",
                        extra={"stream": source.stream, "trimmed": trimmed, "consumers": removed},
                    )

    def _mend_batches(self, stream_no: int, source: Source) -> None:
        self._mend_cursors[stream_no], gone = self._store.mend_batches(source, self._mend_cursors[stream_no])
        if gone:
            log.warning("batch.entries_deleted", extra={"stream": source.stream, "entries": gone})

    def _show_batch(self, request: ShowBatch) -> None:
        """Answer a question of an HTTP client."""
        try:
            batch = self._batches.find(request.id)
            body, error = (batch_facts(batch) if batch else None), ""
        except StoreUnavailable as failure:
            body, error = None, str(failure)
        self._control.send(BatchShown(request.number, body, error))

    def _back_off(self, error: StoreUnavailable) -> float:
        if self._error is None:
            log.error("store.unavailable", extra={"error": str(error)})
        self._error = str(error)
        return self._backoff.next_wait_s()

    def _drain_requested(self, sleep_s: float) -> bool:
        """Sleep, or less if the supervisor sends a message. True if it says drain or has exited."""
        # Not select(): it takes no descriptor above 1,023.
        waiter = select.poll()
        waiter.register(self._control, select.POLLIN)
        for fd in self._forwarder.descriptors:
            waiter.register(fd, select.POLLIN)
        waiter.poll(sleep_s * 1000)
        try:
            while (received := self._control.receive()) is not None:
                match received[0]:
                    case Drain():
                        return True
                    case SetCron(tables):
                        self._cron.set_tables(tables)
                    case ShowBatch():
                        self._show_batch(received[0])
        except EOFError:
            return True
        return False


def _gauges(stream: str, group: str, depths: Depths) -> list[tuple[str, tuple[str, ...], float]]:
    return [
        ("z_novel_jobs_queued", (stream,), depths.queued),
        ("z_novel_jobs_waiting", (stream, "stream"), depths.lag),
        ("z_novel_jobs_waiting", (stream, "lanes"), depths.waiting),
        ("z_novel_jobs_pending", (stream,), depths.pending),
        ("z_novel_oldest_queued_seconds", (stream,), depths.oldest_age_s),
        ("z_novel_redis_stream_lag", (stream, group), depths.lag),
        ("z_novel_dlq_length", (stream,), depths.dead),
        ("z_novel_retry_scheduled", (stream,), depths.retrying),
    ]
