"""``jobworker doctor``: diagnose a deployment and name the remedies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import click

from ..admin.deployment import Deployment, parse_sources
from ..admin.doctor import (
    Finding,
    host_findings,
    model_findings,
    pause_findings,
    server_findings,
    service_findings,
    stream_findings,
)
from ..admin.doctor_facts import package_version, read_host_facts, read_store_facts
from ..admin.words import strip_control
from ..errors import ConfigurationError, StoreUnavailable
from ..options import ENV_PREFIX
from ..telemetry.log import redacted
from .common import AS_JSON, BAD_NEWS, STREAMS, echo_json, verb_on_deployment

#: Loading a large model from a slow disk takes minutes.
_MODEL_WITHIN_S = 600.0
_NO_MODEL = "\0"


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = AS_JSON(doctor)
    for option in (
        STREAMS,
        click.option("--milvus-prefix", default="z_novel_", envvar=f"{ENV_PREFIX}_MILVUS_PREFIX",
                     help="Prefix of the collection names."),
        click.option("--milvus-uri", default="", envvar=f"{ENV_PREFIX}_MILVUS_URI",
                     help="With --model: compare it with the collections there."),
        click.option("--device", default="auto", envvar=f"{ENV_PREFIX}_DEVICE", help="With --model."),
        click.option("--configured-model", hidden=True, default="", envvar=f"{ENV_PREFIX}_MODEL"),
        click.option("--model", is_flag=False, flag_value="", default=_NO_MODEL, show_default=False,
                     help="Load a model too and report its dimension. Without a name: the service's model."),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def doctor(
    deployment: Deployment, model: str, configured_model: str, device: str, milvus_uri: str,
    milvus_prefix: str, streams: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Find what is wrong and say how to fix it.

    Checks the job store, the streams, the services and this machine. Changes nothing. --model also loads
    the model, in a separate process.

    \b
    jobworker doctor
    jobworker doctor --model BAAI/bge-m3 --milvus-uri http://milvus:19530 --json

    Exit code 1: something is wrong.
    """
    findings = [*host_findings(read_host_facts()), *_deployment_findings(deployment, streams)]
    if model != _NO_MODEL:
        milvus = _milvus(milvus_uri, deployment.milvus_uri)
        findings += _model(model or configured_model, device, milvus, milvus_prefix)
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        echo_json({"ok": not wrong, "findings": [finding._asdict() for finding in findings]})
    else:
        _print(findings)
        click.echo(f"{wrong} wrong" if wrong else "nothing is wrong", err=True)
    if wrong:
        sys.exit(BAD_NEWS)


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        colour = {"ok": "green", "note": "yellow", "wrong": "red"}[finding.level]
        level = click.style(f"{finding.level:5}", fg=colour)
        click.echo(f"{level}  {strip_control(finding.subject)}: {strip_control(redacted(finding.says))}")
        if finding.do:
            click.echo(f"       → {strip_control(finding.do)}")


def _deployment_findings(deployment: Deployment, streams: tuple[str, ...]) -> list[Finding]:
    sources, services = parse_sources(streams), deployment.services()
    try:
        store = read_store_facts(deployment.url, sources)
    except (StoreUnavailable, ConfigurationError) as error:
        return [Finding("wrong", "store", str(error), "is it running, and is this its url?")]
    return [
        *(
            finding
            for name, facts in store.servers.items()
            for finding in server_findings(name or "store", facts)
        ),
        *(finding for facts in store.streams for finding in stream_findings(facts)),
        *pause_findings(store.pauses),
        *service_findings(services, deployment.default_metrics, package_version("jobworker")),
    ]


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
