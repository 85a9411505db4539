"""What the verbs of ``jobworker`` share: which deployment, exit codes, and words on a terminal."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..admin.deployment import WHICH, Deployment, endpoints_of, store_url
from ..admin.words import columns, pad, parse_age, strip_control
from ..errors import ConfigurationError, Exit, StoreUnavailable
from ..keys import DEFAULT_SOURCES, STREAM_OF_TYPE
from ..options import CONFIG_OF_SERVICE, DATA_DIR, ENV_PREFIX, REDIS_URL
from ..telemetry.log import redacted

#: Exit code of a verb that was carried out and has bad news: nothing found, or something is wrong.
BAD_NEWS = 1
#: Where a service listens whose --metrics-addr was left alone.
_METRICS_ADDR = "127.0.0.1:9464"


#: Ids that are named one by one where something cannot be done with them.
NAMED_AT_MOST = 10


class CliGroup(click.Group):
    """Turns the errors that a user can mend into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            click.echo(f"jobworker: {redacted(str(error))}", err=True)
            click.echo("Is it running, and is it the one that is meant? " + WHICH, err=True)
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
        try:
            return parse_age(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


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
            command(store_url(redis_url or str(endpoints_of(data_dir).get("redis_url", ""))), **options)

        return group.command(name)(CONFIG_OF_SERVICE(REDIS_URL(DATA_DIR(with_url))))

    return decorate


def verb_on_deployment(group: click.Group) -> Callable[[Callable[..., None]], click.Command]:
    """A command that is given a `Deployment` first of all."""

    def decorate(command: Callable[..., None]) -> click.Command:
        @wraps(command)
        def with_both(
            redis_url: str, data_dir: str, metrics_urls: tuple[str, ...], metrics_addr: str, **options: Any
        ) -> None:
            known = {} if redis_url else endpoints_of(data_dir)
            usual = str(known.get("metrics_url", f"http://{metrics_addr}"))
            url = store_url(redis_url or str(known.get("redis_url", "")))
            milvus_uri = str(known.get("milvus_uri", ""))
            command(Deployment(url, metrics_urls or (usual,), not metrics_urls, milvus_uri), **options)

        for option in (_METRICS_ADDR_ENV, METRICS_URL, DATA_DIR, REDIS_URL, CONFIG_OF_SERVICE):
            with_both = option(with_both)
        return group.command()(with_both)

    return decorate


def say_json(value: Any) -> None:
    """One JSON object on a line; every byte that is no text becomes a replacement character."""
    click.echo(json.dumps(value, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def say_missing(ids: frozenset[str], found: Iterable[str]) -> list[str]:
    """Name those of the ids that were asked for and not found, some of them; returns all."""
    missing = sorted(ids.difference(found))
    for id in missing[:NAMED_AT_MOST]:
        click.echo(f"not found: {strip_control(id)}; try: jobworker explain {strip_control(id)}", err=True)
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
