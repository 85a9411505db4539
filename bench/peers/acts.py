"""Job of every peer: the same fates and event log as in ``chaos_handlers``."""

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

from chaos_events import END, FAIL, FOLDER_VARIABLE, START, EventWriter

#: As in ``chaos_handlers``.
WORK_S = 0.01


@functools.cache
def _writer() -> EventWriter:
    return EventWriter()


def act(job: dict[str, Any]) -> None:
    """Record the start, work, then succeed, raise, or kill the process."""
    writer, tries = _writer(), [(job["id"], 0)]
    writer.write(START, tries)
    time.sleep(WORK_S)  # simulated work
    if job["fate"] == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["fate"] in ("permanent", "exhausted") or (job["fate"] == "flaky" and _first_time(job["id"])):
        writer.write(FAIL, tries)
        raise ValueError("not now")
    writer.effect(job["tenant_id"], job["id"], job["text"])
    writer.write(END, tries)


def _first_time(id: str) -> bool:
    """Whether this is the first try; recorded in a file, because peers count tries in different ways."""
    try:
        os.symlink(id, Path(os.environ[FOLDER_VARIABLE]) / "tried" / id)
    except FileExistsError:
        return False
    return True
