"""``jobworker retry``: list jobs that wait for a retry, or make them due now."""

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import click

from ..admin.deployment import StreamTable
from ..admin.retries import RetrySet, ScheduledRetry
from ..admin.words import format_duration, pluralise, strip_control
from ..config.quantities import Count
from .common import (
    AS_JSON,
    NEGATIVE_RESULT,
    STREAMS,
    CliGroup,
    JobType,
    echo_json,
    echo_missing,
    echo_unread_streams,
    exit_if_refused,
    name_streams,
    print_table,
    verb,
)


@click.group("retry", cls=CliGroup)
def retry() -> None:
    """List scheduled retries, or make them due now.

    \b
    jobworker retry list
    jobworker retry now --type shout
    """


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        STREAMS,
        click.option("--tenant", "tenants", multiple=True, help="Tenant of the job; repeatable."),
        click.option("--type", "types", type=JobType(), multiple=True, help="Job type; repeatable."),
        click.argument("ids", nargs=-1),
    ):
        command = option(command)
    return command


def _open_retries(
    url: str, streams: Sequence[str], ids: Sequence[str], types: Sequence[str], tenants: Sequence[str]
) -> RetrySet:
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    names = StreamTable(streams, need_group=False).names(store)
    echo_unread_streams(store, names if streams else ())
    return RetrySet(store, names, frozenset(ids), frozenset(types), frozenset(tenants), {})


@verb(retry, "list")
@_filter_options
@click.option("--limit", type=Count(0), default=50, show_default=True, help="Maximum; 0 for all.")
@AS_JSON
def list_(url: str, limit: int, as_json: bool, streams: tuple[str, ...], **selection: Any) -> None:
    """List jobs that wait for a retry or a delayed start, soonest first.

    \b
    jobworker retry list --tenant t001
    """
    retries = _open_retries(url, streams, **selection)
    jobs = list(islice(retries.soonest_first(), limit + 1 if limit else None))
    more = bool(limit) and len(jobs) > limit
    jobs = jobs[:limit] if limit else jobs
    now_s = retries.store.wall_now_s(retries.streams[0])
    if as_json:
        refused = list((retries.refused or {}).values())
        echo_json({"retries": [_to_json(one, now_s) for one in jobs], "more": more, "refused": refused})
        exit_if_refused(refused)
        return
    rows = [
        [_due(one.scheduled.due_wall_s - now_s), _retry_count(one), strip_control(one.job.type, 20),
         strip_control(one.job.id, 36), strip_control(one.job.tenant_id, 16), one.stream]
        for one in jobs
    ]  # fmt: skip
    if rows:
        print_table(["DUE>", "RETRY>", "TYPE", "JOB", "TENANT", "STREAM"], rows)
    click.echo(
        "… and more: --limit 0 lists all"
        if more
        else f"{pluralise(len(rows), 'job waits', 'jobs wait')} for a retry or a delayed start in "
        f"{name_streams(retries.streams)}",
        err=True,
    )
    exit_if_refused((retries.refused or {}).values())


def _retry_count(one: ScheduledRetry) -> str:
    return "delayed" if one.job.is_delayed else str(one.job.retry_count)


def _due(in_s: float) -> str:
    return f"in {format_duration(in_s)}" if in_s >= 0 else f"{format_duration(-in_s)} ago"


def _to_json(one: ScheduledRetry, now_s: float) -> dict[str, Any]:
    return {
        "stream": one.stream, "job_id": one.job.id, "type": one.job.type, "tenant_id": one.job.tenant_id,
        "retry_count": one.job.retry_count, "deaths": one.job.deaths,
        "due_in_s": round(one.scheduled.due_wall_s - now_s, 3) + 0.0, "delayed": one.job.is_delayed,
        "last_error": one.job.last_error,
    }  # fmt: skip


@verb(retry)
@_filter_options
@click.option("--all", "all_of_them", is_flag=True, help="Every waiting retry.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@AS_JSON
def now(
    url: str, all_of_them: bool, dry_run: bool, as_json: bool, streams: tuple[str, ...], **selection: Any
) -> None:
    """Retry waiting jobs now, without the rest of their backoff.

    Earlier tries still count.

    \b
    jobworker retry now job-1
    jobworker retry now --all

    Exit code 1: one of the given ids does not wait for a retry.
    """
    if not (all_of_them or any(selection.values())):
        raise click.UsageError("which ones? Give ids, --type or --tenant, or --all")
    retries = _open_retries(url, streams, **selection)
    waiting = retries.soonest_first() if retries.ids else ()
    missing = echo_missing(retries.ids, (one.job.id for one in waiting))
    moved = retries.make_due_now(dry_run=dry_run)
    if as_json:
        echo_json({"hastened": moved, "missing": missing, "dry_run": dry_run})
    else:
        click.echo(f"{pluralise(moved, 'job')} {'would be' if dry_run else 'made'} due now")
    exit_if_refused((retries.refused or {}).values())
    if missing:
        sys.exit(NEGATIVE_RESULT)
