"""Guard process: kills the process groups of the workers when the supervisor exits for any cause."""

import os
import signal
import socket
from contextlib import suppress

from setproctitle import setproctitle

#: Longest message: a few thousand process ids.
_MESSAGE_BYTES = 64 * 1024


def main(socket_fd: int, title: str) -> None:
    """Run until the socket ends, then kill the groups of the last message.

    Each message lists the process ids of all group leaders. The end of the socket means that the supervisor
    has exited. The forkserver may exit before: nothing ties this process to it.
    """
    sock = socket.socket(fileno=socket_fd)
    setproctitle(title)
    os.setsid()  # the forkserver ignores what a terminal or service manager sends to all, and so do we
    leader_pids: list[int] = []
    while message := sock.recv(_MESSAGE_BYTES):
        leader_pids = [int(pid) for pid in message.split()]
    for pid in leader_pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
