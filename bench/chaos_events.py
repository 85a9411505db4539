"""Event log of the chaos test: handlers record each try outside of the tested system.

A line is one write in append mode, so lines of processes never mix, and a killed process leaves whole lines.
An effect is a symbolic link, which is created atomically. Its key depends on the job only, and no store and
no service uses its folder.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

#: Environment variable with the folder; every process of the tested system inherits it.
FOLDER_VARIABLE = "CHAOS_DIR"
START, END, FAIL = "start", "end", "fail"


class Event(NamedTuple):
    """One line; ``mono_s`` is the monotonic clock that all processes of a host share."""

    what: str
    id: str
    retry_count: int
    pid: int
    mono_s: float


class EventWriter:
    """Writer of one process, to the folder that the environment names."""

    def __init__(self) -> None:
        folder = Path(os.environ[FOLDER_VARIABLE])
        self._effects = folder / "effects"
        self._fd = os.open(folder / "events", os.O_WRONLY | os.O_APPEND)

    def write(self, what: str, tries: Iterable[tuple[str, int]]) -> None:
        """Append one line for each (job id, retry count), all in one write."""
        now, pid = time.monotonic(), os.getpid()
        text = "".join(f"{what} {id} {retry_count} {pid} {now:.6f}\n" for id, retry_count in tries)
        os.write(self._fd, text.encode())

    def effect(self, tenant_id: str, id: str, text: str) -> None:
        """Record the job's effect; an existing one stays, because effects are idempotent by key."""
        try:
            os.symlink(id, self._effects / effect_key(tenant_id, id, text))
        except FileExistsError:
            return


def effect_key(tenant_id: str, id: str, text: str) -> str:
    """Key of an effect; it includes the content, so a job that was changed in transit gets another key."""
    return f"{tenant_id}.{id}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class EventLog:
    """Reader of the growing event log."""

    def __init__(self, folder: Path) -> None:
        self._effects = folder / "effects"
        self._effects.mkdir()
        path = folder / "events"
        path.touch(0o600)
        self._file = path.open("rb")
        self._part = b""
        self.events: list[Event] = []

    def read(self) -> Sequence[Event]:
        """All events so far, in the order of the writes."""
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        for line in lines:
            what, id, retry_count, pid, mono_s = line.decode().split(" ")
            self.events.append(Event(what, id, int(retry_count), int(pid), float(mono_s)))
        return self.events

    def running(self) -> dict[int, set[str]]:
        """Ids of started jobs without an end, by process id."""
        found: dict[int, set[str]] = {}
        for event in self.read():
            if event.what == START:
                found.setdefault(event.pid, set()).add(event.id)
            else:
                found.get(event.pid, set()).discard(event.id)
        return {pid: ids for pid, ids in found.items() if ids}

    def effects(self) -> dict[str, list[str]]:
        """Keys of effects by job id."""
        found: dict[str, list[str]] = {}
        for link in os.scandir(self._effects):
            found.setdefault(os.readlink(link.path), []).append(link.name)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()
