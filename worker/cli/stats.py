"""``jobworker stats``: queue depths, workers and rates, printed once."""

import shlex
import time

import click

from ..admin.deployment import Deployment, StreamTable
from ..admin.overview import Overview, open_poller
from ..admin.words import format_duration, pluralise, strip_control
from ..config.quantities import Duration
from ..errors import StoreUnavailable
from ..store.operator import LaneCounts
from ..telemetry.log import redacted
from .common import (
    AS_JSON,
    STREAMS,
    echo_json,
    echo_unread_streams,
    print_table,
    verb_on_deployment,
    with_deployment,
)
from .top import to_json


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    watch = click.option("--watch", type=Duration(0.1), metavar="SECONDS",
                         help="Take two snapshots, this far apart, and print the rates.")  # fmt: skip
    verb_on_deployment(main)(STREAMS(watch(AS_JSON(stats))))


def stats(deployment: Deployment, streams: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """Print queued, pending, retrying and dead jobs by stream.

    QUEUED: not started; where many wait, they are sorted, and those by priority and of the ten largest
    tenants follow. PENDING: read by a service and not settled: running, prefetched or
    parked. RETRYING: waits for a retry, or was sent with a delay. DEAD: dead letters. OLDEST: age of the
    oldest queued job. If services answer at --metrics-url, their workers follow, and with --watch the rates
    by type.

    \b
    jobworker stats
    jobworker stats --watch 5 --json
    """
    table = StreamTable(streams)
    poller = open_poller(deployment, table)
    overview = poller.snapshot()
    if watch:
        time.sleep(watch)  # rates need two snapshots
        overview = poller.snapshot()
    if overview.error:
        raise StoreUnavailable(overview.error)
    if streams:
        from ..store.redis.operator import OperatorStore

        echo_unread_streams(OperatorStore(deployment.url), [source.stream for source in table.latest])
    if as_json:
        echo_json(to_json(overview))
        return
    _print(overview)


def _print_lanes(stream: str, counts: LaneCounts) -> None:
    by_priority = ", ".join(f"{number}: {count}" for number, count in counts.by_priority.items())
    click.echo(f"{stream}: {counts.waiting} of the queued jobs are sorted; by priority {by_priority}")
    rows = [[strip_control(tenant), str(count)] for tenant, count in counts.largest_tenants.items()]
    print_table(["TENANT", "WAITING>"], rows)


def _print(overview: Overview) -> None:
    print_table(
        ["STREAM", "GROUP", "QUEUED>", "PENDING>", "RETRYING>", "DEAD>", "OLDEST>"],
        [
            [
                source.stream,
                source.group,
                *(str(number) for number in depths[:4]),
                format_duration(depths.oldest_age_s) if depths.queued else "-",
            ]
            for source, depths in overview.streams
        ],
    )
    for stream, counts in overview.lanes.items():
        _print_lanes(stream, counts)
    for text in overview.refused:
        click.echo(strip_control(redacted(with_deployment(text))), err=True)
    for pause in overview.pauses:
        resume = f"jobworker resume {shlex.quote(strip_control(pause.job_type))}"
        click.echo(f"{strip_control(pause.job_type)} is paused: {with_deployment(resume)}")
    for service in (one for one in overview.services if not one.status):
        message = f"no service answers at {service.url}: {strip_control(redacted(service.error))}"
        click.echo(f"{message}; give the url of each service by --metrics-url", err=True)
    workers = overview.workers()
    if workers:
        states = ", ".join(f"{count} {state}" for state, count in sorted(workers.items()))
        click.echo(f"{pluralise(workers.total(), 'worker')}: {states}")
    if overview.rates:
        names = ("done", "failed", "retried", "dead")
        rows = [
            [strip_control(job_type), *(f"{rates[name]:.1f}" for name in names)]
            for job_type, rates in sorted(overview.rates.items())
        ]
        print_table(["TYPE", *(f"{name.upper()}/s>" for name in names)], rows)
