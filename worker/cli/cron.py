"""``jobworker cron``: list, run, pause and resume cron tables."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..admin.cron import (
    CronEntry,
    CronHashes,
    cron_entries,
    cron_sources,
    differing_hosts,
    last_state,
    late_entries,
    manual_job,
    read_cron,
    select_entries,
)
from ..admin.deployment import StreamTable
from ..admin.refusals import refusal
from ..admin.words import format_duration, strip_control
from ..cron.table import tick_text
from ..errors import ConfigurationError, StoreRefused
from ..keys import Source
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
    with_deployment,
)

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

_NAMES = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@click.group(cls=CliGroup)
def cron() -> None:
    """List, run, pause and resume cron tables.

    \b
    jobworker cron list
    jobworker cron run nightly
    jobworker cron pause nightly --note 'until the import is done'
    """


def _sources(store: "OperatorStore", streams: tuple[str, ...], *, need_group: bool = False) -> list[Source]:
    given = StreamTable(streams, need_group=need_group).sources(store) if streams else []
    return cron_sources(given, store.announcements())


@verb(cron, "list")
@STREAMS
@AS_JSON
def list_tables(url: str, streams: tuple[str, ...], as_json: bool) -> None:
    """List the active cron tables.

    NEXT: the next tick (UTC). LAST: the last tick that was enqueued, and what became of its job.

    \b
    jobworker cron list
    jobworker cron list --json

    Exit code 1: the store refuses a key of one of the streams. The tables of the others are listed.
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    sources = {source.stream: source for source in _sources(store, streams, need_group=True)}
    echo_unread_streams(store, list(sources) if streams else [])
    found = read_cron(store, sources)
    entries = cron_entries(found)
    refused = dict(found.refused)
    states = [_state(store, sources[entry.table.stream], entry, refused) for entry in entries]
    differing = differing_hosts(found)
    if as_json:
        rows = [_to_json(entry, state) for entry, state in zip(entries, states, strict=True)]
        echo_json({"cron": rows, "other_files": sorted({service for _, service, _ in differing}),
                   "refused": list(refused.values())})  # fmt: skip
        exit_if_refused(refused.values())
        return
    _print(entries, states, found.wall_now_s)
    for text in late_entries(entries):
        click.echo(strip_control(text), err=True)
    for stream, service, _ in differing:
        text = f"{service} has other tables for {stream} in its file: {with_deployment('jobworker doctor')}"
        click.echo(strip_control(text), err=True)
    exit_if_refused(refused.values())


def _state(store: "OperatorStore", source: Source, entry: CronEntry, refused: dict[str, str]) -> str:
    """As `last_state`; empty, with a line in ``refused``, if the store refuses a key of the stream."""
    try:
        return last_state(store, source, entry)
    except StoreRefused as error:
        what = f"jobs of {source.stream}"
        refused[source.stream] = refusal(what, error, partial(store.key_faults, source))
        return ""


def _select(found: CronHashes, names: tuple[str, ...]) -> list[CronEntry]:
    """As `select_entries`; an unknown name may belong to a stream whose tables cannot be read."""
    try:
        return select_entries(cron_entries(found), names)
    except ConfigurationError as error:
        if not found.refused:
            raise
        raise ConfigurationError("; ".join([str(error), *found.refused.values()])) from None


def _print(entries: list[CronEntry], states: list[str], wall_now_s: float) -> None:
    if not entries:
        click.echo("there are no cron tables")
        return
    rows = [
        [
            *map(strip_control, (entry.table.name, entry.table.schedule, entry.table.timezone)),
            strip_control(entry.table.type),
            _next(entry, wall_now_s),
            f"{tick_text(entry.last.tick_s)} {state}".rstrip() if entry.last else "-",
        ]
        for entry, state in zip(entries, states, strict=True)
    ]
    print_table(["NAME", "SCHEDULE", "TIMEZONE", "TYPE", "NEXT", "LAST"], rows)


