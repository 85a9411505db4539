"""``jobworker web`` in tests: the installed command on a port of its own, and a browser's side of HTTP."""

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
#: As root in a container there is no sandbox; the others keep it from calling home.
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip


class Answer(NamedTuple):
    """What came back. Header names are in small letters."""

    status: int
    headers: dict[str, str]
    body: str


class Page:
    """A running page, and whoever looks at it: their cookie is kept once they have logged in."""

    def __init__(self, url: str, popen: "subprocess.Popen[str]") -> None:
        self.url = url
        self.popen = popen
        self.cookie = ""

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> Answer:
        """One request; underscores in header names stand for hyphens."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=COMMAND_S)
        sent = {"Accept": "text/html", "Cookie": self.cookie} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        try:
            connection.request(method, path, body or None, sent)
            response = connection.getresponse()
            said = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, said, response.read().decode())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """Look at a page."""
        return self.ask("GET", path, **headers)

    def post(self, path: str, form: Mapping[str, Any], **headers: str) -> Answer:
        """Send a form as a browser does that shows a page of this address."""
        usual = {"Content_Type": "application/x-www-form-urlencoded", "Origin": self.url}
        return self.ask("POST", path, urlencode(form, doseq=True), **{**usual, **headers})

    def log_in(self, token: str = TOKEN) -> Answer:
        """Send the token, and keep the cookie."""
        answer = self.post("/login", {"token": token, "next": "/"})
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    @property
    def csrf(self) -> str:
        """What stands in the forms of this session."""
        match = re.search(r'name="csrf" value="([^"]+)"', self.get("/").body)
        assert match is not None, "no form with a token: is somebody logged in?"
        return match[1]

    def act(self, path: str, form: Mapping[str, Any], **headers: str) -> Answer:
        """Send a form of this session."""
        return self.post(path, {"csrf": self.csrf, **form}, **headers)


def start(
    url: str, *options: str, token: str = "", metrics_url: str = "http://127.0.0.1:1"
) -> "subprocess.Popen[str]":
    """The command; it may refuse to start."""
    environment = {
        **os.environ, "JOBWORKER_REDIS_URL": url, "JOBWORKER_WEB_TOKEN": token,
        "JOBWORKER_METRICS_URL": metrics_url,
    }  # fmt: skip
    command = [str(COMMAND), "web", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@contextlib.contextmanager
def page(store: RedisServer | Service, *options: str, token: str = "") -> Iterator[Page]:
    """A page on a free port that looks often; ended with TERM, it must end well."""
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
        assert select.select([popen.stdout], [], [], COMMAND_S)[0], "it does not say where it listens"
        first = popen.stdout.readline()
        match = re.match(r"serving (http://\S+)", first)
        assert match is not None, (first, popen.communicate(timeout=COMMAND_S))
        yield Page(match[1], popen)
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(COMMAND_S) == 0
    finally:
        popen.kill()
        popen.communicate(timeout=COMMAND_S)
