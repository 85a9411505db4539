"""Options of the service: the command line overrides the environment, the environment the file."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from .config.file import misspelt_variables, read_config
from .config.quantities import MAX_COUNT, Count, Duration, Number, Size
from .errors import ConfigurationError
from .extension import extension
from .functions.app import app_handlers, parse_app
from .http.bearer_tokens import read_tokens
from .keys import Source
from .outcome import RetryPolicy
from .settings import (
    MAX_PAYLOAD_BYTES,
    Settings,
    cores,
    parse_address,
    parse_handler,
    parse_source,
    settings_class,
)
from .shards import MOST_SHARDS, spread
from .urls import is_loopback, parse_redis_url

ENV_PREFIX = "JOBWORKER"
#: Key of the configuration file's absolute path in the `meta` of the service's context.
_CONFIG_FILE = f"{__name__}.config_file"
#: Key of the configuration file's path in the `meta` of a verb's context.
CONFIG_PATH = "jobworker.config"
#: Longer than nothing.
SECONDS = Duration(0.001)

#: Variables that the verbs and the built-in types read beside those of the service's options.
_OF_OTHER_PROGRAMS = (
    f"{ENV_PREFIX}_METRICS_URL",
    f"{ENV_PREFIX}_WEB_",
    f"{ENV_PREFIX}_LLM_KEY",
    f"{ENV_PREFIX}_SERVE_URL",
    f"{ENV_PREFIX}_SERVE_TOKEN",
    f"{ENV_PREFIX}_SERVE_CLIENT_",
)
#: Options of the service's file that the verbs of `jobworker` use: option -> parameter.
_OF_VERBS = {
    "redis-url": "redis_url", "data-dir": "data_dir", "stream": "streams", "metrics-addr": "metrics_addr",
    "serve-addr": "serve_addr",
}  # fmt: skip


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults; they have the options' own names."""
    if path is not None:
        context.default_map = {_parameter(name): value for name, value in _table(path).items()}
        context.meta[_CONFIG_FILE] = os.path.abspath(path)


