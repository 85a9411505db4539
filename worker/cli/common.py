"""Shared parts of the ``jobworker`` verbs: options that name a deployment, exit codes, output."""

import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..admin.deployment import (
    DEPLOYMENT_HINT,
    Deployment,
    require_store_url,
    stopped_service,
)
from ..admin.words import columns, pad, strip_control
from ..config.quantities import Duration
from ..errors import ConfigurationError, Exit, StoreRefused, StoreUnavailable
from ..extension import extension
from ..host.endpoints import read_endpoints
from ..options import CONFIG_OF_SERVICE, CONFIG_PATH, DATA_DIR, ENV_PREFIX, REDIS_URL, ExplicitOption
from ..safe_text import escape_control, safe_json
from ..settings import without_credentials
from ..store.announcements import suggestion
from ..store_advice import store_advice
from ..telemetry.log import redacted
from ..urls import parse_http_url

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Exit code of a verb that ran and found something missing or wrong.
NEGATIVE_RESULT = 1
#: The default of the service's --metrics-addr.
_METRICS_ADDR = "127.0.0.1:9464"
#: Ids that are named one by one in an error report.
MAX_IDS_NAMED = 10
#: Key of a hint in the `meta` of a context: the service of --data-dir is stopped, and how to start it.
STOPPED_SERVICE = "jobworker.stopped"
#: A command in advice. Options follow it.
_COMMAND = re.compile(r"\bjobworker (?:(?:dlq|retry|cron) [a-z]+|enqueue|explain|resume|stats|doctor)\b")


class CliGroup(click.Group):
    """Command group that turns errors which the user can fix into one line and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As click's. An `OSError` exits with 1."""
        try:
            return super().main(*args, **options)
        except OSError as error:  # click handles a closed pipe; this is a full disk or an unreadable file
            _discard_output()
            click.echo(f"jobworker: {escape_control(str(error))}", err=True)
            sys.exit(NEGATIVE_RESULT)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            click.echo(f"jobworker: {escape_control(redacted(str(error)))}", err=True)
            if isinstance(error, StoreRefused):
                hint = (
                    "The job store answers. jobworker doctor names the key and the command that repairs it."
                )
            else:
                hint = repair_of_store(str(error))
            click.echo(f"jobworker: {hint}", err=True)
            context.exit(Exit.STORE_UNREACHABLE)
        except (ConfigurationError, ValueError) as error:
            click.echo(f"jobworker: {escape_control(str(error))}", err=True)
            context.exit(Exit.USAGE)


def _discard_output() -> None:
    """Give up what standard output does not take: Python would write it again at the exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            sys.stdout.close()


class Age(Duration):
    """How long ago something was, in seconds: any duration."""

    name = "age"

    def __init__(self) -> None:
        super().__init__(0.0, math.inf)


class JobType(click.ParamType[str]):
    """Any job type; completion offers the built-in ones."""

    name = "type"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The built-in types."""
        return [
            CompletionItem(job_type)
            for job_type in extension().stream_of_type
            if job_type.startswith(incomplete)
        ]


def complete_streams(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completion of --stream: the default streams."""
    return [CompletionItem(stream) for stream, _ in extension().streams if stream.startswith(incomplete)]


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")
STREAMS = click.option(
    "--stream", "streams", cls=ExplicitOption, multiple=True, envvar=f"{ENV_PREFIX}_STREAM",
    metavar="NAME=GROUP", shell_complete=complete_streams,
    help="Stream and its group, as given to the service; repeatable. The group of a stream that a registered "
    "service reads may be left out.  [default: those of the registered services, else the built-in ones]",
)  # fmt: skip
METRICS_URL = click.option(
    "--metrics-url", "metrics_urls", cls=ExplicitOption, multiple=True, envvar=f"{ENV_PREFIX}_METRICS_URL",
    help="Where a service serves /status; repeatable.  [default: that of --data-dir, else of "
    f"{ENV_PREFIX}_METRICS_ADDR, else http://{_METRICS_ADDR}]",
)  # fmt: skip
_METRICS_ADDR_ENV = click.option(
    "--metrics-addr",
    cls=ExplicitOption,
    hidden=True,
    default=_METRICS_ADDR,
    envvar=f"{ENV_PREFIX}_METRICS_ADDR",
)


def verb(group: click.Group, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Decorator for a command of the group. The command gets the url of the store as first argument."""

    def decorate(command: Callable[..., None]) -> click.Command:
        @wraps(command)
        def with_url(redis_url: str, data_dir: str, **options: Any) -> None:
            command(find_store(redis_url, data_dir), **options)

        return group.command(name)(CONFIG_OF_SERVICE(REDIS_URL(DATA_DIR(with_url))))

    return decorate


def verb_on_deployment(group: click.Group) -> Callable[[Callable[..., None]], click.Command]:
    """Decorator for a command of the group. The command gets a `Deployment` as first argument."""

    def decorate(command: Callable[..., None]) -> click.Command:
        @wraps(command)
        def with_deployment(
            redis_url: str, data_dir: str, metrics_urls: tuple[str, ...], metrics_addr: str, **options: Any
        ) -> None:
            endpoints = service_endpoints(redis_url, data_dir)
            for metrics_url in metrics_urls:
                parse_http_url(metrics_url, "--metrics-url", f"http://{_METRICS_ADDR}")
            default_url = str(endpoints.get("metrics_url", f"http://{metrics_addr}"))
            url = require_store_url(redis_url or str(endpoints.get("redis_url", "")))
            command(Deployment(url, metrics_urls or (default_url,), not metrics_urls, endpoints), **options)

        for option in (_METRICS_ADDR_ENV, METRICS_URL, DATA_DIR, REDIS_URL, CONFIG_OF_SERVICE):
            with_deployment = option(with_deployment)
        return group.command()(with_deployment)

    return decorate


def find_store(redis_url: str, data_dir: str) -> str:
    """The url of the store: the given one, else that of the service of the data directory.

    Raises `ConfigurationError` if neither names one.
    """
    endpoints = {} if redis_url else _endpoints_of(data_dir)
    return require_store_url(redis_url or str(endpoints.get("redis_url", "")))


def service_endpoints(redis_url: str, data_dir: str) -> dict[str, Any]:
    """Addresses of the service of the data directory; none if the url names another store than its own."""
    if not redis_url:
        return _endpoints_of(data_dir)
    try:
        endpoints = read_endpoints(data_dir)
    except ConfigurationError:  # of another user, or not to be trusted: the url says what is meant
        return {}
    return _noted(data_dir, endpoints) if endpoints.get("redis_url") == redis_url else {}


def _endpoints_of(data_dir: str) -> dict[str, Any]:
    """As `read_endpoints`. Notes the hint for the case that the store does not answer."""
    return _noted(data_dir, read_endpoints(data_dir))


def _noted(data_dir: str, endpoints: dict[str, Any]) -> dict[str, Any]:
    if stopped := stopped_service(data_dir, endpoints):
        click.get_current_context().meta[STOPPED_SERVICE] = stopped
    return endpoints


def repair_of_store(error: str) -> str:
    """What to do about a store that does not answer, by the text of the error."""
    stopped = click.get_current_context().meta.get(STOPPED_SERVICE)
    is_gone = "refused" in error or "No such file" in error
    return stopped if stopped and is_gone else f"{store_advice(error)}. {DEPLOYMENT_HINT}"


def echo_json(value: Any) -> None:
    """Print one JSON object on a line. Bytes that are not UTF-8 become replacement characters."""
    click.echo(safe_json(value, _to_json))


def echo_line(text: str, *, err: bool = False) -> None:
    """Print a line without control characters."""
    click.echo(strip_control(text), err=err)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, frozenset | set):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def echo_missing(ids: frozenset[str], found: Iterable[str]) -> list[str]:
    """Report ids that were given and not found, `MAX_IDS_NAMED` of them by name. Returns all of them."""
    missing = sorted(ids.difference(found))
    for id in missing[:MAX_IDS_NAMED]:
        click.echo(f"not found: {strip_control(id)}; try: {explain_command(id)}", err=True)
    return missing


