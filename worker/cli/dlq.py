"""``jobworker dlq``: look at dead letters, send them again, delete them."""

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import click

from ..admin.dead_letters import AT_ONCE, BulkOperation, DeadLetterQueue, Letter, LetterFilter, aged
from ..admin.deployment import source_list
from ..admin.words import format_duration, pluralise, strip_control
from ..outcome import Reason
from .common import (
    AS_JSON,
    BAD_NEWS,
    NAMED_AT_MOST,
    STREAMS,
    Age,
    CliGroup,
    JobType,
    confirm,
    say_json,
    say_missing,
    table,
    verb,
)

_REASONS = [reason.value for reason in Reason]
#: With --rate, lots are made so small that one goes out about so many times a second.
_LOTS_PER_S = 10.0


@click.group("dlq", cls=CliGroup)
def dlq() -> None:
    """Dead letters: list, show, requeue, purge.

    \b
    jobworker dlq list --reason exhausted --newer-than 2h
    jobworker dlq requeue --type embedding_batch --reason timeout --rate 50
    """


def _choosing(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which letters are meant."""
    options = [
        click.argument("ids", nargs=-1),
        click.option("--reason", "reasons", type=click.Choice(_REASONS), multiple=True,
                     help="Why it was given up; repeatable."),
        click.option("--type", "types", type=JobType(), multiple=True, help="Type of job; repeatable."),
        click.option("--tenant", "tenants", multiple=True, help="Whose job; repeatable."),
        click.option("--error", default="", metavar="TEXT", help="Only where the error holds this text."),
        click.option("--older-than", type=Age(), help="Given up longer ago than 15m, 2h, 7d, ..."),
        click.option("--newer-than", type=Age(), help="Given up within the last 15m, 2h, 7d, ..."),
        STREAMS,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


class _Desk(DeadLetterQueue):
    """The desk as the options ask for it."""

    def __init__(
        self, url: str, streams: Sequence[str], ids: Sequence[str], reasons: Sequence[str],
        types: Sequence[str], tenants: Sequence[str], error: str, older_than: float | None,
        newer_than: float | None,
    ) -> None:  # fmt: skip
        from ..store.redis.operator import RedisOperatorStore

        store = RedisOperatorStore(url)
        names = [source.stream for source in source_list(streams, need_group=False)]
        choice = LetterFilter(frozenset(ids), frozenset(reasons), frozenset(types), frozenset(tenants), error)
        self.now_s = store.wall_now_s(names[0])
        super().__init__(store, names, aged(choice, self.now_s, older_than, newer_than))

    def refuse_everything(self, all_of_them: bool) -> None:
        if self.choice.everything and not all_of_them:
            raise click.UsageError("which ones? Give ids or a filter, or --all for every dead letter")


def _shown(letter: Letter, payload: bool) -> dict[str, Any]:
    """A letter for machines; the payload is a tenant's text, which is shown only when asked for."""
    said = {
        "id": letter.id.decode(), "stream": letter.stream, "job_id": letter.job_id, "type": letter.type,
        "tenant_id": letter.tenant_id, "project_id": letter.project_id, "reason": letter.reason,
        "error": letter.error, "failed_at": letter.failed_at, "original_id": letter.original_id,
        "worker": letter.worker, "retry_count": letter.retry_count, "deaths": letter.deaths,
        "bytes": len(letter.task or letter.raw or ""),
    }  # fmt: skip
    if payload:
        said["task"] = json.loads(letter.task) if letter.task else None
        said["raw"] = letter.raw
    return said


@verb(dlq, "list")
@_choosing
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="At most; 0 for all.")
@click.option("--payload", is_flag=True, help="With --json: the whole job too (a tenant's text).")
@AS_JSON
def list_(url: str, limit: int, payload: bool, as_json: bool, **choice: Any) -> None:
    """List dead letters, newest first, of all streams or of --stream.

    \b
    jobworker dlq list --newer-than 1h
    jobworker dlq list --tenant t001 --error Timeout
    jobworker dlq list --limit 0 --payload --json > letters.json     # a copy before a purge
    """
    desk = _Desk(url, **choice)
    letters = list(islice(desk.newest_first(), limit + 1 if limit else None))
    more = bool(limit) and len(letters) > limit
    letters = letters[:limit] if limit else letters
    if as_json:
        say_json({"dead_letters": [_shown(letter, payload) for letter in letters], "more": more})
        return
    rows = [
        [letter.id.decode(), format_duration(max(0.0, desk.now_s - letter.wall_s)),
         strip_control(letter.reason), strip_control(letter.type, 20),
         strip_control(letter.job_id, 36), strip_control(letter.tenant_id, 16),
         strip_control(letter.error, 60)]
        for letter in letters
    ]  # fmt: skip
    if rows:
        table(["ID", "AGE>", "REASON", "TYPE", "JOB", "TENANT", "ERROR"], rows)
    click.echo("… and more: --limit 0 lists all" if more else pluralise(len(rows), "dead letter"), err=True)


@verb(dlq)
@click.argument("id")
@click.option("--payload", is_flag=True, help="The job's payload too (a tenant's text).")
@STREAMS
@AS_JSON
def show(url: str, id: str, payload: bool, streams: tuple[str, ...], as_json: bool) -> None:
    """Show all that is known of one of them.

    ID is that of the letter, of the job, or of the entry that the job was.

    \b
    jobworker dlq show 1767348000123-0 --payload

    Exit code 1: there is none.
    """
    desk = _Desk(url, streams, [id], (), (), (), "", None, None)
    letters = list(desk.newest_first())
    if as_json:
        shown = [_shown(letter, payload) | {"details": letter.details} for letter in letters]
        say_json({"dead_letters": shown})
    for letter in letters if not as_json else ():
        _print(letter, payload, desk.now_s)
    if not letters:
        click.echo(
            f"no dead letter {strip_control(id)}; try: jobworker explain {strip_control(id)}", err=True
        )
        sys.exit(BAD_NEWS)


