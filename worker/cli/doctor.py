"""``jobworker doctor``: diagnose a deployment and name the remedies."""

import sys
from importlib import import_module
from typing import Any

import click

from ..admin.deployment import Deployment, StreamTable, UnknownGroup
from ..admin.doctor import (
    cron_findings,
    fault_findings,
    host_findings,
    pause_findings,
    server_findings,
    service_findings,
    stream_findings,
)
from ..admin.doctor_facts import package_version, read_host_facts, read_store_facts
from ..admin.finding import Finding
from ..admin.names import name_findings
from ..admin.words import strip_control
from ..errors import ConfigurationError, StoreUnavailable
from ..extension import extension
from ..telemetry.log import redacted
from .common import (
    AS_JSON,
    NEGATIVE_RESULT,
    STREAMS,
    echo_json,
    repair_of_store,
    verb_on_deployment,
    with_deployment,
)


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = AS_JSON(doctor)
    for option in (STREAMS, *_further().OPTIONS):
        command = option(command)
    verb_on_deployment(main)(command)


def _further() -> Any:
    """The checks of the built-in types: their options, and `findings`."""
    return import_module(extension().doctor)


def doctor(deployment: Deployment, streams: tuple[str, ...], as_json: bool, **options: str) -> None:
    """Find what is wrong and say how to fix it.

    Checks the job store, the streams, the services and this machine. Changes nothing.

    \b
    jobworker doctor
    jobworker doctor --redis-url redis://host:6379/0 --json

    Exit code 1: something is wrong.
    """
    findings = [*host_findings(read_host_facts()), *_deployment_findings(deployment, streams)]
    findings += [Finding(*found) for found in _further().findings(options, deployment.endpoints)]
    wrong = sum(finding.level == "wrong" for finding in findings)
    if as_json:
        echo_json({"ok": not wrong, "findings": [finding._asdict() for finding in findings]})
    else:
        _print(findings)
        click.echo(f"{wrong} wrong" if wrong else "nothing is wrong", err=True)
    if wrong:
        sys.exit(NEGATIVE_RESULT)


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        colour = {"ok": "green", "note": "yellow", "wrong": "red"}[finding.level]
        level = click.style(f"{finding.level:5}", fg=colour)
        click.echo(f"{level}  {strip_control(finding.subject)}: {strip_control(redacted(finding.says))}")
        if finding.do:
            click.echo(f"       → {strip_control(with_deployment(finding.do))}")


def _deployment_findings(deployment: Deployment, streams: tuple[str, ...]) -> list[Finding]:
    table, services = StreamTable(streams), deployment.services()
    try:
        store = read_store_facts(deployment.url, table, services)
    except UnknownGroup:
        raise
    except (StoreUnavailable, ConfigurationError) as error:
        return [Finding("wrong", "store", str(error), repair_of_store(str(error)))]
    return [
        *(
            finding
            for name, facts in store.servers.items()
            for finding in server_findings(name or "store", facts)
        ),
        *(finding for facts in store.streams for finding in stream_findings(facts)),
        *name_findings(store.names),
        *fault_findings("paused", store.pause_faults),
        *cron_findings(store.cron, store.cron_faults),
        *pause_findings(store.pauses, store.names.types),
        *service_findings(services, deployment.default_metrics, package_version("jobworker")),
    ]
