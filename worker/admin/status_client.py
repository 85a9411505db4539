"""HTTP client of a service's ``/status`` page."""

import re
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import orjson

from ..settings import without_credentials
from ..store.announcements import Announcement

#: A service in the same data centre answers within milliseconds. A slower one is shown as not answering.
_TIMEOUT_S = 2.5
#: Largest status page accepted. 512 workers with 16 jobs each stay far below it.
_MAX_PAGE_BYTES = 8 * 1024 * 1024


class _Running(msgspec.Struct):
    count: int = 0
    for_s: float = 0.0
    limit_in_s: float = 0.0
    jobs: list[dict[str, str | int]] = []


class _Child(msgspec.Struct):
    role: str = ""
    state: str = ""
    pid: int | None = None
    rss_mib: float | None = None
    finished: int | None = None
    restarts: int | None = None
    running: _Running | None = None


class _Sample(msgspec.Struct):
    value: float | None
    task_type: str = ""


class _Histogram(msgspec.Struct):
    bounds: list[float] = []
    samples: list[dict[str, str | list[float]]] = []


class _Page(msgspec.Struct):
    """Types of the fields that are used here. A field may be missing: older versions have fewer."""

    children: list[_Child]
    host: str = ""
    instance: str = ""
    version: str = ""
    store: str = ""
    ready: bool = False
    lease_s: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    types: list[str] = []
    reasons: list[str] = []
    transient_reasons: list[str] = []
    warnings: list[str] = []
    metrics: dict[str, list[_Sample]] = {}
    histograms: dict[str, _Histogram] = {}


_TOO_SLOW = f"no complete answer within {_TIMEOUT_S:g} s"


class Service(NamedTuple):
    """One service and its status page. ``status`` is empty if it did not answer; ``error`` says why."""

    url: str
    status: dict[str, Any]
    error: str = ""

    @property
    def consumer(self) -> str:
        """The consumer name of its reader."""
        return f"{self.status.get('host')}/{self.status.get('instance')}"

    def workers(self) -> list[dict[str, Any]]:
        """The status of each worker process."""
        return [child for child in self.status.get("children", ()) if child.get("role") == "worker"]

    def running(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """For each running job: the worker, the worker's ``running`` field, the job."""
        for worker in self.workers():
            for job in (worker.get("running") or {}).get("jobs", ()):
                yield worker, worker["running"], job

    def problems(self) -> list[str]:
        """Why it is not ready, without what passes by itself, such as the restart of one of its workers."""
        transient = self.status.get("transient_reasons", ())
        return [str(reason) for reason in self.status.get("reasons", ()) if reason not in transient]

    def types_with(self, gauge: str) -> set[str]:
        """The job types for which a gauge with the label ``task_type`` is not 0."""
        samples = self.status.get("metrics", {}).get(gauge, ())
        return {sample["task_type"] for sample in samples if sample["value"]}


def handled_types(
    announcements: Iterable[Announcement], services: Iterable[Service], wall_now_s: float
) -> tuple[frozenset[str], bool]:
    """Types that running services handle, and True. If none runs: those that services handled lately, and
    False. Empty if unknown."""
    announcements = list(announcements)
    running = {name for one in announcements if one.is_running(wall_now_s) for name in one.types}
    running |= {str(name) for service in services for name in service.status.get("types", ())}
    if running:
        return frozenset(running), True
    return frozenset(name for one in announcements for name in one.types), False


def fetch_status(url: str, redis_url: str = "") -> Service:
    """Fetch one status page; it never raises. With `redis_url`, a service on another store counts as not
    answering."""
    import http.client  # here: it takes longer to import than everything else that `--help` needs

    try:
        status = _fetch(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Service(url, {}, f"{type(error).__name__}: {error}")
    if redis_url and not same_store(str(status.get("store", "")), redis_url):
        return Service(url, {}, f"uses another job store: {status.get('store')}")
    return Service(url, status)


def fetch_all_statuses(urls: Sequence[str], redis_url: str = "") -> list[Service]:
    """Fetch the status page of each url."""
    return [fetch_status(url, redis_url) for url in urls]


def _fetch(url: str) -> dict[str, Any]:
    import http.client

    parts = urlsplit(url)
    secure = parts.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
        parts.netloc, timeout=_TIMEOUT_S
    )
    try:
        connection.connect()
        with _deadline(connection.sock):
            connection.request("GET", f"{parts.path.rstrip('/')}/status")
            response = connection.getresponse()
            body = response.read(_MAX_PAGE_BYTES + 1)
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}")
    finally:
        connection.close()
    if len(body) > _MAX_PAGE_BYTES:
        raise ValueError(f"the answer is larger than {_MAX_PAGE_BYTES >> 20} MiB")
    status = orjson.loads(body)
    if not isinstance(status, dict) or "children" not in status:
        raise ValueError("the answer is not a jobworker status page")
    try:
        msgspec.convert(status, _Page)
    except msgspec.ValidationError as error:
        raise ValueError(f"the answer is not a jobworker status page: {error}") from error
    return status


@contextmanager
def _deadline(connected: socket.socket) -> Iterator[None]:
    """Raises TimeoutError if the block takes longer than the timeout, which a socket applies to each recv."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with suppress(OSError):
            socket.socket.shutdown(
                connected, socket.SHUT_RDWR
            )  # not that of TLS, which sends a message first

    timer = threading.Timer(_TIMEOUT_S, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, ValueError, AttributeError) as error:
        raise error if not expired.is_set() else TimeoutError(_TOO_SLOW) from error
    finally:
        timer.cancel()
    if expired.is_set():
        raise TimeoutError(_TOO_SLOW)


def same_store(one: str, other: str) -> bool:
    """Whether two urls name the same store. Credentials and options are ignored."""
    return _address(one) == _address(other)


def _address(url: str) -> str:
    """The url without credentials, options and database 0; names of this machine become 127.0.0.1."""
    plain = without_credentials(url)
    plain = re.sub(r"://(localhost|\[::1\])(?=[:/]|$)", "://127.0.0.1", plain).rstrip("/")
    return plain.removesuffix("/0")
