"""The oracle's eyes: what handlers write down about each try, outside of the system that is being tested.

A line is one write in append mode, so lines of many processes never mix and a killed one leaves whole lines
only. An effect is a symbolic link: made whole or not at all, under a key that follows from the job alone, in
a folder that no store and no service knows of.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

#: Names the folder; every process of the tested system inherits it.
FOLDER_VARIABLE = "CHAOS_DIR"
START, END, FAIL = "start", "end", "fail"


class Event(NamedTuple):
    """One line. ``mono_s`` is the clock that all processes of a host share."""

    what: str
    id: str
    retry_count: int
    pid: int
    mono_s: float


class EventWriter:
    """Writes for one process; the folder is the one that the environment names."""

    def __init__(self) -> None:
        folder = Path(os.environ[FOLDER_VARIABLE])
        self._effects = folder / "effects"
        self._fd = os.open(folder / "events", os.O_WRONLY | os.O_APPEND)

    def write(self, what: str, tries: Iterable[tuple[str, int]]) -> None:
        """One line for each (job id, retry count), all in one write."""
        now, pid = time.monotonic(), os.getpid()
        text = "".join(f"{what} {id} {retry_count} {pid} {now:.6f}\n" for id, retry_count in tries)
        os.write(self._fd, text.encode())

    def effect(self, tenant_id: str, id: str, text: str) -> None:
        """Leave the job's effect. One that is there already stays: that is what keyed effects are for."""
        try:
            os.symlink(id, self._effects / effect_key(tenant_id, id, text))
        except FileExistsError:
            return


def effect_key(tenant_id: str, id: str, text: str) -> str:
    """The key holds all that a job says, so that one whose content changed on the way leaves another."""
    return f"{tenant_id}.{id}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class EventLog:
    """Reads what was written, as it grows."""

    def __init__(self, folder: Path) -> None:
        self._effects = folder / "effects"
        self._effects.mkdir()
        path = folder / "events"
        path.touch(0o600)
        self._file = path.open("rb")
        self._part = b""
        self.events: list[Event] = []

    def read(self) -> Sequence[Event]:
        """Everything so far, in the order of the writes."""
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        for line in lines:
            what, id, retry_count, pid, mono_s = line.decode().split(" ")
            self.events.append(Event(what, id, int(retry_count), int(pid), float(mono_s)))
        return self.events

    def running(self) -> dict[int, set[str]]:
        """Ids that were started and of whose end nothing was written, by the process that started them."""
        found: dict[int, set[str]] = {}
        for event in self.read():
            if event.what == START:
                found.setdefault(event.pid, set()).add(event.id)
            else:
                found.get(event.pid, set()).discard(event.id)
        return {pid: ids for pid, ids in found.items() if ids}

    def effects(self) -> dict[str, list[str]]:
        """Keys of the effects by the id of the job that left them."""
        found: dict[str, list[str]] = {}
        for link in os.scandir(self._effects):
            found.setdefault(os.readlink(link.path), []).append(link.name)
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()