def _read_config_of_service(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """For a verb: what the service's file says of where it is."""
    if path is not None:
        context.meta[CONFIG_PATH] = path
        names = {**_OF_VERBS, **_extended().VERB_OPTIONS}
        context.default_map = {names[name]: value for name, value in _table(path).items() if name in names}


def _table(path: str) -> dict[str, Any]:
    return read_config(path, _parameters())


def _parameters() -> list[click.Parameter]:
    return click.command()(service_options(lambda: None)).params


def unknown_variables(environ: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Variables that look like those of an option but are none, each with the most similar one."""
    known = [f"{ENV_PREFIX}_{parameter.name}".upper() for parameter in _parameters()]
    other = [name for name in environ if name.startswith(_OF_OTHER_PROGRAMS)]
    return misspelt_variables({name: "" for name in environ if name not in other}, known, f"{ENV_PREFIX}_")


def config_file() -> str:
    """Absolute path of the file that the running command was given; empty if there is none."""
    return str(click.get_current_context().meta.get(_CONFIG_FILE, ""))


def _parameter(option: str) -> str:
    return option.replace("-", "_")


class ExplicitOption(click.Option):
    """Option that refuses an empty value, also in its environment variable. A variable of a script, or a
    secret, that was not filled in must not select the default."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """As click's. Raises `click.BadParameter` for a variable that is set and empty."""
        named = [self.envvar] if isinstance(self.envvar, str) else list(self.envvar or ())
        if ctx.auto_envvar_prefix and self.name:
            named.append(f"{ctx.auto_envvar_prefix}_{self.name.upper()}")
        for variable in named:
            if not ctx.resilient_parsing and not os.environ.get(variable, variable).strip():
                raise click.BadParameter(
                    f"{variable} is set and empty: unset it for {self._default_in_words()}", ctx
                )
        return super().resolve_envvar_value(ctx)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """As click's. Raises `click.BadParameter` for an empty value on the command line."""
        value, source = super().consume_value(ctx, opts)
        values = value if isinstance(value, list | tuple) else [value]
        given = source is ParameterSource.COMMANDLINE and not ctx.resilient_parsing
        if given and any(isinstance(one, str) and not one.strip() for one in values):
            raise click.BadParameter(
                f"an empty value: leave the option out for {self._default_in_words()}", ctx
            )
        return value, source

    def _default_in_words(self) -> str:
        """The default as the help text has it, such as the embedded store."""
        text = (self.help or "").partition("[default: ")[2].rstrip("]")
        return f"its default ({text})" if text else "its default"


def option(name: str, text: str, default: Any = None, kind: Any = None, **more: Any) -> Callable[[Any], Any]:
    """An option that shows its default (where that says anything) and its environment variable."""
    shown = default not in (None, "") and not callable(default) and default is not False
    return click.option(
        name, cls=ExplicitOption, help=text, default=default, type=kind, show_default=shown, show_envvar=True,
        **more,
    )  # fmt: skip


REDIS_URL = option(
    "--redis-url",
    "Redis >= 7.0 or Valkey >= 8: redis://, rediss://, unix://, redis+sentinel://, redis+cluster://. Put "
    "passwords into the environment or the file.  [default: an embedded Valkey in --data-dir]",
    "",
    envvar=f"{ENV_PREFIX}_REDIS_URL",
)
DATA_DIR = option(
    "--data-dir",
    "Where the embedded stores and archives live.",
    "./jobworker-data",
    click.Path(file_okay=False, readable=False),
    envvar=f"{ENV_PREFIX}_DATA_DIR",
)


def _config(callback: Callable[..., None], text: str) -> Callable[[Any], Any]:
    """Read before all other options, which take their defaults from it."""
    return click.option(
        "--config", cls=ExplicitOption, help=text, type=click.Path(exists=True, dir_okay=False),
        is_eager=True, expose_value=False, callback=callback, envvar=f"{ENV_PREFIX}_CONFIG", show_envvar=True,
    )  # fmt: skip


CONFIG = _config(
    _read_config, "TOML file with the same names as the options; command line and environment override it."
)
CONFIG_OF_SERVICE = _config(
    _read_config_of_service,
    "The service's TOML file, for its stores, streams and data directory; command line and environment "
    "override it.",
)

_WORK = [
    option("--procs", "Worker processes.  [default: number of cores]", cores, Count(1, 512)),
    option("--stream", "NAME=GROUP to read; repeatable, replaces the default table.",
            [f"{s.stream}={s.group}" for s in extension().streams], multiple=True),
    option("--shards", "Spread each stream over this number of streams in different slots of a Redis "
            "Cluster, by tenant; 0 for none.", 0, Count(0, MOST_SHARDS)),
    option("--drain-shards", "An earlier number of --shards, whose jobs are still run; repeatable.",
            None, Count(1, MOST_SHARDS), multiple=True),
    option("--handler", "TYPE=module:Class to run a type by; repeatable, adds to or replaces the builtin.",
            multiple=True),
    option("--app", "Module whose @job functions and handler classes to run; repeatable.", multiple=True),
    option("--reload", "For development: restart the workers when a source file of --app or --handler "
            "changes.", False, is_flag=True),
    option("--no-builtin-handlers", "Run only the types given by --app and --handler.", False, is_flag=True),
    option("--job-timeout", "Timeout of a job if neither the job nor its type sets one (seconds, or 5m).",
            300.0, SECONDS),
    option("--linger", "How long an idle worker waits to fill a batch (seconds). With 0 the next batch still "
            "forms while one runs.", 0.0, Duration(0, 1)),
    option("--max-rss", "MiB (or 2GiB) that a worker may use; a larger one is killed while a job runs, and "
            "replaced when idle; 0 for no limit.", 0, Size(0, MAX_COUNT, unit_bytes=1 << 20)),
    option("--max-jobs", "Replace a worker after this number of jobs; 0 for never.", 0, Count(0)),
    option("--max-age", "Replace a worker after this time (seconds, or 12h); 0 for never.", 0.0, Duration()),
    option("--max-payload", "Largest job (bytes, or 8MiB); larger ones are dead-lettered unread.",
            MAX_PAYLOAD_BYTES, Size(1024, 512 * 1024 * 1024)),
    option("--max-retries", "Retries of a job before it is dead-lettered.", 3, Count(0)),
    option("--retry-initial", "Backoff = initial * multiplier ** retry count (seconds).", 1.0, SECONDS),
    option("--retry-max", "Longest backoff (seconds).", 60.0, SECONDS),
    option("--retry-multiplier", "Growth of the backoff.", 2.0, Number(1, 1000)),
    option("--batch-ttl", "How long the counts of a finished batch are kept (seconds, or 7d).",
            7 * 24 * 3600.0, Duration(0.1)),
    option("--retry-jitter", "Share by which a backoff is spread either way.", 0.1, Number(0, 1)),
    option("--unique-window", "Time in which one of several jobs with the same type, tenant and "
            "idempotency_key runs (seconds, or 1h); 0 runs all.", 86_400.0, Duration()),
]  # fmt: skip
_STORES = [
    REDIS_URL,
    DATA_DIR,
    option("--valkey-port", "Port of the embedded Valkey on 127.0.0.1.  [default: that of the last run, else "
            "a free one]", 0, Count(0, 65535)),
    option("--connect-timeout", "How long to wait for the stores at start (seconds).", 30.0, SECONDS),
    option("--lease", "Time after which the jobs of a lost host are claimed by others (seconds, or 1m).",
            30.0, Duration(0.1)),
    option("--wait-replicas", "Replicas of Redis that confirm each settlement (WAIT, at most 1 s); what is "
            "not confirmed is counted and logged.", 0, Count(0, 100)),
]  # fmt: skip
_SERVICE = [
    CONFIG,
    option("--metrics-addr", "Where /metrics, /healthz and /readyz are served; port 0 picks one.",
            "127.0.0.1:9464"),
    option("--serve-addr", "HOST:PORT where questions are answered over HTTP; port 0 picks one.  "
            "[default: not served]", ""),
    option("--serve-token-file", "File with the bearer tokens of its clients: TOKEN, TENANT TOKEN or "
            "TENANT/PROJECT TOKEN a line; needed beyond loopback.", "", click.Path(dir_okay=False)),
    option("--cancel-grace", "How long a cancelled job may still run before its worker is killed (seconds).",
            10.0, Duration()),
    option("--result-ttl", "How long the result of a job that asks for it is kept (seconds, or 1h).", 3600.0,
            SECONDS),
    option("--drain-timeout", "How long TERM waits for running jobs (seconds).", 30.0,
            Duration()),
    option("--instance", "Name of this service, part of its consumer's name; two services on a host need two."
            "  [default: host name]"),
    option("--log-level", "How much is logged.", "info",
            click.Choice(["debug", "info", "warning", "error"])),
    option("--log-format", "[default: text on a terminal, else json]", None, click.Choice(["json", "text"])),
    option("--log-limit", "Most lines of one event (one message of one logger) in 10 s, by each process; the "
            "others are counted in one line; 0 for no limit.", 100, Count(0)),
]  # fmt: skip


#: Control characters, and what Python makes of bytes that are not UTF-8.
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: A type's number and a stream's take a byte in the in-flight table.
_MOST_TYPES = 255
#: Options whose settings carry the unit in their name.
_SECONDS = (
    *("lease", "unique_window", "job_timeout", "drain_timeout", "connect_timeout", "max_age", "linger"),
    *("cancel_grace", "result_ttl"),
    "batch_ttl",
)


def _extended() -> Any:
    """Module with the options of the built-in types: OPTIONS, FIRST, GROUPS, VERB_OPTIONS, fields_of."""
    return import_module(extension().options)


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command every option of the service."""
    for option in reversed([*_WORK, *_STORES, *_extended().OPTIONS, *_SERVICE]):
        command = option(command)
    return command


#: The options that most services need; those of the built-in types follow. Each is in one group only.
_FIRST = ("redis-url", "data-dir", "procs", "app", "handler", "stream", "instance", "metrics-addr", "config")
#: Groups of the other options of the engine; those of the built-in types follow.
_GROUPS = {
    "Work": (
        "no-builtin-handlers",
        "reload",
        "job-timeout",
        "cancel-grace",
        "result-ttl",
        "linger",
        "max-payload",
        "unique-window",
        "batch-ttl",
    ),
    "Worker replacement": ("max-rss", "max-jobs", "max-age", "drain-timeout"),
    "Retries": ("max-retries", "retry-initial", "retry-multiplier", "retry-max", "retry-jitter"),
    "Questions over HTTP": ("serve-addr", "serve-token-file"),
    "Stores": ("valkey-port", "connect-timeout", "lease", "wait-replicas", "shards", "drain-shards"),
}
_LOGS = {"Logs": ("log-level", "log-format", "log-limit")}


class ServiceCommand(click.Command):
    """Command whose help lists the most needed options first, and the others in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a group; options of no group come last."""
        records = {
            parameter.opts[0].removeprefix("--"): record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx)) is not None
        }
        more = _extended()
        groups = {"Most needed options": (*_FIRST, *more.FIRST), **_GROUPS, **more.GROUPS, **_LOGS}
        grouped = {name for names in groups.values() for name in names}
        groups["Other"] = tuple(name for name in records if name not in grouped)
        for title, names in groups.items():
            if rows := [records[name] for name in names if name in records]:
                with formatter.section(title):
                    formatter.write_dl(rows)


def settings_from(options: dict[str, Any], on_terminal: bool) -> Settings:
    """Settings from parsed options. Raises `ConfigurationError` with what to change."""
    values = dict(options)
    _check_texts(values)
    parse_address(values["metrics_addr"])
    _check_serve(values["serve_addr"], values["serve_token_file"])
    values["redis_url"] = _checked_redis_url(values["redis_url"])
    given = dict(parse_handler(text) for text in values.pop("handler"))
    values["apps"] = tuple(dict.fromkeys(parse_app(text) for text in values.pop("app")))
    handlers = _handlers_of(given, values["apps"], builtin=not values.pop("no_builtin_handlers"))
    retry = RetryPolicy(
        values.pop("max_retries"), values.pop("retry_initial"), values.pop("retry_max"),
        values.pop("retry_multiplier"), values.pop("retry_jitter"),
    )  # fmt: skip
    values["max_rss_mib"] = values.pop("max_rss")
    values |= _extended().fields_of(values)
    seconds = {f"{name}_s": values.pop(name) for name in _SECONDS}
    sources = tuple(parse_source(text) for text in values.pop("stream"))
    if twice := {source.stream for source in sources if [s.stream for s in sources].count(source.stream) > 1}:
        raise ConfigurationError(f"--stream: {', '.join(sorted(twice))} is given twice")
    sources = _with_shards(sources, values["shards"], values["drain_shards"])
    values["log_format"] = values["log_format"] or ("text" if on_terminal else "json")
    if values["instance"] is None:
        del values["instance"]
    values["threads"] = max(1, cores() // values["procs"])
    settings = settings_class()(**values, **seconds, streams=sources, handlers=handlers, retry=retry)
    try:
        # What the children could not read is refused here, where the message reaches the user.
        return settings_class().from_json(settings.to_json())
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"an option has a value of the wrong kind: {error}") from error


def _handlers_of(given: Mapping[str, str], apps: tuple[str, ...], *, builtin: bool) -> dict[str, str]:
    """Targets of all handlers by job type; ``given`` are those of --handler. Raises `ConfigurationError`."""
    found = dict(extension().handlers) if builtin else {}
    given = {name: extension().moved.get(target, target) for name, target in given.items()}
    if apps:
        found |= app_handlers(apps, found, given)
    found |= given
    if not found:
        raise ConfigurationError(
            "no handler: give --app MODULE or --handler TYPE=module:Class, or drop --no-builtin-handlers"
        )
    if len(found) > _MOST_TYPES:
        raise ConfigurationError(f"at most {_MOST_TYPES} types")
    return found


def _with_shards(sources: tuple[Source, ...], shards: int, drained: tuple[int, ...]) -> tuple[Source, ...]:
    """The streams with their shards. Raises `ConfigurationError`."""
    if shards in drained:
        raise ConfigurationError(f"--drain-shards {shards}: this is the present number of --shards")
    counts = [count for count in dict.fromkeys([shards, *drained]) if count]
    tagged = [source.stream for source in sources if "{" in source.stream]
    if counts and tagged:
        raise ConfigurationError(
            f"--shards: {', '.join(tagged)} has a hash tag: all shards would be in one slot"
        )
    spread_out = spread(sources, counts)
    if len(spread_out) > _MOST_TYPES:
        raise ConfigurationError(
            f"at most {_MOST_TYPES} streams; {len(sources)} streams with their shards are {len(spread_out)}"
        )
    return spread_out


def _check_serve(address: str, token_file: str) -> None:
    """Raises `ConfigurationError` for a wrong address or token file, and for an open port without tokens."""
    if token_file:
        read_tokens(token_file)
        if not address:
            raise ConfigurationError("--serve-token-file needs --serve-addr")
    if address and not is_loopback(parse_address(address, "--serve-addr")[0]) and not token_file:
        raise ConfigurationError(
            f"--serve-addr {address} is reachable from other machines and needs --serve-token-file; make a "
            "token with: openssl rand -hex 24"
        )


def _checked_redis_url(text: str) -> str:
    """The URL without blanks around it. Raises `ConfigurationError` if it cannot be used."""
    url = text.strip()
    if not url:
        return ""
    try:
        parsed = parse_redis_url(url)
    except ConfigurationError as error:
        raise ConfigurationError(f"--redis-url {error}") from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        path = parsed.tls.get(name)
        if path and not os.access(path, os.R_OK):
            raise ConfigurationError(f"--redis-url: {name} names {path}, which cannot be read")
    return url


def _check_texts(options: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` for bytes that are no UTF-8 and for control characters."""
    for name, value in options.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and _NO_TEXT.search(text):
                shown = name.replace("_", "-")
                raise ConfigurationError(f"--{shown}: holds a control character, or bytes that are not UTF-8")
