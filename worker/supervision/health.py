"""HTTP server of the supervisor: /metrics, /healthz, /readyz, /status, /batches; runs in its own threads."""

import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, NamedTuple
from urllib.parse import unquote

from ..safe_text import safe_json
from ..telemetry.prometheus import CONTENT_TYPE, PrometheusCollector
from .batch_mailbox import BatchAnswer

#: Open connections. Above this the oldest one is closed, first among those without a complete request.
_MAX_CONNECTIONS = 32
#: Descriptors that connections leave to the rest of the supervisor: a child takes up to ten to start.
_RESERVED_FDS = 64
#: Longest wait for a connection: the thread has nothing else to do.
_WAIT_S = 3600.0
#: The connection of a client that stops sending or reading is closed after this time.
_CLIENT_TIMEOUT_S = 10.0


class Health(NamedTuple):
    """Liveness and readiness of the service, with the reasons if it is not ready."""

    live: bool
    ready: bool
    reasons: list[str]
    details: dict[str, Any]


def _json_line(value: dict[str, Any]) -> bytes:
    return safe_json(value).encode() + b"\n"


class HealthServer:
    """HTTP server for probes and Prometheus; serves until `close`. Raises OSError if the port is taken."""

    def __init__(
        self,
        address: tuple[str, int],
        metrics: PrometheusCollector,
        health: Callable[[], Health],
        status: Callable[[], dict[str, Any] | None] = lambda: None,
        batch: Callable[[str], BatchAnswer | None] = lambda id: None,
    ) -> None:
        """``status`` returns the body of /status, ``batch`` that of /batches/ID; None if the service does not
        answer in time."""
        callbacks = {
            "health": staticmethod(health), "status": staticmethod(status), "batch": staticmethod(batch),
        }  # fmt: skip
        handler = type("Handler", (_Handler,), {"metrics": metrics, **callbacks})
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        server = type("Server", (_Server,), {"address_family": family})
        self._server = server(address, handler)
        serve = partial(self._server.serve_forever, poll_interval=_WAIT_S)
        self._thread = threading.Thread(target=serve, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL; for port 0 with the port that the kernel picked."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stop serving and release the port."""
        with suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which then ends
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLIENT_TIMEOUT_S)


class _Server(ThreadingHTTPServer):
    """Server with a bounded number of connections.

    A client that connects and sends nothing, or does not read its answer, costs a descriptor and a thread.
    The newest connection is always served, so that such clients cannot keep probes out.
    """

    daemon_threads = True
    request_queue_size = 128  # a probe that finds the queue full connects a second later

    def __init__(self, address: tuple[str, int], handler: type["_Handler"]) -> None:
        self._lock = threading.Lock()
        # Open connections, oldest first, and whether the request is complete.
        self._connections: dict[socket.socket, bool] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without the reverse lookup of `HTTPServer`: a name server that is silent holds it up."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises OSError if the process is short of descriptors."""
        connection, address = super().get_request()
        # The kernel gives the lowest free number: this is how many descriptors are open.
        if connection.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED_FDS:
            self._close_oldest()
            connection.close()
            raise OSError("too few descriptors are left")
        with self._lock:
            self._connections[connection] = False
            too_many = len(self._connections) > _MAX_CONNECTIONS
        if too_many:
            self._close_oldest()
        return connection, address

    def begin_answer(self, connection: socket.socket) -> None:
        """Record that the request of a connection is complete."""
        with self._lock:
            if connection in self._connections:
                self._connections[connection] = True

    def _close_oldest(self) -> None:
        """Shut a connection down; its thread then reads or writes in vain and closes it."""
        with self._lock:
            oldest = min(self._connections, key=self._connections.__getitem__, default=None)
            if oldest is not None:
                del self._connections[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._connections.pop(request, None)
            super().close_request(request)

    def handle_error(self, *_: object) -> None:
        """Ignore a client that disconnects."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    metrics: PrometheusCollector
    health: Callable[[], Health]
    status: Callable[[], dict[str, Any] | None]
    batch: Callable[[str], BatchAnswer | None]
    timeout = _CLIENT_TIMEOUT_S
    server_version = "jobworker"

    def do_GET(self) -> None:
        """Serve one of the paths."""
        self.server.begin_answer(self.connection)
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, CONTENT_TYPE, self.metrics.page())
            case "/healthz":
                health = self.health()
                self._answer_json(health.live, health)
            case "/readyz":
                health = self.health()
                self._answer_json(health.live and health.ready, health)
            case "/status":
                status = self.status()
                error = {"error": "the supervisor did not answer within 2 s; try again"}
                self._answer(200 if status else 503, "application/json", _json_line(status or error))
            case path if path.startswith("/batches/"):
                self._answer_batch(unquote(path.removeprefix("/batches/")))
            case _:
                self._answer(404, "text/plain", b"try /metrics, /healthz, /readyz, /status or /batches/ID\n")

    def _answer_batch(self, id: str) -> None:
        answer = self.batch(id)
        if answer is None or answer.error:
            error = answer.error if answer else "the service did not answer within 2 s; try again"
            self._answer(503, "application/json", _json_line({"error": error}))
        elif answer.batch is None:
            self._answer(404, "application/json", _json_line({"error": f"no batch has the id {id[:80]}"}))
        else:
            self._answer(200, "application/json", _json_line(answer.batch))

    def _answer_json(self, ok: bool, health: Health) -> None:
        body = {"ok": ok, "reasons": health.reasons, **health.details}
        self._answer(200 if ok else 503, "application/json", _json_line(body))

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing: a scrape is not an event."""