def _next(entry: CronEntry, wall_now_s: float) -> str:
    if entry.pause:
        note = f" ({strip_control(entry.pause.note)})" if entry.pause.note else ""
        return f"paused{note}"
    if entry.next_s is None:
        return "never"
    return f"{tick_text(entry.next_s)} (in {format_duration(entry.next_s - wall_now_s)})"


def _to_json(entry: CronEntry, state: str) -> dict[str, Any]:
    cron = entry.table
    pause = entry.pause
    return {
        "name": cron.name, "schedule": cron.schedule, "timezone": cron.timezone, "type": cron.type,
        "stream": cron.stream, "missed": cron.missed,
        "next": None if entry.next_s is None else tick_text(entry.next_s),
        "last": None if entry.last is None else tick_text(entry.last.tick_s),
        "last_job_id": None if entry.last is None else entry.last.job_id,
        "last_state": state or None,
        "late_s": round(entry.late_s, 3),
        "paused": pause and {"since": tick_text(int(pause.wall_since_s)), "note": pause.note},
    }  # fmt: skip


@verb(cron, "run")
@_NAMES
@STREAMS
@AS_JSON
def run_now(url: str, names: tuple[str, ...], streams: tuple[str, ...], as_json: bool) -> None:
    """Enqueue the jobs of cron tables now, once.

    The job has an id of its own. The schedule does not change, and a pause does not matter.

    \b
    jobworker cron run nightly
    """
    from ..store.redis.operator import OperatorStore
    from ..store.redis.producer import RedisProducerStore

    store = OperatorStore(url)
    found = read_cron(store, [source.stream for source in _sources(store, streams)])
    producer = RedisProducerStore(url)
    ids = {}
    for entry in _select(found, names):
        id, data = manual_job(entry.table, found.wall_now_s)
        producer.add(entry.table.stream, [data])
        ids[entry.table.name] = id
    if as_json:
        echo_json({"enqueued": ids})
        return
    for id in ids.values():
        click.echo(f"enqueued: {strip_control(id)}")


@verb(cron, "pause")
@_NAMES
@click.option("--note", default="", help="Why, for the next operator.")
@STREAMS
@AS_JSON
def pause(url: str, names: tuple[str, ...], note: str, streams: tuple[str, ...], as_json: bool) -> None:
    """Pause cron tables, until `jobworker cron resume`.

    Ticks during the pause are dropped, also with `missed = "once"`. A job that is enqueued already runs.

    \b
    jobworker cron pause nightly --note 'until the import is done'
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    found = read_cron(store, [source.stream for source in _sources(store, streams)])
    for entry in _select(found, names):
        store.cron_pause(entry.table.stream, entry.table.name, note)
    if as_json:
        echo_json({"paused": names})
        return
    for name in names:
        click.echo(f"{strip_control(name)} paused")


@verb(cron, "resume")
@_NAMES
@STREAMS
@AS_JSON
@click.pass_context
def resume(
    context: click.Context, url: str, names: tuple[str, ...], streams: tuple[str, ...], as_json: bool
) -> None:
    """Resume paused cron tables. The next tick is the first from now on.

    \b
    jobworker cron resume nightly

    Exit code 1: one of the tables was not paused, or a stream's cron key cannot be used.
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    # By the pauses and not by the tables: a table that was removed from the file keeps its pause.
    resumed, refused = dict.fromkeys(names, False), {}
    for source in _sources(store, streams):
        try:
            for name in names:
                resumed[name] |= store.cron_resume(source.stream, name)
        except StoreRefused as error:
            what = f"cron tables of {source.stream}"
            refused[source.stream] = refusal(what, error, partial(store.cron_faults, source.stream))
    if as_json:
        echo_json({"resumed": resumed, "refused": list(refused.values())})
    for name, was_paused in resumed.items() if not as_json else ():
        click.echo(f"{strip_control(name)} {'resumed' if was_paused else 'was not paused'}")
    exit_if_refused(refused.values())
    if not all(resumed.values()):
        context.exit(NEGATIVE_RESULT)
