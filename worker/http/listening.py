"""Listening sockets of HTTP servers, made before a server is started."""

import socket

from ..errors import ConfigurationError

#: Connections waiting to be accepted: enough while a server process is replaced.
_BACKLOG = 128


def listen(address: tuple[str, int], option: str) -> socket.socket:
    """A socket that listens on host and port; port 0 takes any free one.

    Raises `ConfigurationError`, which names the option, if it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"{option} {address[0]}:{address[1]}: cannot listen there: {error.strerror or error}"
        ) from error
    listener.listen(_BACKLOG)
    return listener


def url_of(listener: socket.socket) -> str:
    """URL of a listening socket; for port 0 with the port that the kernel picked."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
