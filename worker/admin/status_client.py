"""HTTP client of a service's ``/status`` page."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from ..settings import without_credentials
from ..store.announcements import Announcement

#: A service in the same data centre answers within milliseconds. A slower one is shown as not answering.
_TIMEOUT_S = 2.5
#: Largest status page accepted. 512 workers with 16 jobs each stay far below it.
_MAX_PAGE_BYTES = 8 * 1024 * 1024


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
        connection.request("GET", f"{parts.path.rstrip('/')}/status")
        response = connection.getresponse()
        body = response.read(_MAX_PAGE_BYTES)
        if response.status != 200:
            raise ValueError(f"HTTP status {response.status}")
    finally:
        connection.close()
    status = orjson.loads(body)
    if not isinstance(status, dict) or "children" not in status:
        raise ValueError("the answer is not a jobworker status page")
    return status


def same_store(one: str, other: str) -> bool:
    """Whether two urls name the same store. Credentials and options are ignored."""
    return _address(one) == _address(other)


def _address(url: str) -> str:
    """The url without credentials, options and database 0; names of this machine become 127.0.0.1."""
    plain = without_credentials(url)
    plain = re.sub(r"://(localhost|\[::1\])(?=[:/]|$)", "://127.0.0.1", plain).rstrip("/")
    return plain.removesuffix("/0")
