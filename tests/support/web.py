"""``jobworker web`` in tests: the installed command on a free port, and an HTTP client for its forms."""

import contextlib
import http.client
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from support.operator import COMMAND, COMMAND_S, url_of
from support.redis_servers import RedisServer
from support.service import Service

TOKEN = "a token of the tests, long enough"
#: As root in a container Chromium has no sandbox; the other flags stop requests to its vendor.
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip


class Answer(NamedTuple):
    """A response. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: str


class Page:
    """A running page and a visitor; the cookie is kept after a log in."""

    def __init__(self, url: str, popen: "subprocess.Popen[str]") -> None:
        self.url = url
        self.popen = popen
        self.cookie = ""

    def request(self, method: str, path: str, body: str = "", **headers: str) -> Answer:
        """One request; underscores in header names stand for hyphens."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=COMMAND_S)
        sent = {"Accept": "text/html", "Cookie": self.cookie} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        try:
            connection.request(method, path, body or None, sent)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, received, response.read().decode())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """Fetch a page."""
        return self.request("GET", path, **headers)

    def post(self, path: str, form: Mapping[str, Any], **headers: str) -> Answer:
        """Send a form as a browser does from a page of this address."""
        defaults = {"Content_Type": "application/x-www-form-urlencoded", "Origin": self.url}
        return self.request("POST", path, urlencode(form, doseq=True), **{**defaults, **headers})

    def log_in(self, token: str = TOKEN) -> Answer:
        """Send the token and keep the cookie."""
        answer = self.post("/login", {"token": token, "next": "/"})
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    @property
    def csrf(self) -> str:
        """The CSRF token in the forms of this session."""
        match = re.search(r'name="csrf" value="([^"]+)"', self.get("/").body)
        assert match is not None, "no form with a CSRF token: not logged in"
        return match[1]

    def act(self, path: str, form: Mapping[str, Any], **headers: str) -> Answer:
        """Send a form with the CSRF token of this session."""
        return self.post(path, {"csrf": self.csrf, **form}, **headers)


def start(
    url: str, *options: str, token: str = "", metrics_url: str = "http://127.0.0.1:1"
) -> "subprocess.Popen[str]":
    """Start the command; it may exit with an error."""
    environment = {
        **os.environ, "JOBWORKER_REDIS_URL": url, **({"JOBWORKER_WEB_TOKEN": token} if token else {}),
        "JOBWORKER_METRICS_URL": metrics_url,
    }  # fmt: skip
    command = [str(COMMAND), "web", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@contextlib.contextmanager
def page(store: RedisServer | Service, *options: str, token: str = "") -> Iterator[Page]:
    """A page on a free port with a short interval. It must exit with 0 after TERM."""
    metrics_url = store.url if isinstance(store, Service) else "http://127.0.0.1:1"
    popen = start(
        url_of(store),
        "--listen=127.0.0.1:0",
        "--interval=0.3",
        *options,
        token=token,
        metrics_url=metrics_url,
    )
    assert popen.stdout is not None
    try:
        assert select.select([popen.stdout], [], [], COMMAND_S)[0], "it did not print its address"
        first = popen.stdout.readline()
        match = re.match(r"serving (http://\S+)", first)
        assert match is not None, (first, popen.communicate(timeout=COMMAND_S))
        yield Page(match[1], popen)
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(COMMAND_S) == 0
    finally:
        popen.kill()
        popen.communicate(timeout=COMMAND_S)
