"""Which process gets a processor first: workers make room for the role ``api``."""

import ctypes
import os
import platform
import struct
from contextlib import suppress

#: Niceness of workers beside the role ``api``. Its requests get nine tenths of a processor that both want.
WORKERS_NICE = 10
#: Slice of the role ``api`` (ns): the kernel's smallest. Of two threads the one with the shorter slice
#: interrupts the other when it wakes up (Linux >= 6.12); its share of the processor stays the same.
API_SLICE_NS = 100_000
#: Number of the system call sched_setattr, which Python does not offer. Most architectures have the second.
_SCHED_SETATTR = {"x86_64": 314}.get(platform.machine(), 274)
#: struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_SCHED_ATTR = struct.Struct("IIQiIQQQ")


def make_room() -> None:
    """Let the threads of this process, and those that it starts, run after those of the role ``api``."""
    with suppress(OSError):  # a sandbox that forbids it
        os.nice(WORKERS_NICE)


def run_soon() -> None:
    """Let the threads that this process starts from now on run as soon as they wake up.

    An older kernel keeps its own slice.
    """
    attributes = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, API_SLICE_NS, 0, 0
    )
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attributes, 0)
