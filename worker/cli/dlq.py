"""``jobworker dlq``: list, show, requeue and purge dead letters."""

import base64
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import click
import msgspec
import orjson

from ..admin.dead_letters import BATCH_SIZE, BulkOperation, DeadLetterQueue, Letter, LetterFilter
from ..admin.deployment import StreamTable
from ..admin.words import format_duration, pluralise, strip_control
from ..config.quantities import MAX_COUNT, Count, Number
from ..keys import is_derived
from ..outcome import Reason
from .common import (
    AS_JSON,
    MAX_IDS_NAMED,
    NEGATIVE_RESULT,
    STREAMS,
    Age,
    CliGroup,
    JobType,
    confirm,
    echo_json,
    echo_missing,
    echo_unread_streams,
    exit_if_refused,
    explain_command,
    is_terminal,
    name_streams,
    print_table,
    verb,
)

_REASONS = [reason.value for reason in Reason]
#: With --rate, a batch is so small that about this many are sent each second: the load stays even.
_BATCHES_PER_S = 10.0


@click.group("dlq", cls=CliGroup)
def dlq() -> None:
    """List, show, requeue and purge dead letters.

    \b
    jobworker dlq list --reason exhausted --newer-than 2h
    jobworker dlq requeue --type shout --reason timeout --rate 50
    """


def _filter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select letters."""
    options = [
        click.argument("ids", nargs=-1),
        click.option("--reason", "reasons", type=click.Choice(_REASONS), multiple=True,
                     help="Reason for which it was dead-lettered; repeatable."),
        click.option("--type", "types", type=JobType(), multiple=True, help="Job type; repeatable."),
        click.option("--tenant", "tenants", multiple=True, help="Tenant of the job; repeatable."),
        click.option("--error", default="", metavar="TEXT", help="Only if the error contains this text."),
        click.option("--older-than", type=Age(), help="Only if dead for more than 15m, 2h, 7d, ..."),
        click.option("--newer-than", type=Age(), help="Only if dead for less than 15m, 2h, 7d, ..."),
        STREAMS,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


class _SelectedByOptions(DeadLetterQueue):
    """The dead letters that the options select."""

    def __init__(
        self, url: str, streams: Sequence[str], ids: Sequence[str], reasons: Sequence[str],
        types: Sequence[str], tenants: Sequence[str], error: str, older_than: float | None,
        newer_than: float | None,
    ) -> None:  # fmt: skip
        from ..store.redis.operator import OperatorStore

        store = OperatorStore(url)
        names = StreamTable(streams, need_group=False).names(store)
        self.now_s = store.wall_now_s(names[0])
        echo_unread_streams(store, names if streams else ())
        selected = LetterFilter(
            frozenset(ids), frozenset(reasons), frozenset(types), frozenset(tenants), error
        )
        super().__init__(store, names, selected.with_ages(self.now_s, older_than, newer_than),
                         leave_out_refused=True)  # fmt: skip

    def require_filter(self, all_of_them: bool) -> None:
        """Raises `click.UsageError` if nothing limits the selection and --all is not given."""
        if self.filter.is_empty and not all_of_them:
            raise click.UsageError("which ones? Give ids or a filter, or --all for every dead letter")

    def ids_found(self) -> Iterator[str]:
        """Every id that names one of the letters; nothing if no ids were given."""
        letters = self.newest_first() if self.filter.ids else ()
        return (id for one in letters for id in (one.id.decode(), one.job_id, one.original_id))

    def describe(self) -> str:
        """The number of letters, in words."""
        dry_run = BulkOperation(self, dry_run=True)
        dry_run.purge()
        return pluralise(dry_run.done, "dead letter")


def _to_json(letter: Letter, payload: bool) -> dict[str, Any]:
    """A letter for scripts. The payload is a tenant's text and included only on request."""
    fields = {
        "id": letter.id.decode(), "stream": letter.stream, "job_id": letter.job_id, "type": letter.type,
        "tenant_id": letter.tenant_id, "project_id": letter.project_id, "reason": letter.reason,
        "error": letter.error, "failed_at": letter.failed_at, "original_id": letter.original_id,
        "worker": letter.worker, "retry_count": letter.retry_count, "deaths": letter.deaths,
        "bytes": len(letter.task or letter.raw or ""),
    }  # fmt: skip
    if payload:
        # As it was received: parsing would round numbers. Only white space is taken out.
        fields["task"] = orjson.Fragment(msgspec.json.format(letter.task, indent=-1)) if letter.task else None
        fields["raw"] = letter.raw
    return fields


