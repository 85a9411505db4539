"""The deployment that an operator works on: its job store, its services and its streams."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigurationError
from ..extension import extension
from ..keys import Source
from ..settings import parse_source
from .status_client import Service, fetch_all_statuses

DEPLOYMENT_HINT = (
    "Give --redis-url (or JOBWORKER_REDIS_URL), the --config FILE of its service, or the --data-dir of a "
    "service on this machine"
)


class Deployment(NamedTuple):
    """Url of the job store and of the services' status pages. ``default_metrics``: no url of a service was
    given, so the one that answers at the default address may belong to another deployment.
    ``endpoints``: further addresses of the service on this machine."""

    url: str
    metrics_urls: tuple[str, ...]
    default_metrics: bool
    endpoints: Mapping[str, Any] = {}

    def services(self) -> list[Service]:
        """Every service with its current status, or with the reason why it did not answer."""
        return fetch_all_statuses(self.metrics_urls, self.url if self.default_metrics else "")

    def answering_services(self) -> list[Service]:
        """The services that answer."""
        return [service for service in self.services() if service.status]


def require_store_url(url: str) -> str:
    """The url itself. Raises `ConfigurationError` if it is empty."""
    if not url:
        raise ConfigurationError(f"which deployment? {DEPLOYMENT_HINT}")
    return url


def parse_sources(streams: Sequence[str], *, need_group: bool = True) -> list[Source]:
    """The streams of --stream, or the default ones if there are none.

    A default stream may be given without its group. So may any stream unless `need_group`; its group is
    empty then. Raises `ConfigurationError`.
    """
    default = {source.stream: source for source in extension().streams}

    def parse(text: str) -> Source:
        return default.get(text) or (parse_source(text) if need_group or "=" in text else Source(text, ""))

    return [parse(text) for text in streams] or list(extension().streams)
