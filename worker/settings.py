"""Settings: one frozen record of every option; children get it as JSON over a pipe."""

import os
import re
import socket
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from .errors import ConfigurationError
from .extension import extension
from .keys import NO_HOLDER, Holder, Source
from .outcome import RetryPolicy

#: Default limit of one entry; larger ones are refused before they are parsed.
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
#: Settings that may hold a password or a key.
MAY_HOLD_SECRETS = ("redis_url", "milvus_token", "milvus_uri", "llm_url", "postgres_dsn")
#: In less the cache's own log would not leave room for vectors.
_LEAST_CACHE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Every option of the service. Times in seconds, sizes in bytes; urls may hold secrets."""

    procs: int = 1
    redis_url: str = ""
    milvus_uri: str = ""
    data_dir: str = "./jobworker-data"
    model: str = ""
    device: str = "auto"
    streams: tuple[Source, ...] = field(default_factory=lambda: extension().streams)
    handlers: dict[str, str] = field(default_factory=dict)
    metrics_addr: str = "127.0.0.1:9464"
    lease_s: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_deaths: int = 3
    max_payload: int = MAX_PAYLOAD_BYTES
    drain_timeout_s: float = 30.0
    connect_timeout_s: float = 30.0
    job_timeout_s: float = 300.0
    max_rss_mib: int = 0
    max_jobs: int = 0
    max_age_s: float = 0.0
    instance: str = field(default_factory=socket.gethostname)
    host: str = field(default_factory=socket.gethostname)
    log_level: str = "info"
    log_format: str = "json"
    milvus_token: str = ""
    milvus_prefix: str = "z_novel_"
    milvus_partitions: str = "key"
    long_text: str = "windows"
    token_budget: int = 16384
    dtype: str = "auto"
    model_copies: int = 0
    summary_chars: int = 100
    llm_url: str = ""
    llm_model: str = ""
    llm_key_file: str = ""
    llm_timeout_s: float = 60.0
    summary_sink: str = ""
    postgres_dsn: str = ""
    #: 0: no cache. In a Settings of their own, as tests make it, nothing is put on the disk.
    cache_bytes: int = 0
    linger_s: float = 0.002
    threads: int = 1
    holder: Holder = NO_HOLDER

    def to_json(self) -> bytes:
        """For a child of the service; it holds the secrets too, so it goes over a pipe only."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "Settings":
        """The inverse of `to_json`."""
        return msgspec.json.decode(data, type=cls)

    def public(self) -> dict[str, Any]:
        """The options without the secrets, for the log."""
        left_out = {*MAY_HOLD_SECRETS, "holder"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


def parse_source(text: str) -> Source:
    """``NAME=GROUP`` of ``--stream``. Raises `ConfigurationError`."""
    stream, _, group = text.rpartition("=")
    if not stream or not group:
        raise ConfigurationError(
            f"--stream {text!r}: say NAME=GROUP, for example stream:story:gen=cg-gen-worker"
        )
    return Source(stream, group)


def parse_handler(text: str) -> tuple[str, str]:
    """``TYPE=module:Class`` of ``--handler``. Raises `ConfigurationError`."""
    kind, _, target = text.partition("=")
    module, _, name = target.partition(":")
    if not kind or not module or not name.isidentifier():
        raise ConfigurationError(
            f"--handler {text!r}: say TYPE=module:Class, for example shout=mypkg.jobs:Shout"
        )
    return kind, target


def check_llm(url: str, model: str) -> None:
    """``--llm-url`` and ``--llm-model`` belong together. Raises `ConfigurationError`."""
    if url and not url.startswith(("http://", "https://")):
        raise ConfigurationError("--llm-url: say http(s)://host:port/v1, as for any OpenAI-compatible client")
    if url and not model:
        raise ConfigurationError("--llm-url needs --llm-model: the name that the endpoint knows its model by")


def parse_address(text: str, option: str = "--metrics-addr") -> tuple[str, int]:
    """``HOST:PORT`` as an option has it. Raises `ConfigurationError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"{option} {text!r}: say HOST:PORT, for example 127.0.0.1:9464")
    return host.strip("[]"), int(port)


def parse_size(text: str) -> int:
    """``off`` or a size such as ``512MiB`` or ``2G`` (always powers of 1024) in bytes, 0 for off.

    Raises `ConfigurationError`.
    """
    if text == "off":
        return 0
    found = re.fullmatch(r"(\d{1,12})([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    size_bytes = int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ") if found else 0
    if size_bytes < _LEAST_CACHE_BYTES:
        raise ConfigurationError(f"--cache {text!r}: say off or a size from 16MiB on, for example 512MiB")
    return size_bytes


def cores() -> int:
    """Processors that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0))


def without_credentials(url: str, mark: str = "") -> str:
    """A URL without its credentials, which ``mark`` replaces, and without its options. Raises nothing: also
    fit for a text that is no URL."""
    scheme, separator, rest = url.partition("://")
    _, at, address = rest.rpartition("@")
    shown = f"{scheme}://{mark}{address}" if separator and at else url
    return shown.partition("?")[0]  # last, for a password may hold a question mark
