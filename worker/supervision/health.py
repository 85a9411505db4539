"""HTTP server of the supervisor: /metrics, /healthz, /readyz and /status, in threads of its own."""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from ..telemetry.prometheus import CONTENT_TYPE, PrometheusCollector

#: A client that stops sending or reading is dropped after this (seconds).
_CLIENT_TIMEOUT_S = 10.0


class Health(NamedTuple):
    """Whether the service lives and whether it is ready, and why not."""

    live: bool
    ready: bool
    reasons: list[str]
    details: dict[str, Any]


class HealthServer:
    """Serves until closed. Raises OSError where the address is taken."""

    def __init__(
        self,
        address: tuple[str, int],
        exposition: PrometheusCollector,
        health: Callable[[], Health],
        status: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        """``status`` gives the page for tools, or None where it cannot be had now."""
        asked = {"health": staticmethod(health), "status": staticmethod(status)}
        handler = type("Handler", (_Handler,), {"exposition": exposition, **asked})
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        self._server = server(address, handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that hangs up is no event
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens; with port 0 the one that was picked."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLIENT_TIMEOUT_S)


class _Handler(BaseHTTPRequestHandler):
    exposition: PrometheusCollector
    health: Callable[[], Health]
    status: Callable[[], dict[str, Any] | None]
    timeout = _CLIENT_TIMEOUT_S
    server_version = "jobworker"

    def do_GET(self) -> None:
        """Answer one of the pages."""
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, CONTENT_TYPE, self.exposition.page())
            case "/healthz":
                health = self.health()
                self._answer_json(health.live, health)
            case "/readyz":
                health = self.health()
                self._answer_json(health.live and health.ready, health)
            case "/status":
                status = self.status()
                body = json.dumps(status or {"error": "the service is too busy to say"}).encode() + b"\n"
                self._answer(200 if status else 503, "application/json", body)
            case _:
                self._answer(404, "text/plain", b"try /metrics, /healthz, /readyz or /status\n")

    def _answer_json(self, fine: bool, health: Health) -> None:
        body = {"ok": fine, "reasons": health.reasons, **health.details}
        self._answer(200 if fine else 503, "application/json", json.dumps(body).encode() + b"\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Scrapes are not events."""
