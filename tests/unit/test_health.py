"""The HTTP port: what a load balancer, an orchestrator and Prometheus see."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from jobworker.worker.supervision.health import Health, HealthServer
from jobworker.worker.telemetry.prometheus import CONTENT_TYPE, PrometheusCollector

WITHIN_S = 10


class Service:
    """A server with a state that the test sets."""

    def __init__(self) -> None:
        self.health = Health(True, True, [], {"workers": {"idle": 2}})
        self.server = HealthServer(("127.0.0.1", 0), PrometheusCollector(), lambda: self.health)

    def get(self, path: str) -> tuple[int, str, bytes]:
        # Without the proxies of the environment: it is this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.server.url + path, timeout=WITHIN_S) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read()


def test_the_status_page_says_when_it_cannot_be_had() -> None:
    answers: list[dict[str, object] | None] = [{"children": []}, None]
    made = Service()
    made.server.close()
    made.server = HealthServer(
        ("127.0.0.1", 0), PrometheusCollector(), lambda: made.health, lambda: answers.pop(0)
    )
    try:
        status, kind, body = made.get("/status")
        assert (status, kind, json.loads(body)) == (200, "application/json", {"children": []})
        assert made.get("/status")[0] == 503
    finally:
        made.server.close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.close()


@pytest.mark.parametrize(
    ("live", "ready", "healthz", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503), (False, True, 503, 503)],
)
def test_live_and_ready(service: Service, live: bool, ready: bool, healthz: int, readyz: int) -> None:
    service.health = Health(live, ready, ["worker 0 is starting"], {"workers": {"idle": 1}})
    assert service.get("/healthz")[0] == healthz
    status, kind, body = service.get("/readyz")
    assert (status, kind) == (readyz, "application/json")
    assert json.loads(body) == {
        "ok": readyz == 200, "reasons": ["worker 0 is starting"], "workers": {"idle": 1},
    }  # fmt: skip


def test_metrics_are_served_as_prometheus_wants_them(service: Service) -> None:
    status, kind, body = service.get("/metrics?name[]=x")
    assert (status, kind) == (200, CONTENT_TYPE)
    assert b"\nz_novel_truncated_tokens_total 0.0\n" in body


def test_any_other_path_says_what_there_is(service: Service) -> None:
    status, _, body = service.get("/")
    assert status == 404
    assert b"/readyz" in body


def test_a_client_that_says_nothing_holds_nobody_up(service: Service) -> None:
    host, port = service.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WITHIN_S) as silent:
        silent.sendall(b"GET /met")
        assert service.get("/healthz")[0] == 200
        closing = threading.Thread(target=service.server.close)
        closing.start()
        closing.join(5.0)
        assert not closing.is_alive(), "closing waits for a silent client"
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=1.0)
    service.server = HealthServer(("127.0.0.1", 0), PrometheusCollector(), lambda: service.health)


def test_an_address_in_use_is_an_error_at_start(service: Service) -> None:
    host, port = service.server.url.removeprefix("http://").split(":")
    with pytest.raises(OSError, match="in use"):
        HealthServer((host, int(port)), PrometheusCollector(), lambda: service.health)


def test_the_port_is_free_again_at_once_after_closing() -> None:
    """A restart must find its port, though clients of the last service are just gone."""
    first = Service()
    assert first.get("/healthz")[0] == 200
    host, port = first.server.url.removeprefix("http://").split(":")
    first.server.close()
    HealthServer((host, int(port)), PrometheusCollector(), lambda: first.health).close()


def test_scrapes_leave_no_line_on_stderr(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    service.get("/metrics")
    service.get("/nothing")
    assert capfd.readouterr().err == ""
