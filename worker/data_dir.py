"""The data directory of a service: its lock, and where its embedded servers listen."""

import fcntl
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from .endpoints import FILE_NAME
from .errors import ConfigurationError

#: Embedded servers listen on this address only.
HOST = "127.0.0.1"


class DataDir:
    """The service's own folder, locked while it is held. Private to its user: it holds secrets."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.endpoints_file = self.path / FILE_NAME
        self.lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def lock(self) -> bool:
        """Try to hold the folder; False while another service (or a store of one) holds it."""
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        pid = str(os.getpid()).encode()
        os.pwrite(self.lock_fd, pid, 0)
        os.ftruncate(self.lock_fd, len(pid))
        return True

    def holder_pid(self) -> int:
        """Process id of the service that locked the folder last; 0 if the file does not say."""
        text = os.pread(self.lock_fd, 20, 0)
        return int(text) if text.isdigit() else 0

    def endpoints(self) -> dict[str, Any]:
        """Where the service of this folder listens (or last listened); empty where none ever ran."""
        try:
            found = json.loads(self.endpoints_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def announce(self, endpoints: dict[str, Any]) -> None:
        """Write where everything listens, for tools on this machine; readable by its user only."""
        write_private(self.endpoints_file, json.dumps(endpoints))

    def close(self) -> None:
        """Let go of the lock (stores that still run keep it)."""
        os.close(self.lock_fd)


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step by one that only its user can read."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    # As bytes: the name of a folder may have bytes that are no UTF-8.
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.fsencode(text))
    draft.replace(path)


def kept_secret(path: Path, user: str = "") -> str:
    """The secret of this data directory, made at its first use; behind ``user:`` where a name is given.

    An empty file counts as none: a crash of the host can leave one.
    """
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = f"{user}:{secrets.token_urlsafe(24)}" if user else secrets.token_urlsafe(24)
        write_private(path, kept)
    path.chmod(0o600)  # a copied data directory may have lost its modes
    return kept


def private_folder(path: Path) -> Path:
    """The folder, made if need be, for its user only, also where a copy has lost its mode."""
    path.mkdir(exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def free_port(last_url: str | None) -> int:
    """The port of the last run where it is free, so that clients' settings stay good; else any free one."""
    last = (last_url or "").rpartition(":")[2].partition("/")[0]
    for port in (int(last) if last.isdigit() else 0, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((HOST, port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise ConfigurationError(f"no free port on {HOST}")
