"""``jobworker dlq``: look at dead letters, send them again, delete them."""

import base64
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import click

from .cli_common import (
    AS_JSON,
    BAD_NEWS,
    STREAMS,
    Age,
    Verbs,
    clean,
    confirm,
    say_json,
    sources_of,
    span,
    table,
    verb,
)  # fmt: skip
from .dead_letters import Choice, Letter, fresh_job, read_letter
from .operator_store import START, OperatorStore, order_of, walk
from .store import Entry

#: Letters moved between two looks at the clock: a script each, some 10 ms of the server's time together.
_AT_ONCE = 100
#: With --rate, lots are made so small that one goes out about so many times a second.
_LOTS_PER_S = 10.0
#: Letters without a job that are named one by one; of the others only the number is said.
_NAMED_AT_MOST = 10


@click.group("dlq", cls=Verbs)
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
        click.option("--reason", "reasons", multiple=True, help="exhausted, permanent, timeout, poison, "
                     "malformed, unknown_type or oversized; repeatable."),
        click.option("--type", "types", multiple=True, help="Type of job; repeatable."),
        click.option("--tenant", "tenants", multiple=True, help="Whose job; repeatable."),
        click.option("--error", default="", metavar="TEXT", help="Only where the error holds this text."),
        click.option("--older-than", type=Age(), help="Given up longer ago than 15m, 2h, 7d, ..."),
        click.option("--newer-than", type=Age(), help="Given up within the last 15m, 2h, 7d, ..."),
        STREAMS,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


class _Desk:
    """The dead letters of some streams and a choice among them."""

    def __init__(
        self, url: str, streams: Sequence[str], ids: Sequence[str], reasons: Sequence[str],
        types: Sequence[str], tenants: Sequence[str], error: str, older_than: float | None,
        newer_than: float | None,
    ) -> None:  # fmt: skip
        from .redis_operator import RedisOperatorStore

        self.store: OperatorStore = RedisOperatorStore(url)
        self.streams = [source.stream for source in sources_of(streams, need_group=False)]
        choice = Choice(frozenset(ids), frozenset(reasons), frozenset(types), frozenset(tenants), error)
        self.now_s = self.store.wall_now_s(self.streams[0])
        self.choice = replace(
            choice,
            before_wall_s=math.inf if older_than is None else self.now_s - older_than,
            after_wall_s=0.0 if newer_than is None else self.now_s - newer_than,
        )

    def newest_first(self) -> Iterator[Letter]:
        """Every chosen letter of every stream."""
        for stream in self.streams:

            def page(before: bytes, count: int, stream: str = stream) -> list[Entry]:
                return self.store.dead_before(stream, before, count)

            for entries in walk(page):
                yield from (one for one in self._read(stream, entries) if one in self.choice)

    def oldest_first(self, stream: str, seen: Callable[[int], None]) -> Iterator[Letter]:
        """Chosen letters that are there now: what is given up while we work is not met again."""
        newest = self.store.dead_before(stream, START, 1)
        last = order_of(newest[0].id) if newest else (0, 0)

        def page(after: bytes, count: int) -> list[Entry]:
            return self.store.dead_after(stream, after, count)

        for entries in walk(page):
            for letter in self._read(stream, entries):
                if order_of(letter.id) > last:
                    return
                if letter in self.choice:
                    yield letter
                seen(1)

    @staticmethod
    def _read(stream: str, entries: Sequence[Entry]) -> Iterator[Letter]:
        return (read_letter(stream, entry) for entry in entries)

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
        [letter.id.decode(), span(max(0.0, desk.now_s - letter.wall_s)), clean(letter.reason),
         clean(letter.type, 20), clean(letter.job_id, 36), clean(letter.tenant_id, 16),
         clean(letter.error, 60)]
        for letter in letters
    ]  # fmt: skip
    if rows:
        table(["ID", "AGE>", "REASON", "TYPE", "JOB", "TENANT", "ERROR"], rows)
    click.echo("… and more: --limit 0 lists all" if more else f"{len(rows)} dead letters", err=True)


