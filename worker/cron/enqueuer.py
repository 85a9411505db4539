"""Enqueues the jobs of cron tables when they are due.

The reaper of every host runs it. The job store decides which host takes a tick, so each tick is taken once.
The store's clock decides when a tick is due.
"""

import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import orjson

from ..errors import StoreRefused
from ..keys import consumer_name
from ..new_job import NewJob, encode_job
from ..settings import Settings
from ..store.cron import CronStore, StoredTable, Taken, TickJob
from ..telemetry.metrics import MetricsBuffer
from .schedule import DueTicks, Schedule, due_ticks, next_tick, parse_schedule
from .table import CronTable, decode_table, digest, encode_table, tick_text

log = logging.getLogger("jobworker.cron")

#: Interval in which the service says what its file has (seconds).
_PUBLISH_INTERVAL_S = 30.0
#: Interval of looking for changed tables (seconds), and where no service has published any.
_CHECK_INTERVAL_S, _CHECK_NONE_INTERVAL_S = 2.0, 10.0
#: Time after which a refused stream is tried again (seconds).
_REFUSED_INTERVAL_S = 5.0
#: Ticks per stream and cycle, so that the reaper's other duties are not delayed after a long stop.
_MAX_TICKS = 500


@dataclass
class _InForce:
    """A published table. ``cursor_s`` is its last tick, as far as this host knows."""

    table: CronTable
    schedule: Schedule
    cursor_s: int
    next_s: int | None = None

    def move_to(self, cursor_s: int) -> None:
        """Set the last tick."""
        self.cursor_s = cursor_s
        self.next_s = next_tick(self.schedule, cursor_s)


@dataclass
class _StreamState:
    """What is known of one stream."""

    stream: str
    own: list[CronTable] = field(default_factory=list)
    running: dict[str, _InForce] = field(default_factory=dict)
    version: bytes = b""
    #: The tables or last ticks may have changed without a new version.
    outdated: bool = False
    mono_due_s: float = 0.0
    mono_publish_s: float = 0.0
    #: The store's clock minus ours, at the last answer.
    wall_offset_s: float = 0.0
    ticks_left: int = 0
    error: str = ""


