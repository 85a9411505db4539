"""The data directory of a service: its lock, and where its embedded servers listen."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any


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
        write_private(self.endpoints_file, json.dumps(endpoints))

    def close(self) -> None:
        """Let go of the lock (stores that still run keep it)."""
        os.close(self.lock_fd)


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step by one that only its user can read."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
