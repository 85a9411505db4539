"""The programs in examples/ work against a running service."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobworker.worker import Job
from support.service import TESTS, Service, eventually, service

pytestmark = pytest.mark.process

EXAMPLES = TESTS.parent / "examples"
GO_FOLDER = EXAMPLES / "producer_go"
HANDLERS = {"greet": "smallest:Greet", "count_words": "batch:CountWords", "notify": "webhook:Notify"}
#: A cold build compiles the standard library too, which a busy core takes minutes for.
GO_BUILD_WITHIN_S = 240


class Endpoint(ThreadingHTTPServer):
    """What the webhook example posts to. It is down for the first posts, and rejects some payloads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.statuses = [503, 503]
        #: Idempotency key, payload and status of each post.
        self.posts: list[tuple[str, object, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_HEAD(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 422 if payload == "bad" else self.server.statuses.pop(0) if self.server.statuses else 204
        self.server.posts.append((self.headers["Idempotency-Key"], payload, status))
        self._answer(status)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint) -> Iterator[Service]:
    """The service with all handlers, found by the path as a user's own modules are."""
    environment = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(EXAMPLES)]), "NOTIFY_URL": endpoint.url}
    environment["JOBWORKER_APP"] = "functions"
    with service(tmp_path_factory.mktemp("examples"), HANDLERS, environment=environment) as one:
        yield one
        one.wait_until_drained()


def greeted(running: Service, name: str) -> bool:
    return bool(running.logged("greeting", text=f"Hello, {name}!"))


def test_the_smallest_handler_runs_and_dead_letters_a_bad_payload(running: Service) -> None:
    running.enqueue("greet", {"name": "Ada"})
    letter = running.dead_letter(running.enqueue("greet", {"nom": "Ada"}))
    eventually(lambda: greeted(running, "Ada"))
    assert (letter["reason"], letter["retry_count"]) == ("permanent", 0)


def test_the_functions_run_and_a_bad_payload_is_malformed(running: Service) -> None:
    running.enqueue("welcome", {"name": "Ada"})
    invitation = running.enqueue("invite", {"name": "Ada", "languages": ["en", "fr"]})
    running.enqueue("total", {"item": "tea", "cents": 250})
    eventually(lambda: running.logged("welcome", text="Welcome, Ada!"))
    eventually(lambda: len(running.logged("invited", request=invitation)) == 2)
    eventually(lambda: running.logged("total", cents=250))
    letter = running.dead_letter(running.enqueue("welcome", {"nom": "Ada"}))
    assert (letter["reason"], letter["retry_count"]) == ("malformed", 0)
    assert (
        running.dead_letter(running.enqueue("total", {"item": "tea", "cents": -1}))["reason"] == "permanent"
    )


def test_the_batch_handler_writes_one_row_a_job_and_fails_bad_jobs_alone(running: Service) -> None:
    good = running.enqueue_many({"type": "count_words", "payload": "one two three"} for _ in range(40))
    bad = running.enqueue("count_words", 5)
    assert running.dead_letter(bad)["error"] == "PermanentError: the payload must be a string"

    def rows() -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(running.data_dir / "words.sqlite3")) as database:
            return dict(database.execute("SELECT job_id, words FROM counts"))

    eventually(lambda: set(good) <= rows().keys())
    assert [rows()[id] for id in good] == [3] * 40
    eventually(lambda: running.metric("z_novel_words_total") == 120)


def test_the_webhook_waits_for_its_endpoint_without_using_up_retries(
    running: Service, endpoint: Endpoint
) -> None:
    running.enqueue(
        "notify", {"text": "chapter 7 is ready"}, id="雪\nX-Other: 1"
    )  # no id that a header can hold
    eventually(lambda: [post for post in endpoint.posts if post[2] == 204], within_s=60)
    assert [post[1:] for post in endpoint.posts[:3]] == [
        ({"text": "chapter 7 is ready"}, status) for status in (503, 503, 204)
    ]
    (key,) = {post[0] for post in endpoint.posts[:3]}
    assert re.fullmatch("[0-9a-f]{64}", key)
    running.wait_until_drained()
    assert running.metric("z_novel_jobs_retried_total", task_type="notify") == 0
    assert running.dead_letter(running.enqueue("notify", "bad"))["reason"] == "permanent"


def test_the_python_producer_sends_jobs_that_are_run(running: Service) -> None:
    names = ["Grace", "Barbara", "Radia"]
    command = [sys.executable, EXAMPLES / "producer.py", running.redis_url, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(names)
    eventually(lambda: all(greeted(running, name) for name in names))


@pytest.mark.timeout(300)
def test_the_go_producer_is_built_and_sends_jobs_that_are_run(running: Service, tmp_path: Path) -> None:
    binary = built_by_go(tmp_path)
    command = [binary, "-redis", running.redis_url, "Frances", "Joan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    eventually(lambda: greeted(running, "Frances") and greeted(running, "Joan"))


def built_by_go(folder: Path) -> Path:
    """The program, built outside the tree; skips where this machine cannot build it."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no go on this machine: examples/producer_go is checked as text only")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [go, *arguments], cwd=GO_FOLDER, capture_output=True, text=True, check=False,
            timeout=GO_BUILD_WITHIN_S, env={**os.environ, "GOTOOLCHAIN": "local"},
        )  # fmt: skip

    fetched = run("mod", "download")
    if fetched.returncode:
        pytest.skip(f"go cannot fetch go-redis: {fetched.stderr.strip()[-200:]}")
    built = run("build", "-o", str(folder / "producer"), ".")
    assert built.returncode == 0, built.stderr
    return folder / "producer"


def test_the_go_producer_has_the_fields_of_the_wire_format_and_never_trims() -> None:
    """Shows without go that the struct and the fields that the service reads have the same names."""
    source = (GO_FOLDER / "main.go").read_text()
    sent = set(re.findall(r'`json:"(\w+)"`', source))
    assert sent == set(Job.__struct_fields__) - {"stream", "entry_id", "retry_count"}
    (values,) = re.findall(r"redis\.XAddArgs\{(.*?\})\}", source)
    assert values == 'Stream: stream, Values: map[string]any{"data": data}'