@verb(dlq)
@click.argument("id")
@click.option("--payload", is_flag=True, help="The job's payload too (a tenant's text).")
@STREAMS
@AS_JSON
def show(url: str, id: str, payload: bool, streams: tuple[str, ...], as_json: bool) -> None:
    """Show all that is known of a dead letter, by its ID, the job's id or the id of its entry.

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
        click.echo(f"no dead letter {clean(id)}; try: jobworker explain {clean(id)}", err=True)
        sys.exit(BAD_NEWS)


def _print(letter: Letter, payload: bool, now_s: float) -> None:
    said = _shown(letter, False)
    said["given up"] = f"{span(max(0.0, now_s - letter.wall_s))} ago"
    for name, value in said.items():
        click.echo(f"{name:12} {clean(str(value))}")
    for name, value in (letter.details or {}).items():
        lines = str(value).splitlines() or [""]
        click.echo(
            "\n".join([f"{name:12} {clean(lines[0])}", *(" " * 13 + clean(line) for line in lines[1:])])
        )
    if payload:
        raw = letter.task or base64.b64decode(letter.raw or "")
        click.echo(f"{'job':12} {clean(raw.decode('utf-8', 'replace'))}")
    elif letter.task:
        click.echo("(--payload shows the job itself)")


def _pace(rate: float | None) -> Iterator[int]:
    """How many may go out now, for ever; sleeps between two so that `rate` a second are not exceeded."""
    if rate is None:
        while True:
            yield _AT_ONCE
    lot = max(1, min(_AT_ONCE, int(rate / _LOTS_PER_S)))
    mono_next_s = time.monotonic()
    while True:
        time.sleep(max(0.0, mono_next_s - time.monotonic()))  # the pace is what was asked for
        mono_next_s = max(mono_next_s, time.monotonic() - 1 / _LOTS_PER_S) + lot / rate
        yield lot


class _Count:
    """What became of the letters."""

    def __init__(self, word: str, dry_run: bool) -> None:
        self.word = word
        self.dry_run = dry_run
        self.done = self.gone = self.skipped = 0

    def without_job(self, letter: Letter) -> None:
        self.skipped += 1
        if self.skipped <= _NAMED_AT_MOST:
            click.echo(f"left: {letter.id.decode()} ({clean(letter.reason)}) holds no job", err=True)

    def report(self, as_json: bool, choice: Choice) -> None:
        """Say it; exit code 1 where ids were given and something about them could not be done."""
        if as_json:
            say_json({self.word: self.done, "gone": self.gone, "skipped": self.skipped,
                      "dry_run": self.dry_run})  # fmt: skip
        else:
            left = f", {self.skipped} left that hold no job" if self.skipped else ""
            click.echo(f"{self.done} {'would be ' if self.dry_run else ''}{self.word}{left}")
        if choice.ids and (self.skipped or not self.done):
            sys.exit(BAD_NEWS)


def _work(
    desk: _Desk, count: _Count, rate: float | None, deal_with: Callable[[str, list[Letter]], list[bool]],
    skip: Callable[[Letter], None] | None = None,
) -> None:  # fmt: skip
    """Go through the chosen letters in lots; what was done is said even where we are stopped half-way.
    With `skip`, letters that hold no job are handed to it instead."""
    total = sum(desk.store.dead_count(stream) for stream in desk.streams)
    label = f"{count.word}{' (dry run)' if count.dry_run else ''}"
    try:
        hidden = not sys.stderr.isatty()
        with click.progressbar(length=total, label=label, file=sys.stderr, hidden=hidden) as bar:
            lots = _pace(None if count.dry_run else rate)
            for stream in desk.streams:
                chosen = desk.oldest_first(stream, bar.update)
                while letters := list(islice(chosen, next(lots))):
                    if skip is not None:
                        for letter in (one for one in letters if one.task is None):
                            skip(letter)
                        letters = [letter for letter in letters if letter.task is not None]
                    done = [True] * len(letters) if count.dry_run else deal_with(stream, letters)
                    count.done += sum(done)
                    count.gone += len(done) - sum(done)
    except BaseException:
        click.echo(f"\nstopped: {count.done} were {count.word}, the others are where they were", err=True)
        raise


@verb(dlq)
@_choosing
@click.option("--all", "all_of_them", is_flag=True, help="Every dead letter of the streams.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most so many a second.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@AS_JSON
def requeue(
    url: str, all_of_them: bool, rate: float | None, dry_run: bool, as_json: bool, **choice: Any
) -> None:
    """Send dead letters again as new jobs: same id and payload, tries counted from 0.

    Each is moved by one atomic step, so that stopping half-way (Ctrl-C, a kill) neither loses nor doubles
    one; run it again for the rest. Letters that hold no readable job stay where they are.

    \b
    jobworker dlq requeue 1767348000123-0
    jobworker dlq requeue --reason timeout --newer-than 2h --dry-run
    jobworker dlq requeue --all --rate 100

    Exit code 1: none of the ids given was requeued, or one of them cannot be.
    """
    desk = _Desk(url, **choice)
    desk.refuse_everything(all_of_them)
    count = _Count("requeued", dry_run)

    def send_again(stream: str, letters: list[Letter]) -> list[bool]:
        return desk.store.requeue(stream, [(one.id, fresh_job(one.task)) for one in letters if one.task])

    _work(desk, count, rate, send_again, skip=count.without_job)
    count.report(as_json, desk.choice)


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

    Exit code 1: none of the ids given was there.
    """
    desk = _Desk(url, **choice)
    desk.refuse_everything(all_of_them)
    if not dry_run:
        confirm("Delete the chosen dead letters for good?", yes)
    count = _Count("purged", dry_run)

    def delete(stream: str, letters: list[Letter]) -> list[bool]:
        deleted = desk.store.purge(stream, [letter.id for letter in letters])
        return [number < deleted for number in range(len(letters))]

    _work(desk, count, None, delete)
    count.report(as_json, desk.choice)
