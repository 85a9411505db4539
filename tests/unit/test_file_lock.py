"""The file lock has a deadline, and a killed holder releases it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobworker.handlers.file_lock import lock_file

HOLDER = """
import os, sys, time
from jobworker.handlers.file_lock import lock_file
lock_file(os.open(sys.argv[1], os.O_RDWR), mono_give_up_s=time.monotonic() + 10)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_waiter_gives_up_at_its_deadline_and_gets_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    fd = os.open(path, os.O_RDWR)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(TimeoutError):
            lock_file(fd, mono_give_up_s=time.monotonic() + 0.05)
        holder.send_signal(signal.SIGKILL)
        lock_file(fd, mono_give_up_s=time.monotonic() + 20)
    finally:
        os.close(fd)
        holder.kill()
        holder.communicate(timeout=60)
