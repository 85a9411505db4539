"""``jobworker explain``: find a job and say why it waits."""

import shlex
import sys
from dataclasses import asdict

import click

from ..admin.deployment import Deployment, StreamTable
from ..admin.find_job import JobFinder, JobLocation
from ..admin.words import strip_control
from ..config.quantities import Count
from ..errors import ConfigurationError
from .common import (
    AS_JSON,
    NEGATIVE_RESULT,
    STREAMS,
    echo_json,
    exit_if_refused,
    verb_on_deployment,
    with_deployment,
)

#: Entries scanned in each stream, retry set and dead-letter queue: about a second for all of them.
_SCAN_LIMIT = 100_000

#: Streams that are named where a job is not found.
_MAX_NAMED = 20


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = AS_JSON(explain)
    for option in (
        STREAMS,
        click.option("--scan", type=Count(1), default=_SCAN_LIMIT, show_default=True,
                     help="Maximum of entries to scan in each stream, its retries and its dead letters."),
        click.argument("id"),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def explain(deployment: Deployment, id: str, scan: int, streams: tuple[str, ...], as_json: bool) -> None:
    """Find a job and say why it waits.

    ID is the id of the job or of its entry in the stream. The answer says whether the job is queued (behind
    how many), running (where, since when), pending (leased by which service), retrying or delayed (until
    when), paused or dead (for what reason). A requeued job may be in two places; both are shown.

    \b
    jobworker explain job-1
    jobworker explain 1767348000123-0 --json

    Exit code 1: not found. A finished job leaves no trace after its entry is trimmed.
    """
    from ..store.redis.operator import OperatorStore

    if not id:
        raise ConfigurationError("the id is empty: give the id of a job or of its entry")
    store = OperatorStore(deployment.url)
    finder = JobFinder(store, StreamTable(streams).sources(store), deployment.answering_services(), scan)
    locations = finder.find(id)
    if as_json:
        echo_json({"id": id, "found": [asdict(one) for one in locations], "complete": not finder.incomplete,
                   "given_up": finder.incomplete, "looked_at": finder.scanned,
                   "refused": finder.refused})  # fmt: skip
    else:
        _print(id, locations, finder)
    exit_if_refused(finder.refused)
    if not locations:
        sys.exit(NEGATIVE_RESULT)


def _print(id: str, locations: list[JobLocation], finder: JobFinder) -> None:
    for one in locations:
        job_type = one.type or "unreadable"
        owner = f"{job_type}, tenant {one.tenant_id}" if one.tenant_id else job_type
        click.echo(f"{strip_control(one.job_id or id)} ({strip_control(owner)})")
        click.echo(f"  {one.state} in {strip_control(one.stream)}: {strip_control(with_deployment(one.why))}")
        for name, value in one.facts.items():
            first, *others = str(value).splitlines() or [""]
            click.echo(f"    {name:16} {strip_control(first)}")
            for line in others:  # of a traceback
                click.echo(" " * 21 + strip_control(line))
        if one.state == "dead":
            again = f"jobworker dlq requeue {one.facts['letter']} --stream {shlex.quote(one.stream)}"
            click.echo(f"    send it again:   {strip_control(with_deployment(again))}")
    if not locations:
        searched = ", ".join(strip_control(name) for name in finder.searched[:_MAX_NAMED])
        click.echo(
            f"{strip_control(id)} was not found. It may never have been sent, or it has ended and was "
            f"trimmed: the job store keeps no record of either. Searched: {searched}"
        )
    if finder.incomplete:
        names = ", ".join(strip_control(name) for name in finder.incomplete)
        more = "" if finder.refused else "; --scan N scans more"
        click.echo(f"scanned {finder.scanned} entries, but not all of: {names}{more}")
