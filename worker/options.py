"""Options of the service: the command line overrides the environment, the environment the file."""

import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from .errors import ConfigurationError
from .extension import extension
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

ENV_PREFIX = "JOBWORKER"
SECONDS = click.FloatRange(min=0, min_open=True)


#: Options of the service's file that the verbs of `jobworker` use: option -> parameter.
_OF_VERBS = {
    "redis-url": "redis_url", "data-dir": "data_dir", "stream": "streams", "metrics-addr": "metrics_addr",
}  # fmt: skip


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults; they have the options' own names."""
    if path is not None:
        context.default_map = {_parameter(name): value for name, value in _table(path).items()}


def _read_config_of_service(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """For a verb: what the service's file says of where it is."""
    if path is not None:
        names = {**_OF_VERBS, **_extended().VERB_OPTIONS}
        context.default_map = {names[name]: value for name, value in _table(path).items() if name in names}


def _table(path: str) -> dict[str, Any]:
    """The values of the file. Raises `click.BadParameter` if they are not options of the service."""
    try:
        table = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    every = click.command()(service_options(lambda: None)).params
    known = {option for parameter in every for option in parameter.opts}
    for name in table:
        if f"--{name}" not in known:
            raise click.BadParameter(f"{path}: no option --{name}; see --help for their names")
    return table


def _parameter(option: str) -> str:
    return option.replace("-", "_")


def option(name: str, text: str, default: Any = None, kind: Any = None, **more: Any) -> Callable[[Any], Any]:
    """An option that shows its default (where that says anything) and its environment variable."""
    shown = default not in (None, "") and not callable(default) and default is not False
    return click.option(
        name, help=text, default=default, type=kind, show_default=shown, show_envvar=True, **more
    )


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
    click.Path(file_okay=False),
    envvar=f"{ENV_PREFIX}_DATA_DIR",
)


def _config(callback: Callable[..., None], text: str) -> Callable[[Any], Any]:
    """Read before all other options, which take their defaults from it."""
    return click.option(
        "--config", help=text, type=click.Path(exists=True, dir_okay=False), is_eager=True,
        expose_value=False, callback=callback, envvar=f"{ENV_PREFIX}_CONFIG", show_envvar=True,
    )  # fmt: skip


CONFIG = _config(
    _read_config, "TOML file with the same names as the options; command line and environment win over it."
)
CONFIG_OF_SERVICE = _config(
    _read_config_of_service,
    "The service's own TOML file: its stores, streams and data directory are meant, where neither the "
    "command line nor the environment names others.",
)

