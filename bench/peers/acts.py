"""What a job does in every peer: the same fates as in ``chaos_handlers``, written down in the same way."""

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
    """Write the start, work, then succeed, raise, or take the process along."""
    writer, tries = _writer(), [(job["id"], 0)]
    writer.write(START, tries)
    time.sleep(WORK_S)  # stands for the work
    if job["fate"] == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["fate"] in ("permanent", "exhausted") or (job["fate"] == "flaky" and _first_time(job["id"])):
        writer.write(FAIL, tries)
        raise ValueError("not now")
    writer.effect(job["tenant_id"], job["id"], job["text"])
    writer.write(END, tries)


def _first_time(id: str) -> bool:
    """Whether this is the first try; kept outside, for each peer counts tries in another way."""
    try:
        os.symlink(id, Path(os.environ[FOLDER_VARIABLE]) / "tried" / id)
    except FileExistsError:
        return False
    return True