@verb(dlq, "list")
@_filter_options
@click.option("--limit", type=Count(0), default=50, show_default=True, help="Maximum; 0 for all.")
@click.option("--payload", is_flag=True, help="With --json: include the whole job (a tenant's text).")
@AS_JSON
def list_(url: str, limit: int, payload: bool, as_json: bool, **selection: Any) -> None:
    """List dead letters of all streams, newest first.

    \b
    jobworker dlq list --newer-than 1h
    jobworker dlq list --tenant t001 --error Timeout
    jobworker dlq list --limit 0 --payload --json > letters.json     # a copy before a purge
    """
    queue = _SelectedByOptions(url, **selection)
    letters = list(islice(queue.newest_first(), limit + 1 if limit else None))
    more = bool(limit) and len(letters) > limit
    letters = letters[:limit] if limit else letters
    if as_json:
        echo_json({"dead_letters": [_to_json(letter, payload) for letter in letters], "more": more,
                   "refused": list(queue.refused.values())})  # fmt: skip
        exit_if_refused(queue.refused.values())
        return
    rows = [
        [letter.id.decode(), format_duration(max(0.0, queue.now_s - letter.wall_s)),
         strip_control(letter.reason), strip_control(letter.type, 20),
         strip_control(letter.job_id, 36), strip_control(letter.tenant_id, 16),
         strip_control(letter.error, 60)]
        for letter in letters
    ]  # fmt: skip
    if rows:
        print_table(["ID", "AGE>", "REASON", "TYPE", "JOB", "TENANT", "ERROR"], rows)
    total = f"{pluralise(len(rows), 'dead letter')} of {name_streams(queue.streams)}"
    click.echo("… and more: --limit 0 lists all" if more else total, err=True)
    exit_if_refused(queue.refused.values())


@verb(dlq)
@click.argument("id")
@click.option("--payload", is_flag=True, help="Show the job too (a tenant's text).")
@STREAMS
@AS_JSON
def show(url: str, id: str, payload: bool, streams: tuple[str, ...], as_json: bool) -> None:
    """Show one dead letter in full.

    ID is the id of the letter, of the job, or of the job's entry in its stream.

    \b
    jobworker dlq show 1767348000123-0 --payload

    Exit code 1: there is no such letter.
    """
    queue = _SelectedByOptions(url, streams, [id], (), (), (), "", None, None)
    letters = list(queue.newest_first())
    if as_json:
        shown = [_to_json(letter, payload) | {"details": letter.details} for letter in letters]
        echo_json({"dead_letters": shown, "refused": list(queue.refused.values())})
    for letter in letters if not as_json else ():
        _print(letter, payload, queue.now_s)
    if not letters:
        missing = f"no dead letter {strip_control(id)} of {name_streams(queue.streams)}"
        click.echo(f"{missing}; try: {explain_command(id)}", err=True)
        exit_if_refused(queue.refused.values())
        sys.exit(NEGATIVE_RESULT)
    exit_if_refused(queue.refused.values())


def _print(letter: Letter, payload: bool, now_s: float) -> None:
    fields = _to_json(letter, False)
    fields["age"] = format_duration(max(0.0, now_s - letter.wall_s))
    for name, value in fields.items():
        click.echo(f"{name:12} {strip_control(str(value))}")
    for name, value in (letter.details or {}).items():
        first, *others = str(value).splitlines() or [""]
        click.echo(f"{name:12} {strip_control(first)}")
        for line in others:
            click.echo(" " * 13 + strip_control(line))
    if payload:
        raw = letter.task or base64.b64decode(letter.raw or "")
        click.echo(f"{'job':12} {strip_control(raw.decode('utf-8', 'replace'))}")
    elif letter.task:
        click.echo("(--payload shows the job itself)")


def _batch_sizes(rate: float | None) -> Iterator[int]:
    """Sizes of successive batches, without end. Sleeps between two, so that no more than `rate` letters a
    second are sent."""
    if rate is None:
        while True:
            yield BATCH_SIZE
    size = max(1, min(BATCH_SIZE, int(rate / _BATCHES_PER_S)))
    mono_next_s = time.monotonic()
    while True:
        time.sleep(max(0.0, mono_next_s - time.monotonic()))  # the pace that --rate asks for
        mono_next_s = max(mono_next_s, time.monotonic() - 1 / _BATCHES_PER_S) + size / rate
        yield size


