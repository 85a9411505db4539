"""Child entry point: settings become adapters, adapters become a role, the role runs.

``python -m jobworker.worker.boot FD``, where FD is the child's end of its line to the supervisor.
"""

import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import setproctitle

from .devices import LEAST_COPIES, NO_DEVICE, device_for_slot, set_pools, visible_gpus
from .errors import ConfigurationError, Exit, JobworkerError
from .event_loop import EventLoop
from .handler import BoundHandler, load_handlers
from .ipc.channel import MASKED_TYPES, Channel
from .ipc.control import ControlSocket, Message, Standby, Start, StartFailed
from .ipc.crash_marks import CrashMarks
from .keys import consumer_name
from .outcome import MAX_ERROR_CHARS
from .process_env import open_standard_streams
from .settings import Settings, settings_class
from .supervision.pdeathsig import tie_to_parent
from .telemetry import log as logs
from .telemetry import trace

log = logging.getLogger("jobworker.boot")

#: How long to wait for the first message; the supervisor sends it right after the start.
_START_WITHIN_S = 10.0
_ALONE = "started without a supervisor: run jobworker-supervise"
#: Pause between tries to set a handler up while a store that it needs does not answer yet.
_SETUP_RETRY_S = 0.5
#: What takes time at the start of a reader or reaper; a spare has it behind it.
_IMPORTS_OF_ROLES = ("reader.reader", "reaper", "store.redis.reader", "store.redis.reaper")
#: Half of what there is, out of 1000: before any other process of the service, after what asks to go first.
_OOM_SCORE_ADJ = "500"


def main() -> int:
    """Run one role; the exit code is 0 after a proper end, 3 or 5 where the role could not start."""
    open_standard_streams()
    link = ControlSocket(socket.socket(fileno=int(sys.argv[1])))
    start, fds = _first_message(link)
    settings = settings_class().from_json(start.settings)
    if start.role == "worker":
        settings = replace(settings, device=_place(settings, start.slot))
    name = start.role if start.role != "worker" else f"worker {start.slot}"
    setproctitle.setproctitle(f"jobworker: {name} [{settings.instance}]")
    logs.configure(name, settings, os.environ)
    _begin_tracing(name, settings)
    # Ctrl-C and a terminal's end reach the whole group; only the supervisor decides what they mean.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if start.role == "worker":
        os.setpgid(0, 0)  # the supervisor ends the group: what handlers start ends with the worker
    else:
        # So does a service manager's TERM; these two have to outlive the jobs that are running.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable(start.blackbox_fd)
    faulthandler.register(signal.SIGUSR2, start.blackbox_fd)
    tie_to_parent(start.parent_pid)
    # The roles make many short-lived objects and no cycles: looking for cycles this rarely costs nothing.
    gc.set_threshold(50_000, 20, 50)
    try:
        _run(start.role, settings, link, fds)
        trace.close()
    except ConfigurationError as error:  # of the store; what a handler says is dealt with where it is loaded
        return _fail(link, str(error), Exit.USAGE)
    except JobworkerError as error:
        return _fail(link, str(error), Exit.BOOT_FAILED)
    return 0


def _begin_tracing(role: str, settings: Settings) -> None:
    """Traces are no reason not to run jobs: where they cannot be made, the log says why."""
    if not trace.wanted(os.environ):
        return
    try:
        from .telemetry.otel import open_tracing

        trace.install(open_tracing(role, settings, os.environ))
    except ImportError as error:
        log.warning("traces.disabled", extra={"error": str(error), "hint": "install the extra otel"})
    except Exception as error:  # of the library too, which reads its variables by itself
        log.warning("traces.disabled", extra={"error": str(error)})


def _fail(link: ControlSocket, error: str, code: Exit) -> int:
    log.critical("child.start_failed", extra={"error": error})
    link.send(StartFailed(error, code))
    return code


def _first_message(link: ControlSocket) -> tuple[Start, list[int]]:
    message, fds = _await(link, _START_WITHIN_S)
    if isinstance(message, Standby):
        _stand_by(message)
        message, fds = _await(link, None)  # for as long as no other ends; the supervisor's own end is heard
    if not isinstance(message, Start):
        raise SystemExit(_ALONE)
    return message, fds


