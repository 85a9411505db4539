"""Child entry point: settings become adapters, adapters become a role, the role runs."""

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import setproctitle

from .api_role import ApiLink
from .devices import LEAST_COPIES, NO_DEVICE, device_for_slot, set_pools, visible_gpus
from .errors import ConfigurationError, Exit, JobworkerError
from .event_loop import EventLoop
from .extension import extension, imported
from .fork_guard import ForkGuard
from .handler import BoundHandler, load_handlers
from .host.scheduling import make_room, run_soon
from .ipc.channel import MASKED_TYPES, Channel
from .ipc.control import ControlSocket, StartFailed
from .ipc.crash_marks import CrashMarks
from .keys import consumer_name
from .outcome import MAX_ERROR_CHARS
from .safe_text import text_of
from .settings import Settings, cores, settings_class
from .supervision.pdeathsig import tie_to_parent
from .telemetry import log as logs
from .telemetry import trace
from .telemetry.failure import error_text, is_transient

log = logging.getLogger("jobworker.boot")

#: Pause between tries to set a handler up while a store that it needs does not answer yet.
_SETUP_RETRY_S = 0.5
#: Process id of the forkserver, which has imported this module before it forked this process.
_FORKSERVER_PID = os.getpid()
#: Half of what there is, out of 1000: before any other process of the service, after what asks to go first.
_OOM_SCORE_ADJ = b"500"


def main(role: str, slot: int, settings_json: bytes, control_fd: int, blackbox_fd: int, *fds: int) -> None:
    """Run one role in a process that the forkserver has forked.

    ``control_fd`` is its end of the control socket. ``fds`` are those of a worker's channel or of the
    reader's crash marks. Raises SystemExit: 0 after a proper end, 2, 3 or 5 if the role could not start.
    """
    tie_to_parent(_FORKSERVER_PID)
    try:
        sys.exit(_main(role, slot, settings_json, control_fd, blackbox_fd, fds))
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        logging.shutdown()


def _main(
    role: str, slot: int, settings_json: bytes, control_fd: int, blackbox_fd: int, fds: Sequence[int]
) -> int:
    # The forkserver ignores what a terminal or service manager sends to all: only the supervisor decides what
    # that means. Reader and reaper have to outlive the running jobs; a worker can be stopped while it starts.
    if role == "worker":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)  # the supervisor ends the group: what handlers start ends with the worker
    faulthandler.enable(blackbox_fd)
    faulthandler.register(signal.SIGUSR2, blackbox_fd)
    link = ControlSocket(socket.socket(fileno=control_fd))
    settings = settings_class().from_json(settings_json)
    if role == "worker":
        device = _place(settings, slot)
        threads = settings.threads if device == NO_DEVICE else settings.device_threads or settings.threads
        settings = replace(settings, device=device, threads=threads)
    name = role if role != "worker" else f"worker {slot}"
    setproctitle.setproctitle(f"jobworker: {name} [{settings.instance}]")
    logs.configure(name, settings, os.environ)
    _begin_tracing(name, settings)
    try:
        _run(role, settings, link, fds)
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


def _run(role: str, settings: Settings, link: ControlSocket, fds: Sequence[int]) -> None:
    match role:
        case "reader":
            _run_reader(settings, link, CrashMarks(*fds))
        case "reaper":
            _run_reaper(settings, link)
        case "api":
            _run_api(settings, link, *fds)
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
    store = RedisReaderStore(
        settings.redis_url, consumer, holder=settings.holder, wait_replicas=settings.wait_replicas
    )
    Reader(store, settings, link, marks=marks).run()


def _run_reaper(settings: Settings, link: ControlSocket) -> None:
    from .reaper import Reaper
    from .store.redis.reaper import RedisReaperStore

    Reaper(RedisReaperStore(settings.redis_url), settings, link).run()


def _run_api(settings: Settings, link: ControlSocket, listener_fd: int) -> None:
    _go_first_when_memory_is_short()
    run_soon()
    # A question is short, and workers make room for it. A second thread on the same core gains nothing.
    settings = replace(settings, threads=max(1, cores() // 2), device=_place(settings, 0))
    set_pools(settings.threads)
    run = imported(extension().api)
    run(settings, ApiLink(link), socket.socket(fileno=listener_fd))
    trace.close()
    logging.shutdown()
    os._exit(0)  # as a worker


def _run_worker(settings: Settings, link: ControlSocket, channel: Channel) -> None:
    from .runner import Runner

    if channel.stop_requested:  # the signal may have come before it had an effect
        signal.raise_signal(signal.SIGTERM)
    _go_first_when_memory_is_short()
    if settings.serve_addr:
        make_room()
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
    # Suppressed: a kernel or container that does not offer it. With Path a worker copies more shared pages.
    with suppress(OSError), open("/proc/self/oom_score_adj", "wb", 0) as file:
        file.write(_OOM_SCORE_ADJ)


def _mask(flags: Iterable[bool]) -> int:
    """A bit for each type, as far as there are bits."""
    return sum(1 << number for number, flag in enumerate(flags) if flag and number < MASKED_TYPES)


def _set_up(settings: Settings, link: ControlSocket) -> dict[str, BoundHandler] | None:
    """Load the handlers, waiting for stores that are still coming up; None when it was given up."""
    give_up_at = time.monotonic() + settings.connect_timeout_s
    loop = EventLoop()
    while True:
        try:
            with ForkGuard():
                return load_handlers(settings, loop)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # asyncio's cancellation among them
            transient = is_transient(error)
            if transient and time.monotonic() < give_up_at:
                time.sleep(_SETUP_RETRY_S)  # a store that does not listen yet offers no event to wait on
                continue
            code = Exit.STORE_UNREACHABLE if transient else Exit.BOOT_FAILED
            known = isinstance(error, JobworkerError) or transient
            text = text_of(error) if known else error_text(error)
            log.critical("handler.setup_failed", extra={"error": text}, exc_info=None if transient else error)
            link.send(StartFailed(text[:MAX_ERROR_CHARS], code))
            return None
