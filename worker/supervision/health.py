"""HTTP server of the supervisor for /metrics, /healthz, /readyz and /status; runs in its own threads."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from ..telemetry.prometheus import CONTENT_TYPE, PrometheusCollector

#: The connection of a client that stops sending or reading is closed after this time.
_CLIENT_TIMEOUT_S = 10.0


class Health(NamedTuple):
    """Liveness and readiness of the service, with the reasons if it is not ready."""

    live: bool
    ready: bool
    reasons: list[str]
    details: dict[str, Any]


class HealthServer:
    """HTTP server for probes and Prometheus; serves until `close`. Raises OSError if the port is taken."""

    def __init__(
        self,
        address: tuple[str, int],
        metrics: PrometheusCollector,
        health: Callable[[], Health],
        status: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        """``status`` returns the body of /status, or None if the supervisor does not answer in time."""
        callbacks = {"health": staticmethod(health), "status": staticmethod(status)}
        handler = type("Handler", (_Handler,), {"metrics": metrics, **callbacks})
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        self._server = server(address, handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that disconnects is not an error
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL; for port 0 with the port that the kernel picked."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLIENT_TIMEOUT_S)


class _Handler(BaseHTTPRequestHandler):
    metrics: PrometheusCollector
    health: Callable[[], Health]
    status: Callable[[], dict[str, Any] | None]
    timeout = _CLIENT_TIMEOUT_S
    server_version = "jobworker"

    def do_GET(self) -> None:
        """Serve one of the paths."""
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
                body = (
                    json.dumps(
                        status or {"error": "the supervisor did not answer within 2 s; try again"}
                    ).encode()
                    + b"\n"
                )
                self._answer(200 if status else 503, "application/json", body)
            case _:
                self._answer(404, "text/plain", b"try /metrics, /healthz, /readyz or /status\n")

    def _answer_json(self, ok: bool, health: Health) -> None:
        body = {"ok": ok, "reasons": health.reasons, **health.details}
        self._answer(200 if ok else 503, "application/json", json.dumps(body).encode() + b"\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing: a scrape is not an event."""
