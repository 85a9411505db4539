"""Supervisor: starts reader, reaper, workers and embedded servers, restarts them and stops them in order."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import click
import setproctitle

from jobworker.worker.config.tables import ConfigTables
from jobworker.worker.errors import ConfigurationError, Exit
from jobworker.worker.extension import CopySize, extension, imported, require_extras
from jobworker.worker.host.data_dir import DataDir
from jobworker.worker.host.process_env import prepare_process
from jobworker.worker.http.listening import listen, url_of
from jobworker.worker.keys import Holder
from jobworker.worker.options import (
    ENV_PREFIX,
    config_file,
    service_options,
    settings_from,
    unknown_variables,
)
from jobworker.worker.settings import Settings, parse_address
from jobworker.worker.supervision.device_copies import CopyPlan, copies_status, fit_copies
from jobworker.worker.supervision.embedded import Stores, needed
from jobworker.worker.supervision.forkserver import ForkServer
from jobworker.worker.supervision.health import Health, HealthServer
from jobworker.worker.supervision.instance import InstanceLock, new_holder
from jobworker.worker.supervision.pdeathsig import become_subreaper
from jobworker.worker.supervision.process import Process
from jobworker.worker.supervision.process_groups import GroupGuard, reap_adopted
from jobworker.worker.supervision.process_manager import ProcessManager
from jobworker.worker.supervision.reloader import Reloader, Restart
from jobworker.worker.supervision.sd_notify import is_notified, notify, reloading
from jobworker.worker.supervision.signals import SignalQueue
from jobworker.worker.supervision.start_errors import (
    RefusingCommand,
    default_format,
    refuse,
    require_open_files,
)
from jobworker.worker.supervision.status import StatusLine, StatusMailbox, flagged_types, service_status
from jobworker.worker.telemetry import log as logs
from jobworker.worker.telemetry.prometheus import PrometheusCollector
from jobworker.worker.urls import parse_redis_url

log = logging.getLogger("jobworker.supervisor")

#: How long processes of a service that was just killed may still hold a lock.
_LOCK_TIMEOUT_S = 5.0
#: Longest sleep of the loop: the longest delay until an exceeded job timeout is detected.
_TICK_S = 0.1
#: The same without a job, and while all is well. The reader reports when it dispatches jobs, and exits,
#: signals and HTTP requests wake the loop, too.
_IDLE_TICK_S, _QUIET_TICK_S = 0.25, 1.0
#: /healthz reports "not live" when the loop has not run for this long.
_LIVE_TIMEOUT_S = 10.0
#: The same signal again within this time is a copy of the first: `timeout` and many other programs signal the
#: process and then its group, and a terminal signals the group while `make` or `uv run` pass it on.
_STOP_COPY_S = 0.25
#: Time for reader and reaper to settle after the last worker has exited, beyond the drain timeout.
_SETTLE_TIMEOUT_S = 5.0


class Supervisor:
    """Main loop of the service: handles signals and messages, and keeps the processes in the desired state.

    Only this loop changes the children. HTTP threads call `health`, and request the full status through a
    `StatusMailbox`.
    """

    def __init__(
        self, settings: Settings, data: DataDir | None, stores: Stores, copy_size: CopySize | None = None
    ) -> None:
        self._settings = settings
        self._copy_size = copy_size
        self._copy_plan: CopyPlan | None = None
        self._data = data
        self._stores = stores
        self._metrics = PrometheusCollector()
        server = ForkServer(
            f"jobworker: forkserver [{settings.instance}]", Process.uncollected, log_level=settings.log_level
        )
        self._api_listener = self._listen_api()
        api_fd = self._api_listener.fileno() if self._api_listener else None
        self._processes = ProcessManager(settings, self._metrics, server, api_fd=api_fd)
        self._guard = GroupGuard(server, f"jobworker: guard [{settings.instance}]")
        self._mono_last_tick_s = time.monotonic()
        self._mono_stop_by_s: float | None = None
        # The signal that began the drain, and when.
        self._stop_signal: signal.Signals | None = None
        self._mono_stop_s = 0.0
        self._reported_ready = False
        self._progress = 0
        self._health = Health(True, False, ["starting"], {"workers": self._processes.states()})
        self._mailbox = StatusMailbox()
        self._reloader = Reloader(settings) if settings.reload else None
        #: Whether the service is to be started again after its end: it has other job types.
        self.start_again = False
        self._status_line = StatusLine(settings.procs)
        self._reported_reasons = ""
        self._announced: dict[str, Any] = {}
        self._server = self._listen()

    def _listen(self) -> HealthServer:
        address = parse_address(self._settings.metrics_addr)
        try:
            return HealthServer(
                address, self._metrics, self.health, self._mailbox.request, self._processes.batches.request
            )
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-addr {self._settings.metrics_addr}: cannot listen there: "
                f"{error.strerror or error}; give another address, or port 0 for any free one"
            ) from error

    def _listen_api(self) -> socket.socket | None:
        """Socket of the role ``api``. It stays open here: clients of a restarting api wait."""
        if not self._settings.serve_addr:
            return None
        option = "--serve-addr"
        return listen(parse_address(self._settings.serve_addr, option), option)

    def _close_api_listener(self) -> None:
        if self._api_listener is not None:
            self._api_listener.close()

    def run(self, queue: SignalQueue) -> Exit:
        """Run until a stop signal or a fatal error. No child is left, also after an exception."""
        try:
            return self._run(queue)
        finally:
            self._processes.kill_all()
            if self._reloader is not None:
                self._reloader.close()
            self._guard.close()
            self._stores.stop()
            self._server.close()
            self._close_api_listener()

    def _run(self, queue: SignalQueue) -> Exit:
        self._mailbox.wake = self._processes.batches.wake = queue.wake
        log.info("health.listening", extra={"metrics_url": self._server.url, "pid": os.getpid()})
        if self._api_listener is not None:
            log.info("api.listening", extra={"serve_url": url_of(self._api_listener)})
        while True:
            now = time.monotonic()
            signals = queue.take()  # before the questions: it takes what woke the loop for them
            self._mono_last_tick_s = now
            self._mailbox.answer(self._status)
            self._processes.pass_questions()
            for number in signals:
                if (code := self._handle_signal(number)) is not None:
                    return code
            if (code := self._stores.turn(now)) is not None:
                return code
            if self._stores.ready and (code := self._tick(now)) is not None:
                return code
            if not self._stores.ready or self._mono_stop_by_s is not None:
                self._health = self._assess()  # else `_report` did
            self._guard.update(self._processes.group_leaders(), now)
            self._metrics.add(self._guard.take_restarts())
            reap_adopted()
            self._processes.wait(self._tick_s(), queue, self._guard.event_fds)

    def _tick_s(self) -> float:
        """Longest sleep of the loop now."""
        if not self._reported_ready or self._mono_stop_by_s is not None or not self._processes.idle:
            return _TICK_S
        is_quiet = self._health.ready and self._reloader is None and bool(self._guard.event_fds)
        return _QUIET_TICK_S if is_quiet else _IDLE_TICK_S

    def _tick(self, now: float) -> Exit | None:
        if not self._processes.started:
            self._start_processes(now)
        self._announce()
        code = self._processes.tick(now)
        if code is None and self._mono_stop_by_s is not None:
            return self._continue_drain(now)
        self._reload(now)
        self._report(now)
        return code

    def _reload(self, now: float) -> None:
        """Restart what uses a source file that has changed. Running jobs finish."""
        restart = self._reloader.tick(now) if self._reloader is not None else None
        if restart is Restart.WORKERS:
            self._restart_workers()
        elif restart is Restart.SERVICE:
            self.start_again = True
            self._begin_drain("reload")

    def _start_processes(self, now: float) -> None:
        """Start the processes: the stores are up."""
        self._announce()
        # Now, because the memory that the embedded stores take is not free.
        self._settings, self._copy_plan = fit_copies(self._settings, self._copy_size)
        self._processes.start(self._stores.fill(self._settings), now)

    def _announce(self) -> None:
        """Write endpoints.json for tools on this machine, if something has changed."""
        if self._data is None:
            return
        given = {name: getattr(self._settings, name) for name in ("redis_url", *extension().endpoints)}
        found = {**given, **self._stores.endpoints(), "metrics_url": self._server.url, "pid": os.getpid()}
        if self._api_listener is not None and self._mono_stop_by_s is None:
            found["serve_url"] = url_of(self._api_listener)
        if found != self._announced:
            self._data.announce(found)
            self._announced = found

    def _handle_signal(self, number: signal.Signals) -> Exit | None:
        if number == signal.SIGHUP:
            self._reload_tables()
            self._restart_workers()
        elif number in (signal.SIGTERM, signal.SIGINT):
            if self.start_again:
                self.start_again = False
                return None  # it drains already
            return self._stop(number, time.monotonic())
        return None

    def _reload_tables(self) -> None:
        """Read the tables of the configuration file again; if it is wrong, keep the previous ones."""
        try:
            tables = ConfigTables.load(self._settings)
        except ConfigurationError as error:
            log.error(
                "tables.rejected",
                extra={"error": str(error), "hint": "the service keeps the previous tables"},
            )
            return
        if tables.cron != self._settings.cron:
            log.info("cron.reloaded", extra={"names": [table.name for table in tables.cron]})
            self._processes.set_cron(tables.cron)
        if tables.flow is not None:
            self._processes.configure(tables.flow)
        self._settings = replace(self._settings, cron=tables.cron, flow=tables.flow)

    def _stop(self, number: signal.Signals, now: float) -> Exit | None:
        """Begin a drain, or stop now if one has begun."""
        if number == self._stop_signal and now - self._mono_stop_s < _STOP_COPY_S:
            hint = f"the same signal {_STOP_COPY_S} s or more after the first stops the service now"
            log.info("stop.copy_ignored", extra={"signal": number.name, "hint": hint})
            return None
        if self._mono_stop_by_s is not None or not self._processes.started:
            log.warning("stop.immediate", extra={"signal": number.name})
            return Exit.STOPPED
        self._stop_signal, self._mono_stop_s = number, now
        self._begin_drain(number.name)
        return None

    def _restart_workers(self) -> None:
        log.info("restart.begun")
        reloading()
        self._reported_ready = False
        self._processes.restart_workers()

    def _begin_drain(self, cause: str) -> None:
        timeout_s = self._settings.drain_timeout_s
        self._mono_stop_by_s = time.monotonic() + timeout_s
        self._health = self._assess()  # not ready from now on
        log.info("drain.begun", extra={"signal": cause, "timeout_s": timeout_s})
        notify(STOPPING="1")
        self._processes.drain()
        self._close_api_listener()  # clients are refused at once, also while jobs still run

    def _continue_drain(self, now: float) -> Exit | None:
        assert self._mono_stop_by_s is not None
        notify(WATCHDOG="1")  # a draining reader reports no progress, and the drain has a timeout of its own
        if self._processes.drained:
            log.info("supervisor.stopped")
            return Exit.STOPPED
        if now > self._mono_stop_by_s:
            self._processes.kill_workers()
        if now > self._mono_stop_by_s + _SETTLE_TIMEOUT_S:
            log.warning(
                "drain.incomplete", extra={"hint": "unsettled jobs stay pending in Redis and run again"}
            )
            return Exit.STOPPED
        return None

    def _report(self, now: float) -> None:
        self._health = health = self._assess()
        self._metrics.put([("z_novel_ready", (), float(health.ready))])
        if health.ready and not self._reported_ready and not self._processes.restarting:
            self._reported_ready = True
            notify(READY="1")
            log.info("service.ready", extra={"workers": self._settings.procs})
        if is_notified():
            self._report_status(health.reasons, now)
        if self._progress != self._processes.progress:
            self._progress = self._processes.progress
            notify(WATCHDOG="1")

    def _report_status(self, reasons: list[str], now: float) -> None:
        """Send STATUS=: the reasons while not ready, as soon as they change; otherwise the status line."""
        if reasons and (text := "; ".join(reasons)) != self._reported_reasons:
            notify(STATUS=text)
            self._reported_reasons = text
        elif not reasons and (self._reported_reasons or self._status_line.due(now)):
            notify(STATUS=self._status_line.render(self._metrics.totals(), now))
            self._reported_reasons = ""

    def _status(self) -> dict[str, Any]:
        health = self._health
        store = self._stores.endpoints().get("redis_url", self._settings.redis_url)
        return {
            **service_status(self._settings, store),
            "device_copies": copies_status(self._copy_plan),
            "ready": health.live and health.ready,
            "reasons": health.reasons,
            "transient_reasons": self._processes.transient_reasons(),
            "warnings": self._processes.warnings(),
            "children": self._processes.children(time.monotonic()),
            "metrics": self._metrics.totals(),
            "histograms": self._metrics.histograms(),
        }

    def health(self) -> Health:
        """Liveness and readiness as of the loop's last cycle (HTTP threads)."""
        silent_s = time.monotonic() - self._mono_last_tick_s
        if silent_s <= _LIVE_TIMEOUT_S:
            return self._health
        reason = f"the supervisor's loop has not run for {silent_s:.0f} s"
        return Health(False, False, [*self._health.reasons, reason], self._health.details)

    def _assess(self) -> Health:
        """Health of the children and stores. Only the loop may look: it closes the channels."""
        stopping = ["stopping"] if self._mono_stop_by_s is not None else []
        reasons = [*self._stores.reasons(), *stopping, *self._processes.reasons()]
        slowed = "z_novel_crash_circuits_open"
        details = {
            "workers": self._processes.states(), "warnings": self._processes.warnings(),
            "slowed_types": flagged_types(self._metrics.totals(slowed), slowed),
        }  # fmt: skip
        return Health(True, not reasons, reasons, details)


