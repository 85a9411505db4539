"""The parent: starts the roles and the embedded stores, watches and restarts them, ends them in order."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import click
import setproctitle

from jobworker.worker.data_dir import DataDir
from jobworker.worker.errors import ConfigurationError, Exit
from jobworker.worker.extension import extension
from jobworker.worker.keys import Holder
from jobworker.worker.options import ENV_PREFIX, service_options, settings_from
from jobworker.worker.settings import Settings, parse_address
from jobworker.worker.supervision.embedded import Stores, needed
from jobworker.worker.supervision.health import Health, HealthServer
from jobworker.worker.supervision.instance import InstanceLock, new_holder
from jobworker.worker.supervision.process_manager import ProcessManager
from jobworker.worker.supervision.sd_notify import notify, reloading
from jobworker.worker.supervision.signals import SignalQueue
from jobworker.worker.supervision.status import StatusLine, StatusMailbox, service_status
from jobworker.worker.telemetry import log as logs
from jobworker.worker.telemetry.prometheus import PrometheusCollector

log = logging.getLogger("jobworker.supervisor")

#: How long a data directory's lock may still be held by the stores of a service that has just died.
_LOCK_WITHIN_S = 5.0
#: The loop's longest sleep: how late a job's time limit is noticed at most.
_TICK_S = 0.1
#: Health says "not live" when the loop has not come round for this long.
_LIVE_WITHIN_S = 10.0
#: What the reader and reaper may need after the last worker has ended, beyond the drain time-out.
_SETTLE_WITHIN_S = 5.0


class Supervisor:
    """One loop: take signals and news in, hold the actual state to the desired one."""

    def __init__(self, settings: Settings, data: DataDir | None, stores: Stores) -> None:
        self._settings = settings
        self._data = data
        self._stores = stores
        self._metrics = PrometheusCollector()
        self._processes = ProcessManager(settings, self._metrics)
        self._mono_turned_s = time.monotonic()
        self._mono_stop_by_s: float | None = None
        self._said_ready = False
        self._progress = 0
        self._mailbox = StatusMailbox()
        self._status_line = StatusLine(settings.procs)
        self._said_status = ""
        self._server = HealthServer(
            parse_address(settings.metrics_addr), self._metrics, self.health, self._mailbox.ask
        )

    def run(self, queue: SignalQueue) -> Exit:
        """Until told to stop or something fatal; whatever the way out, no child is left."""
        try:
            return self._run(queue)
        finally:
            self._processes.end_now()
            self._stores.stop()
            self._server.close()

    def _run(self, queue: SignalQueue) -> Exit:
        log.info("health.listening", extra={"metrics_url": self._server.url, "pid": os.getpid()})
        while True:
            now = self._mono_turned_s = time.monotonic()
            self._mailbox.serve(self._status)
            for number in queue.take():
                if (verdict := self._signalled(number)) is not None:
                    return verdict
            if (verdict := self._stores.turn(now)) is not None:
                return verdict
            if self._stores.ready and (verdict := self._turn(now)) is not None:
                return verdict
            self._processes.wait(_TICK_S, queue)

    def _turn(self, now: float) -> Exit | None:
        if not self._processes.started:
            self._announce()
        verdict = self._processes.turn(now)
        if verdict is None and self._mono_stop_by_s is not None:
            return self._draining(now)
        self._tell_systemd(now)
        return verdict

    def _announce(self) -> None:
        """The stores are up: from here on tools on this machine can find them."""
        settings = self._stores.fill(self._settings)
        if self._data is not None:
            addresses = {name: getattr(settings, name) for name in ("redis_url", *extension().endpoints)}
            self._data.announce({**addresses, "metrics_url": self._server.url, "pid": os.getpid()})
        self._processes.start(settings)

    def _signalled(self, number: signal.Signals) -> Exit | None:
        if number == signal.SIGHUP:
            log.info("restart.begun")
            reloading()
            self._said_ready = False
            self._processes.restart_workers()
        elif number in (signal.SIGTERM, signal.SIGINT):
            if self._mono_stop_by_s is not None or not self._processes.started:
                log.warning("stop.immediate", extra={"signal": number.name})
                return Exit.STOPPED
            timeout_s = self._settings.drain_timeout_s
            log.info("drain.begun", extra={"signal": number.name, "timeout_s": timeout_s})
            notify(STOPPING="1")
            self._mono_stop_by_s = time.monotonic() + timeout_s
            self._processes.drain()
        return None

    def _draining(self, now: float) -> Exit | None:
        assert self._mono_stop_by_s is not None
        notify(WATCHDOG="1")  # nothing is read any more, and the time for this is limited anyway
        if self._processes.drained:
            log.info("supervisor.stopped")
            return Exit.STOPPED
        if now > self._mono_stop_by_s:
            self._processes.kill_workers()
        if now > self._mono_stop_by_s + _SETTLE_WITHIN_S:
            log.warning("drain.incomplete", extra={"hint": "what was not settled stays pending in Redis"})
            return Exit.STOPPED
        return None

    def _tell_systemd(self, now: float) -> None:
        health = self.health()
        self._metrics.put([("z_novel_ready", (), float(health.ready))])
        if health.ready and not self._said_ready and not self._processes.restarting:
            self._said_ready = True
            notify(READY="1")
            log.info("service.ready", extra={"workers": self._settings.procs})
        self._tell_status(health.reasons, now)
        if self._progress != self._processes.progress:
            self._progress = self._processes.progress
            notify(WATCHDOG="1")

    def _tell_status(self, reasons: list[str], now: float) -> None:
        """Why it is not ready as soon as that changes; else how it does, now and then."""
        if reasons and (text := "; ".join(reasons)) != self._said_status:
            notify(STATUS=text)
            self._said_status = text
        elif not reasons and (self._said_status or self._status_line.due(now)):
            notify(STATUS=self._status_line.make(self._metrics.totals(), now))
            self._said_status = ""

    def _status(self) -> dict[str, Any]:
        health = self.health()
        return {
            **service_status(self._settings, self._stores.fill(self._settings).redis_url),
            "ready": health.live and health.ready,
            "reasons": health.reasons,
            "children": self._processes.children(time.monotonic()),
            "metrics": self._metrics.totals(),
        }

    def health(self) -> Health:
        """Asked by the HTTP threads."""
        silent_s = time.monotonic() - self._mono_turned_s
        reasons = self._stores.reasons()
        if self._mono_stop_by_s is not None:
            reasons.append("stopping")
        reasons += self._processes.reasons()
        if silent_s > _LIVE_WITHIN_S:
            reasons.append(f"the supervisor's loop has not come round for {silent_s:.0f} s")
        return Health(silent_s <= _LIVE_WITHIN_S, not reasons, reasons, {"workers": self._processes.states()})


def _open_data_dir(settings: Settings) -> DataDir:
    """Lock the data directory. Raises `ConfigurationError` where another service holds it."""
    data = DataDir(settings.data_dir)
    give_up_at = time.monotonic() + _LOCK_WITHIN_S
    while not data.lock():
        holder = data.endpoints().get("pid", 0)
        if os.path.exists(f"/proc/{holder}") or time.monotonic() > give_up_at:
            raise ConfigurationError(
                f"data directory {data.path} is held by another service (pid {holder}): "
                "stop that one, or give this one its own --data-dir"
            )
        time.sleep(0.05)  # a file lock held by a dying process offers no event with a deadline
    return data


@contextmanager
def _instance_lock(settings: Settings) -> Iterator[Holder]:
    """Hold the instance's lock file. Raises `ConfigurationError` where a service of this directory has it.

    The job store decides who has the name; without a usable file only a restart after a crash is slower.
    """
    with ExitStack() as cleanup:
        try:
            lock = InstanceLock(settings)
            cleanup.callback(lock.close)
            _take(lock, settings.instance)
            holder = lock.sign()
        except OSError as error:
            log.warning(
                "instance.no_lock_file",
                extra={"error": str(error), "hint": "after a crash a restart waits for the lease"},
            )
            holder = new_holder(settings)
        yield holder


def _take(lock: InstanceLock, instance: str) -> None:
    give_up_at = time.monotonic() + _LOCK_WITHIN_S
    while not lock.take():
        pid = lock.holder_pid()
        if os.path.exists(f"/proc/{pid}") or time.monotonic() > give_up_at:
            raise ConfigurationError(
                f"instance {instance!r} is held by pid {pid} in data directory {lock.folder}: "
                "stop that service, or give this one its own --instance"
            )
        time.sleep(0.05)  # a file lock held by a dying process offers no event with a deadline


def _supervise(settings: Settings, queue: SignalQueue) -> Exit:
    log.info("supervisor.starting", extra={"settings": settings.public()})
    servers = needed(settings)
    data = _open_data_dir(settings) if servers else None
    stores = Stores(settings, data, [make(data) for make in servers] if data else [])
    with _instance_lock(settings) as holder:
        return Supervisor(replace(settings, holder=holder), data, stores).run(queue)


@click.command(context_settings={"auto_envvar_prefix": ENV_PREFIX, "max_content_width": 110})
@click.version_option(package_name="jobworker")
@service_options
def main(**options: Any) -> None:
    """Run background jobs from Redis Streams.

    Without --redis-url and --milvus-uri it starts stores of its own, with their data in --data-dir. TERM or
    INT finishes the running jobs and stops; a second one stops now; HUP restarts the workers one by one.

    Exit codes: 0 stopped as asked, 2 bad usage or configuration, 3 a child could not start, 4 crash loop,
    5 a store could not be reached.
    """
    try:
        settings = settings_from(options, sys.stderr.isatty())
        setproctitle.setproctitle(f"jobworker: supervisor [{settings.instance}]")
        logs.begin("supervisor", settings, os.environ)
        with SignalQueue(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD) as queue:
            sys.exit(_supervise(settings, queue))
    except ConfigurationError as error:
        click.echo(f"jobworker-supervise: {error}", err=True)
        sys.exit(Exit.USAGE)
    except OSError as error:
        click.echo(f"jobworker-supervise: {error}", err=True)
        sys.exit(Exit.USAGE)


if __name__ == "__main__":
    main()
