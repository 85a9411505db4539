"""Which deployment an operator means: its job store, its services and its streams."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..admin.status_client import Service, fetch_all_statuses
from ..data_dir import DataDir
from ..errors import ConfigurationError
from ..keys import DEFAULT_SOURCES, Source
from ..settings import parse_source

WHICH = (
    "Give --redis-url (or JOBWORKER_REDIS_URL), the --config FILE of its service, or the --data-dir of a "
    "service here"
)


class Deployment(NamedTuple):
    """Where the job store is, and where services that use it say how they are. ``guessed``: nobody named
    those, so they may be of another deployment."""

    url: str
    metrics_urls: tuple[str, ...]
    guessed: bool
    milvus_uri: str = ""


def endpoints_of(data_dir: str) -> dict[str, Any]:
    """Where the service of a data directory listens; empty where there is none."""
    if not Path(data_dir).is_dir():
        return {}
    data = DataDir(data_dir)
    try:
        return data.endpoints()
    finally:
        data.close()


def store_url(url: str) -> str:
    """The url, if there is one. Raises `ConfigurationError` where nothing says which store."""
    if not url:
        raise ConfigurationError(f"which deployment? {WHICH}")
    return url


def source_list(streams: Sequence[str], *, need_group: bool = True) -> list[Source]:
    """What --stream says, or the service's own table. A stream of that table may be named without its
    group, and so may any where the group does not matter. Raises `ConfigurationError`."""
    known = {source.stream: source for source in DEFAULT_SOURCES}

    def read(text: str) -> Source:
        return known.get(text) or (parse_source(text) if need_group or "=" in text else Source(text, ""))

    return [read(text) for text in streams] or list(DEFAULT_SOURCES)


def services_of(deployment: Deployment) -> list[Service]:
    """What the deployment's services say now, those that answer."""
    asked = fetch_all_statuses(deployment.metrics_urls, deployment.url if deployment.guessed else "")
    return [service for service in asked if service.said]