def _open_data_dir(settings: Settings) -> DataDir:
    """Lock the data directory. Raises ConfigurationError if another service holds it."""
    data = DataDir(settings.data_dir)
    holder_pid = _wait_for_lock(data.lock, data.holder_pid)
    if holder_pid is not None:
        raise ConfigurationError(
            f"data directory {data.path} is held by {_describe_holder(holder_pid)}: "
            "stop that one, or give this one its own --data-dir"
        )
    return data


def _wait_for_lock(try_lock: Callable[[], bool], read_holder_pid: Callable[[], int]) -> int | None:
    """Lock, waiting for processes of a killed service to exit. Returns the holder's pid if that fails.

    A holder that is alive is not waited for: it is another service. The pid is 0 if it is unknown.
    """
    mono_give_up_s = time.monotonic() + _LOCK_TIMEOUT_S
    while not try_lock():
        pid = read_holder_pid()
        if os.path.exists(f"/proc/{pid}") or time.monotonic() > mono_give_up_s:
            return pid
        time.sleep(0.05)  # the lock of an exiting process offers no event to wait for
    return None


def _describe_holder(pid: int) -> str:
    if not pid:
        return "another service, whose pid is not known"
    if os.path.exists(f"/proc/{pid}"):
        return f"another service (pid {pid})"
    return f"processes of another service, which outlived its supervisor (pid {pid})"


