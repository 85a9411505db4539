"""Lock file of a service instance: one service per data directory, job store and instance name.

The kernel drops the lock however the service ends. So a service that gets the lock knows that every earlier
start in the file is over, and the job store lets it take their name without waiting for the lease.
"""

import fcntl
import hashlib
import os
import re
import secrets
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ..keys import Holder
from ..settings import Settings

#: Starts kept in the file: more than end in a row without having taken the name.
_STARTS_KEPT = 16
#: What a password may be in; the file's name must not tell anything about it.
_CREDENTIALS = re.compile(r"^([^:/]+://)[^/]*@|[?].*$", re.DOTALL)


class InstanceLock:
    """An open lock file; locked once `take` has returned True.

    Raises OSError where the data directory cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder = Path(settings.data_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = _CREDENTIALS.sub(r"\1", settings.redis_url)
        name = hashlib.sha256(f"{store}\n{settings.instance}".encode()).hexdigest()[:16]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.folder / f"instance-{name}.lock", flags, 0o600)
        self._settings = settings

    def take(self) -> bool:
        """Lock the file; False while another service has it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def holder_pid(self) -> int:
        """Process id of the latest start; 0 where the file has none."""
        starts = self._starts()
        return int(starts[-1][1]) if starts else 0

    def sign(self) -> Holder:
        """Write a new start into the locked file; returns it with its predecessors."""
        starts = self._starts()
        one = new_holder(self._settings, tuple(token for token, _ in starts))
        starts = [*starts, (one.token, str(os.getpid()))][-_STARTS_KEPT:]
        text = "".join(f"{token} {pid}\n" for token, pid in starts).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        return one

    def close(self) -> None:
        """Drop the lock."""
        os.close(self._fd)

    def _starts(self) -> list[tuple[str, str]]:
        """Token and process id of each start, oldest first; lines that are no start are ignored."""
        with suppress(UnicodeDecodeError):
            lines = [line.split() for line in os.pread(self._fd, 4096, 0).decode("ascii").splitlines()]
            return [(line[0], line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()]
        return []


def new_holder(settings: Settings, predecessors: tuple[str, ...] = ()) -> Holder:
    """This start of the service, as other services get to see it."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    about = (
        f"pid {os.getpid()} on host {settings.host} since {since}, "
        f"data directory {Path(settings.data_dir).absolute()}"
    )
    return Holder(secrets.token_hex(8), about, settings.lease_s, predecessors)