def explain_command(id: str) -> str:
    """The command that searches everywhere for an id, ready to be run."""
    return with_deployment(f"jobworker explain {shlex.quote(strip_control(id))}")


def with_deployment(advice: str) -> str:
    """The text, whose commands name the same deployment as this command line does. A password is masked."""
    context = click.get_current_context(silent=True)
    options = [
        f" --{name.replace('_', '-')} {shlex.quote(without_credentials(str(value), '***'))}"
        for name in ("config", "redis_url", "data_dir")
        if context is not None
        and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and (value := context.params.get(name) or context.meta.get(CONFIG_PATH))
    ]
    return _COMMAND.sub(lambda found: found[0] + "".join(options), advice)


def echo_unread_streams(store: "OperatorStore", given: Sequence[str]) -> None:
    """Note on standard error which of the streams of --stream do not exist, or are read by no service: a name
    may be misspelt."""
    if not given:
        return
    read = {name for one in store.announcements() for name in one.streams}
    for name in given:
        if name in read:
            continue
        if not store.exists(name):
            text = f"there is no stream {name!r}"
        elif read:
            text = f"no service of this deployment reads the stream {name!r}"
        else:
            continue
        hint = f": {suggestion(name, read)}" if read else ""
        click.echo(f"jobworker: {strip_control(text + hint)}", err=True)


def exit_if_refused(refused: Iterable[str]) -> None:
    """Report what the store refused to show, on standard error; exits with 1 if there is any."""
    texts = list(refused)
    for text in texts:
        click.echo(f"jobworker: {strip_control(redacted(with_deployment(text)))}", err=True)
    if texts:
        sys.exit(NEGATIVE_RESULT)


def name_streams(streams: Sequence[str]) -> str:
    """The streams in words, at most `MAX_IDS_NAMED` of them."""
    names = ", ".join(strip_control(name) for name in streams[:MAX_IDS_NAMED])
    return names + (f" and {len(streams) - MAX_IDS_NAMED} more" if len(streams) > MAX_IDS_NAMED else "")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their longest cell. A heading that ends in ``>`` aligns its column right."""
    names = [heading.rstrip(">") for heading in headings]
    widths = [max([len(name), *(columns(row[i]) for row in rows)]) for i, name in enumerate(names)]
    for row in [names, *rows]:
        cells = [
            pad(cell, -width if heading.endswith(">") else width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal; False for a closed one, which is None."""
    return stream is not None and stream.isatty()


def standard_input(option: str) -> BinaryIO:
    """Standard input for an option that reads it. Raises `ConfigurationError` if it is closed."""
    if sys.stdin is None:
        raise ConfigurationError(f"{option}: standard input is closed")
    return sys.stdin.buffer


def confirm(question: Callable[[], str], yes: bool) -> None:
    """Ask before an operation that cannot be undone. `question` is called only on a terminal.
    Raises `ConfigurationError` if standard input is not one."""
    if yes:
        return
    if not is_terminal(sys.stdin):
        raise ConfigurationError("no terminal to confirm on: give --yes")
    click.confirm(question(), abort=True, err=True)
