"""Options of the built-in job types, as click declares them, and the settings made from them."""

import re
from typing import Any

import click

from jobworker.worker import NO_DEVICE, ConfigurationError
from jobworker.worker.config.quantities import Count, Size
from jobworker.worker.options import SECONDS, option
from jobworker.worker.urls import parse_http_url

#: In less the log of the cache's database would not leave room for vectors.
_LEAST_CACHE_BYTES = 16 * 1024 * 1024
_MOST_CACHE_BYTES = 1 << 50
_PREFIX = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]{0,63})?")
_TARGET = re.compile(r"[\w.]+:[A-Za-z_]\w*")
_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")
#: Options of the service's file that the verbs of `jobworker` use: option -> parameter.
VERB_OPTIONS = {
    "milvus-uri": "milvus_uri", "milvus-prefix": "milvus_prefix", "model": "configured_model",
    "device": "device",
}  # fmt: skip
#: In the order of the help text.
OPTIONS = [
    option("--milvus-uri", "Milvus >= 2.3, http(s)://host:port.  [default: an embedded Milvus Lite]", ""),
    option("--milvus-token", "user:password or API key; better given by the environment.", ""),
    option("--milvus-prefix", "Prefix of collection names.", "z_novel_"),
    option("--milvus-partitions", "A partition key, or one named partition a tenant and project.", "key",
            click.Choice(["key", "named"])),
    option("--model", "A sentence-transformers folder, a hub name that is in the cache, or "
            "package:<module>.  [default: the model of the 'embedded' extra, else BAAI/bge-m3]", ""),
    option("--device", "auto, cpu, cuda, or cuda:0,cuda:1.", "auto"),
    option("--model-copies", "Workers that hold the model, of each GPU or of the CPU; the others run "
            "other types.  [default: 2, on a CPU one a core, fewer where memory is short]", 0, Count(0)),
    option("--dtype", "Number format of the model; auto takes the fastest that reproduces its vectors.",
            "auto", click.Choice(["auto", "fp32", "bf16", "fp16"])),
    option("--sparse", "Sparse vectors, which find names, where model and store have them; on: also on "
            "Milvus Lite, where such searches are slow.", "auto",
            click.Choice(["auto", "on", "off"])),
    option("--long-text", "What to do with a text longer than the model's window.", "windows",
            click.Choice(["windows", "truncate", "reject"])),
    option("--token-budget", "Tokens, padding included, of one forward pass.", 65536, Count(512)),
    option("--cache", "off, or the disk space in --data-dir for vectors of texts that were embedded before.",
            "1GiB", Size(_LEAST_CACHE_BYTES, _MOST_CACHE_BYTES, off=True)),
    option("--serve-model-name", "Further name by which clients of --serve-addr may call the model; "
            "repeatable.", multiple=True),
    option("--tombstone-ttl", "How long a deletion rejects work that is older (days: 30d).",
            30 * 86_400.0, SECONDS),
    option("--summary-chars", "Longest summary of a chapter that is made here, in characters.", 100,
            Count(20, 10_000)),
    option("--llm-url", "OpenAI-compatible endpoint that writes summaries, http(s)://host:port/v1; its key "
            "comes from --llm-key-file or JOBWORKER_LLM_KEY.  [default: the chapter's own sentences]", ""),
    option("--llm-model", "The model's name there.", ""),
    option("--llm-key-file", "File that holds the endpoint's key.", "", click.Path(dir_okay=False)),
    option("--llm-timeout", "Limit of one request to it (seconds, or 2m).", 60.0, SECONDS),
    option("--summary-sink", "Further store for the findings of a chapter: postgres, or module:Class.", ""),
    option("--postgres-dsn", "For --summary-sink postgres; put passwords into the environment or the file.",
            ""),
]  # fmt: skip


#: Options among those that most services need.
FIRST = ("milvus-uri", "model")
#: Groups of the help text, beside the options that it shows first.
GROUPS = {
    "Milvus": ("milvus-token", "milvus-prefix", "milvus-partitions", "tombstone-ttl"),
    "Model": (
        "serve-model-name", "device", "model-copies", "dtype", "sparse", "long-text", "token-budget", "cache",
    ),
    "Summaries": (
        "summary-chars", "llm-url", "llm-model", "llm-key-file", "llm-timeout", "summary-sink",
        "postgres-dsn",
    ),
}  # fmt: skip


def fields_of(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `HandlerSettings`; takes the options that have other names out of ``values``.

    Raises `ConfigurationError` with what to change.
    """
    check_milvus_uri(values["milvus_uri"])
    check_llm(values["llm_url"], values["llm_model"])
    if not _PREFIX.fullmatch(values["milvus_prefix"]):
        raise ConfigurationError("--milvus-prefix: must be letters, digits and _, and not begin with a digit")
    sink = values["summary_sink"]
    if sink == "postgres" and not values["postgres_dsn"]:
        raise ConfigurationError("--summary-sink postgres needs --postgres-dsn")
    if sink not in ("", "postgres") and not _TARGET.fullmatch(sink):
        raise ConfigurationError(f"--summary-sink {sink!r}: must be postgres or module:Class")
    return {
        "serve_model_names": tuple(values.pop("serve_model_name")),
        "cache_bytes": values.pop("cache"),
        "tombstone_ttl_s": values.pop("tombstone_ttl"),
        "device": parse_device(values.pop("device")),
        "milvus_uri": values.pop("milvus_uri").strip(),
        "llm_timeout_s": values.pop("llm_timeout"),
        "device_copies": values.pop("model_copies"),
    }


def check_milvus_uri(uri: str) -> None:
    """Raises `ConfigurationError` unless it is empty or ``http(s)://[user:password@]host[:port][/database]``."""
    if uri:
        parts = parse_http_url(uri, "--milvus-uri", "http://milvus.example:19530")
        if parts.query or parts.fragment:
            raise ConfigurationError(
                "--milvus-uri takes no options behind ? or #; in a password write %3F and %23"
            )


def parse_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda``, or names joined by commas, without blanks. Raises `ConfigurationError`."""
    names = [name.strip() for name in text.split(",")]
    if names in (["auto"], ["cuda"], [NO_DEVICE]) or all(map(_DEVICE.fullmatch, names)):
        return ",".join(names)
    raise ConfigurationError(f"--device {text!r}: say auto, cpu, cuda, or names such as cuda:0,cuda:1")


def check_llm(url: str, model: str) -> None:
    """``--llm-url`` and ``--llm-model`` belong together. Raises `ConfigurationError`."""
    if url:
        parse_http_url(url, "--llm-url", "http://host:port/v1, as for any OpenAI-compatible client")
    if url and not model:
        raise ConfigurationError("--llm-url needs --llm-model: the name that the endpoint knows its model by")