_WORK = [
    option("--procs", "Worker processes.  [default: number of cores]", cores, click.IntRange(1, 512)),
    option("--stream", "NAME=GROUP to read; repeatable, replaces the default table.",
            [f"{s.stream}={s.group}" for s in extension().streams], multiple=True),
    option("--handler", "TYPE=module:Class to run a type by; repeatable, adds to or replaces the builtin.",
            multiple=True),
    option("--no-builtin-handlers", "Run only the types given by --handler.", False, is_flag=True),
    option("--job-timeout", "Limit in seconds where neither type nor job names one.", 300.0, SECONDS),
    option("--linger", "How long a worker waits for more jobs where its handler takes several at once "
            "(seconds).", 0.002, click.FloatRange(0, 1)),
    option("--max-rss", "MiB that a worker may hold; one that grows beyond is killed while a job runs, and "
            "replaced when idle; 0 for no limit.", 0, click.IntRange(0)),
    option("--max-jobs", "Replace a worker after this number of jobs; 0 for never.", 0, click.IntRange(0)),
    option("--max-age", "Replace a worker after this many seconds; 0 for never.", 0.0, click.FloatRange(0)),
    option("--max-payload", "Largest job in bytes; larger ones are dead-lettered unread.", MAX_PAYLOAD_BYTES,
            click.IntRange(1024, 512 * 1024 * 1024)),
    option("--max-retries", "Retries of a job before it is dead-lettered.", 3, click.IntRange(0)),
    option("--retry-initial", "Backoff = initial * multiplier ** retry count (seconds).", 1.0, SECONDS),
    option("--retry-max", "Longest backoff (seconds).", 60.0, SECONDS),
    option("--retry-multiplier", "Growth of the backoff.", 2.0, click.FloatRange(min=1)),
    option("--retry-jitter", "Share by which a backoff is spread either way.", 0.1, click.FloatRange(0, 1)),
]  # fmt: skip
_STORES = [
    REDIS_URL,
    DATA_DIR,
    option("--valkey-port", "Port of the embedded Valkey on 127.0.0.1.  [default: that of the last run, else "
            "a free one]", 0, click.IntRange(0, 65535)),
    option("--connect-timeout", "How long to wait for the stores at start (seconds).", 30.0, SECONDS),
    option("--lease", "Seconds after which the jobs of a lost host are claimed by others.", 30.0, SECONDS),
]  # fmt: skip
_SERVICE = [
    CONFIG,
    option("--metrics-addr", "Where /metrics, /healthz and /readyz are served; port 0 picks one.",
            "127.0.0.1:9464"),
    option("--drain-timeout", "How long TERM waits for running jobs (seconds).", 30.0,
            click.FloatRange(min=0)),
    option("--instance", "Part of the consumer's name; two services on a host need two.  "
            "[default: host name]"),
    option("--log-level", "How much is logged.", "info",
            click.Choice(["debug", "info", "warning", "error"])),
    option("--log-format", "[default: text on a terminal, else json]", None, click.Choice(["json", "text"])),
]  # fmt: skip


#: A type's number and a stream's take a byte in the in-flight table.
_MOST_KINDS = 255
#: Options whose settings carry the unit in their name.
_SECONDS = ("lease", "job_timeout", "drain_timeout", "connect_timeout", "max_age", "linger")


def _extended() -> Any:
    """The module with the options of the built-in types: ``OPTIONS``, ``fields_of`` and ``VERB_OPTIONS``."""
    return import_module(extension().options)


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command every option of the service."""
    for option in reversed([*_WORK, *_STORES, *_extended().OPTIONS, *_SERVICE]):
        command = option(command)
    return command


def settings_from(options: dict[str, Any], on_terminal: bool) -> Settings:
    """Settings from parsed options. Raises `ConfigurationError` with what to change."""
    values = dict(options)
    parse_address(values["metrics_addr"])
    handlers = {} if values.pop("no_builtin_handlers") else dict(extension().handlers)
    given = dict(parse_handler(text) for text in values.pop("handler"))
    handlers |= {kind: extension().moved.get(target, target) for kind, target in given.items()}
    if not handlers:
        raise ConfigurationError(
            "no handler: give --handler TYPE=module:Class, or drop --no-builtin-handlers"
        )
    if len(handlers) > _MOST_KINDS or len(values["stream"]) > _MOST_KINDS:
        raise ConfigurationError(f"at most {_MOST_KINDS} types and as many streams")
    retry = RetryPolicy(
        values.pop("max_retries"), values.pop("retry_initial"), values.pop("retry_max"),
        values.pop("retry_multiplier"), values.pop("retry_jitter"),
    )  # fmt: skip
    values["max_rss_mib"] = values.pop("max_rss")
    values |= _extended().fields_of(values)
    seconds = {f"{name}_s": values.pop(name) for name in _SECONDS}
    sources = tuple(parse_source(text) for text in values.pop("stream"))
    values["log_format"] = values["log_format"] or ("text" if on_terminal else "json")
    if values["instance"] is None:
        del values["instance"]
    values["threads"] = max(1, cores() // values["procs"])
    return settings_class()(**values, **seconds, streams=sources, handlers=handlers, retry=retry)
