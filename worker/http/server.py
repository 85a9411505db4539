"""uvicorn with limits against slow clients, and an end within a fixed time."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Deadline of a request with its body, from its first byte or from the connect. A form has a few kilobytes.
REQUEST_WITHIN_S = 10.0
#: Open connections. A browser opens six; each takes a descriptor, of which many hosts allow 1,024.
MAX_CONNECTIONS = 128
#: End of the process after TERM, also with a request that waits in a thread: nothing can interrupt a thread.
END_WITHIN_S = 4.5


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 connection that is closed when a request does not arrive in time.

    A connection beyond the limit is closed at once.
    """

    max_connections: ClassVar[int] = MAX_CONNECTIONS
    request_within_s: ClassVar[float] = REQUEST_WITHIN_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._start()

    def data_received(self, data: bytes) -> None:
        """Stop the deadline once the request is complete."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._start()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self.request_within_s, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class BoundedServer(uvicorn.Server):
    """Server that ends with exit code 0 within `END_WITHIN_S` of INT or TERM."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown."""
        timer = threading.Timer(END_WITHIN_S, os._exit, (0,))
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)


class SupervisedServer(uvicorn.Server):
    """Server in a process of the service: the supervisor stops it, so signals of a terminal do not."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def stop(self) -> None:
        """Accept no more connections, finish the requests in progress, end."""
        self.should_exit = True


def config(
    application: Any, drain_s: int, protocol: type[BoundedProtocol] = BoundedProtocol
) -> uvicorn.Config:
    """Settings of the server."""
    return uvicorn.Config(
        application, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        http=protocol, timeout_graceful_shutdown=drain_s,
    )  # fmt: skip
