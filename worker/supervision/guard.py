"""Guard process: kills the process groups of the workers when the supervisor exits for any cause.

``python -I guard.py FD TITLE``. Each message on the socket FD lists the process ids of all group leaders.
The end of the socket means that the supervisor has exited. The file imports nothing of the service, so that
the process stays small.
"""

import os
import signal
import socket
import sys
from contextlib import suppress

from setproctitle import setproctitle

#: Longest message: a few thousand process ids.
_MESSAGE_BYTES = 64 * 1024


def main() -> None:
    """Run until the socket ends, then kill the groups of the last message."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    setproctitle(sys.argv[2])
    # A terminal or service manager signals every process, and the supervisor may still need this one.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    leader_pids: list[int] = []
    while message := sock.recv(_MESSAGE_BYTES):
        leader_pids = [int(pid) for pid in message.split()]
    for pid in leader_pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
