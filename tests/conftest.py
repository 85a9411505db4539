"""What every test gets: no network for models, one Hypothesis profile, and no child left behind."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

#: How long a child that was told to end may take to be gone from the process table.
CHILD_GRACE_S = 5.0

#: Python's own helpers of multiprocessing live as long as the interpreter that started them.
HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

# Children inherit it: a test that reached for a model hub would depend on somebody else's server.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell that puts the suite into the background has it ignore interrupts, and so would every child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline an example and no example database: a slow machine is no bug, and tests leave nothing behind.
settings.register_profile("jobworker", deadline=None, database=None, print_blob=True)
settings.load_profile("jobworker")


def living_children() -> dict[int, str]:
    """Children of this process that still run, by process id, less Python's own helpers."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        runs = int(after_name[1]) == os.getpid() and after_name[0] not in "ZX"
        if runs and not any(helper in command for helper in HELPERS):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


@pytest.fixture(scope="session", autouse=True)
def no_child_left_behind() -> Iterator[None]:
    """The suite fails at its end if a process that a test started still runs."""
    before = living_children()
    yield
    deadline = time.monotonic() + CHILD_GRACE_S
    while (left := living_children().keys() - before.keys()) and time.monotonic() < deadline:
        time.sleep(0.05)  # the process table has no event to wait on for children of others' Popen objects
    assert not left, f"still running: {living_children()}"
