"""Options of the service: the command line overrides the environment, the environment the file."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .errors import ConfigurationError
from .extension import extension
from .outcome import RetryPolicy
from .settings import Settings, check_llm, cores, parse_address, parse_handler, parse_size, parse_source

ENV_PREFIX = "JOBWORKER"
_POSITIVE = click.FloatRange(min=0, min_open=True)


#: Options of the service's file that the verbs of `jobworker` use: option -> parameter.
_OF_VERBS = {
    "redis-url": "redis_url", "data-dir": "data_dir", "stream": "streams", "metrics-addr": "metrics_addr",
    "milvus-uri": "milvus_uri", "milvus-prefix": "milvus_prefix", "model": "configured_model",
    "device": "device",
}  # fmt: skip


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults; they have the options' own names."""
    if path is not None:
        context.default_map = {_parameter(name): value for name, value in _table(path).items()}


def _read_config_of_service(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """For a verb: what the service's file says of where it is."""
    if path is not None:
        said = _table(path).items()
        context.default_map = {_OF_VERBS[name]: value for name, value in said if name in _OF_VERBS}


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


def _option(name: str, text: str, default: Any = None, kind: Any = None, **more: Any) -> Callable[[Any], Any]:
    """An option that shows its default (where that says anything) and its environment variable."""
    shown = default not in (None, "") and not callable(default) and default is not False
    return click.option(
        name, help=text, default=default, type=kind, show_default=shown, show_envvar=True, **more
    )


REDIS_URL = _option(
    "--redis-url",
    "Redis >= 7.0 or Valkey >= 8: redis://, rediss://, unix://, redis+sentinel://, redis+cluster://. Put "
    "passwords into the environment or the file.  [default: an embedded Valkey in --data-dir]",
    "",
    envvar=f"{ENV_PREFIX}_REDIS_URL",
)
DATA_DIR = _option(
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
    _option("--procs", "Worker processes.  [default: number of cores]", cores, click.IntRange(1, 512)),
    _option("--stream", "NAME=GROUP to read; repeatable, replaces the default table.",
            [f"{s.stream}={s.group}" for s in extension().streams], multiple=True),
    _option("--handler", "TYPE=module:Class to run a type by; repeatable, adds to or replaces the builtin.",
            multiple=True),
    _option("--no-builtin-handlers", "Run only the types given by --handler.", False, is_flag=True),
    _option("--job-timeout", "Limit in seconds where neither type nor job names one.", 300.0, _POSITIVE),
    _option("--linger", "How long a worker waits for more jobs where its handler takes several at once "
            "(seconds).", 0.002, click.FloatRange(0, 1)),
    _option("--max-rss", "MiB that a worker may hold; one that grows beyond is killed while a job runs, and "
            "replaced when idle; 0 for no limit.", 0, click.IntRange(0)),
    _option("--max-jobs", "Replace a worker after this number of jobs; 0 for never.", 0, click.IntRange(0)),
    _option("--max-age", "Replace a worker after this many seconds; 0 for never.", 0.0, click.FloatRange(0)),
    _option("--max-payload", "Largest job in bytes; larger ones are dead-lettered unread.", 8 * 1024 * 1024,
            click.IntRange(1024, 512 * 1024 * 1024)),
    _option("--max-retries", "Retries of a job before it is dead-lettered.", 3, click.IntRange(0)),
    _option("--retry-initial", "Backoff = initial * multiplier ** retry count (seconds).", 1.0, _POSITIVE),
    _option("--retry-max", "Longest backoff (seconds).", 60.0, _POSITIVE),
    _option("--retry-multiplier", "Growth of the backoff.", 2.0, click.FloatRange(min=1)),
    _option("--retry-jitter", "Share by which a backoff is spread either way.", 0.1, click.FloatRange(0, 1)),
]  # fmt: skip
_STORES = [
    REDIS_URL,
    _option("--milvus-uri", "Milvus >= 2.3, http(s)://host:port.  [default: an embedded Milvus Lite]", ""),
    _option("--milvus-token", "user:password or API key; better given by the environment.", ""),
    _option("--milvus-prefix", "What collection names begin with.", "z_novel_"),
    _option("--milvus-partitions", "A partition key, or one named partition a tenant and project.", "key",
            click.Choice(["key", "named"])),
    DATA_DIR,
    _option("--connect-timeout", "How long to wait for the stores at start (seconds).", 30.0, _POSITIVE),
    _option("--lease", "Seconds after which the jobs of a lost host are claimed by others.", 30.0, _POSITIVE),
]  # fmt: skip
_MODEL = [
    _option("--model", "A sentence-transformers folder, a hub name that is in the cache, or "
            "package:<module>.  [default: the model of the 'embedded' extra, else BAAI/bge-m3]", ""),
    _option("--device", "auto, cpu, cuda, or cuda:0,cuda:1.", "auto"),
    _option("--model-copies", "Workers that hold the model, of each GPU or of the CPU; the others run "
            "other types.  [default: 2, on a CPU one a core]", 0, click.IntRange(0)),
    _option("--dtype", "What the model computes in; auto takes the fastest that gives its vectors.", "auto",
            click.Choice(["auto", "fp32", "bf16", "fp16"])),
    _option("--long-text", "What becomes of a text longer than the model's window.", "windows",
            click.Choice(["windows", "truncate", "reject"])),
    _option("--token-budget", "Tokens, padding included, of one forward pass.", 16384, click.IntRange(512)),
    _option("--cache", "off, or the most disk that vectors of texts seen before may take, below --data-dir.",
            "1GiB"),
]  # fmt: skip
_SUMMARIES = [
    _option("--summary-chars", "Longest summary of a chapter that is made here, in characters.", 100,
            click.IntRange(20, 10_000)),
    _option("--llm-url", "OpenAI-compatible endpoint that writes summaries, http(s)://host:port/v1; its key "
            "comes from --llm-key-file or JOBWORKER_LLM_KEY.  [default: the chapter's own sentences]", ""),
    _option("--llm-model", "The model's name there.", ""),
    _option("--llm-key-file", "File that holds the endpoint's key.", "", click.Path(dir_okay=False)),
    _option("--llm-timeout", "Limit of one request to it in seconds.", 60.0, _POSITIVE),
    _option("--summary-sink", "Where else what was found in a chapter goes: postgres, or module:Class.", ""),
    _option("--postgres-dsn", "For --summary-sink postgres; put passwords into the environment or the file.",
            ""),
]  # fmt: skip
_SERVICE = [
    CONFIG,
    _option("--metrics-addr", "Where /metrics, /healthz and /readyz are served; port 0 picks one.",
            "127.0.0.1:9464"),
    _option("--drain-timeout", "How long TERM waits for running jobs (seconds).", 30.0,
            click.FloatRange(min=0)),
    _option("--instance", "Part of the consumer's name; two services on a host need two.  "
            "[default: host name]"),
    _option("--log-level", "How much is logged.", "info",
            click.Choice(["debug", "info", "warning", "error"])),
    _option("--log-format", "[default: text on a terminal, else json]", None, click.Choice(["json", "text"])),
]  # fmt: skip


#: A type's number and a stream's take a byte in the in-flight table.
_MOST_KINDS = 255
#: Options whose settings carry the unit in their name.
_SECONDS = ("lease", "job_timeout", "drain_timeout", "connect_timeout", "max_age", "llm_timeout", "linger")


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command every option of the service."""
    for option in reversed([*_WORK, *_STORES, *_MODEL, *_SUMMARIES, *_SERVICE]):
        command = option(command)
    return command


def settings_from(options: dict[str, Any], on_terminal: bool) -> Settings:
    """Settings from parsed options. Raises `ConfigurationError` with what to change."""
    values = dict(options)
    parse_address(values["metrics_addr"])
    check_llm(values["llm_url"], values["llm_model"])
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
    values["cache_bytes"] = parse_size(values.pop("cache"))
    seconds = {f"{name}_s": values.pop(name) for name in _SECONDS}
    sources = tuple(parse_source(text) for text in values.pop("stream"))
    values["log_format"] = values["log_format"] or ("text" if on_terminal else "json")
    if values["instance"] is None:
        del values["instance"]
    values["threads"] = max(1, cores() // values["procs"])
    return Settings(**values, **seconds, streams=sources, handlers=handlers, retry=retry)