@contextmanager
def _instance_lock(settings: Settings) -> Iterator[Holder]:
    """Hold the lock file of the instance; yields this start of the service.

    Raises ConfigurationError if a service with this data directory holds it. The job store decides who has
    the name: without a usable file, only a restart after a crash is slower.
    """
    with ExitStack() as cleanup:
        try:
            lock = InstanceLock(settings)
            cleanup.callback(lock.close)
            _take_instance(lock, settings.instance)
            holder = lock.record_start()
        except OSError as error:
            log.warning(
                "instance.no_lock_file",
                extra={"error": str(error), "hint": "after a crash a restart waits for the lease"},
            )
            holder = new_holder(settings)
        yield holder


def _take_instance(lock: InstanceLock, instance: str) -> None:
    holder_pid = _wait_for_lock(lock.try_lock, lock.holder_pid)
    if holder_pid is not None:
        raise ConfigurationError(
            f"instance {instance!r} is held by {_describe_holder(holder_pid)} in data directory "
            f"{lock.folder}: stop that service, or give this one its own --instance"
        )


def _supervise(settings: Settings, queue: SignalQueue) -> tuple[Exit, bool]:
    """Run the service; returns its exit code, and whether it is to be started again."""
    log.info("supervisor.starting", extra={"settings": settings.public()})
    require_extras(settings.handlers, serves=bool(settings.serve_addr))
    # First, because the time limits of the stores' start begin below.
    copy_size: CopySize | None = imported(extension().copy_size)(settings)
    servers = needed(settings)
    data = _open_data_dir(settings) if servers else None
    stores = Stores(settings, data, [make(data) for make in servers] if data else [])
    with _instance_lock(settings) as holder:
        supervisor = Supervisor(replace(settings, holder=holder), data, stores, copy_size)
        return supervisor.run(queue), supervisor.start_again


