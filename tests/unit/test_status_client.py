"""Client of /status: answers, services that do not answer, and services of another store."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobworker.worker.admin.status_client import Service, fetch_status, same_store


@contextmanager
def serving(body: bytes, code: int = 200) -> Iterator[str]:
    """A server that answers every request with this; its url."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_status_page_is_read() -> None:
    page = {"children": [{"role": "reader"}, {"role": "worker", "slot": 0}], "host": "h", "instance": "blue",
            "store": "redis://:***@127.0.0.1:6379/0",
            "metrics": {"g": [{"task_type": "a", "value": 1}, {"task_type": "b", "value": 0}]}}  # fmt: skip
    with serving(json.dumps(page).encode()) as url:
        service = fetch_status(url, "redis://localhost:6379")
        assert (service.error, service.consumer, len(service.workers())) == ("", "h/blue", 1)
        assert service.types_with("g") == {"a"}
        assert "uses another job store" in fetch_status(url, "redis://localhost:6379/1").error


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        (b"no json", 200, "ValueError"),
        (b"[]", 200, "not a jobworker status page"),
        (b'{"status": "ok"}', 200, "not a jobworker status page"),
        (b'{"children": 5}', 200, "Expected `array`, got `int` - at `$.children`"),
        (b'{"children": [{"role": "worker", "running": [1]}]}', 200, "$.children[0].running"),
        (b'{"children": [], "metrics": {"m": [5]}}', 200, "$.metrics"),
        (b'{"children": [], "histograms": {"h": {"bounds": 5}}}', 200, "$.histograms"),
        (b'{"children": [], "reasons": 5}', 200, "$.reasons"),
        (b'{"children": [], "lease_s": -1}', 200, "$.lease_s"),
        (b"{}", 503, "HTTP status 503"),
    ],
)
def test_another_page_counts_as_no_answer(body: bytes, code: int, error: str) -> None:
    with serving(body, code) as url:
        service = fetch_status(url)
    assert service.status == {}
    assert error in service.error or "JSONDecodeError" in service.error


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"]
)
def test_an_answer_in_drops_has_one_deadline(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr("jobworker.worker.admin.status_client._TIMEOUT_S", 0.3)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(head)
                while not stop.wait(0.05):  # far below the timeout of one recv
                    peer.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            service = fetch_status(f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            stop.set()
            thread.join()
    assert service.error.startswith("TimeoutError: no complete answer within")


def test_a_page_over_the_limit_counts_as_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.worker.admin.status_client._MAX_PAGE_BYTES", 1 << 20)
    with serving(b" " * ((1 << 20) + 1)) as url:
        assert "larger than 1 MiB" in fetch_status(url).error


def test_a_closed_port_counts_as_no_answer() -> None:
    assert fetch_status("http://127.0.0.1:1").error.startswith("ConnectionRefusedError")


def test_each_running_job_comes_with_its_worker() -> None:
    running = {"jobs": [{"entry_id": "1-0"}, {"entry_id": "2-0"}]}
    idle, busy = {"role": "worker", "running": None}, {"role": "worker", "running": running}
    service = Service("http://a", {"children": [{"role": "reader"}, idle, busy]})
    assert [(worker is busy, job["entry_id"]) for worker, _, job in service.running()] == [
        (True, "1-0"), (True, "2-0"),
    ]  # fmt: skip
    assert list(Service("http://b", {}, "refused").running()) == []


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("redis://:***@127.0.0.1:6379/0", "redis://:pa@ss@localhost:6379", True),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/1", False),
        ("redis://a:6379/0", "redis://b:6379/0", False),
        ("unix:///run/r.sock", "unix:///run/r.sock?db=0", True),
        ("redis+sentinel://h:1,i:2/mymaster/0", "redis+sentinel://u:p@h:1,i:2/mymaster", True),
    ],
)
def test_urls_of_one_store_are_recognised(theirs: str, ours: str, same: bool) -> None:
    assert same_store(theirs, ours) is same