class CronEnqueuer:
    """Publishes the tables of this service's file and takes due ticks of all published tables."""

    def __init__(
        self, store: CronStore, settings: Settings, metrics: MetricsBuffer, mono_s: Callable[[], float]
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._mono_s = mono_s
        self._types = settings.handlers.keys()
        self._service = consumer_name(settings.host, settings.instance)
        self._states = [_StreamState(source.stream) for source in settings.streams]
        self.set_tables(settings.cron)

    def set_tables(self, tables: Iterable[CronTable]) -> None:
        """The tables of this service's file, at the start and after HUP."""
        tables = list(tables)
        for table in tables:
            if table.type not in self._types:
                log.warning("cron.unknown_type", extra={"cron": table.name, "task_type": table.type})
        for state in self._states:
            state.own = [table for table in tables if table.stream == state.stream]
            state.mono_due_s = state.mono_publish_s = 0.0

    def warnings(self) -> list[str]:
        """Faults that an operator must repair."""
        return [f"cron on {state.stream}: {state.error}" for state in self._states if state.error]

    def run_once(self, isolated: Container[int] = ()) -> float:
        """Take what is due; returns seconds until the next call. Streams whose numbers are in ``isolated``
        are left out. Raises `StoreUnavailable`."""
        return min(
            (
                self._run_stream(state)
                for stream_no, state in enumerate(self._states)
                if stream_no not in isolated
            ),
            default=_CHECK_INTERVAL_S,
        )

    def next_due_s(self) -> float | None:
        """The time of the next tick of all tables (unix seconds); None where there is none."""
        dues = [running.next_s for state in self._states for running in state.running.values()]
        return min((due for due in dues if due is not None), default=None)

    def _run_stream(self, state: _StreamState) -> float:
        now = self._mono_s()
        if now >= state.mono_due_s:
            try:
                state.mono_due_s = now + self._take_due(state, now)
                state.error = ""
            except StoreRefused as error:
                state.mono_due_s = now + _REFUSED_INTERVAL_S
                self._note_refusal(state, error)
                self._gauge(state, now + state.wall_offset_s)
        return max(0.0, state.mono_due_s - now)

    def _note_refusal(self, state: _StreamState, error: StoreRefused) -> None:
        # A service without tables may have a user who is not allowed to use the key.
        if (state.own or state.running) and not state.error:
            state.error = str(error)
            log.error("cron.refused", extra={"stream": state.stream, "error": state.error})

    def _take_due(self, state: _StreamState, mono_now_s: float) -> float:
        """Returns seconds until the stream is looked at again."""
        if mono_now_s >= state.mono_publish_s:
            self._publish(state)
            state.mono_publish_s = mono_now_s + _PUBLISH_INTERVAL_S
        version, wall_now_s = self._store.cron_clock(state.stream)
        if state.own and not version:  # the key was deleted
            self._publish(state)
            version, wall_now_s = self._store.cron_clock(state.stream)
        if version != state.version or state.outdated:
            self._load(state)
        state.ticks_left, state.wall_offset_s = _MAX_TICKS, wall_now_s - mono_now_s
        for name in list(state.running):
            self._take_ticks(state, name, wall_now_s)
        self._gauge(state, wall_now_s)
        if not state.running:
            return _CHECK_INTERVAL_S if state.version else _CHECK_NONE_INTERVAL_S
        dues = [running.next_s - wall_now_s for running in state.running.values() if running.next_s]
        return max(0.0, min([_CHECK_INTERVAL_S, *dues]))

    def _publish(self, state: _StreamState) -> None:
        stored = [StoredTable(table.name, table.rule, encode_table(table)) for table in state.own]
        if self._store.cron_publish(state.stream, self._service, digest(state.own), stored):
            names = sorted(table.name for table in state.own)
            log.info("cron.published", extra={"stream": state.stream, "names": names})

    def _load(self, state: _StreamState) -> None:
        """Read the published tables and their last ticks."""
        found = self._store.cron_hash(state.stream)
        for name in state.running.keys() - found.tables.keys():
            self._metrics.gauge("z_novel_cron_late_seconds", (name,), 0.0)
        state.running = {}
        for name, data in found.tables.items():
            try:
                table = decode_table(data)
                schedule = parse_schedule(table.schedule, table.timezone)
            except ValueError as error:
                log.error("cron.table_unusable", extra={"cron": name, "error": str(error)})
                continue
            if (cursor_s := found.cursors_s.get(name)) is None:
                error_text = f"its last tick is missing: delete the key of {state.stream}'s cron tables"
                log.error("cron.table_unusable", extra={"cron": name, "error": error_text})
                continue
            state.running[name] = _InForce(table, schedule, cursor_s, next_tick(schedule, cursor_s))
        state.version, state.outdated = found.version, False

    def _due(self, state: _StreamState, name: str, wall_now_s: float) -> DueTicks:
        running = state.running.get(name)
        if running is None or running.next_s is None or running.next_s > wall_now_s:
            return DueTicks(None, [], 0)
        return due_ticks(running.schedule, running.table.missed, running.cursor_s, wall_now_s)

    def _take_ticks(self, state: _StreamState, name: str, wall_now_s: float) -> None:
        due = self._due(state, name, wall_now_s)
        if due.missed:
            # This process may have been suspended while another host took the ticks.
            self._load(state)
            due = self._due(state, name, wall_now_s)
        missed = due.missed
        if due.skip_to is not None:
            if not self._take(state, name, due.skip_to, wall_now_s, missed, drop=True):
                return
            missed = 0
        for tick_s in due.enqueue:
            if not state.ticks_left or not self._take(state, name, tick_s, wall_now_s, missed):
                return
            state.ticks_left -= 1
            missed = 0

    def _take(
        self, state: _StreamState, name: str, tick_s: int, wall_now_s: float, missed: int, drop: bool = False
    ) -> bool:
        """Take one tick or find that another host did. False: later ticks must wait."""
        running = state.running[name]
        table = running.table
        job = TickJob(name, tick_s) if drop else tick_job(table, tick_s, wall_now_s)
        taken = self._store.cron_take(state.stream, state.version, job)
        if taken.outcome is Taken.OUTDATED:
            state.outdated = True
            running.next_s = tick_s  # due at once
            return False
        running.move_to(taken.cursor_s)
        if taken.outcome is Taken.DONE:
            self._record(table, job, missed)
        return taken.outcome is not Taken.EARLY

    def _record(self, table: CronTable, job: TickJob, missed: int) -> None:
        about = {"cron": table.name, "tick": tick_text(job.tick_s)}
        if missed:
            self._metrics.count("z_novel_cron_missed_total", (table.name,), missed)
            log.warning("cron.missed", extra={**about, "missed": missed, "policy": table.missed})
        if job.data:
            self._metrics.count("z_novel_cron_enqueued_total", (table.name,))
            log.info("cron.enqueued", extra={**about, "job_id": job.job_id, "stream": table.stream})

    def _gauge(self, state: _StreamState, wall_now_s: float) -> None:
        for name, running in state.running.items():
            late_s = 0.0 if running.next_s is None else max(0.0, wall_now_s - running.next_s)
            self._metrics.gauge("z_novel_cron_late_seconds", (name,), late_s)


def tick_job(table: CronTable, tick_s: int, wall_now_s: float) -> TickJob:
    """The job of one tick. Its id and idempotency key come from name and tick."""
    id = table.job_id(tick_s)
    return TickJob(table.name, tick_s, id, cron_job(table, id, tick_s, wall_now_s))


def cron_job(table: CronTable, id: str, tick_s: int, wall_now_s: float) -> bytes:
    """JSON of a job of the table."""
    metadata = {**table.metadata, "idempotency_key": id, "cron_tick": tick_text(tick_s)}
    job = NewJob(
        table.type, orjson.Fragment(table.payload.encode()), table.tenant_id, table.project_id,
        id=id, metadata=metadata, timeout=table.timeout,
    )  # fmt: skip
    return encode_job(job, wall_now_s)[1]
