"""Lock file of a service instance: one service per data directory, job store and instance name.

The kernel releases the lock when the service exits, for any cause. A service that gets the lock knows that
every earlier start in the file has ended. The job store then gives it the name without waiting for the lease.
"""

import fcntl
import hashlib
import os
import re
import secrets
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ..host.data_dir import open_own, safe_folder
from ..keys import Holder
from ..settings import Settings

#: Starts listed in the file: more than fail in a row before one of them takes the name.
_MAX_STARTS = 16
#: Parts of a URL that may hold a password. The file name is a hash, and must not depend on them.
_CREDENTIALS = re.compile(r"^([^:/]+://)[^/]*@|[?].*$", re.DOTALL)


class InstanceLock:
    """Lock file of an instance, opened but not yet locked: call `try_lock`.

    Raises OSError if the data directory cannot be used, ConfigurationError if others may change it.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder = Path(settings.data_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        safe_folder(self.folder)
        store = _CREDENTIALS.sub(r"\1", settings.redis_url)
        name = hashlib.sha256(f"{store}\n{settings.instance}".encode()).hexdigest()[:16]
        self._fd = open_own(self.folder / f"instance-{name}.lock", os.O_RDWR | os.O_CREAT)
        self._settings = settings

    def try_lock(self) -> bool:
        """Lock the file. Returns False while another service holds it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def holder_pid(self) -> int:
        """Process id of the latest start; 0 if the file lists none."""
        starts = self._starts()
        return int(starts[-1][1]) if starts else 0

    def record_start(self) -> Holder:
        """Append this start to the locked file; returns it with its predecessors."""
        starts = self._starts()
        holder = new_holder(self._settings, tuple(token for token, _ in starts))
        starts = [*starts, (holder.token, str(os.getpid()))][-_MAX_STARTS:]
        text = "".join(f"{token} {pid}\n" for token, pid in starts).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        return holder

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)

    def _starts(self) -> list[tuple[str, str]]:
        """Token and process id of each start, oldest first. Malformed lines are ignored."""
        with suppress(UnicodeDecodeError):
            lines = [line.split() for line in os.pread(self._fd, 4096, 0).decode("ascii").splitlines()]
            return [(line[0], line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()]
        return []


def new_holder(settings: Settings, predecessors: tuple[str, ...] = ()) -> Holder:
    """Identity of this start of the service, as other services see it in the job store."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    description = (
        f"pid {os.getpid()} on host {settings.host} since {since}, "
        f"data directory {Path(settings.data_dir).absolute()}"
    )
    return Holder(secrets.token_hex(8), description, settings.lease_s, predecessors)
