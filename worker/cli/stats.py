"""``jobworker stats``: how much waits where, what the services do, and how fast."""

import time

import click

from ..admin.deployment import Deployment, source_list
from ..admin.overview import Overview, overview_poller_of
from ..admin.words import format_duration, pluralise, strip_control
from ..errors import StoreUnavailable
from ..telemetry.log import redacted
from .common import AS_JSON, STREAMS, say_json, table, verb_on_deployment
from .top import as_plain


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    watch = click.option("--watch", type=click.FloatRange(0.1), metavar="SECONDS",
                         help="Look twice, so far apart, and say how much happened a second.")  # fmt: skip
    verb_on_deployment(main)(STREAMS(watch(AS_JSON(stats))))


def stats(deployment: Deployment, streams: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """How much waits, runs, and was given up, by stream.

    QUEUED was not given to any worker yet; PENDING was, and is not finished; RETRYING waits for its next
    try; DEAD was given up; OLDEST is how long the oldest queued job has waited. Where services answer at
    --metrics-url, their workers and (with --watch) rates by type follow.

    \b
    jobworker stats
    jobworker stats --watch 5 --json
    """
    source_list(streams)
    watcher = overview_poller_of(deployment, streams)
    seen = watcher.look()
    if watch:
        time.sleep(watch)  # rates are what happens in between
        seen = watcher.look()
    if seen.trouble:
        raise StoreUnavailable(seen.trouble)
    if as_json:
        say_json(as_plain(seen))
        return
    _print(seen)


def _print(seen: Overview) -> None:
    table(
        ["STREAM", "GROUP", "QUEUED>", "PENDING>", "RETRYING>", "DEAD>", "OLDEST>"],
        [
            [
                source.stream,
                source.group,
                *(str(number) for number in depths[:4]),
                format_duration(depths.oldest_age_s) if depths.queued else "-",
            ]
            for source, depths in seen.streams
        ],
    )
    for pause in seen.pauses:
        click.echo(f"{strip_control(pause.kind)} is paused: jobworker resume {strip_control(pause.kind)}")
    for service in (one for one in seen.services if not one.said):
        says = f"no service answers at {service.url}: {strip_control(redacted(service.trouble))}"
        click.echo(f"{says}; --metrics-url says where its workers and rates are to be had", err=True)
    workers = seen.workers()
    if workers:
        states = ", ".join(f"{count} {state}" for state, count in sorted(workers.items()))
        click.echo(f"{pluralise(workers.total(), 'worker')}: {states}")
    if seen.rates:
        whats = ("done", "failed", "retried", "dead")
        rows = [
            [strip_control(kind), *(f"{rates[what]:.1f}" for what in whats)]
            for kind, rates in sorted(seen.rates.items())
        ]
        table(["TYPE", *(f"{what.upper()}/s>" for what in whats)], rows)
