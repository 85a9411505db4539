"""Exclusive lock on an open file, with a deadline."""

import fcntl
import time


def lock_file(fd: int, *, mono_give_up_s: float, poll_s: float = 0.02) -> None:
    """Lock the open file `fd`. The kernel unlocks it when the descriptor is closed, also after a kill.

    Tries every `poll_s`, because `flock` itself has no deadline. Raises TimeoutError if another process still
    has the lock at `mono_give_up_s` of `time.monotonic`.
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > mono_give_up_s:
                raise TimeoutError("another process has held the lock of the file for too long") from None
            time.sleep(poll_s)
