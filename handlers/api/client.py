"""HTTP client of the search of a service's API, for the command line and the web page."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from jobworker.worker import ConfigurationError
from jobworker.worker.host.endpoints import read_endpoints
from jobworker.worker.urls import parse_http_url

TOKEN_VARIABLE = "JOBWORKER_SERVE_TOKEN"
#: What a header can carry. The client of HTTP would quote another token in its error.
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
#: The API answers within 25 s, if only with an error.
_TIMEOUT_S = 30.0
#: Largest answer: 200 rows with the longest texts have 13 MiB, with escapes twice that.
_MAX_ANSWER_BYTES = 64 * 1024 * 1024


class SearchRefused(Exception):
    """The API refused the search or did not answer; the message gives its reason."""


class Found(NamedTuple):
    """Rows of a search, the best first, each with its score, and the model that embedded the question.

    `mode` is dense or hybrid; `note` says why it is dense, if something else was asked for.
    """

    rows: list[dict[str, Any]]
    model: str
    collection: str
    mode: str = "dense"
    note: str = ""


class SearchClient(NamedTuple):
    """Address of an API, and a token that may be empty."""

    url: str
    token: str = ""

    def search(self, asked: Mapping[str, Any]) -> Found:
        """Search. ``asked`` has the fields of ``/v1/search``. Raises `SearchRefused`."""
        import http.client  # here: it takes longer to import than everything else that `--help` needs

        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1/search"
            connection.request("POST", path, _body(asked), headers)
            response = connection.getresponse()
            body = response.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise SearchRefused(f"{self.url} does not answer: {error}. Start it with --serve-addr") from error
        finally:
            connection.close()
        return _found(self.url, response.status, body)


def _body(asked: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(asked)
    except TypeError as error:  # an argument of the command line that is not UTF-8
        raise SearchRefused(f"the search cannot be sent: {error}") from error


def _found(url: str, status: int, body: bytes) -> Found:
    try:
        answer = orjson.loads(body)
        if status == 200:
            how = str(answer.get("mode", "dense")), str(answer.get("note", ""))
            return Found(list(answer["results"]), str(answer["model"]), str(answer["collection"]), *how)
        reason = str(answer["error"]["message"])
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise SearchRefused(f"{url} is no API of jobworker: HTTP status {status}") from None
    hint = f"; set {TOKEN_VARIABLE}" if status == 401 else ""
    raise SearchRefused(f"{reason} (HTTP status {status} from {url}){hint}")


def read_serve_token(path: str) -> str:
    """The token of a client: from the file, else from the environment, else empty.

    Raises `ConfigurationError` for a file that cannot be read, and for what is no token, which it does not
    quote.
    """
    origin = path or TOKEN_VARIABLE
    try:
        token = Path(path).read_text("utf-8").strip() if path else os.environ.get(TOKEN_VARIABLE, "").strip()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the token from {path}: {error}") from error
    if len(token.split()) > 1:
        raise ConfigurationError(
            f"{origin} holds more than a token: give the token alone, without its tenant. The file of "
            "--serve-token-file is for the service"
        )
    if not _TOKEN.fullmatch(token) if token else path:
        raise ConfigurationError(f"{origin} holds no token of printable ASCII characters")
    return token


def find_api(url: str, data_dir: str, serve_addr: str = "") -> str:
    """URL of the API: the given one, else that of the service of the data directory, else ``serve_addr``.

    Empty if none is known. Raises `ConfigurationError` for a wrong URL.
    """
    if url:
        if parse_http_url(url, "--serve-url", "http://127.0.0.1:8000").username is not None:
            raise ConfigurationError(f"--serve-url: give no user or password, but {TOKEN_VARIABLE}")
        return url
    known = str(read_endpoints(data_dir).get("serve_url", ""))
    return known or (f"http://{serve_addr}" if serve_addr and not serve_addr.endswith(":0") else "")
