"""sd_notify(3): reports the state of the service to systemd; does nothing without NOTIFY_SOCKET."""

import os
import socket
import time


def is_notified() -> bool:
    """Whether systemd, or a program in its place, takes the reports."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(**fields: str) -> None:
    """Send fields such as ``READY="1"`` or ``STATUS="..."``. Never raises and never blocks."""
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
    """Report the start of a reload. systemd requires the monotonic time with it (microseconds)."""
    notify(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
