"""Handlers under test: the service's own roles in one process, over a store in memory and a clock of its own.

Nothing is started and nothing is waited for: no server and no second process. What becomes of a job is
decided by the code that decides it in the service.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from .admin.dead_letters import Letter, read_letter
from .envelope import Job, job_of, reread_envelope
from .event_loop import EventLoop
from .handler import BoundHandler, set_up
from .ipc.channel import Channel
from .ipc.control import Attach, ControlSocket, Drain, Report, SyncDone, WorkerExited
from .outcome import RetryPolicy
from .producer import Producer
from .reader.reader import Reader
from .reaper import Reaper
from .runner import Runner
from .settings import Settings
from .store.memory.server import MemoryServer
from .store.memory.store import MemoryStore
from .store.ports import Entry, Settlement

__all__ = ["Harness", "Raised", "RetryPolicy", "Retrying", "Settings"]

#: When a harness's time begins, in unix seconds: the same in each, so that what is written down is too.
_WALL_START_S = 1_767_345_600.0
#: No run takes longer in real time; a handler that enqueues for each job another one would never end.
_LIMIT_S = 60.0
#: Rounds without a move until all is taken to be done: what one role does, the others see in the next.
_QUIET_ROUNDS = 3
#: While jobs wait for what their handler needs, it is seen so often whether one of them may be tried.
_STEP_S = 1.0
#: Retries wait exactly 2, 4 and 8 seconds.
_RETRY = RetryPolicy(jitter=0.0)


class Raised(NamedTuple):
    """A try that failed. The error has its traceback: raise it to see where it came from."""

    job: Job
    error: BaseException


class Retrying(NamedTuple):
    """A job that waits for its next try (or the end of its ``delay``) and the seconds until then."""

    job: Job
    due_in_s: float


class _WorkerKilled(SystemExit):
    """Ends a worker from within, where the supervisor would kill it."""


class _Store(MemoryStore):
    """Remembers what was acknowledged."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server, "test")
        self.completed: list[Job] = []

    def settle(self, settlements: Sequence[Settlement]) -> set[bytes]:
        """See `ReaderStore.settle`."""
        refused = super().settle(settlements)
        for source, done, _, _ in settlements:
            bodies = self.fetch(source, done)
            for id in done:
                if id not in refused and (data := bodies.get(id)) is not None:
                    self.completed.append(_job(data, source.stream, id.decode()))
        return refused


