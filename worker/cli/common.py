"""What the verbs of ``jobworker`` share: which deployment, exit codes, and words on a terminal."""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from ..embedded import DataDir
from ..errors import ConfigurationError, Exit, StoreUnavailable
from ..keys import DEFAULT_SOURCES, STREAM_OF_TYPE, Source
from ..log import redacted
from ..observe import Service, ask_all
from ..options import CONFIG_OF_SERVICE, DATA_DIR, ENV_PREFIX, REDIS_URL
from ..settings import parse_source

#: Exit code of a verb that was carried out and has bad news: nothing found, or something is wrong.
BAD_NEWS = 1
#: Where a service listens whose --metrics-addr was left alone.
_METRICS_ADDR = "127.0.0.1:9464"
_WHICH = (
    "Give --redis-url (or JOBWORKER_REDIS_URL), the --config FILE of its service, or the --data-dir of a "
    "service here"
)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: What may move a terminal's cursor or change its title; tenants' words go to the terminal too.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


#: Ids that are named one by one where something cannot be done with them.
NAMED_AT_MOST = 10


class Deployment(NamedTuple):
    """Where the job store is, and where services that use it say how they are. ``guessed``: nobody named
    those, so they may be of another deployment."""

    url: str
    metrics_urls: tuple[str, ...]
    guessed: bool
    milvus_uri: str = ""


class Verbs(click.Group):
    """Turns the errors that a user can mend into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            click.echo(f"jobworker: {redacted(str(error))}", err=True)
            click.echo("Is it running, and is it the one that is meant? " + _WHICH, err=True)
            context.exit(Exit.STORE_UNREACHABLE)
        except (ConfigurationError, ValueError) as error:
            click.echo(f"jobworker: {error}", err=True)
            context.exit(Exit.USAGE)


class Age(click.ParamType[float]):
    """``90``, ``90s``, ``15m``, ``2h``, ``7d`` or ``1w``, as seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", str(value))
        if match is None:
            self.fail(f"{value!r}: say 90s, 15m, 2h or 7d", param, ctx)
        return float(match[1]) * _UNITS_S[match[2] or "s"]


class JobType(click.ParamType[str]):
    """Any type of job; completion knows those that need no code of users."""

    name = "type"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The agreed types."""
        return [CompletionItem(kind) for kind in STREAM_OF_TYPE if kind.startswith(incomplete)]


def stream_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completion: the streams of the service's own table."""
    return [CompletionItem(stream) for stream, _ in DEFAULT_SOURCES if stream.startswith(incomplete)]


AS_JSON = click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
STREAMS = click.option(
    "--stream", "streams", multiple=True, envvar=f"{ENV_PREFIX}_STREAM", metavar="NAME=GROUP",
    shell_complete=stream_names,
    help="Stream and its group, as the service was told; repeatable.  [default: the service's own table]",
)  # fmt: skip
METRICS_URL = click.option(
    "--metrics-url", "metrics_urls", multiple=True, envvar=f"{ENV_PREFIX}_METRICS_URL",
    help="Where a service serves /status; repeatable.  [default: that of --data-dir, else of "
    f"{ENV_PREFIX}_METRICS_ADDR, else http://{_METRICS_ADDR}]",
)  # fmt: skip
_METRICS_ADDR_ENV = click.option(
    "--metrics-addr", hidden=True, default=_METRICS_ADDR, envvar=f"{ENV_PREFIX}_METRICS_ADDR"
)


