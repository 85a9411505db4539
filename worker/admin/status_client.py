"""What services say of themselves at /status, asked from outside."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..settings import without_credentials

#: A service on this machine or in this data centre answers at once; one that does not is shown as silent.
_TIMEOUT_S = 2.5
#: Largest page taken in: 512 workers with 16 jobs each stay well below.
_PAGE_BYTES = 8 * 1024 * 1024


class Service(NamedTuple):
    """One service's answer; ``said`` is empty where there was none, and ``trouble`` says why."""

    url: str
    said: dict[str, Any]
    trouble: str = ""

    @property
    def consumer(self) -> str:
        """The name that it reads by."""
        return f"{self.said.get('host')}/{self.said.get('instance')}"

    def workers(self) -> list[dict[str, Any]]:
        """Its worker processes."""
        return [child for child in self.said.get("children", ()) if child.get("role") == "worker"]

    def running(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """Each job under way that it names: the worker, what that runs, the job."""
        for worker in self.workers():
            for job in (worker.get("running") or {}).get("jobs", ()):
                yield worker, worker["running"], job

    def flagged(self, gauge: str) -> set[str]:
        """The types for which a gauge with the label ``task_type`` is not 0."""
        samples = self.said.get("metrics", {}).get(gauge, ())
        return {sample["task_type"] for sample in samples if sample["value"]}


def fetch_status(url: str, redis_url: str = "") -> Service:
    """What a service says. With `redis_url`, one that works on another store counts as none."""
    import http.client  # here: it takes longer to import than all else that a `--help` needs

    try:
        said = _fetch(url)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Service(url, {}, f"{type(error).__name__}: {error}")
    if redis_url and not same_store(str(said.get("store", "")), redis_url):
        return Service(url, {}, f"works on another store: {said.get('store')}")
    return Service(url, said)


def fetch_all_statuses(urls: Sequence[str], redis_url: str = "") -> list[Service]:
    """What each of the services says."""
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
        body = response.read(_PAGE_BYTES)
        if response.status != 200:
            raise ValueError(f"answers {response.status}")
    finally:
        connection.close()
    said = json.loads(body)
    if not isinstance(said, dict) or "children" not in said:
        raise ValueError("is no status page of this version")
    return said


def same_store(one: str, other: str) -> bool:
    """Whether two urls name one store, whatever their credentials and options are."""
    return _place(one) == _place(other)


def _place(url: str) -> str:
    """The store's address without credentials and options, names of this machine all alike."""
    plain = without_credentials(url)
    plain = re.sub(r"://(localhost|\[::1\])(?=[:/]|$)", "://127.0.0.1", plain).rstrip("/")
    return plain.removesuffix("/0")
