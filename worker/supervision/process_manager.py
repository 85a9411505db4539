"""Process manager: starts and restarts children, relays control messages."""

import logging
import select
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from ..cron.table import CronTable
from ..errors import Exit
from ..flow import FlowConfig
from ..ipc.channel import STOPPING, Channel
from ..ipc.control import (
    Attach,
    BatchShown,
    Configure,
    Drain,
    ExitReclaimed,
    HeldElsewhere,
    Message,
    Ready,
    Report,
    Retire,
    SetCron,
    ShowBatch,
    StartFailed,
    SyncDone,
    WorkerExited,
)
from ..ipc.crash_marks import CrashMarks
from ..settings import Settings, cores
from ..store_advice import store_advice
from ..telemetry.line_writer import take_dropped_lines
from ..telemetry.prometheus import PrometheusCollector
from .batch_mailbox import BatchAnswer, BatchMailbox
from .child_limits import STUCK_AFTER_S, ChildLimits
from .forkserver import ForkServer
from .process import Child, ProcessExit, RestartBackoff
from .process_groups import ProcessGroups
from .signals import SignalQueue
from .slots import Slot, state
from .status import child_status
from .work_estimate import WorkEstimate

log = logging.getLogger("jobworker.process_manager")

#: How long a drain waits for a report of the forkserver when every worker has exited.
_STUCK_AT_STOP_S = 3.0
#: A child is past its imports, which use a whole CPU, after this time. The rest of its set-up mostly waits.
_IMPORTS_S = 1.0
#: Workers that may import at once on a machine with few CPUs.
_MIN_PARALLEL_STARTS = 2
#: Consecutive exits before becoming ready, after which we stop restarting: at the first start, and later.
_MAX_START_ATTEMPTS, _CRASH_LOOP_EXITS = 3, 6
_GAUGES_EVERY_S = 0.5
#: Causes that an operator or the kernel (out of memory) can produce at any moment: no proof against an entry.
_EXTERNAL_CAUSES = frozenset({"SIGKILL", "SIGTERM"})


