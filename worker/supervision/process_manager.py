"""Process manager: starts and restarts children, enforces job timeouts, relays control messages."""

import logging
import select
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from ..errors import Exit
from ..ipc.channel import READY, STOPPING, Channel
from ..ipc.control import (
    Attach,
    Drain,
    ExitReclaimed,
    HeldElsewhere,
    Message,
    Ready,
    Report,
    Retire,
    StartFailed,
    SyncDone,
    WorkerExited,
)
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings, cores
from ..telemetry.prometheus import PrometheusCollector
from .process import Child, Ended
from .signals import SignalQueue
from .slots import Slot, Standbys, state
from .status import child_status

log = logging.getLogger("jobworker.process_manager")

#: Between asking a worker past its limit for its stacks and killing it.
_DUMP_S = 0.3
#: Reader and reaper report several times a second, but a call to a slow store may hold them for 5 s.
_STUCK_AFTER_S = 15.0
#: Time for a child to set itself up; a handler may load gigabytes from a slow disk.
_BOOT_WITHIN_S = 600.0
#: A start that long ago is past its imports, which keep a processor busy; what follows is mostly waiting.
_IMPORTS_S = 1.0
#: Starts at once on a machine of few processors.
_LEAST_STARTS = 2
#: Ends in a row before a place was ready, after which nothing is to be hoped from another try.
_BOOT_TRIES, _LOOP_TRIES = 3, 6
_GAUGES_EVERY_S = 0.5
#: Exits of a reader that an operator or the kernel (out of memory) may cause at any moment.
_FROM_OUTSIDE = frozenset({"SIGKILL", "SIGTERM"})


