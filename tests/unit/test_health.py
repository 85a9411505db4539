"""HTTP port of the supervisor, as a load balancer, an orchestrator and Prometheus use it."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from jobworker.worker.supervision import health
from jobworker.worker.supervision.health import _MAX_CONNECTIONS, Health, HealthServer
from jobworker.worker.telemetry.prometheus import CONTENT_TYPE, PrometheusCollector

WITHIN_S = 30


class Service:
    """A health server whose state the test sets."""

    def __init__(self) -> None:
        self.health = Health(True, True, [], {"workers": {"idle": 2}})
        self.server = HealthServer(("127.0.0.1", 0), PrometheusCollector(), lambda: self.health)

    def get(self, path: str) -> tuple[int, str, bytes]:
        # Without proxies: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.server.url + path, timeout=WITHIN_S) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.close()


def test_its_start_asks_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("a name server that does not answer would hold up the start")

    for lookup in ("getfqdn", "gethostbyaddr", "getaddrinfo"):
        monkeypatch.setattr(socket, lookup, fail)
    server = HealthServer(("0.0.0.0", 0), PrometheusCollector(), lambda: Health(True, True, [], {}))
    assert server.url.startswith("http://0.0.0.0:")
    server.close()


def test_status_is_503_while_the_supervisor_does_not_answer(service: Service) -> None:
    answers: list[dict[str, object] | None] = [{"children": []}, None]
    service.server.close()
    service.server = HealthServer(
        ("127.0.0.1", 0), PrometheusCollector(), lambda: service.health, lambda: answers.pop(0)
    )
    status, content_type, body = service.get("/status")
    assert (status, content_type, json.loads(body)) == (200, "application/json", {"children": []})
    assert service.get("/status")[0] == 503


@pytest.mark.parametrize(
    ("live", "ready", "healthz", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503), (False, True, 503, 503)],
)
def test_healthz_and_readyz_follow_the_state_and_give_the_reasons(
    service: Service, live: bool, ready: bool, healthz: int, readyz: int
) -> None:
    service.health = Health(live, ready, ["worker 0 is starting"], {"workers": {"idle": 1}})
    assert service.get("/healthz")[0] == healthz
    status, content_type, body = service.get("/readyz")
    assert (status, content_type) == (readyz, "application/json")
    assert json.loads(body) == {
        "ok": readyz == 200, "reasons": ["worker 0 is starting"], "workers": {"idle": 1},
    }  # fmt: skip


def test_metrics_have_the_content_type_of_prometheus(service: Service) -> None:
    status, content_type, body = service.get("/metrics?name[]=x")
    assert (status, content_type) == (200, CONTENT_TYPE)
    assert b"\nz_novel_truncated_tokens_total 0.0\n" in body


def test_an_unknown_path_lists_the_paths(service: Service) -> None:
    status, _, body = service.get("/")
    assert status == 404
    assert b"/readyz" in body


def test_a_silent_client_blocks_neither_other_clients_nor_the_shutdown(service: Service) -> None:
    host, port = service.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WITHIN_S) as silent:
        silent.sendall(b"GET /met")
        assert service.get("/healthz")[0] == 200
        closing = threading.Thread(target=service.server.close)
        closing.start()
        closing.join(8.0)  # the server waits 10 s for a client
        assert not closing.is_alive(), "closing waits for a silent client"
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=1.0)
    service.server = HealthServer(("127.0.0.1", 0), PrometheusCollector(), lambda: service.health)


def test_a_port_in_use_is_an_error_at_start(service: Service) -> None:
    host, port = service.server.url.removeprefix("http://").split(":")
    with pytest.raises(OSError, match="in use"):
        HealthServer((host, int(port)), PrometheusCollector(), lambda: service.health)


def test_the_port_is_free_directly_after_the_shutdown() -> None:
    """A restart must get its port although connections of the last service have just closed."""
    first = Service()
    assert first.get("/healthz")[0] == 200
    host, port = first.server.url.removeprefix("http://").split(":")
    first.server.close()
    HealthServer((host, int(port)), PrometheusCollector(), lambda: first.health).close()


def test_scrapes_leave_no_line_on_stderr(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.get("/metrics")
    service.get("/nothing")
    assert capfd.readouterr().err == ""


def connect(service: Service) -> socket.socket:
    host, port = service.server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=WITHIN_S)


def test_half_open_connections_are_bounded_and_keep_no_probe_out(service: Service) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(service)) for _ in range(2 * _MAX_CONNECTIONS)]
        for number, client in enumerate(silent):
            client.sendall(b"GET /metrics HTTP/1.0\r\n" * (number % 2))
        for _ in range(3):
            assert service.get("/healthz")[0] == 200
        oldest = silent[: _MAX_CONNECTIONS - 1]
        for client in oldest:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b"", "closed by the server"
        assert len(service.server._server._connections) <= _MAX_CONNECTIONS


def test_a_request_that_is_being_answered_outlives_half_open_connections(service: Service) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def status() -> dict[str, object]:
        asked.set()
        assert go_on.wait(WITHIN_S)
        return {"children": []}

    service.server.close()
    service.server = HealthServer(("127.0.0.1", 0), PrometheusCollector(), lambda: service.health, status)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(service))
        client.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        assert asked.wait(WITHIN_S)
        for _ in range(_MAX_CONNECTIONS + 1):
            stack.enter_context(connect(service))
        assert service.get("/healthz")[0] == 200
        go_on.set()
        assert client.recv(100).startswith(b"HTTP/1.0 200")


def test_connections_leave_descriptors_for_children(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(service) as probe:
        limit = probe.fileno() + 20
    monkeypatch.setattr(health.resource, "getrlimit", lambda _: (limit, limit))
    with connect(service) as refused, contextlib.suppress(ConnectionResetError):
        assert refused.recv(1) == b""
    monkeypatch.undo()
    assert service.get("/healthz")[0] == 200
