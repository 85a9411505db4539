"""``jobworker explain``: where a job is, and why it waits there."""

import sys
from dataclasses import asdict

import click

from ..admin.deployment import Deployment, services_of, source_list
from ..admin.find_job import JobFinder, JobLocation
from ..admin.words import strip_control
from .common import AS_JSON, BAD_NEWS, STREAMS, say_json, verb_on_deployment

#: Looked at of each stream, retry set and dead-letter stream: a second or so for all of them.
_SCAN = 100_000


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    command = AS_JSON(explain)
    for option in (
        STREAMS,
        click.option("--scan", type=click.IntRange(1), default=_SCAN, show_default=True,
                     help="Look at no more entries than this of each stream, its retries and dead letters."),
        click.argument("id"),
    ):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def explain(deployment: Deployment, id: str, scan: int, streams: tuple[str, ...], as_json: bool) -> None:
    """Say where a job is and why it waits there.

    ID is the job's own or that of its entry in the stream. Said is: queued behind how many; running where
    and since when; pending with whom; waiting for its next try until when; paused; given up for what
    reason. A requeued job may be in two places: all are shown.

    \b
    jobworker explain job-1
    jobworker explain 1767348000123-0 --json

    Exit code 1: it was not found. Jobs that are done leave no trace once their entry is trimmed.
    """
    from ..store.redis.operator import RedisOperatorStore

    store = RedisOperatorStore(deployment.url)
    search = JobFinder(store, source_list(streams), services_of(deployment), scan)
    found = search.find(id)
    if as_json:
        say_json({"id": id, "found": [asdict(one) for one in found], "complete": not search.given_up,
                  "given_up": search.given_up, "looked_at": search.looked_at})  # fmt: skip
    else:
        _say(id, found, search)
    if not found:
        sys.exit(BAD_NEWS)


def _say(id: str, found: list[JobLocation], search: JobFinder) -> None:
    for one in found:
        of_whom = f"{one.type or 'unreadable'}, tenant {one.tenant_id}" if one.tenant_id else one.type
        click.echo(f"{strip_control(one.job_id or id)} ({strip_control(of_whom)})")
        click.echo(f"  {one.state} in {strip_control(one.stream)}: {strip_control(one.why)}")
        for name, value in one.facts.items():
            click.echo(f"    {name:16} {strip_control(str(value))}")
        if one.state == "dead":
            click.echo(f"    send it again:   jobworker dlq requeue {one.facts['letter']}")
    if not found:
        click.echo(
            f"{strip_control(id)} was not found: it is done and trimmed, or was never sent to these streams"
        )
    if search.given_up:
        places = ", ".join(strip_control(place) for place in search.given_up)
        click.echo(f"looked at {search.looked_at} entries and gave up in: {places}; --scan looks further")