def _await(link: ControlSocket, within_s: float | None) -> tuple[Message, list[int]]:
    select.select([link], [], [], within_s)
    try:
        received = link.receive()
    except EOFError:  # the supervisor was killed right after it had started us, or while we stood by
        raise SystemExit("the supervisor is gone") from None
    if received is None:
        raise SystemExit(_ALONE)
    return received


def _stand_by(standby: Standby) -> None:
    """Get behind us what need not wait until a reader or reaper has ended."""
    setproctitle.setproctitle(f"jobworker: spare {standby.number} [{standby.instance}]")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tie_to_parent(standby.parent_pid)
    for module in _IMPORTS_OF_ROLES:
        import_module(f"{__package__}.{module}")


def _run(role: str, settings: Settings, link: ControlSocket, fds: list[int]) -> None:
    match role:
        case "reader":
            _run_reader(settings, link, CrashMarks(*fds))
        case "reaper":
            _run_reaper(settings, link)
        case _:
            _run_worker(settings, link, Channel(*fds))


def _place(settings: Settings, slot: int) -> str:
    """The device of this worker. Only the first 64 types can be left out: with more, all workers get one."""
    many = len(settings.handlers) > MASKED_TYPES
    place = device_for_slot(settings.device, slot, visible_gpus(), settings.device_copies)
    if many and place == NO_DEVICE:
        return device_for_slot(settings.device, slot % LEAST_COPIES, visible_gpus())
    return place


def _run_reader(settings: Settings, link: ControlSocket, marks: CrashMarks) -> None:
    from .reader.reader import Reader
    from .store.redis.reader import RedisReaderStore

    consumer = consumer_name(settings.host, settings.instance)
    store = RedisReaderStore(settings.redis_url, consumer, holder=settings.holder)
    Reader(store, settings, link, marks=marks).run()


def _run_reaper(settings: Settings, link: ControlSocket) -> None:
    from .reaper import Reaper
    from .store.redis.reaper import RedisReaperStore

    Reaper(RedisReaperStore(settings.redis_url), settings, link).run()


def _run_worker(settings: Settings, link: ControlSocket, channel: Channel) -> None:
    from .runner import Runner

    _go_first_when_memory_is_short()
    set_pools(settings.threads)
    handlers = _set_up(settings, link)
    if handlers is None:
        raise SystemExit(Exit.BOOT_FAILED)
    streams = [source.stream for source in settings.streams]
    refused = [type_name not in handlers for type_name in settings.handlers]
    channel.unsupported_types = _mask(refused)
    channel.exclusive_types = _mask(
        type_name in handlers and handlers[type_name].alone for type_name in settings.handlers
    )
    trace.watch(handlers)
    runner = Runner(channel, link, handlers, streams, linger_s=settings.linger_s)

    def stop(*_: object) -> None:
        runner.stop = True
        channel.wake_worker()

    signal.signal(signal.SIGTERM, stop)
    runner.run()
    # Not through the interpreter's shutdown: threads of torch or gRPC may hold that up or crash in it.
    trace.close()
    logging.shutdown()
    os._exit(0)


def _go_first_when_memory_is_short() -> None:
    """The kernel ends the largest process, which may be an embedded store; of ours, a worker costs least."""
    with suppress(OSError):  # a kernel or container that does not offer it
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)


def _mask(flags: Iterable[bool]) -> int:
    """A bit for each type, as far as there are bits."""
    return sum(1 << number for number, flag in enumerate(flags) if flag and number < MASKED_TYPES)


def _set_up(settings: Settings, link: ControlSocket) -> dict[str, BoundHandler] | None:
    """Load the handlers, waiting for stores that are still coming up; None when it was given up."""
    give_up_at = time.monotonic() + settings.connect_timeout_s
    loop = EventLoop()
    while True:
        try:
            return load_handlers(settings, loop)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # asyncio's cancellation among them
            transient = bool(getattr(error, "transient", False))
            if transient and time.monotonic() < give_up_at:
                time.sleep(_SETUP_RETRY_S)  # a store that does not listen yet offers no event to wait on
                continue
            code = Exit.STORE_UNREACHABLE if transient else Exit.BOOT_FAILED
            text = (
                str(error)
                if isinstance(error, JobworkerError) or transient
                else f"{type(error).__name__}: {error}"
            )
            log.critical("handler.setup_failed", extra={"error": text}, exc_info=None if transient else error)
            link.send(StartFailed(text[:MAX_ERROR_CHARS], code))
            return None


if __name__ == "__main__":
    sys.exit(main())
