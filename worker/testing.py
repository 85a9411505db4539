"""Test harness for handlers: the service's roles in one process, on an in-memory store and a simulated clock.

It starts no server and no other process, and never sleeps. The code that decides about a job is the code of
the service.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import Any, NamedTuple, Self

from .admin.dead_letters import Letter, read_letter
from .batches import Batch, find_batch
from .cron.config import parse_cron_tables
from .envelope import Job, cancellation, job_of, read_payload
from .errors import MalformedPayload
from .event_loop import EventLoop
from .extension import Metric
from .functions.job_function import FunctionHandler, job_type_of
from .handler import BoundHandler, Outcomes, set_up
from .ipc.channel import Channel
from .ipc.control import Attach, ControlSocket, Drain, Report, SyncDone, WorkerExited
from .outcome import RetryPolicy
from .producer import Producer
from .reader.reader import Reader
from .reaper import Reaper
from .results import CancelOutcome, JobResult
from .runner import Runner
from .settings import Settings
from .store.memory.server import MemoryServer
from .store.memory.store import MemoryStore
from .store.ports import Entry, Settled, Settlement, do_nothing
from .telemetry.current_job import current
from .telemetry.metrics import all_metrics

__all__ = ["Harness", "Raised", "RetryPolicy", "Retrying", "Settings"]

#: Start of a harness's clock (unix seconds). It is always the same, so that recorded times are, too.
_WALL_START_S = 1_767_345_600.0
#: Longest run in real time. A handler that enqueues another job for each job would never end.
_LIMIT_S = 60.0
#: Rounds without a change after which nothing is left to run: a role sees another's work a round later.
_QUIET_ROUNDS = 3
#: Time until a service has noticed that jobs were cancelled.
_NOTICE_S = 1.0
#: Cause of the end of a worker whose job was cancelled.
_CANCELLED = "its jobs were cancelled, and the grace time is over"
#: Step of the clock while jobs are unfinished: probes of an open circuit breaker become due.
_STEP_S = 1.0
#: Without jitter retries wait exactly 2, 4 and 8 seconds.
_RETRY = RetryPolicy(jitter=0.0)
#: Definition of every counter of a handler.
_HANDLER_COUNTER = Metric("counter", "Counted by a handler")


class Raised(NamedTuple):
    """A failed try. Raise the error to see its traceback."""

    job: Job
    error: BaseException


class Retrying(NamedTuple):
    """A job that waits for its retry (or for the end of its ``delay``), and the seconds until then."""

    job: Job
    due_in_s: float


class _WorkerKilled(SystemExit):
    """Ends a worker from inside, in place of a kill by the supervisor."""


class _Store(MemoryStore):
    """Store that records acknowledged jobs."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server, "test")
        self.completed: list[Job] = []

    def settle(
        self, settlements: Sequence[Settlement], meanwhile: Callable[[], None] = do_nothing
    ) -> list[Settled]:
        all_bodies = [self.fetch(one.source, _done(one)) for one in settlements]
        results = super().settle(settlements, meanwhile)
        for one, bodies, result in zip(settlements, all_bodies, results, strict=True):
            for id in _done(one):
                if id not in result.refused and (data := bodies.get(id)) is not None:
                    self.completed.append(_job(data, one.source.stream, id.decode()))
        return results


def _done(settlement: Settlement) -> list[bytes]:
    """The entries whose jobs succeeded, also those whose result is kept."""
    return [*settlement.done, *(one.id for one in settlement.kept)]


