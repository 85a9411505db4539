"""Parent-death signal: the kernel kills a process when its parent exits, for any cause.

As a program, ``python pdeathsig.py PARENT_PID COMMAND ...`` sets the signal, starts a new session (a Ctrl-C
in the terminal does not reach it) and execs the command. The setting survives exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def tie_to_parent(parent_pid: int) -> None:
    """Let the kernel send SIGKILL to this process when its parent exits (Linux, prctl(2)).

    If the parent has already exited, this function sends the signal: the kernel sends none for that. Raises
    OSError if the kernel refuses.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def tied_to_us() -> list[str]:
    """The words before a command that make the kernel kill it when this process exits.

    The file runs alone, without ``site``: ``-m`` would import the package first, which costs more than the
    start of the interpreter.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid())]


def become_subreaper() -> None:
    """Adopt the orphans among this process's descendants (Linux, prctl(2)). Raises OSError."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    os.setsid()
    os.execv(sys.argv[2], sys.argv[2:])
