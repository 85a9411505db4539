"""``jobworker batch``: list batches and show how far one is."""

import sys
from typing import TYPE_CHECKING

import click

from ..admin.deployment import StreamTable
from ..admin.words import format_duration, strip_control
from ..config.quantities import Count
from .common import (
    AS_JSON,
    NEGATIVE_RESULT,
    STREAMS,
    CliGroup,
    echo_json,
    echo_unread_streams,
    exit_if_refused,
    print_table,
    verb,
)

if TYPE_CHECKING:  # these take a while to load
    from ..batches import Batch
    from ..store.redis.operator import OperatorStore

_BAR_CHARS = 40


@click.group("batch", cls=CliGroup)
def batch() -> None:
    """List batches and show how far one is.

    A batch is a number of jobs that are counted together. A job counts as done when it was acknowledged, and
    as dead when it was dead-lettered.

    \b
    jobworker batch list
    jobworker batch show import-7
    """


def _streams(store: "OperatorStore", streams: tuple[str, ...]) -> list[str]:
    names = list(StreamTable(streams, need_group=False).names(store))
    echo_unread_streams(store, names if streams else [])
    return names


@verb(batch, "list")
@click.option("--limit", type=Count(1, 10_000), default=50, show_default=True, help="Most batches to list.")
@STREAMS
@AS_JSON
def list_(url: str, limit: int, streams: tuple[str, ...], as_json: bool) -> None:
    """List batches: unfinished ones, then finished ones, each newest first.

    \b
    jobworker batch list
    jobworker batch list --json
    """
    from ..admin.batches import list_batches
    from ..batches import batch_facts
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    names = _streams(store, streams)
    found, refused = list_batches(store, names, limit)
    if as_json:
        echo_json({"batches": [batch_facts(one) for one in found], "refused": refused})
    elif found:
        now_s = store.wall_now_s(names[0])
        print_table(
            ["ID", "NAME", "TENANT", "STATE", "TOTAL>", "DONE>", "DEAD>", "PROGRESS>", "AGE>"],
            [_row(one, now_s) for one in found],
        )
    elif not refused:
        click.echo("there are no batches")
    exit_if_refused(refused)


def _row(one: "Batch", wall_now_s: float) -> list[str]:
    texts = [one.id, one.record.name or "-", one.record.tenant_id or "-", one.state]
    total = "?" if one.total is None else str(one.total)
    return [
        *map(strip_control, texts), total, str(one.done), str(one.dead), _percent(one),
        _age(one.record.wall_created_s, wall_now_s),
    ]  # fmt: skip


def _percent(one: "Batch") -> str:
    return "?" if one.percent is None else f"{one.percent:.1f} %"


def _age(wall_s: float | None, wall_now_s: float) -> str:
    return format_duration(max(0.0, wall_now_s - wall_s)) if wall_s else "-"


@verb(batch, "show")
@click.argument("id")
@STREAMS
@AS_JSON
def show(url: str, id: str, streams: tuple[str, ...], as_json: bool) -> None:
    """Show how far a batch is.

    \b
    jobworker batch show import-7
    jobworker batch show import-7 --json

    Exit code 1: there is no such batch. The record of a finished one is kept for --batch-ttl.
    """
    from ..batches import batch_facts, find_batch
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    names = _streams(store, streams)
    one = find_batch(store, names, id)
    if one is None:
        click.echo(f"jobworker: there is no batch {strip_control(id)!r:.80}", err=True)
        sys.exit(NEGATIVE_RESULT)
    if as_json:
        return echo_json(batch_facts(one))
    for name, text in _facts(one, store.wall_now_s(one.home)):
        click.echo(f"{name:<10}{strip_control(text)}".rstrip())


def _facts(one: "Batch", wall_now_s: float) -> list[tuple[str, str]]:
    record = one.record
    left = "" if one.total is None else f", {max(0, one.total - one.ended)} left"
    facts = [
        ("batch", f"{one.id} ({record.name})" if record.name else one.id),
        ("tenant", record.tenant_id),
        ("state", _state(one, wall_now_s)),
        ("progress", f"{_bar(one)} {_percent(one)}"),
        ("jobs", f"{'?' if one.total is None else one.total}: {one.done} done, {one.dead} dead{left}"),
        ("streams", ", ".join([one.home, *record.streams])),
        ("callback", one.callback_id if record.callback else record.error),
    ]
    return [(name, text) for name, text in facts if text]


def _state(one: "Batch", wall_now_s: float) -> str:
    record = one.record
    match one.state:
        case "finished":
            return f"finished {_age(record.wall_finished_s, wall_now_s)} ago"
        case "closed":
            return f"closed: its {one.total} jobs were enqueued"
        case _:
            return "open: more jobs may follow"


def _bar(one: "Batch") -> str:
    filled = 0 if one.percent is None else int(one.percent * _BAR_CHARS / 100)
    return f"[{'#' * filled}{'-' * (_BAR_CHARS - filled)}]"