class Harness:
    """The service with one worker, for tests. Only `advance` moves its clock.

    ``handlers`` maps types to handler classes (one object a worker, as in the service), to objects or to
    functions with `job`; a list of such functions will do, for each has its type. Of the ``settings``, these
    have an effect: streams, retry, max_payload, max_deaths, job_timeout_s, unique_window_s, cancel_grace_s
    and result_ttl_s. The default settings have no jitter. ``cron`` are tables with the keys of ``[[cron]]``
    in the configuration file; `advance` enqueues their jobs. Errors of a handler's ``setup`` are raised here,
    and `ValueError` for a wrong table.
    """

    def __init__(
        self,
        handlers: Mapping[str, Any] | Iterable[Callable[..., Any]],
        settings: Settings | None = None,
        *,
        cron: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        if not isinstance(handlers, Mapping):
            handlers = _by_type(handlers)
        settings = settings or Settings(retry=_RETRY, instance="test", host="test")
        names = {
            type_name: f"{type(one).__module__}:{type(one).__name__}" for type_name, one in handlers.items()
        }
        tables = parse_cron_tables(list(cron), [source.stream for source in settings.streams])
        self.settings = dataclasses.replace(
            settings, handlers=names, linger_s=0.0, cron=tables or settings.cron
        )
        #: The jobs of each call of a handler, in order.
        self.batches: list[list[Job]] = []
        #: The failed tries, in order.
        self.raised: list[Raised] = []
        self._handlers = handlers
        self._elapsed_s = 0.0
        self._working = False
        self._counts: dict[tuple[str, tuple[str, ...]], float] = {}
        self._server = MemoryServer(self.wall_now_s, blocking=False)
        self._store = _Store(self._server)
        self.producer = Producer(store=MemoryStore(self._server), wall_now_s=self.wall_now_s)
        #: As `Producer.enqueue`.
        self.enqueue = self.producer.enqueue
        first = self._set_up()  # first: if it raises, nothing else has to be closed
        self._sockets: list[ControlSocket] = []
        clock, rng = self.mono_now_s, random.Random(0)
        self._to_reader, control = self._control_pair()
        # Slowing down after worker deaths would only make tests wait.
        wall = self.wall_now_s
        self._reader = Reader(
            self._store, self.settings, control, mono_s=clock, wall_s=wall, rng=rng, slow_crashes=False
        )
        self._to_reaper, control = self._control_pair()
        reaper_store = MemoryStore(self._server)
        self._reaper = Reaper(
            reaper_store, self.settings, control, mono_s=clock, wall_s=self.wall_now_s, rng=rng
        )
        self._generation = 0
        self._worker: Runner | None = self._start_worker(first)
        self._to_reader.send(SyncDone())
        self.run()

    # -- time

    def wall_now_s(self) -> float:
        """The harness's wall clock (unix seconds)."""
        return _WALL_START_S + self._elapsed_s

    def mono_now_s(self) -> float:
        """The harness's monotonic clock (seconds)."""
        return 1.0 + self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Advance the clock and run everything that becomes due, each at its time.

        Inside a handler the call simulates work: the worker is killed if it exceeds the job's timeout, or its
        job was cancelled and the grace time is over.
        """
        if self._working:
            self._refresh_reader()
            self._elapsed_s += seconds
            return self._check_limits()
        end_s = self._elapsed_s + seconds
        self.run()
        while self._elapsed_s < end_s:
            self._elapsed_s = min(end_s, self._elapsed_s + self._next_step_s())
            self.run()

    def run(self) -> None:
        """Run all jobs that can run now, without advancing the clock.

        Raises TimeoutError if that does not end within a minute of real time.
        """
        give_up_at = time.monotonic() + _LIMIT_S
        quiet, before = 0, self._state()
        while quiet < _QUIET_ROUNDS:
            self._run_round()
            quiet, before = (quiet + 1, before) if self._state() == before else (0, self._state())
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"jobs do not end: {len(self.batches)} calls of handlers so far")

    # -- jobs

    def cancel(self, id: str, *, discard: bool = False) -> CancelOutcome:
        """As `Producer.cancel`; a handler may call it too, for its own job."""
        outcome = self.producer.cancel(id, discard=discard)
        if self._working:
            self._refresh_reader()
        else:
            self._elapsed_s += _NOTICE_S
            self.run()
        return outcome

    def result(self, id: str) -> JobResult:
        """The kept result of a job, after everything that can run now has run. Raises `TimeoutError` if it
        has none."""
        if not self._working:
            self.run()
        return self.producer.result(id, 0)

    def _refresh_reader(self) -> None:
        """Let the reader find what was cancelled, as it does each second while a handler runs."""
        if any(self._server.stream(source.stream).cancels for source in self.settings.streams):
            self._reader.refresh()
            self._loop.cancel_if_asked()

    def send(self, data: bytes | None, stream: str | None = None) -> None:
        """Append raw bytes to a stream, as any program can; None is an entry without the field ``data``."""
        self._server.append(stream or self.settings.streams[0].stream, data)

    @property
    def completed(self) -> list[Job]:
        """The acknowledged jobs, in order."""
        return list(self._store.completed)

    @property
    def retrying(self) -> list[Retrying]:
        """Scheduled retries and delayed jobs: stream by stream, soonest first."""
        now = self.wall_now_s()
        return [
            Retrying(_job(data, source.stream, ""), due - now)
            for source in self.settings.streams
            for due, _, data in sorted(self._server.stream(source.stream).retries)
        ]

    @property
    def dead(self) -> list[Letter]:
        """Dead letters of all streams, with reason and error."""
        return [
            read_letter(source.stream, Entry(b"0-%d" % number, data))
            for source in self.settings.streams
            for number, data in enumerate(self._server.dead_letters(source.stream))
        ]

    def batch(self, id: str) -> Batch | None:
        """A batch with its counts; None if there is none of this id."""
        return find_batch(self._store, [source.stream for source in self.settings.streams], id)

    @property
    def unfinished(self) -> int:
        """Number of jobs that are neither acknowledged, scheduled for a retry nor dead-lettered.

        They have not run yet, or are parked because a dependency of their handler is unavailable.
        """
        depths = [self._store.depths(source) for source in self.settings.streams]
        return sum(depth.queued + depth.pending for depth in depths)

    def metric(self, name: str, *labels: str) -> float:
        """Value of a counter or gauge; 0.0 if it is not set yet.

        ``labels`` are the values of its labels, in order. Raises ValueError for a name, type or stream that
        neither the service nor a handler of this harness has, and for a wrong number of labels.
        """
        self._check_metric(name, labels)
        self._reader.report()
        self._reaper.report()
        if self._worker is not None:
            self._worker.report()
        self._receive_reports()
        return self._counts.get((name, labels), 0.0)

    def _check_metric(self, name: str, labels: tuple[str, ...]) -> None:
        own = {f"z_novel_{counter}_total" for one in self._bound.values() for counter in one.counters}
        known = {**dict.fromkeys(own, _HANDLER_COUNTER), **all_metrics()}
        if name not in known:
            close = get_close_matches(name, known, 1) or [one for one in known if f"_{name}_" in one]
            declare = "a handler declares a counter in `counters`, with 0, in `__init__` or `setup`"
            hint = f"did you mean {close[0]}?" if close else declare
            raise ValueError(f"no metric {name!r}: {hint}")
        metric = known[name]
        if metric.kind == "histogram":
            raise ValueError(f"{name} is a histogram: metric() has counters and gauges only")
        if len(labels) != len(metric.labels):
            wanted = ", ".join(metric.labels) or "none"
            raise ValueError(f"{name} has {len(metric.labels)} labels ({wanted}), not {len(labels)}")
        streams = [source.stream for source in self.settings.streams]
        values = {"task_type": [*self.settings.handlers, "unknown"], "stream": streams}
        for label, value in zip(metric.labels, labels, strict=True):
            if value not in values.get(label, [value]):
                raise ValueError(f"{name}: no {label} {value!r} in this harness, only {values[label]}")

    # -- the end

    def close(self) -> None:
        """Release all resources."""
        if self._worker is not None:
            self._end_worker("closed", charge=False)
        self._to_reader.send(Drain())
        while not self._reader.drained:
            self._reader.run_once(0.0)
        self._reader.run()  # it is drained, so this only releases what it holds
        for sock in self._sockets:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what the supervisor does in the service

    def _control_pair(self) -> tuple[ControlSocket, ControlSocket]:
        """Control socket between this object, as the supervisor, and a role: our end, its end."""
        ours, sock = ControlSocket.pair()
        self._sockets += [ours, ControlSocket(sock)]
        return ours, self._sockets[-1]

    def _set_up(self) -> dict[str, BoundHandler]:
        made = {type_name: _made(one) for type_name, one in self._handlers.items()}
        self._loop = EventLoop()
        try:
            bound = set_up(made, self.settings, self._loop)
        except BaseException:
            self._loop.close()
            raise
        for one in bound.values():
            self._record(one)
        self._bound = bound
        return bound

    def _start_worker(self, bound: dict[str, BoundHandler]) -> Runner:
        self._generation += 1
        self._channel = Channel.create(self.settings.max_payload)
        self._to_reader.send(Attach(0, self._generation), self._channel.fds)
        self._to_worker, control = self._control_pair()
        streams = [source.stream for source in self.settings.streams]
        worker = Runner(
            self._channel, control, bound, streams, mono_s=self.mono_now_s, wall_s=self.wall_now_s
        )
        worker.begin()
        return worker

    def _end_worker(self, cause: str, *, charge: bool, timed_out: bool = False) -> None:
        self._to_reader.send(WorkerExited(0, self._generation, cause, charge, timed_out, {}))
        self._worker = None
        current.jobs, current.extend_deadline = (), None  # of the killed worker
        cancellation.of_job = cancellation.of_all = None
        self._loop.close()
        self._channel.close()

    def _run_round(self) -> None:
        self._reaper.run_once(self.mono_now_s())
        self._reader.run_once(0.0)
        self._work()
        self._receive_reports()

    def _work(self) -> None:
        if self._worker is None:
            self._worker = self._start_worker(self._set_up())
        self._working = True
        try:
            self._worker.run_once(0.0)
        except _WorkerKilled as killed:
            cancelled = str(killed) == _CANCELLED
            limit_s = self._channel.mono_deadline_s - self._channel.mono_since_s
            cause = f"SIGKILL ({_CANCELLED if cancelled else f'timeout of {limit_s:.6g} s'})"
            self._end_worker(cause, charge=not cancelled, timed_out=not cancelled)
        except SystemExit as leaving:
            self._end_worker(f"exit {leaving.code or 0}", charge=True)
        finally:
            self._working = False

    def _check_limits(self) -> None:
        deadline_s = self._channel.mono_deadline_s
        if self._channel.is_cancel_overdue(self.mono_now_s()):
            raise _WorkerKilled(_CANCELLED)
        if deadline_s and self.mono_now_s() > deadline_s:
            raise _WorkerKilled("the job exceeded its timeout")

    def _receive_reports(self) -> None:
        """Add up the metrics that the roles report; other messages do not matter here."""
        for control in (self._to_reader, self._to_reaper, self._to_worker):
            while received := control.receive():
                if isinstance(report := received[0], Report):
                    for name, labels, by in report.counts:
                        self._counts[name, labels] = self._counts.get((name, labels), 0.0) + by
                    self._counts |= {
                        (name, labels): value for name, labels, value in report.gauges if value is not None
                    }

    def _state(self) -> Any:
        """A value that changes with every step of a job."""
        depths = [self._store.depths(source) for source in self.settings.streams]
        return self._generation, len(self.batches), len(self._store.completed), depths

    def _next_step_s(self) -> float:
        """Seconds in which nothing can become due."""
        store = self._store
        dues = [store.promote(source.stream, 0).next_due_s for source in self.settings.streams]
        steps = [_STEP_S] if self.unfinished else []
        if (tick_s := self._reaper.next_cron_s()) is not None:
            steps.append(max(0.0, tick_s - self.wall_now_s()))
        return min([float("inf"), *steps, *(due for due in dues if due is not None)])

    # -- records of handler calls

    def _record(self, bound: BoundHandler) -> None:
        """Record the calls of a handler and its errors."""
        bound.handle = self._recorded(bound.handle)
        if bound.handle_batch is not None:
            bound.handle_batch = self._recorded_batch(bound.handle_batch)

    def _recorded(self, handle: Callable[[Job], object]) -> Callable[[Job], object]:
        def recorded(job: Job) -> object:
            self.batches.append([job])
            try:
                return handle(job)
            except MalformedPayload:
                self.batches.pop()  # the function was not called
                raise
            except BaseException as error:
                self.raised.append(Raised(job, error))
                raise

        return recorded

    def _recorded_batch(
        self, handle_batch: Callable[[Sequence[Job]], Outcomes]
    ) -> Callable[[Sequence[Job]], Outcomes]:
        def recorded(jobs: Sequence[Job]) -> Outcomes:
            self.batches.append(list(jobs))
            try:
                outcomes = handle_batch(jobs)
            except BaseException as error:
                self.raised += [Raised(job, error) for job in jobs]
                raise
            called = [job for job, error in zip(jobs, outcomes, strict=True) if not _is_malformed(error)]
            self.batches[-1:] = [called] if called else []
            pairs = zip(jobs, outcomes, strict=True)
            self.raised += [
                Raised(job, error)
                for job, error in pairs
                if isinstance(error, BaseException) and not _is_malformed(error)
            ]
            return outcomes

        return recorded


def _job(data: bytes, stream: str, entry_id: str) -> Job:
    return job_of(read_payload(data), stream, entry_id)


def _made(one: Any) -> Any:
    """The handler object of a class, a decorated function or an object."""
    if job_type_of(one) is not None:
        return FunctionHandler(one)
    return one() if isinstance(one, type) else one


def _by_type(functions: Iterable[Callable[..., Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in functions:
        type_name = job_type_of(one)
        if type_name is None:
            raise TypeError(f"{one!r} has no @job: give a mapping of types to handlers")
        if type_name in found:
            raise TypeError(f"two functions have the type {type_name}")
        found[type_name] = one
    return found


def _is_malformed(error: object) -> bool:
    return isinstance(error, MalformedPayload)
