"""``jobworker cancel``: end jobs that wait or run."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from ..admin.deployment import StreamTable
from ..admin.words import pluralise, strip_control
from ..cancel import SCAN_LIMIT, CancelledJob, Canceller, JobFilter, outcome_of
from ..config.quantities import Count
from ..results import CancelOutcome
from .common import (
    AS_JSON,
    NEGATIVE_RESULT,
    STREAMS,
    JobType,
    confirm,
    echo_json,
    echo_unread_streams,
    explain_command,
    name_streams,
    verb,
)

_SAYS = {
    CancelOutcome.CANCELLED: "cancelled: it waited and was removed",
    CancelOutcome.REQUESTED: "a service has it and was asked to end it",
    CancelOutcome.ENDED: "has ended",
}
_WOULD = {
    CancelOutcome.CANCELLED: "would be cancelled: it waits",
    CancelOutcome.REQUESTED: "would be asked to end: a service has it",
    CancelOutcome.ENDED: "has ended",
}


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command: Any = cancel
    for option in (
        AS_JSON,
        click.option("--yes", is_flag=True, help="Do not ask for confirmation."),
        click.option("--dry-run", is_flag=True, help="Only say what would be done."),
        click.option("--discard", is_flag=True, help="Drop the jobs: no dead letter is made of them."),
        click.option("--scan", type=Count(1), default=SCAN_LIMIT, show_default=True,
                     help="With ids: maximum of entries and of retries to scan in each stream."),
        click.option("--all", "all_of_them", is_flag=True, help="Every job of the streams."),
        STREAMS,
        click.option("--tenant", "tenants", multiple=True, help="Tenant of the job; repeatable."),
        click.option("--type", "types", type=JobType(), multiple=True, help="Job type; repeatable."),
        click.argument("ids", nargs=-1),
    ):  # fmt: skip
        command = option(command)
    verb(main, "cancel")(command)


def cancel(
    url: str, ids: tuple[str, ...], types: tuple[str, ...], tenants: tuple[str, ...],
    streams: tuple[str, ...], all_of_them: bool, scan: int, discard: bool, dry_run: bool, yes: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Cancel jobs that have not ended.

    IDS are the ids of jobs or of their entries. Jobs that wait (in a stream, for a turn, a retry or a delay)
    are removed at once. Services that have prefetched or run the others are asked to end them: within about a
    second, and for a running handler that does not end by itself after --cancel-grace of its service. A
    cancelled job becomes a dead letter with the reason "cancelled", unless --discard is given. Jobs that are
    sent meanwhile are left alone.

    \b
    jobworker cancel job-1
    jobworker cancel --type shout --tenant t001 --dry-run
    jobworker cancel --tenant t001 --discard --yes

    Exit code 1: one of the given ids was not found or has ended.
    """
    from ..store.redis.operator import OperatorStore

    selected = JobFilter(frozenset(ids), frozenset(types), frozenset(tenants))
    if selected == JobFilter() and not all_of_them:
        raise click.UsageError("which ones? Give ids, --type or --tenant, or --all")
    store = OperatorStore(url)
    names = StreamTable(streams, need_group=False).names(store)
    echo_unread_streams(store, names if streams else ())

    def canceller(*, dry_run: bool) -> Canceller:
        limit = scan if ids else None
        return Canceller(
            store, names, selected, by="operator", discard=discard, dry_run=dry_run, scan_limit=limit
        )

    if not (ids or dry_run):
        confirm(lambda: _question(canceller(dry_run=True), names, discard), yes)
    run = canceller(dry_run=dry_run)
    if ids:
        _finish_ids(run, ids, dry_run, as_json)
    else:
        _finish_filter(run, dry_run, as_json)


def _question(canceller: Canceller, names: Sequence[str], discard: bool) -> str:
    counts = Counter(job.outcome for job in canceller.run())
    number = counts[CancelOutcome.CANCELLED] + counts[CancelOutcome.REQUESTED]
    how = "and drop them" if discard else "into dead letters"
    return f"Cancel {pluralise(number, 'job')} of {name_streams(names)}, {how}?"


def _finish_ids(run: Canceller, ids: Sequence[str], dry_run: bool, as_json: bool) -> None:
    found = list(run.run())
    by_id = {id: [job for job in found if id in (job.id, job.entry_id)] for id in dict.fromkeys(ids)}
    outcomes = {id: outcome_of(jobs) for id, jobs in by_id.items()}
    if as_json:
        echo_json({"outcomes": outcomes, "jobs": [_to_json(job) for job in found], "dry_run": dry_run,
                   "scanned": run.scanned, "incomplete": run.incomplete})  # fmt: skip
    for id, outcome in () if as_json else outcomes.items():
        if outcome == CancelOutcome.UNKNOWN:
            says = "was not found. It may never have been sent, or it has ended and was trimmed"
            click.echo(f"{strip_control(id)} {says}; try: {explain_command(id)}", err=True)
        else:
            words = _WOULD[outcome] if dry_run else _SAYS[outcome]
            click.echo(f"{strip_control(id)} {words} ({strip_control(by_id[id][0].stream)})")
    if run.incomplete:
        names = name_streams(list(dict.fromkeys(run.incomplete)))
        click.echo(f"scanned {run.scanned} entries, but not all of: {names}; --scan N scans more", err=True)
    if any(one in (CancelOutcome.UNKNOWN, CancelOutcome.ENDED) for one in outcomes.values()):
        sys.exit(NEGATIVE_RESULT)


def _to_json(job: CancelledJob) -> dict[str, str]:
    return {**job._asdict(), "job_id": job.id}


def _finish_filter(run: Canceller, dry_run: bool, as_json: bool) -> None:
    counts: Counter[CancelOutcome] = Counter()
    try:
        for job in run.run():
            counts[job.outcome] += 1
    except BaseException:
        click.echo(f"\nstopped: {counts[CancelOutcome.CANCELLED]} were cancelled", err=True)
        raise
    cancelled, requested = counts[CancelOutcome.CANCELLED], counts[CancelOutcome.REQUESTED]
    if as_json:
        echo_json({"cancelled": cancelled, "requested": requested, "dry_run": dry_run})
        return
    would_be = "would be " if dry_run else ""
    asked = (
        f"; services {'would be' if dry_run else 'were'} asked to end {requested} more" if requested else ""
    )
    click.echo(f"{pluralise(cancelled, 'waiting job')} {would_be}cancelled{asked}")