class ProcessManager:
    """All children of the service except its embedded servers.

    `tick` brings the processes one step closer to the desired state; nothing here blocks but `wait` and
    `kill_all`. An exited worker is kept in ``_exited`` until the reader has reclaimed its jobs, so that a
    reader that dies in between loses nothing.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: PrometheusCollector,
        server: ForkServer,
        new_child: Callable[..., Child] = Child,
        *,
        api_fd: int | None = None,
    ) -> None:
        """``api_fd``: listening socket of the role ``api``; None: there is no such role."""
        self._settings = settings
        self._metrics = metrics
        self._server = server
        self._limits = ChildLimits(settings)
        self._new_child = new_child
        self._reader = Slot("reader")
        self._reaper = Slot("reaper")
        self._workers = [Slot("worker", number) for number in range(settings.procs)]
        self._api = None if api_fd is None else Slot("api")
        self._api_fd = api_fd
        self._slots = [self._reader, self._reaper, *self._workers, *filter(None, [self._api])]
        self._groups = ProcessGroups()
        self._marks = CrashMarks.create()
        self._exited: dict[tuple[int, int], tuple[WorkerExited, Channel]] = {}
        # Slots to restart: the worker of this generation or an earlier one is replaced.
        self._to_restart: deque[tuple[Slot, int]] = deque()
        #: Increases while the reader completes read cycles; the watchdog of systemd follows it.
        self.progress = 0
        #: Questions about batches, which the reaper answers.
        self.batches = BatchMailbox()
        self._work = WorkEstimate()
        self._exit_code: Exit | None = None
        self._was_complete = False
        self._draining = False
        # Whether any reader of this service has held the instance's name.
        self._had_name = False
        self._mono_started_s = 0.0
        self._mono_connect_by_s = 0.0
        self._mono_gauged_s = 0.0

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._mono_started_s > 0

    def start(self, settings: Settings, now: float) -> None:
        """Start children from the next `tick` on. ``settings`` has the addresses of the embedded servers."""
        self._settings = settings
        self._mono_started_s = now
        self._mono_connect_by_s = now + settings.connect_timeout_s

    def set_cron(self, tables: tuple[CronTable, ...]) -> None:
        """Replace the cron tables for this reaper and every later one."""
        self._settings = replace(self._settings, cron=tables)
        if self._reaper.child is not None:
            self._reaper.child.send(SetCron(tables))

    def pass_questions(self) -> None:
        """Pass questions about batches to the reaper."""
        for number, id in self.batches.take().items():
            if self._reaper.child is not None:
                self._reaper.child.send(ShowBatch(number, id))

    def tick(self, now: float) -> Exit | None:
        """Take one step towards the desired state. Returns an exit code if that state is out of reach."""
        self._collect_server()
        for slot in self._slots:
            for child in slot.children():
                self._receive(child, now)
                self._collect(slot, child, now)
        for slot in self._slots:
            self._ensure_child(slot, now)
            for child in slot.children():
                self._check_server(child, now)
                self._limits.enforce(child, now)
                child.flush()
            self._schedule_recycle(slot, now)
        self._groups.tick(now)
        self._continue_restart(now)
        if now - self._mono_gauged_s > _GAUGES_EVERY_S:
            self._mono_gauged_s = now
            self._metrics.put(("z_novel_workers", (state,), n) for state, n in self.states().items())
            self._metrics.add([("z_novel_log_lines_dropped_total", (), take_dropped_lines())])
            self._metrics.put(self._work.gauges(self._metrics))
        self._check_startup(now)
        return self._exit_code

    def wait(self, timeout_s: float, queue: SignalQueue, more_fds: Iterable[int] = ()) -> None:
        """Sleep until a signal, a message or an exit arrives, at most ``timeout_s`` seconds.

        It ends also when one of ``more_fds`` is readable.
        """
        poll = select.poll()
        poll.register(queue, select.POLLIN)
        for fd in more_fds:
            poll.register(fd, select.POLLIN)
        for child in self._children():
            poll.register(child.event_fd, select.POLLIN)
            if not child.hung_up:
                poll.register(child.control, select.POLLIN)
        poll.poll(timeout_s * 1000)

    def _children(self) -> Iterator[Child]:
        for slot in self._slots:
            yield from slot.children()

    # -- messages from children

    def _receive(self, child: Child, now: float) -> None:
        try:
            while (received := child.control.receive()) is not None:
                child.mono_last_message_s = now
                self._handle(child, received[0], now)
        except EOFError:
            # The child has exited or is about to: `_collect` handles it when the forkserver reports it. Until
            # then the socket stays readable, and polling it would keep a CPU busy.
            child.hung_up = True
        except ValueError:  # no message of ours: a handler wrote to the descriptor
            log.error("control.unexpected_message", extra={"child": child.name})

    def _handle(self, child: Child, message: Message, now: float) -> None:
        match message:
            case Ready():
                child.ready = True
                self._had_name |= child is self._reader.child
                log.info("child.ready", extra={"child": child.name, "process_id": child.pid})
            case Report():
                self._handle_report(child, message)
            case ExitReclaimed(slot, generation):
                self._exited.pop((slot, generation))[1].close()
            case HeldElsewhere():
                self._handle_held_name(message, now)
            case BatchShown(number, batch, error):
                self.batches.answer(number, BatchAnswer(batch, error))
            case StartFailed(error, exit_code):
                child.trouble = error
                # This ends the service at its first start, and whenever no later attempt can succeed.
                if not self._was_complete or exit_code == Exit.USAGE:
                    log.critical("child.start_failed", extra={"child": child.name, "error": error})
                    self._exit_code = Exit(exit_code)
            case _:
                log.error("control.unexpected_message", extra={"child": child.name})

    def _handle_report(self, child: Child, report: Report) -> None:
        # A store that does not answer is not a hang of this service, and no restart repairs it.
        waits_for_store = report.trouble is not None and child is self._reader.child
        self.progress += waits_for_store or report.progress != child.progress
        child.progress = report.progress
        self._metrics.add(report.counts)
        self._metrics.put(report.gauges)
        self._metrics.merge(report.histograms)
        self._work.record(report.counts, report.histograms)
        child.trouble = report.trouble
        child.warnings = report.warnings

    def _handle_held_name(self, held: HeldElsewhere, now: float) -> None:
        """Another service holds the instance's name.

        A service that never had the name ends once it sees that the other one is alive. A service that had it
        waits.
        """
        wait_until = now + held.left_s + self._settings.connect_timeout_s
        self._mono_connect_by_s = max(self._mono_connect_by_s, wait_until)
        if held.renewed and not self._had_name and self._exit_code is None:
            log.critical("child.start_failed", extra={"error": (
                f"instance {self._settings.instance!r} is held by {held.by}: "
                "stop that service, or give this one its own --instance"
            )})  # fmt: skip
            self._exit_code = Exit.USAGE

    # -- exits and starts

    def _collect_server(self) -> None:
        """Log the exit of the forkserver. The next start of a child starts its successor."""
        code = self._server.collect()
        if code is None:
            return
        cause = signal.Signals(-code).name if code < 0 else f"exit {code}"
        log.error("child.exited", extra={"child": "forkserver", "cause": cause})
        self._metrics.add([("z_novel_worker_restarts_total", ("forkserver", cause), 1)])

    def _collect(self, slot: Slot, child: Child, now: float) -> None:
        exited = child.collect()
        if exited is None:
            return
        self._receive(child, now)
        if child.channel is not None:
            self._groups.end(child.pid, now)
        if child is slot.successor:
            slot.successor = None
            self._to_restart.clear()
            log.error("restart.aborted", extra={"child": child.name, "cause": exited.cause})
        else:
            slot.child, slot.successor = slot.successor, None
        self._handle_exit(slot, child, exited, now)
        child.close()

    def _handle_exit(self, slot: Slot, child: Child, exited: ProcessExit, now: float) -> None:
        expected = _is_expected(child, exited)
        if not expected:
            cause = child.kill_cause or exited.cause
            log.error("child.exited", extra={
                "child": child.name, "process_id": child.pid, "cause": cause,
                "peak_rss_mib": exited.peak_rss_mib, "stack": exited.stack or None,
            })  # fmt: skip
            self._metrics.add([("z_novel_worker_restarts_total", (child.role, cause), 1)])
            slot.unexpected_exits += 1
            # A child that ended with the forkserver has not failed to start, ready or not.
            was_able = child.ready or exited.with_forkserver
            slot.backoff.record_exit(now, was_ready=was_able, lived_s=now - child.mono_started_s)
        if child.channel is not None:
            # No job is to blame for the exit of the forkserver; one that was cancelled is not charged.
            charge = not expected and not exited.with_forkserver and child.kill_cause != "cancelled"
            self._record_exit(child, child.channel, exited, charge=charge)
        elif slot is self._reader:
            self._count_reader_death(child, exited)

    def _count_reader_death(self, child: Child, exited: ProcessExit) -> None:
        """Count a strike against the entry that the reader was reading when it exited."""
        # A blocked reader (a full stderr pipe, SIGSTOP) is not the entry's fault. Neither is a reader that
        # was overdue and has reported since.
        endless_loop = child.mono_overdue_s is not None and child.was_computing
        suspect = self._marks.record_death(proven=endless_loop or exited.cause not in _EXTERNAL_CAUSES)
        if suspect is not None:
            stream = self._settings.streams[suspect.stream_no].stream
            log.error("reader.died_at_entry", extra={
                "stream": stream, "entry_id": suspect.entry_id.decode(), "poison": suspect.is_poison,
            })  # fmt: skip

    def _record_exit(self, child: Child, channel: Channel, exited: ProcessExit, *, charge: bool) -> None:
        """Keep the exit of a worker until the reader has reclaimed its jobs, and report it to the reader."""
        timed_out = child.kill_cause == "timeout"
        limit = f" ({self._limits.describe(child, channel)})" if child.kill_cause else ""
        details = {"peak_rss_mib": exited.peak_rss_mib, "stack": exited.stack}
        message = WorkerExited(
            child.slot_no, child.generation, exited.cause + limit, charge, timed_out, details
        )
        self._exited[child.slot_no, child.generation] = (message, channel)
        self._send_to_reader(message)

    def _ensure_child(self, slot: Slot, now: float) -> None:
        wanted = not self._draining or (slot is self._reader and not self._settled)
        if slot.child is None and wanted and not slot.backoff.wait_s(now) and self._may_start(slot, now):
            slot.child = self._try_spawn(slot, now)

    def _may_start(self, slot: Slot, now: float) -> bool:
        """Whether a start may begin now.

        Workers start one after another: reader, reaper and the first worker are ready soon even where there
        are more slots than CPUs.
        """
        return slot.role != "worker" or self._count_importing(now) < max(_MIN_PARALLEL_STARTS, cores())

    def _count_importing(self, now: float) -> int:
        """Number of children in slots that are still at their imports."""
        children = (child for slot in self._slots for child in slot.children())
        return sum(not child.ready and now - child.mono_started_s < _IMPORTS_S for child in children)

    def _try_spawn(self, slot: Slot, now: float) -> Child | None:
        """Start a child. None if the system is short of descriptors, processes or memory: try again later.

        Only a service that was never complete gives up after some attempts.
        """
        try:
            return self._spawn(slot, now)
        except OSError as error:
            slot.backoff.record_exit(now, was_ready=self._was_complete, lived_s=0.0)
            log.error("child.spawn_failed", extra={"child": slot.role, "error": str(error)})
            return None

    def _spawn(self, slot: Slot, now: float) -> Child:
        slot.generation += 1
        new_child = partial(
            self._new_child, self._server, slot.role, slot.number, slot.generation, self._settings, now
        )
        if slot.role == "worker":
            channel = Channel.create(self._settings.max_payload)
            try:
                child = new_child(channel=channel)
            except OSError:
                channel.close()
                raise
            self._send_to_reader(Attach(child.slot_no, child.generation), channel.fds)
            return child
        child = new_child(
            marks=self._marks if slot is self._reader else None,
            listener_fd=self._api_fd if slot is self._api else None,
        )
        child.stopping = self._draining
        if slot is self._reader:
            self._resync_reader(child)
        return child

    def _resync_reader(self, reader: Child) -> None:
        """Send a new reader every worker, and every exited worker that no reader has reclaimed."""
        for slot in self._workers:
            for child in slot.children():
                assert child.channel is not None
                reader.send(Attach(child.slot_no, child.generation), child.channel.fds)
        for exited, channel in self._exited.values():
            reader.send(Attach(exited.slot, exited.generation), channel.fds)
            reader.send(exited)
        reader.send(SyncDone())
        if self._draining:
            reader.send(Drain())

    def _send_to_reader(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send a message to the reader, if there is one: `_resync_reader` brings the next one up to date."""
        if self._reader.child is not None:
            self._reader.child.send(message, fds)

    def _check_server(self, child: Child, now: float) -> None:
        """Kill a forkserver that is stuck: it does not report a start or an exit."""
        if not child.is_unanswered():
            child.mono_unanswered_s = None
        elif child.mono_unanswered_s is None:
            child.mono_unanswered_s = now
        elif now - child.mono_unanswered_s > self._report_timeout_s:
            log.error("forkserver.stuck", extra={"child": child.name})
            self._server.kill()

    @property
    def _report_timeout_s(self) -> float:
        """How long the forkserver may owe a report. Its end is the end of every worker that still runs."""
        workers = (child for slot in self._workers for child in slot.children())
        idle = self._draining and all(worker.is_unanswered() for worker in workers)
        return _STUCK_AT_STOP_S if idle else STUCK_AFTER_S

    def _check_startup(self, now: float) -> None:
        """Detect when the service is complete for the first time, or that it will never be."""
        if self._exit_code is not None or self._draining:
            return
        if not self._was_complete:
            self._was_complete = all(slot.child and slot.child.ready for slot in self._slots)
            reader = self._reader.child
            trouble = reader.trouble if reader else None
            # On a busy machine a short timeout is over before the reader has said what it met.
            give_up_s = self._mono_connect_by_s + (STUCK_AFTER_S if trouble is None else 0.0)
            if now > give_up_s and not (reader and reader.ready):
                hint = store_advice(trouble or "")
                log.critical("store.unreachable", extra={"error": trouble, "hint": hint})
                self._exit_code = Exit.STORE_UNREACHABLE
            for slot in self._slots:
                if self._exit_code is None and slot.backoff.exits_before_ready >= _MAX_START_ATTEMPTS:
                    error = f"it exited {_MAX_START_ATTEMPTS} times before it was ready: see child.exited"
                    log.critical("child.start_failed", extra={"child": slot.name, "error": error})
                    self._exit_code = Exit.BOOT_FAILED
        elif all(slot.backoff.exits_before_ready >= _CRASH_LOOP_EXITS for slot in self._workers):
            log.critical("crash_loop.detected", extra={"hint": "no worker stays up"})
            self._exit_code = Exit.CRASH_LOOP

    # -- rolling restart, drain, stop

    def restart_workers(self) -> None:
        """Replace every worker, one by one. Each is stopped only when its successor is ready.

        Failed starts before it do not count: the successors have other code. The api is restarted at once:
        its socket stays open, so no client is refused.
        """
        if self._api is not None and self._api.child is not None:
            self._api.child.stopping = True
            self._api.child.send(Drain())
        for slot in self._workers:
            slot.backoff = RestartBackoff()
        self._to_restart = deque((slot, slot.generation) for slot in self._workers)

    def configure(self, flow: FlowConfig) -> None:
        """Apply limits and weights that were read from the configuration file again."""
        self._settings = replace(self._settings, flow=flow)
        self._send_to_reader(Configure(flow))

    @property
    def idle(self) -> bool:
        """Whether every child is ready, and no worker has a job or left subprocesses."""
        return (
            not (self._to_restart or self._groups)
            and all(
                state(slot.child) in ("idle", "running") and slot.successor is None for slot in self._slots
            )
            and not any(
                child.hung_up or (child.channel is not None and child.channel.has_jobs)
                for child in self._children()
            )
        )

    @property
    def restarting(self) -> bool:
        """Whether a restart of workers is in progress."""
        return bool(self._to_restart)

    def _continue_restart(self, now: float) -> None:
        if not self._to_restart or self._draining:
            return
        slot, generation = self._to_restart[0]
        if slot.child is None:
            return
        if slot.successor is None:
            if slot.child.generation > generation:
                self._to_restart.popleft()
            elif not slot.backoff.wait_s(now):
                slot.successor = self._try_spawn(slot, now)
        elif slot.successor.ready and not slot.child.stopping:
            self._stop_worker(slot.child)

    def _schedule_recycle(self, slot: Slot, now: float) -> None:
        """Restart a worker that exceeds its age or number of jobs, or its memory limit while idle."""
        child = slot.child
        if child is None or child.channel is None or not child.ready or child.stopping:
            return
        limits = self._settings
        too_old = limits.max_age_s and now - child.mono_started_s > limits.max_age_s
        too_many_jobs = limits.max_jobs and child.channel.finished >= limits.max_jobs
        too_large = not child.channel.mono_deadline_s and self._limits.exceeds_rss(child)
        if (too_old or too_many_jobs or too_large) and (slot, child.generation) not in self._to_restart:
            log.info("worker.recycle_due", extra={"child": child.name})
            self._to_restart.append((slot, child.generation))

    def _stop_worker(self, child: Child) -> None:
        self._send_to_reader(Retire(child.slot_no, child.generation))
        child.stop()

    def drain(self) -> None:
        """Let running jobs finish and read nothing new."""
        self._draining = True
        self._send_to_reader(Drain())
        for slot in filter(None, (self._reaper, self._api)):
            if slot.child:
                slot.child.send(Drain())
        for child in self._children():
            if child.channel is not None:
                child.stop()
            child.stopping = True

    @property
    def _settled(self) -> bool:
        """Whether a drained reader has no more work: no worker is left, and every exit is reclaimed."""
        return not self._exited and not any(slot.child for slot in self._workers)

    @property
    def drained(self) -> bool:
        """Whether every child and subprocess has exited and every job is settled or released."""
        return self._settled and not self._groups and not any(True for _ in self._children())

    def group_leaders(self) -> set[int]:
        """Process ids of the workers whose process groups end with the service."""
        workers = {child.pid for slot in self._workers for child in slot.children()}
        return self._groups.leader_pids | (workers - {0})  # 0: not forked yet

    def kill_workers(self) -> None:
        """Kill all workers when the drain timeout is over. Their jobs are released without a death count."""
        for child in self._children():
            if child.channel is not None:
                child.killed_by_stop = True
                child.kill(signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill and collect every child, the forkserver and the subprocesses of workers."""
        self._server.kill()
        self._server.collect(wait=True)
        for child in self._children():
            child.kill(signal.SIGKILL)
        for child in self._children():
            if child.wait(STUCK_AFTER_S) and child.channel is not None:
                self._groups.end(child.pid, 0.0)
            child.close()
        self._groups.kill_all()
        for slot in self._slots:
            slot.child = slot.successor = None

    # -- state

    def reasons(self) -> list[str]:
        """Why the service is not ready; empty if it is."""
        return [reason for slot in self._slots for reason in slot.reasons()]

    def transient_reasons(self) -> list[str]:
        """The reasons that pass without an operator: a worker or the api restarts while workers are ready."""
        if not any(slot.child and slot.child.ready for slot in self._workers):
            return []
        return [reason for slot in self._slots if slot.is_restarting() for reason in slot.reasons()]

    def warnings(self) -> list[str]:
        """Faults that stop only a part of the work, such as an isolated stream."""
        return sorted({text for slot in self._slots for child in slot.children() for text in child.warnings})

    def children(self, now: float) -> list[dict[str, Any]]:
        """Every child as /status shows it."""
        return [
            {
                "state": state(child),
                "restarts": slot.unexpected_exits,
                **child_status(child, self._settings, now),
            }
            for slot in self._slots
            for child in slot.children()
        ]

    def states(self) -> dict[str, int]:
        """Number of workers by state."""
        states = Counter({"starting": 0, "idle": 0, "busy": 0, "stopping": 0})
        for slot in self._workers:
            states[state(slot.child)] += 1
        return dict(states)


def _is_expected(child: Child, exited: ProcessExit) -> bool:
    """Whether the exit was requested or announced, so that its jobs are not charged with it."""
    # A worker sets STOPPING before it leaves; a handler that calls os._exit(0) does not.
    announced = child.channel is not None and child.channel.phase == STOPPING and exited.clean
    # SIGTERM may arrive before its handler is installed. A SIGKILL that we did not send is not a regular
    # stop: a job that kills its worker, also by using up memory, is charged with it even during a drain.
    if child.channel is None:
        return child.stopping and exited.clean
    return announced or (child.stopping and (exited.cause == "SIGTERM" or child.killed_by_stop))