class _Report:
    """Terminal output of a bulk operation: missing ids, progress, skipped letters, result."""

    def __init__(self, verb_done: str, queue: _SelectedByOptions, operation: BulkOperation) -> None:
        self._verb_done = verb_done
        self._queue = queue
        self._operation = operation
        self._missing = echo_missing(queue.filter.ids, queue.ids_found())

    def skipped(self, letter: Letter) -> None:
        """Name a letter that was left, up to `MAX_IDS_NAMED` of them."""
        if self._operation.skipped <= MAX_IDS_NAMED:
            reason = strip_control(letter.reason)
            click.echo(f"skipped: {letter.id.decode()} ({reason}) holds no readable job", err=True)

    def run(self, operate: Callable[[Callable[[int], None]], None]) -> None:
        """Run the operation with a progress bar. The number processed is reported even if it is
        interrupted."""
        label = f"{self._verb_done}{' (dry run)' if self._operation.dry_run else ''}"
        hidden = not is_terminal(sys.stderr)
        total = self._queue.count()
        try:
            with click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden) as bar:
                operate(bar.update)
        except BaseException:
            done = f"{self._operation.done} were {self._verb_done}"
            click.echo(f"\nstopped: {done}, the others are unchanged", err=True)
            raise

    def finish(self, as_json: bool) -> None:
        """Print the result. Exits with 1 if ids were given and one of them could not be processed."""
        operation = self._operation
        if as_json:
            echo_json({self._verb_done: operation.done, "gone": operation.gone, "skipped": operation.skipped,
                       "missing": self._missing, "dry_run": operation.dry_run,
                       "refused": list(self._queue.refused.values())})  # fmt: skip
        else:
            skipped = f", {operation.skipped} skipped that hold no readable job" if operation.skipped else ""
            would_be = "would be " if operation.dry_run else ""
            click.echo(f"{operation.done} {would_be}{self._verb_done}{skipped}")
        exit_if_refused(self._queue.refused.values())
        if self._queue.filter.ids and (operation.skipped or self._missing or not operation.done):
            sys.exit(NEGATIVE_RESULT)


@verb(dlq)
@_filter_options
@click.option("--all", "all_of_them", is_flag=True, help="Every dead letter of the streams.")
@click.option("--rate", type=Number(0.001, MAX_COUNT), help="At most this many a second.")
@click.option("--to", "to_stream", default="", metavar="STREAM",
              help="Send them to another stream, because they were sent to a wrong one.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only count them.")
@AS_JSON
def requeue(
    url: str, all_of_them: bool, rate: float | None, to_stream: str, dry_run: bool, as_json: bool,
    **selection: Any,
) -> None:  # fmt: skip
    """Send dead letters again, with their retries reset to 0.

    The new jobs keep their ids and payloads. Each letter is moved in one atomic step: an interruption
    (Ctrl-C, a kill) neither loses nor duplicates a job, and running the command again sends the rest.
    Letters that hold no readable job are skipped.

    \b
    jobworker dlq requeue 1767348000123-0
    jobworker dlq requeue --reason timeout --newer-than 2h --dry-run
    jobworker dlq requeue --all --rate 100
    jobworker dlq requeue --stream wrong --all --to stream:story:gen

    Exit code 1: one of the given ids was not found or holds no readable job.
    """
    queue = _SelectedByOptions(url, **selection)
    queue.require_filter(all_of_them)
    if is_derived(to_stream):
        raise click.UsageError(f"--to {to_stream!r:.80} is a key that belongs to a stream, and no stream")
    if to_stream:
        echo_unread_streams(queue.store, [to_stream])
    operation = BulkOperation(queue, dry_run=dry_run, to=to_stream)
    report = _Report("requeued", queue, operation)
    sizes = _batch_sizes(None if dry_run else rate)
    report.run(lambda on_scanned: operation.requeue(sizes, on_scanned, report.skipped))
    report.finish(as_json)


@verb(dlq)
@_filter_options
@click.option("--all", "all_of_them", is_flag=True, help="Every dead letter of the streams.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@AS_JSON
def purge(url: str, all_of_them: bool, dry_run: bool, yes: bool, as_json: bool, **selection: Any) -> None:
    """Delete dead letters permanently.

    \b
    jobworker dlq purge --older-than 30d --dry-run
    jobworker dlq purge --reason malformed --yes

    Exit code 1: one of the given ids was not found.
    """
    queue = _SelectedByOptions(url, **selection)
    queue.require_filter(all_of_them)
    if not dry_run:
        confirm(lambda: f"Delete {queue.describe()} permanently?", yes)
    operation = BulkOperation(queue, dry_run=dry_run)
    report = _Report("purged", queue, operation)
    report.run(operation.purge)
    report.finish(as_json)
