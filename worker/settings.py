"""Settings: one frozen record of every option; children get it as JSON over a pipe."""

import re
import socket
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

import msgspec

from .cron.table import CronTable
from .errors import ConfigurationError
from .extension import extension, imported
from .flow import FlowConfig
from .host.cgroup import usable_cpus
from .keys import NO_HOLDER, Holder, Source, is_derived
from .outcome import RetryPolicy
from .shards import shard_count

#: Default limit of one entry; larger ones are refused before they are parsed.
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Every option of the engine. Times in seconds, sizes in bytes; urls may hold secrets.

    The options of the built-in types are fields of a subclass, which the extension names.
    """

    #: Fields that may hold a password: inside a URL or as a parameter; as the whole or behind a colon; in a
    #: file.
    secret_urls: ClassVar[tuple[str, ...]] = ("redis_url",)
    secret_tokens: ClassVar[tuple[str, ...]] = ()
    secret_files: ClassVar[tuple[str, ...]] = ("serve_token_file",)

    procs: int = 1
    redis_url: str = ""
    data_dir: str = "./jobworker-data"
    #: Port of the embedded Valkey; 0: that of the last run, else any free one.
    valkey_port: int = 0
    device: str = "auto"
    #: Workers of each device that run types that need it; 0: as many as help.
    device_copies: int = 0
    #: Threads of a worker with a device; 0: as many as every worker has.
    device_threads: int = 0
    streams: tuple[Source, ...] = field(default_factory=lambda: extension().streams)
    #: Number of shards of each stream, which are in ``streams`` too; 0: jobs are read from the stream itself.
    shards: int = 0
    #: Earlier numbers of shards, whose jobs are still run.
    drain_shards: tuple[int, ...] = ()
    handlers: dict[str, str] = field(default_factory=dict)
    #: Modules whose handlers are in ``handlers`` too.
    apps: tuple[str, ...] = ()
    #: Restart the workers when a source file changes.
    reload: bool = False
    metrics_addr: str = "127.0.0.1:9464"
    #: Where the role ``api`` answers questions over HTTP; empty: there is no such role.
    serve_addr: str = ""
    serve_token_file: str = ""
    lease_s: float = 30.0
    #: Replicas that are to have a settlement before its jobs count as done; 0: it is not waited for.
    wait_replicas: int = 0
    #: Time for which a finished batch is kept.
    batch_ttl_s: float = 7 * 24 * 3600.0
    #: Time for which an idempotency key is taken; 0: keys do not count.
    unique_window_s: float = 86_400.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_deaths: int = 3
    max_payload: int = MAX_PAYLOAD_BYTES
    drain_timeout_s: float = 30.0
    connect_timeout_s: float = 30.0
    job_timeout_s: float = 300.0
    #: How long a cancelled job may run on before its worker is ended.
    cancel_grace_s: float = 10.0
    result_ttl_s: float = 3600.0
    max_rss_mib: int = 0
    max_jobs: int = 0
    max_age_s: float = 0.0
    instance: str = field(default_factory=socket.gethostname)
    host: str = field(default_factory=socket.gethostname)
    log_level: str = "info"
    log_format: str = "json"
    #: Most lines of one event in 10 s; 0: no limit.
    log_limit: int = 100
    linger_s: float = 0.0
    threads: int = 1
    holder: Holder = NO_HOLDER
    #: The TOML file of `--config`; empty without one. `SIGHUP` reads its tables again.
    config_file: str = ""
    #: Limits and weights of that file, if it has any.
    flow: FlowConfig | None = None
    cron: tuple[CronTable, ...] = ()

    @property
    def spread_streams(self) -> tuple[int, ...]:
        """Numbers of the streams whose new entries are moved into shards."""
        if not self.shards:
            return ()
        return tuple(no for no, source in enumerate(self.streams) if not shard_count(source.stream))

    @property
    def logical_streams(self) -> list[str]:
        """Names of the streams that jobs are sent to; shards are left out."""
        return [source.stream for source in self.streams if not shard_count(source.stream)]

    def to_json(self) -> bytes:
        """For a child of the service; it holds the secrets too, so it goes over a pipe only."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The inverse of `to_json`."""
        return msgspec.json.decode(data, type=cls)

    def public(self) -> dict[str, Any]:
        """The options without the secrets, for the log."""
        left_out = {*self.secret_urls, *self.secret_tokens, "holder", "cron"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


def parse_source(text: str) -> Source:
    """``NAME=GROUP`` of ``--stream``. Raises `ConfigurationError`, also for a key of the service's own."""
    stream, _, group = (part.strip() for part in text.rpartition("="))
    if not stream or not group:
        raise ConfigurationError(
            f"--stream {text!r}: say NAME=GROUP, for example stream:story:gen=cg-gen-worker"
        )
    if is_derived(stream) or shard_count(stream):
        raise ConfigurationError(
            f"--stream {text!r}: the service keeps its own records under this name; give the jobs' stream"
        )
    return Source(stream, group)


def parse_handler(text: str) -> tuple[str, str]:
    """``TYPE=module:Class`` of ``--handler``. Raises `ConfigurationError`."""
    type_name, _, target = (part.strip() for part in text.partition("="))
    module, _, name = target.partition(":")
    if not type_name or not module or not name.isidentifier():
        raise ConfigurationError(
            f"--handler {text!r}: say TYPE=module:Class, for example shout=mypkg.jobs:Shout"
        )
    return type_name, target


def parse_address(text: str, option: str = "--metrics-addr") -> tuple[str, int]:
    """``HOST:PORT`` as an option has it. Raises `ConfigurationError`."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+(?:%\w+)?\]|[^\s\[\]:/@]+):([0-9]{1,5})", text.strip())
    if found is None or int(found[2]) > 65535:
        raise ConfigurationError(
            f"{option} {text!r}: say HOST:PORT, for example 127.0.0.1:9464 or [::1]:9464"
        )
    return found[1].strip("[]"), int(found[2])


@cache
def cores() -> int:
    """Processors that this process may use, by affinity and CPU quota; the machine may have more.

    Counted once, in the forkserver for all its children: which slots have a device must not change while the
    service runs, and a worker that reads the files of the control groups has 0.4 MB more of its own. A quota
    that changes later takes effect when the service starts again.
    """
    return usable_cpus()


def without_credentials(url: str, mark: str = "") -> str:
    """A URL without its credentials, which ``mark`` replaces, and without its options. Raises nothing: also
    fit for a text that is no URL."""
    scheme, separator, rest = url.partition("://")
    _, at, address = rest.rpartition("@")
    shown = f"{scheme}://{mark}{address}" if separator and at else url
    return shown.partition("?")[0]  # last, for a password may hold a question mark


def settings_class() -> type[Settings]:
    """The settings of the engine and the built-in types together."""
    found: type[Settings] = imported(extension().settings)
    assert issubclass(found, Settings)
    return found
