"""uvicorn with limits against slow clients, and an end within a fixed time."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("jobworker.http")

#: Deadline of a request with its body, from its first byte or from the connect. A form has a few kilobytes.
REQUEST_WITHIN_S = 10.0
#: What a client must take of a large answer within the time of a request: 13 KB/s for a time of 20 s.
TAKEN_BYTES = 256 * 1024
#: Open connections. A browser opens six; each takes a descriptor, of which many hosts allow 1,024.
MAX_CONNECTIONS = 128
#: End of the process after TERM, also with a request that waits in a thread: nothing can interrupt a thread.
END_WITHIN_S = 4.5


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 connection that is closed when a request does not arrive or its answer is not taken in time.

    A connection beyond the limit takes the place of the one that has waited longest for the rest of its
    request; without such a one it is closed at once.
    """

    max_connections: ClassVar[int] = MAX_CONNECTIONS
    request_within_s: ClassVar[float] = REQUEST_WITHIN_S
    _deadline: asyncio.TimerHandle | None = None
    _reader_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and (slowest := self._slowest()) is not None:
            slowest._stop()  # not found again before its end is noticed
            slowest.transport.abort()
        elif len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._start()

    def data_received(self, data: bytes) -> None:
        """Stop the deadline once the request is complete."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._start()
        else:
            self._stop()

    def pause_writing(self) -> None:
        """Start the deadline of the client, which has not taken the answer yet."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Stop it: the rest is small."""
        self._stop_reader()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also one whose client does not take the rest of an answer."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, such as the start of a TLS connection."""
        client = self.client[0] if self.client else ""
        log.warning("http.request_invalid", extra={"client": client})
        super().send_400_response(msg)
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadlines."""
        self._stop()
        self._stop_reader()
        super().connection_lost(exc)

    def _slowest(self) -> "BoundedProtocol | None":
        waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one._deadline]
        return min(waiting, key=lambda one: one._deadline.when() if one._deadline else 0.0, default=None)

    def _unsent(self) -> int:
        return int(self.transport.get_write_buffer_size())

    def _watch_reader(self) -> None:
        unsent = self._unsent()
        if unsent and self._reader_deadline is None:
            loop = asyncio.get_running_loop()
            self._reader_deadline = loop.call_later(self.request_within_s, self._check_reader, unsent)

    def _check_reader(self, unsent_before: int) -> None:
        self._reader_deadline = None
        if self._unsent() > max(0, unsent_before - TAKEN_BYTES):
            self.transport.abort()
        else:
            self._watch_reader()

    def _stop_reader(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

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
