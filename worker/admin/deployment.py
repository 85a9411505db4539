"""The deployment that an operator works on: its job store, its services and its streams."""

import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigurationError
from ..extension import extension
from ..keys import Source
from ..settings import parse_source
from ..shards import logical_stream
from ..store.announcements import suggestion
from .status_client import Service, fetch_all_statuses

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

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


def stopped_service(data_dir: str, endpoints: Mapping[str, Any]) -> str:
    """In words, that the service of a data directory is stopped, and how to start it; empty if it runs, or
    none has run there."""
    pid = endpoints.get("pid")
    if not isinstance(pid, int) or Path(f"/proc/{pid}").exists():
        return ""
    return (
        f"The service of the data directory {data_dir} is stopped; an embedded store stops with it. Start it "
        f"with the options that it had: jobworker-supervise --data-dir {shlex.quote(data_dir)}"
    )


def require_store_url(url: str) -> str:
    """The url itself. Raises `ConfigurationError` if it is empty."""
    if not url:
        raise ConfigurationError(f"which deployment? {DEPLOYMENT_HINT}")
    return url


class UnknownGroup(ConfigurationError):
    """A stream was given without its group, and no service tells it."""


class StreamTable:
    """The streams that a verb looks at: those of --stream and their shards.

    Without any, those of the services that the job store has registered, running or stopped lately; the
    default ones if no service is registered."""

    def __init__(self, streams: Sequence[str], *, need_group: bool = True) -> None:
        """Raises `ConfigurationError` for an invalid stream. A stream of a registered service may be given
        without its group, and so may any stream unless `need_group`; its group is empty then."""
        self._need_group = need_group
        self._given = [_parse_source(text) for text in streams]
        #: The given streams with their groups and shards, once they are known.
        self._complete: list[Source] = []
        #: The answer of the last call of `sources`.
        self.latest = self._given or list(extension().streams)

    def sources(self, store: "OperatorStore") -> list[Source]:
        """The streams now, at least one. Raises `StoreUnavailable`, and `UnknownGroup` if a group is needed.
        Given streams raise nothing after a first success."""
        self.latest = self._find(store)
        return self.latest

    def _find(self, store: "OperatorStore") -> list[Source]:
        if self._complete:
            return self._complete
        registered = _registered(store)
        if not self._given:
            return registered or list(extension().streams)
        groups = dict([*extension().streams, *registered])
        given = [self._with_group(source, groups) for source in self._given]
        shards = _of_streams(registered, {source.stream for source in given})
        self._complete = list(dict.fromkeys([*given, *shards]))
        return self._complete

    def names(self, store: "OperatorStore") -> list[str]:
        """The names of `sources`, each once."""
        return list(dict.fromkeys(source.stream for source in self.sources(store)))

    def _with_group(self, source: Source, groups: Mapping[str, str]) -> Source:
        group = source.group or groups.get(source.stream, "")
        if self._need_group and not group:
            raise UnknownGroup(
                f"--stream {source.stream!r}: no registered service reads this stream, so say NAME=GROUP; "
                f"{suggestion(source.stream, groups)}"
            )
        return Source(source.stream, group)


def with_shards(store: "OperatorStore", stream: str) -> list[str]:
    """The stream of a name and its registered shards, in the order in which a job passes through them.

    Raises `StoreUnavailable`.
    """
    logical = logical_stream(stream)
    shards = [source.stream for source in _of_streams(_registered(store), {logical})]
    return list(dict.fromkeys([logical, *shards, stream]))


def _registered(store: "OperatorStore") -> list[Source]:
    """What the registered services read, each once."""
    return list(dict.fromkeys(source for one in store.announcements() for source in one.sources))


def _of_streams(registered: Iterable[Source], names: Container[str]) -> list[Source]:
    """Those of some streams and of their shards."""
    return [one for one in registered if logical_stream(one.stream) in names]


def _parse_source(text: str) -> Source:
    """``NAME=GROUP`` or ``NAME``. Raises `ConfigurationError`."""
    return Source(text, "") if "=" not in text and text.strip() else parse_source(text)