def _print(letter: Letter, payload: bool, now_s: float) -> None:
    said = _shown(letter, False)
    said["given up"] = f"{format_duration(max(0.0, now_s - letter.wall_s))} ago"
    for name, value in said.items():
        click.echo(f"{name:12} {strip_control(str(value))}")
    for name, value in (letter.details or {}).items():
        lines = str(value).splitlines() or [""]
        click.echo(
            "\n".join(
                [
                    f"{name:12} {strip_control(lines[0])}",
                    *(" " * 13 + strip_control(line) for line in lines[1:]),
                ]
            )
        )
    if payload:
        raw = letter.task or base64.b64decode(letter.raw or "")
        click.echo(f"{'job':12} {strip_control(raw.decode('utf-8', 'replace'))}")
    elif letter.task:
        click.echo("(--payload shows the job itself)")


def _names(desk: DeadLetterQueue) -> Iterator[str]:
    """Every id by which the chosen letters may be called; nothing where none was asked for."""
    letters = desk.newest_first() if desk.choice.ids else ()
    return (id for one in letters for id in (one.id.decode(), one.job_id, one.original_id))


def _chosen(desk: DeadLetterQueue) -> str:
    count = BulkOperation(desk, dry_run=True)
    count.purge()
    return pluralise(count.done, "dead letter")


def _pace(rate: float | None) -> Iterator[int]:
    """How many may go out now, for ever; sleeps between two so that `rate` a second are not exceeded."""
    if rate is None:
        while True:
            yield AT_ONCE
    lot = max(1, min(AT_ONCE, int(rate / _LOTS_PER_S)))
    mono_next_s = time.monotonic()
    while True:
        time.sleep(max(0.0, mono_next_s - time.monotonic()))  # the pace is what was asked for
        mono_next_s = max(mono_next_s, time.monotonic() - 1 / _LOTS_PER_S) + lot / rate
        yield lot


class _Report:
    """An errand on a terminal: its progress, what it left, and how it ended."""

    def __init__(self, word: str, errand: BulkOperation) -> None:
        self._word = word
        self._errand = errand
        self._missing = say_missing(errand.desk.choice.ids, _names(errand.desk))

    def skipped(self, letter: Letter) -> None:
        if self._errand.skipped <= NAMED_AT_MOST:
            click.echo(f"left: {letter.id.decode()} ({strip_control(letter.reason)}) holds no job", err=True)

    def run(self, deed: Callable[[Callable[[int], None]], None]) -> None:
        """Do it; what was done is said even where we are stopped half-way."""
        label = f"{self._word}{' (dry run)' if self._errand.dry_run else ''}"
        hidden = not sys.stderr.isatty()
        total = self._errand.desk.count()
        try:
            with click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden) as bar:
                deed(bar.update)
        except BaseException:
            done = f"{self._errand.done} were {self._word}"
            click.echo(f"\nstopped: {done}, the others are where they were", err=True)
            raise

    def say(self, as_json: bool) -> None:
        """Exit code 1 where ids were given and something about them could not be done."""
        errand = self._errand
        if as_json:
            say_json({self._word: errand.done, "gone": errand.gone, "skipped": errand.skipped,
                      "missing": self._missing, "dry_run": errand.dry_run})  # fmt: skip
        else:
            left = f", {errand.skipped} left that hold no job" if errand.skipped else ""
            click.echo(f"{errand.done} {'would be ' if errand.dry_run else ''}{self._word}{left}")
        if errand.desk.choice.ids and (errand.skipped or self._missing or not errand.done):
            sys.exit(BAD_NEWS)


@verb(dlq)
@_choosing
@click.option("--all", "all_of_them", is_flag=True, help="Every dead letter of the streams.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most so many a second.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@AS_JSON
def requeue(
    url: str, all_of_them: bool, rate: float | None, dry_run: bool, as_json: bool, **choice: Any
) -> None:
    """Send dead letters again, tries counted from 0.

    The new jobs have the same ids and payloads. Each is moved by one atomic step, so that stopping half-way
    (Ctrl-C, a kill) neither loses nor doubles one; run it again for the rest. Letters that hold no readable
    job stay where they are.

    \b
    jobworker dlq requeue 1767348000123-0
    jobworker dlq requeue --reason timeout --newer-than 2h --dry-run
    jobworker dlq requeue --all --rate 100

    Exit code 1: one of the ids given was not found, or holds no job.
    """
    desk = _Desk(url, **choice)
    desk.refuse_everything(all_of_them)
    errand = BulkOperation(desk, dry_run=dry_run)
    report = _Report("requeued", errand)
    lots = _pace(None if dry_run else rate)
    report.run(lambda seen: errand.requeue(lots, seen, report.skipped))
    report.say(as_json)


@verb(dlq)
@_choosing
@click.option("--all", "all_of_them", is_flag=True, help="Every dead letter of the streams.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@AS_JSON
def purge(url: str, all_of_them: bool, dry_run: bool, yes: bool, as_json: bool, **choice: Any) -> None:
    """Delete dead letters for good.

    \b
    jobworker dlq purge --older-than 30d --dry-run
    jobworker dlq purge --reason malformed --yes

    Exit code 1: one of the ids given was not found.
    """
    desk = _Desk(url, **choice)
    desk.refuse_everything(all_of_them)
    if not dry_run:
        confirm(lambda: f"Delete {_chosen(desk)} for good?", yes)
    errand = BulkOperation(desk, dry_run=dry_run)
    report = _Report("purged", errand)
    report.run(errand.purge)
    report.say(as_json)
