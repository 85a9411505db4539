"""What a process finds when it starts: standard streams that are open, and no proxy for this machine."""

import os
import sys
from collections.abc import MutableMapping

#: What clients take for this machine. gRPC and HTTP libraries ask the proxy for these names too.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")


def prepare_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Prepare this process. Call it first: before files are opened and clients read the environment."""
    open_standard_streams()
    exempt_loopback_from_proxies(environ)


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that was closed (``2>&-``).

    Otherwise the next file or socket gets the number, and everything that is printed goes into it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
    # `sys.stdin` stays None: a command that needs input says that it is closed.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Not the number itself, which a library may have got since the start.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (stays open)


def exempt_loopback_from_proxies(environ: MutableMapping[str, str]) -> None:
    """Add this machine to ``no_proxy``, also for children. Without a proxy variable nothing changes."""
    if not any(environ.get(name) or environ.get(name.upper()) for name in _PROXIES):
        return
    # Clients differ in which of them they read, and gRPC reads no other if no_grpc_proxy is set.
    environ.setdefault("no_proxy", environ.get("NO_PROXY", ""))
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        if name in environ:
            hosts = [host.strip() for host in environ[name].split(",") if host.strip()]
            environ[name] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
