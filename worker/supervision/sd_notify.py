"""sd_notify(3): state of the service for systemd; does nothing where systemd does not listen."""

import os
import socket
import time


def notify(**fields: str) -> None:
    """Send ``READY="1"``, ``STATUS="..."`` and the like. Never raises and never waits."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    message = "\n".join(f"{key}={value}" for key, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(message.encode(), address)
        except OSError:
            return


def reloading() -> None:
    """Say that a reload began; systemd wants the monotonic clock with it (microseconds)."""
    notify(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
