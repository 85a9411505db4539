"""``jobworker retry``: jobs that wait for their next try."""

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import click

from ..admin.deployment import source_list
from ..admin.retries import RetrySet, ScheduledRetry
from ..admin.words import format_duration, pluralise, strip_control
from .common import AS_JSON, BAD_NEWS, STREAMS, CliGroup, JobType, say_json, say_missing, table, verb


@click.group("retry", cls=CliGroup)
def retry() -> None:
    """Waiting retries: list them, or have them tried now.

    \b
    jobworker retry list
    jobworker retry now --type embedding_batch
    """


def _choosing(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        STREAMS,
        click.option("--tenant", "tenants", multiple=True, help="Whose job; repeatable."),
        click.option("--type", "types", type=JobType(), multiple=True, help="Type of job; repeatable."),
        click.argument("ids", nargs=-1),
    ):
        command = option(command)
    return command


def _desk(
    url: str, streams: Sequence[str], ids: Sequence[str], types: Sequence[str], tenants: Sequence[str]
) -> RetrySet:
    from ..store.redis.operator import RedisOperatorStore

    names = [source.stream for source in source_list(streams, need_group=False)]
    return RetrySet(RedisOperatorStore(url), names, frozenset(ids), frozenset(types), frozenset(tenants))


@verb(retry, "list")
@_choosing
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="At most; 0 for all.")
@AS_JSON
def list_(url: str, limit: int, as_json: bool, streams: tuple[str, ...], **choice: Any) -> None:
    """List jobs that wait for their next try, soonest first.

    \b
    jobworker retry list --tenant t001
    """
    desk = _desk(url, streams, **choice)
    found = list(islice(desk.soonest_first(), limit + 1 if limit else None))
    more = bool(limit) and len(found) > limit
    found = found[:limit] if limit else found
    now_s = desk.store.wall_now_s(desk.streams[0])
    if as_json:
        say_json({"retries": [_shown(one, now_s) for one in found], "more": more})
        return
    rows = [
        [_due(one.scheduled.due_wall_s - now_s), str(one.job.retry_count), strip_control(one.job.type, 20),
         strip_control(one.job.id, 36), strip_control(one.job.tenant_id, 16), one.stream]
        for one in found
    ]  # fmt: skip
    if rows:
        table(["DUE>", "RETRY>", "TYPE", "JOB", "TENANT", "STREAM"], rows)
    click.echo(
        "… and more: --limit 0 lists all"
        if more
        else f"{pluralise(len(rows), 'job waits', 'jobs wait')} for the next try",
        err=True,
    )


def _due(in_s: float) -> str:
    return f"in {format_duration(in_s)}" if in_s >= 0 else f"{format_duration(-in_s)} ago"


def _shown(one: ScheduledRetry, now_s: float) -> dict[str, Any]:
    return {
        "stream": one.stream, "job_id": one.job.id, "type": one.job.type, "tenant_id": one.job.tenant_id,
        "retry_count": one.job.retry_count, "deaths": one.job.deaths,
        "due_in_s": round(one.scheduled.due_wall_s - now_s, 3),
    }  # fmt: skip


@verb(retry)
@_choosing
@click.option("--all", "all_of_them", is_flag=True, help="Every job that waits.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@AS_JSON
def now(
    url: str, all_of_them: bool, dry_run: bool, as_json: bool, streams: tuple[str, ...], **choice: Any
) -> None:
    """Have waiting jobs tried now, not when their backoff is over.

    The tries that they have had still count.

    \b
    jobworker retry now job-1
    jobworker retry now --all

    Exit code 1: one of the ids given does not wait for a try.
    """
    if not (all_of_them or any(choice.values())):
        raise click.UsageError("which ones? Give ids, --type or --tenant, or --all")
    desk = _desk(url, streams, **choice)
    missing = say_missing(desk.ids, (one.job.id for one in (desk.soonest_first() if desk.ids else ())))
    moved = desk.try_now(dry_run=dry_run)
    if as_json:
        say_json({"hastened": moved, "missing": missing, "dry_run": dry_run})
    else:
        click.echo(f"{pluralise(moved, 'job')} {'would be' if dry_run else 'made'} due now")
    if missing:
        sys.exit(BAD_NEWS)