@click.command(
    cls=RefusingCommand, context_settings={"auto_envvar_prefix": ENV_PREFIX, "max_content_width": 110}
)
@click.version_option(package_name="jobworker")
@service_options
def main(**options: Any) -> None:
    """Run background jobs from Redis Streams.

    Without --redis-url and --milvus-uri it starts stores of its own, with their data in --data-dir. TERM or
    INT finishes the running jobs and stops; a second one stops now (a copy within 0.25 s does not count); HUP
    restarts the workers one by one.

    Exit codes: 0 stopped as asked, 2 bad usage or configuration, 3 a child could not start, 4 crash loop,
    5 a store could not be reached.
    """
    prepare_process()
    try:
        settings = replace(settings_from(options, sys.stderr.isatty()), config_file=config_file())
        tables = ConfigTables.load(settings)
        settings = replace(settings, cron=tables.cron, flow=tables.flow)
        setproctitle.setproctitle(f"jobworker: supervisor [{settings.instance}]")
        logs.configure("supervisor", settings, os.environ)
        if settings.redis_url and (ignored := parse_redis_url(settings.redis_url).ignored):
            log.info("redis_url.options_ignored", extra={"options": ignored})
        for variable, similar in unknown_variables(os.environ):
            log.warning(
                "option.unknown_variable", extra={"variable": variable, "hint": f"did you mean {similar}?"}
            )
        require_open_files(settings.procs)
        become_subreaper()
        with SignalQueue(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD) as queue:
            code, start_again = _supervise(settings, queue)
        if start_again and code is Exit.STOPPED:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        sys.exit(code)
    except (ConfigurationError, OSError) as error:
        refuse(str(error), options["log_format"] or default_format())
        sys.exit(Exit.USAGE)


if __name__ == "__main__":
    main()