class Harness:
    """The service with one worker, for tests. Its time stands still but for `advance`.

    ``handlers`` maps types to handler classes (one object a worker, as in the service) or to objects.
    ``settings`` are the service's; what matters of them is streams, retry, max_payload, max_deaths and
    job_timeout_s. Without them retries have no jitter. What a handler's ``setup`` raises passes through.
    """

    def __init__(self, handlers: Mapping[str, Any], settings: Settings | None = None) -> None:
        settings = settings or Settings(retry=_RETRY, instance="test", host="test")
        names = {kind: f"{type(one).__module__}:{type(one).__name__}" for kind, one in handlers.items()}
        self.settings = dataclasses.replace(settings, handlers=names, linger_s=0.0)
        #: The jobs that each call of a handler was given, in order.
        self.batches: list[list[Job]] = []
        #: The tries that failed, in order.
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
        first = self._set_up()  # before anything is opened that would have to be closed if it raises
        self._links: list[ControlSocket] = []
        clock, rng = self.mono_now_s, random.Random(0)
        self._to_reader, link = self._line()
        self._reader = Reader(self._store, self.settings, link, mono_s=clock, rng=rng)
        self._to_reaper, link = self._line()
        self._reaper = Reaper(MemoryStore(self._server), self.settings, link, mono_s=clock, rng=rng)
        self._generation = 0
        self._worker: Runner | None = self._start_worker(first)
        self._to_reader.send(SyncDone())
        self.run()

    # -- time

    def wall_now_s(self) -> float:
        """The time here, in unix seconds."""
        return _WALL_START_S + self._elapsed_s

    def mono_now_s(self) -> float:
        """The same as a monotonic clock shows it."""
        return 1.0 + self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Let time pass, and everything be run that becomes due meanwhile, each at its moment.

        In a handler it is the duration of its work: the worker is killed if that exceeds the job's timeout.
        """
        if self._working:
            self._elapsed_s += seconds
            return self._heed_limit()
        end_s = self._elapsed_s + seconds
        self.run()
        while self._elapsed_s < end_s:
            self._elapsed_s = min(end_s, self._elapsed_s + self._next_step_s())
            self.run()

    def run(self) -> None:
        """Run all that can be run now, until nothing moves any more. Time stands still.

        Raises TimeoutError where that does not end within a minute of real time.
        """
        give_up_at = time.monotonic() + _LIMIT_S
        quiet, before = 0, self._state()
        while quiet < _QUIET_ROUNDS:
            self._go_round()
            quiet, before = (quiet + 1, before) if self._state() == before else (0, self._state())
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"jobs do not end: {len(self.batches)} calls of handlers so far")

    # -- jobs

    def send(self, data: bytes | None, stream: str | None = None) -> None:
        """Put these bytes on a stream as any program might; None is an entry without the field ``data``."""
        self._server.append(stream or self.settings.streams[0].stream, data)

    @property
    def completed(self) -> list[Job]:
        """The jobs that were acknowledged, in this order."""
        return list(self._store.completed)

    @property
    def retrying(self) -> list[Retrying]:
        """What waits for its time, soonest first of each stream."""
        now = self.wall_now_s()
        return [
            Retrying(_job(data, source.stream, ""), due - now)
            for source in self.settings.streams
            for due, _, data in sorted(self._server.stream(source.stream).retries)
        ]

    @property
    def dead(self) -> list[Letter]:
        """The dead letters of all streams, each with its reason and error."""
        return [
            read_letter(source.stream, Entry(b"0-%d" % number, data))
            for source in self.settings.streams
            for number, data in enumerate(self._server.dead_letters(source.stream))
        ]

    @property
    def unfinished(self) -> int:
        """How many jobs are in the streams and at no end: not run yet, or held while their type is paused
        because what its handler needs is unavailable."""
        depths = [self._store.depths(source) for source in self.settings.streams]
        return sum(depth.queued + depth.pending for depth in depths)

    def metric(self, name: str, *labels: str) -> float:
        """What a counter or gauge stands at; 0.0 where it was never touched."""
        self._reader.report()
        if self._worker is not None:
            self._worker.report()
        self._listen()
        return self._counts.get((name, labels), 0.0)

    # -- the end

    def close(self) -> None:
        """Give everything back."""
        if self._worker is not None:
            self._end_worker("closed", charge=False)
        self._to_reader.send(Drain())
        while not self._reader.drained:
            self._reader.run_once(0.0)
        self._reader.run()  # to its end, which is here
        for link in self._links:
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the supervisor's part

    def _line(self) -> tuple[ControlSocket, ControlSocket]:
        """A line between the supervisor, which is this object, and a role: our end, its end."""
        ours, sock = ControlSocket.pair()
        self._links += [ours, ControlSocket(sock)]
        return ours, self._links[-1]

    def _set_up(self) -> dict[str, BoundHandler]:
        made = {kind: one() if isinstance(one, type) else one for kind, one in self._handlers.items()}
        self._loop = EventLoop()
        try:
            bound = set_up(made, self.settings, self._loop)
        except BaseException:
            self._loop.close()
            raise
        for one in bound.values():
            self._watch(one)
        return bound

    def _start_worker(self, bound: dict[str, BoundHandler]) -> Runner:
        self._generation += 1
        self._channel = Channel.create(self.settings.max_payload)
        self._to_reader.send(Attach(0, self._generation), self._channel.fds)
        self._to_worker, link = self._line()
        streams = [source.stream for source in self.settings.streams]
        worker = Runner(self._channel, link, bound, streams, mono_s=self.mono_now_s, wall_s=self.wall_now_s)
        worker.begin()
        return worker

    def _end_worker(self, cause: str, *, charge: bool, timed_out: bool = False) -> None:
        self._to_reader.send(WorkerExited(0, self._generation, cause, charge, timed_out, {}))
        self._worker = None
        self._loop.close()
        self._channel.close()

    def _go_round(self) -> None:
        self._reaper.run_once(self.mono_now_s())
        self._reader.run_once(0.0)
        self._work()
        self._listen()

    def _work(self) -> None:
        if self._worker is None:
            self._worker = self._start_worker(self._set_up())
        self._working = True
        try:
            self._worker.run_once(0.0)
        except _WorkerKilled:
            self._end_worker("SIGKILL (timeout)", charge=True, timed_out=True)
        except SystemExit as leaving:
            self._end_worker(f"exit {leaving.code or 0}", charge=True)
        finally:
            self._working = False

    def _heed_limit(self) -> None:
        deadline_s = self._channel.mono_deadline_s
        if deadline_s and self.mono_now_s() > deadline_s:
            raise _WorkerKilled("ran past its limit")

    def _listen(self) -> None:
        """Add up what the roles report; of what else they say nothing matters here."""
        for line in (self._to_reader, self._to_reaper, self._to_worker):
            while received := line.receive():
                if isinstance(report := received[0], Report):
                    for name, labels, by in report.counts:
                        self._counts[name, labels] = self._counts.get((name, labels), 0.0) + by
                    self._counts |= {(name, labels): value for name, labels, value in report.gauges}

    def _state(self) -> Any:
        """What changes whenever anything moves."""
        depths = [self._store.depths(source) for source in self.settings.streams]
        return self._generation, len(self.batches), len(self._store.completed), depths

    def _next_step_s(self) -> float:
        """How long nothing can become due."""
        store = self._store
        dues = [store.promote(source.stream, 0).next_due_s for source in self.settings.streams]
        held = [_STEP_S] if self.unfinished else []
        return min([float("inf"), *held, *(due for due in dues if due is not None)])

    # -- what handlers are given

    def _watch(self, bound: BoundHandler) -> None:
        """Note what a handler is given, and what it raises."""
        bound.handle = self._watched(bound.handle)
        if bound.handle_batch is not None:
            bound.handle_batch = self._watched_batch(bound.handle_batch)

    def _watched(self, handle: Callable[[Job], object]) -> Callable[[Job], object]:
        def watched(job: Job) -> None:
            self.batches.append([job])
            try:
                handle(job)
            except BaseException as error:
                self.raised.append(Raised(job, error))
                raise

        return watched

    def _watched_batch(
        self, handle_batch: Callable[[Sequence[Job]], Sequence[BaseException | None]]
    ) -> Callable[[Sequence[Job]], Sequence[BaseException | None]]:
        def watched(jobs: Sequence[Job]) -> Sequence[BaseException | None]:
            self.batches.append(list(jobs))
            try:
                outcomes = handle_batch(jobs)
            except BaseException as error:
                self.raised += [Raised(job, error) for job in jobs]
                raise
            pairs = zip(jobs, outcomes, strict=True)
            self.raised += [Raised(job, error) for job, error in pairs if error is not None]
            return outcomes

        return watched


def _job(data: bytes, stream: str, entry_id: str) -> Job:
    return job_of(reread_envelope(data), stream, entry_id)
