"""Parent-death signal: a process is killed when its parent dies, in whatever way the parent dies.

As a program (``python -m jobworker.worker.supervision.pdeathsig PARENT_PID COMMAND ...``) it ties itself,
leaves the terminal's process group, and becomes the command: the tie is kept over exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def tie_to_parent(parent_pid: int) -> None:
    """Have the kernel send SIGKILL to this process when its parent ends (Linux, prctl(2)).

    Exits at once where the parent has ended already: no signal would come for that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent is gone")


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    os.setsid()
    os.execv(sys.argv[2], sys.argv[2:])