def verb(group: click.Group, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """A command of a group that is given the store's url first of all."""

    def decorate(command: Callable[..., None]) -> click.Command:
        @wraps(command)
        def with_url(redis_url: str, data_dir: str, **options: Any) -> None:
            command(_url(redis_url or str(_endpoints(data_dir).get("redis_url", ""))), **options)

        return group.command(name)(CONFIG_OF_SERVICE(REDIS_URL(DATA_DIR(with_url))))

    return decorate


def verb_on_deployment(group: click.Group) -> Callable[[Callable[..., None]], click.Command]:
    """A command that is given a `Deployment` first of all."""

    def decorate(command: Callable[..., None]) -> click.Command:
        @wraps(command)
        def with_both(
            redis_url: str, data_dir: str, metrics_urls: tuple[str, ...], metrics_addr: str, **options: Any
        ) -> None:
            known = {} if redis_url else _endpoints(data_dir)
            usual = str(known.get("metrics_url", f"http://{metrics_addr}"))
            url = _url(redis_url or str(known.get("redis_url", "")))
            milvus_uri = str(known.get("milvus_uri", ""))
            command(Deployment(url, metrics_urls or (usual,), not metrics_urls, milvus_uri), **options)

        for option in (_METRICS_ADDR_ENV, METRICS_URL, DATA_DIR, REDIS_URL, CONFIG_OF_SERVICE):
            with_both = option(with_both)
        return group.command()(with_both)

    return decorate


def _endpoints(data_dir: str) -> dict[str, Any]:
    if not Path(data_dir).is_dir():
        return {}
    data = DataDir(data_dir)
    try:
        return data.endpoints()
    finally:
        data.close()


def _url(url: str) -> str:
    """The url, if there is one. Raises `ConfigurationError` where nothing says which store."""
    if not url:
        raise ConfigurationError(f"which deployment? {_WHICH}")
    return url


def sources_of(streams: Sequence[str], *, need_group: bool = True) -> list[Source]:
    """What --stream says, or the service's own table. A stream of that table may be named without its
    group, and so may any where the group does not matter. Raises `ConfigurationError`."""
    known = {source.stream: source for source in DEFAULT_SOURCES}

    def read(text: str) -> Source:
        return known.get(text) or (parse_source(text) if need_group or "=" in text else Source(text, ""))

    return [read(text) for text in streams] or list(DEFAULT_SOURCES)


def services_of(deployment: Deployment) -> list[Service]:
    """What the deployment's services say now, those that answer."""
    asked = ask_all(deployment.metrics_urls, deployment.url if deployment.guessed else "")
    return [service for service in asked if service.said]


def say_json(value: Any) -> None:
    """One JSON object on a line; every byte that is no text becomes a replacement character."""
    click.echo(json.dumps(value, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def clean(text: str, width: int = 0) -> str:
    """Fit for a terminal: no control characters, and cut to a width (0: as long as it is)."""
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if not width or columns(text) <= width:
        return text
    ends = accumulate(columns(char) for char in text)
    return "".join(char for char, end in zip(text, ends, strict=True) if end < width) + "…"


def columns(text: str) -> int:
    """How many columns of a terminal it takes: Chinese characters two, marks upon a letter none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def pad(text: str, width: int) -> str:
    """Filled up to a width; a negative one sets to the right."""
    blanks = " " * (abs(width) - columns(text))
    return blanks + text if width < 0 else text + blanks


def span(seconds: float) -> str:
    """A length of time in two letters' precision: ``0.4 s``, ``12 s``, ``3 min``, ``5 h``, ``9 d``."""
    for limit, unit_s, unit in ((10, 0, ""), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.1f} s" if not unit else f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def some(count: int, what: str, plural: str = "") -> str:
    """``1 worker``, ``2 workers``."""
    return f"{count} {what if count == 1 else plural or what + 's'}"


def say_missing(ids: frozenset[str], found: Iterable[str]) -> list[str]:
    """Name those of the ids that were asked for and not found, some of them; returns all."""
    missing = sorted(ids.difference(found))
    for id in missing[:NAMED_AT_MOST]:
        click.echo(f"not found: {clean(id)}; try: jobworker explain {clean(id)}", err=True)
    return missing


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; headings that end in ``>`` are set to the right."""
    names = [heading.rstrip(">") for heading in headings]
    widths = [max([len(name), *(columns(row[i]) for row in rows)]) for i, name in enumerate(names)]
    for row in [names, *rows]:
        cells = [
            pad(cell, -width if heading.endswith(">") else width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def confirm(question: Callable[[], str], yes: bool) -> None:
    """Ask before what cannot be taken back. Raises `ConfigurationError` where nobody can answer; the question
    is made only where somebody can."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError("nobody here to confirm it: give --yes")
    click.confirm(question(), abort=True, err=True)