class ProcessManager:
    """All children of the service but its embedded stores."""

    def __init__(self, settings: Settings, metrics: PrometheusCollector) -> None:
        self._settings = settings
        self._metrics = metrics
        self._reader = Slot("reader")
        self._reaper = Slot("reaper")
        self._workers = [Slot("worker", slot) for slot in range(settings.procs)]
        self._places = [self._reader, self._reaper, *self._workers]
        self._spares = Standbys()
        self._marks = CrashMarks.create()
        self._exited: dict[tuple[int, int], tuple[WorkerExited, Channel]] = {}
        # Places whose worker of this generation or before is to be exchanged.
        self._to_restart: deque[tuple[Slot, int]] = deque()
        #: Goes up while the reader completes read cycles.
        self.progress = 0
        self._verdict: Exit | None = None
        self._was_complete = False
        self._draining = False
        # Whether any reader of this service has held the instance's name.
        self._had_name = False
        self._mono_started_s = 0.0
        self._mono_connected_by_s = 0.0
        self._mono_gauged_s = 0.0

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._mono_started_s > 0

    def start(self, settings: Settings) -> None:
        """From the next turn on hold all places filled; the settings now have the stores' urls."""
        self._settings = settings
        self._mono_started_s = time.monotonic()
        self._mono_connected_by_s = self._mono_started_s + settings.connect_timeout_s

    def turn(self, now: float) -> Exit | None:
        """One step towards the desired state; an exit code where it cannot be reached."""
        for place in self._places:
            for child in place.children():
                self._receive(child, now)
                self._collect(place, child, now)
        for place in self._places:
            self._fill(place, now)
            for child in place.children():
                self._enforce(child, now)
                child.flush()
            self._recycle(place, now)
        self._roll(now)
        # A spare that begins must not take the processor from those that are waited for.
        wanted = self._steady and not self._draining and not self._beginning(now)
        self._spares.keep(self._settings, now, wanted=wanted)
        if now - self._mono_gauged_s > _GAUGES_EVERY_S:
            self._mono_gauged_s = now
            self._metrics.put(("z_novel_workers", (state,), n) for state, n in self.states().items())
        self._check_startup(now)
        return self._verdict

    def wait(self, timeout_s: float, queue: SignalQueue) -> None:
        """Sleep until a signal, a message or an end, or until the time is over."""
        poll = select.poll()
        poll.register(queue, select.POLLIN)
        for child in self._children():
            poll.register(child.pidfd, select.POLLIN)
            poll.register(child.link, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def _children(self) -> Iterator[Child]:
        for place in self._places:
            yield from place.children()
        yield from self._spares

    # -- news

    def _receive(self, child: Child, now: float) -> None:
        try:
            while (received := child.link.receive()) is not None:
                child.mono_heard_s = now
                self._handle(child, received[0])
        except EOFError:
            return  # it has ended or is about to; `_collect` sees to it

    def _handle(self, child: Child, message: Message) -> None:
        match message:
            case Ready():
                child.ready = True
                self._had_name |= child is self._reader.child
                log.info("child.ready", extra={"child": child.name, "process_id": child.pid})
            case Report(counts, gauges, histograms, trouble, progress):
                # A store that does not answer is no standstill of ours, and no restart mends it.
                waits = trouble is not None and child is self._reader.child
                self.progress += waits or progress != child.progress
                child.progress = progress
                self._metrics.add(counts)
                self._metrics.put(gauges)
                self._metrics.merge(histograms)
                child.trouble = trouble
            case ExitReclaimed(slot, generation):
                self._exited.pop((slot, generation))[1].close()
            case HeldElsewhere():
                self._note_held(message)
            case StartFailed(error, exit_code):
                child.trouble = error
                # At the first start, and for what no later try can mend, this ends the service.
                if not self._was_complete or exit_code == Exit.USAGE:
                    log.critical("child.start_failed", extra={"child": child.name, "error": error})
                    self._verdict = Exit(exit_code)
            case _:
                log.error("control.unexpected_message", extra={"child": child.name})

    def _note_held(self, held: HeldElsewhere) -> None:
        """End a service that never had the name once the other is seen to live; one that had it waits."""
        wait_until = time.monotonic() + held.left_s + self._settings.connect_timeout_s
        self._mono_connected_by_s = max(self._mono_connected_by_s, wait_until)
        if held.renewed and not self._had_name and self._verdict is None:
            log.critical("child.start_failed", extra={"error": (
                f"instance {self._settings.instance!r} is held by {held.by}: "
                "stop that service, or give this one its own --instance"
            )})  # fmt: skip
            self._verdict = Exit.USAGE

    # -- ends and starts

    def _collect(self, place: Slot, child: Child, now: float) -> None:
        ended = child.collect()
        if ended is None:
            return
        self._receive(child, now)
        if child is place.successor:
            place.successor = None
            self._to_restart.clear()
            log.error("restart.aborted", extra={"child": child.name, "cause": ended.cause})
        else:
            place.child, place.successor = place.successor, None
        self._handle_exit(place, child, ended, now)
        child.close()

    def _handle_exit(self, place: Slot, child: Child, ended: Ended, now: float) -> None:
        # A worker says STOPPING before it leaves; a handler that calls os._exit(0) does not.
        left = child.channel is not None and child.channel.phase == STOPPING and ended.clean
        # TERM may come before its handler is installed. A SIGKILL that we did not send is no regular stop: a
        # job that kills its worker, also by using up memory, is charged with it, even while we drain.
        stopped = ended.clean if child.channel is None else ended.cause == "SIGTERM" or child.killed_by_drain
        expected = left or (child.stopping and stopped)
        if not expected:
            cause = child.kill_cause or ended.cause
            log.error("child.exited", extra={
                "child": child.name, "process_id": child.pid, "cause": cause,
                "peak_rss_mib": ended.peak_rss_mib, "stack": ended.stack or None,
            })  # fmt: skip
            self._metrics.add([("z_novel_worker_restarts_total", (child.role, cause), 1)])
            place.unexpected_exits += 1
            place.backoff.ended(now, was_ready=child.ready, lived_s=now - child.mono_started_s)
        if child.channel is not None:
            self._record_exit(child, child.channel, ended, charge=not expected)
        elif place is self._reader:
            self._count_reader_death(child, ended)

    def _count_reader_death(self, child: Child, ended: Ended) -> None:
        """Count a strike against the entry that the reader was reading when it ended."""
        # A reader that is blocked (a full stderr pipe, SIGSTOP) is not the entry's fault; nor is
        # one that was overdue and has reported since.
        spins = child.mono_killed_s is not None and child.was_computing
        suspect = self._marks.record_death(proven=spins or ended.cause not in _FROM_OUTSIDE)
        if suspect is not None:
            stream = self._settings.streams[suspect.stream_no].stream
            log.error("reader.died_at_entry", extra={
                "stream": stream, "entry_id": suspect.entry_id.decode(), "poison": suspect.is_poison,
            })  # fmt: skip

    def _record_exit(self, child: Child, channel: Channel, ended: Ended, *, charge: bool) -> None:
        timed_out = child.kill_cause == "timeout"
        cause = f"{ended.cause} ({child.kill_cause})" if child.kill_cause else ended.cause
        details = {"peak_rss_mib": ended.peak_rss_mib, "stack": ended.stack}
        gone = WorkerExited(child.slot, child.generation, cause, charge, timed_out, details)
        self._exited[child.slot, child.generation] = (gone, channel)
        self._tell_reader(gone)

    def _fill(self, place: Slot, now: float) -> None:
        wanted = not self._draining or (place is self._reader and not self._settled)
        if place.child is None and wanted and not place.backoff.wait_s(now) and self._has_turn(place, now):
            place.child = self._spawn(place, now)

    def _has_turn(self, place: Slot, now: float) -> bool:
        """Whether a start may begin: workers one after another, so that reader, reaper and the first worker
        are there soon where there are more places than processors."""
        return place.role != "worker" or self._beginning(now) < max(_LEAST_STARTS, cores())

    def _beginning(self, now: float) -> int:
        """How many that have a place are in their imports."""
        children = (child for place in self._places for child in place.children())
        return sum(not child.ready and now - child.mono_started_s < _IMPORTS_S for child in children)

    def _spawn(self, place: Slot, now: float) -> Child:
        place.generation += 1
        if place.role == "worker":
            channel = Channel.create(self._settings.max_payload)
            child = Child(now)
            child.begin(place.role, place.slot, place.generation, self._settings, now, channel)
            self._tell_reader(Attach(child.slot, child.generation), channel.fds)
            return child
        # While draining the spares have been told to end like all others.
        child = (None if self._draining else self._spares.take()) or Child(now)
        marks = self._marks if place is self._reader else None
        child.begin(place.role, place.slot, place.generation, self._settings, now, marks=marks)
        child.stopping = self._draining
        if place is self._reader:
            self._resync_reader(child)
        return child

    def _resync_reader(self, reader: Child) -> None:
        """Tell a new reader of every worker, and of those gone that the reader before did not deal with."""
        for place in self._workers:
            for child in place.children():
                assert child.channel is not None
                reader.tell(Attach(child.slot, child.generation), child.channel.fds)
        for gone, channel in self._exited.values():
            reader.tell(Attach(gone.slot, gone.generation), channel.fds)
            reader.tell(gone)
        reader.tell(SyncDone())
        if self._draining:
            reader.tell(Drain())

    def _tell_reader(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """A reader that is not there now will be briefed when it is."""
        if self._reader.child is not None:
            self._reader.child.tell(message, fds)

    # -- limits

    def _enforce(self, child: Child, now: float) -> None:
        overdue = self._overdue(child, now)
        if not overdue:
            child.mono_killed_s = None
        elif child.mono_killed_s is None:
            child.mono_killed_s = now
            child.kill_cause = overdue
            child.was_computing = child.is_computing()
            child.kill(signal.SIGUSR2)
        elif now - child.mono_killed_s > (_DUMP_S if overdue != "rss" else 0.0):
            child.kill(signal.SIGKILL)  # what is too large already is not given time to grow

    def _overdue(self, child: Child, now: float) -> str:
        """Why a child has to be ended, or nothing."""
        if not child.ready:
            return "boot" if now - child.mono_started_s > _BOOT_WITHIN_S else ""
        if child.channel is None:
            return "stuck" if now - child.mono_heard_s > _STUCK_AFTER_S else ""
        deadline = child.channel.mono_deadline_s
        if deadline:
            if now > deadline:
                return "timeout"
            return "rss" if self._too_large(child) else ""
        idle = child.channel.phase == READY and now - child.channel.mono_heartbeat_s > _STUCK_AFTER_S
        return "stuck" if idle else ""

    def _check_startup(self, now: float) -> None:
        """Notice when the service is complete for the first time, or will never be."""
        if self._verdict is not None or self._draining:
            return
        if not self._was_complete:
            self._was_complete = all(place.child and place.child.ready for place in self._places)
            reader = self._reader.child
            if now > self._mono_connected_by_s and not (reader and reader.ready):
                trouble = reader.trouble if reader else None
                log.critical("store.unreachable", extra={"error": trouble})
                self._verdict = Exit.STORE_UNREACHABLE
            elif any(place.backoff.unready_ends >= _BOOT_TRIES for place in self._places):
                self._verdict = Exit.BOOT_FAILED
        elif all(place.backoff.unready_ends >= _LOOP_TRIES for place in self._workers):
            log.critical("crash_loop.detected", extra={"hint": "no worker stays up"})
            self._verdict = Exit.CRASH_LOOP

    # -- exchange, drain, end

    def restart_workers(self) -> None:
        """Exchange every worker for a new one, one by one; each goes only when its successor is ready."""
        self._to_restart = deque((place, place.generation) for place in self._workers)

    @property
    def restarting(self) -> bool:
        """Whether workers are still to be exchanged."""
        return bool(self._to_restart)

    def _roll(self, now: float) -> None:
        if not self._to_restart or self._draining:
            return
        place, generation = self._to_restart[0]
        if place.child is None:
            return
        if place.successor is None:
            if place.child.generation > generation:
                self._to_restart.popleft()
            else:
                place.successor = self._spawn(place, now)
        elif place.successor.ready and not place.child.stopping:
            self._stop_worker(place.child)

    def _recycle(self, place: Slot, now: float) -> None:
        """Exchange a worker that has run long enough or grown too large while it had nothing to do."""
        child = place.child
        if child is None or child.channel is None or not child.ready or child.stopping:
            return
        limits = self._settings
        old = limits.max_age_s and now - child.mono_started_s > limits.max_age_s
        tired = limits.max_jobs and child.channel.finished >= limits.max_jobs
        large = not child.channel.mono_deadline_s and self._too_large(child)
        if (old or tired or large) and (place, child.generation) not in self._to_restart:
            log.info("worker.recycle_due", extra={"child": child.name})
            self._to_restart.append((place, child.generation))

    def _too_large(self, child: Child) -> bool:
        return bool(self._settings.max_rss_mib) and child.rss_mib() > self._settings.max_rss_mib

    def _stop_worker(self, child: Child) -> None:
        self._tell_reader(Retire(child.slot, child.generation))
        child.stopping = True
        child.kill(signal.SIGTERM)

    def drain(self) -> None:
        """Let running jobs end, take nothing new."""
        self._draining = True
        self._tell_reader(Drain())
        if self._reaper.child:
            self._reaper.child.tell(Drain())
        for child in self._children():
            child.stopping = True
            if child.channel is not None:
                child.kill(signal.SIGTERM)
        for child in self._spares:
            child.kill(signal.SIGKILL)

    @property
    def _steady(self) -> bool:
        """Whether reader and reaper are ready, so that a standby may start."""
        both = (self._reader.child, self._reaper.child)
        return self._was_complete and all(child is not None and child.ready for child in both)

    @property
    def _settled(self) -> bool:
        """Whether a drained reader has nothing left to do."""
        return not self._exited and not any(place.child for place in self._workers)

    @property
    def drained(self) -> bool:
        """Whether every child has ended."""
        return self._settled and not any(True for _ in self._children())

    def kill_workers(self) -> None:
        """The drain time is over: what still runs goes back unharmed."""
        for child in self._children():
            if child.channel is not None:
                child.killed_by_drain = True
                child.kill(signal.SIGKILL)

    def end_now(self) -> None:
        """Kill and collect every child."""
        for child in self._children():
            child.kill(signal.SIGKILL)
        for child in self._children():
            child.wait(_STUCK_AFTER_S)
            child.close()
        for place in self._places:
            place.child = place.successor = None
        self._spares.forget()

    # -- state

    def reasons(self) -> list[str]:
        """Why the service is not ready; nothing where it is."""
        return [reason for place in self._places for reason in place.reasons()]

    def children(self, now: float) -> list[dict[str, Any]]:
        """Every child as /status shows it."""
        return [
            {
                "state": state(child),
                "restarts": place.unexpected_exits,
                **child_status(child, self._settings, now),
            }
            for place in self._places
            for child in place.children()
        ]

    def states(self) -> dict[str, int]:
        """How many workers are in which state."""
        states = Counter({"starting": 0, "idle": 0, "busy": 0, "stopping": 0})
        for place in self._workers:
            states[state(place.child)] += 1
        return dict(states)
