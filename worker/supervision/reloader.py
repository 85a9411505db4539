"""Reloader for development: notices changed source files and says what has to be restarted.

It compares the times and sizes of the files twice a second. That needs no library and no thread, and it also
sees changes through bind mounts and network file systems, where the kernel reports none. The files are those
that an import in another process has loaded; the supervisor imports no module of the user.
"""

import logging
import os
import signal
import time
from collections.abc import Iterable
from enum import Enum

from ..errors import ConfigurationError
from ..functions.app import AppListing, checked_handlers, listing_command, read_listing
from ..settings import Settings
from .process import Command

log = logging.getLogger("jobworker.reloader")

_POLL_S = 0.5
#: Longest import of the modules after a change.
_IMPORT_WITHIN_S = 60.0
#: Modules of this package are not watched.
_OURS = f"{__name__.partition('.')[0]}."
#: Files of a change that are named.
_NAMED_FILES = 10

#: Time of the last change, size and inode of a file; None where it does not exist.
Stamp = tuple[int, int, int] | None


class Restart(Enum):
    """What has to be restarted: the workers have new code, or the service has other job types."""

    WORKERS = "workers"
    SERVICE = "service"


class Reloader:
    """Watches the source files of the handlers of ``settings``.

    `tick` never blocks. After a change it imports the modules in another process; if that fails, it logs the
    error and the old workers stay.
    """

    def __init__(self, settings: Settings) -> None:
        self._apps = settings.apps
        self._handlers = settings.handlers
        modules = {target.partition(":")[0] for target in settings.handlers.values()}
        self._others = sorted(name for name in modules - {*settings.apps} if not name.startswith(_OURS))
        #: Each file as it was when the workers' code was read.
        self._files: dict[str, Stamp] = {}
        #: The files at the last look, if that differed.
        self._unsettled: dict[str, Stamp] | None = None
        self._known: set[tuple[str, str]] | None = None
        self._process: Command | None = None
        self._answer_fd = -1
        self._wall_since_ns = time.time_ns()
        self._mono_next_s = 0.0

    def tick(self, now: float) -> Restart | None:
        """Take one step; returns what has to be restarted now."""
        if self._process is not None:
            return self._continue_listing(self._process, now)
        if self._known is None:
            self._begin_listing(now)
        elif now >= self._mono_next_s:
            self._mono_next_s = now + _POLL_S
            self._compare(now)
        return None

    def close(self) -> None:
        """End an import that is still running."""
        if self._process is not None:
            self._process.kill(signal.SIGKILL)
            self._process.wait(_IMPORT_WITHIN_S)
            self._end_listing(self._process)

    def _compare(self, now: float) -> None:
        """Compare the files; a change counts once they are the same twice in a row."""
        stamps = _stamps(self._files)
        if stamps == self._files:
            self._unsettled = None
        elif stamps != self._unsettled:
            self._unsettled = stamps  # an editor or a checkout may still be writing
        else:
            changed = [name for name, stamp in stamps.items() if stamp != self._files[name]]
            log.info("reload.changed", extra={"files": _shown(changed)})
            self._files, self._unsettled = stamps, None
            self._begin_listing(now)

    def _begin_listing(self, now: float) -> None:
        if self._known is not None:
            self._wall_since_ns = time.time_ns()
        self._answer_fd = os.memfd_create("app", os.MFD_CLOEXEC)
        try:
            command = listing_command(self._apps, self._others, self._answer_fd)
            self._process = Command("app listing", command, [self._answer_fd], now)
        except OSError as error:  # short of processes or memory: the next change tries again
            os.close(self._answer_fd)
            self._fail(error)

    def _continue_listing(self, process: Command, now: float) -> Restart | None:
        exited = process.collect()
        if exited is None:
            if now - process.mono_started_s > _IMPORT_WITHIN_S:
                process.kill(signal.SIGKILL)
            return None
        try:
            return self._judge(read_listing(self._answer_fd, exited.cause))
        except ConfigurationError as error:
            self._fail(error)
            return None
        finally:
            self._end_listing(process)

    def _fail(self, error: Exception) -> None:
        """Log why the modules cannot be imported. The types stay those with which the service has started."""
        _log_failure(str(error))
        if self._known is None:
            of_apps = tuple(f"{name}{end}" for name in self._apps for end in ".:")
            self._known = {one for one in self._handlers.items() if one[1].startswith(of_apps)}

    def _end_listing(self, process: Command) -> None:
        process.close()
        os.close(self._answer_fd)
        self._process = None

    def _judge(self, listing: AppListing) -> Restart | None:
        """Watch the files that were loaded, and compare the types. Raises `ConfigurationError`."""
        self._watch(listing.files)
        found, known = set(listing.handlers), self._known
        builtin = {name for name, target in self._handlers.items() if target.startswith(_OURS)}
        given = {
            name: target
            for name, target in self._handlers.items()
            if name not in builtin and (name, target) not in found | (known or set())
        }
        handlers = checked_handlers(listing, builtin, given)
        self._known = found
        if handlers.items() - self._handlers.items() or (known or set()) - found:
            changed = {name for name, _ in found ^ (known or set())}
            log.info("reload.types_changed", extra={"types": sorted(changed)})
            return Restart.SERVICE
        return None if known is None else Restart.WORKERS

    def _watch(self, files: Iterable[str]) -> None:
        """Add files. One that has changed since the code was read counts as changed."""
        for name, stamp in _stamps(name for name in files if name not in self._files).items():
            is_newer = stamp is not None and stamp[0] > self._wall_since_ns
            self._files[name] = None if is_newer else stamp


def _log_failure(error: str) -> None:
    lines = error.splitlines()
    if len(lines) == 1:
        log.error("reload.failed", extra={"error": error})
    else:
        log.error("reload.failed", extra={"error": f"{lines[0]}: {lines[-1]}", "exception": error})


def _stamps(files: Iterable[str]) -> dict[str, Stamp]:
    return {name: _stamp(name) for name in files}


def _stamp(name: str) -> Stamp:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _shown(files: list[str]) -> list[str]:
    """Names relative to the current folder, where they are in it."""
    here = os.getcwd() + os.sep
    named = [name.removeprefix(here) for name in files[:_NAMED_FILES]]
    return [*named, f"and {len(files) - _NAMED_FILES} more"] if len(files) > _NAMED_FILES else named
