"""``jobworker enqueue``: send one job, the same job many times, or one job per line of a file."""

import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import orjson

from ..admin.words import strip_control
from ..config.quantities import Count, Duration
from ..envelope import MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ..errors import StoreUnavailable
from ..extension import extension
from ..flow import HIGHEST_PRIORITY
from ..new_job import NewJob
from ..options import ExplicitOption
from ..producer import Producer, UnknownDestination
from ..producer_batch import OpenBatch
from ..safe_text import escape_control
from .common import (
    MAX_IDS_NAMED,
    JobType,
    complete_streams,
    echo_json,
    is_terminal,
    standard_input,
    verb,
    with_deployment,
)

#: Jobs per call of the producer; the progress bar moves after each call.
_BATCH_SIZE = 1000


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = enqueue
    for option in reversed(_OPTIONS):
        command = option(command)
    verb(main)(command)


_OPTIONS = [
    click.argument("type", type=JobType(), required=False, default=""),
    click.option("--payload", default="{}", show_default=True, help="JSON, @FILE, or - for standard input."),
    click.option("--lines", type=click.Path(exists=True, allow_dash=True, dir_okay=False), metavar="FILE",
                 help="One JSON object per line (- for standard input): type, payload, tenant_id, "
                 "project_id, id, stream, metadata, delay, run_at, expires_at, timeout, keep_result. TYPE "
                 "and the options are the defaults of a line."),
    click.option("--tenant", default="", help="Tenant of the job."),
    click.option("--project", default="", help="Project of the tenant."),
    click.option("--stream", cls=ExplicitOption, default=None, shell_complete=complete_streams,
                 help="Stream to send it to.  [default: the stream of the type, else that of a registered "
                 "service that handles it, else JOBWORKER_STREAM]"),
    click.option("--id", "job_id", default=None,
                 help="Job id; with --count a number is appended.  [default: random]"),
    click.option("--priority", type=Count(0, HIGHEST_PRIORITY),
                 help="0 to 10; higher is more urgent.  [default: 5]"),
    click.option("--delay", type=Duration(), help="Run it this much later (seconds, or 15m)."),
    click.option("--run-at", metavar="TIME",
                 help="Run it not before this time: RFC 3339 or unix seconds."),
    click.option("--expires-at", metavar="TIME", help="Dead-letter it if it has not started by this time."),
    click.option("--timeout", type=Duration(MIN_TIMEOUT_S, MAX_TIMEOUT_S),
                 help="Timeout (seconds, or 5m), from 0.1 s to 24 h."),
    click.option("--keep-result", is_flag=True, help="Keep what its handler returns: see jobworker result."),
    click.option("--count", type=Count(1), default=1, show_default=True,
                 help="Number of times to send it."),
    click.option("--batch", default="", metavar="ID",
                 help="Count the jobs together in the batch of this id, and close it after the last."),
    click.option("--on-complete", type=JobType(), default="", metavar="TYPE",
                 help="With --batch: the type of a job to be enqueued when all of its jobs have ended."),
    click.option("--json", "as_json", is_flag=True, help='Print {"ids": [...]}.'),
]  # fmt: skip


def enqueue(
    url: str, type: str, payload: str, lines: str | None, tenant: str, project: str, stream: str | None,
    job_id: str | None, priority: int | None, delay: float | None, run_at: str | None,
    expires_at: str | None, timeout: float | None, keep_result: bool, count: int, batch: str,
    on_complete: str, as_json: bool,
) -> None:  # fmt: skip
    """Send a job of TYPE, or one for each line of --lines.

    Exit code 0: the job store has accepted every job. After an interruption some jobs were sent. A file that
    is sent again runs its jobs again, also under the same ids, unless their metadata has an idempotency_key.
    Idempotent handlers then leave one effect if each line has its own id.

    \b
    jobworker enqueue shout --tenant t001 --payload '{"text": "hello"}'
    jobworker enqueue --lines jobs.jsonl
    jobworker enqueue --lines jobs.jsonl --batch import-7 --on-complete import_done
    jobworker enqueue audit --lines - < events.jsonl      # lines like {"payload": {"who": "me"}}
    """
    metadata = None if priority is None else {"priority": str(priority)}
    if on_complete and not batch:
        raise click.UsageError("--on-complete needs --batch ID")
    into = _BatchOptions(batch, on_complete, tenant)
    defaults = NewJob(
        type, None, tenant, project, stream, job_id, metadata, delay, timeout, run_at, expires_at, keep_result
    )
    if lines is not None:
        if job_id is not None or count != 1 or payload != "{}":
            raise click.UsageError(
                "--lines gives payloads and ids itself: leave out --payload, --id and --count"
            )
        ids = _send_lines(url, lines, defaults, into)
    elif not type:
        raise click.UsageError("give a TYPE of job, or --lines FILE")
    else:
        ids = _send(url, defaults._replace(payload=_payload(payload)), count, into)
    if as_json:
        echo_json({"ids": ids})
    elif len(ids) == 1:
        click.echo(escape_control(ids[0]))
    else:
        span = f", {ids[0]} … {ids[-1]}" if ids else ""
        click.echo(f"{len(ids)} jobs enqueued{escape_control(span)}")


def _payload(text: str) -> Any:
    """JSON from the text, from a file (``@FILE``) or from standard input (``-``), with every digit of its
    numbers. Raises `click.BadParameter`."""
    try:
        if text == "-":
            text = standard_input("--payload -").read().decode()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        orjson.loads(text)  # its errors name the line and column
        return msgspec.Raw(text.encode())
    except OSError as error:
        raise click.BadParameter(f"--payload: {error}") from error
    except ValueError as error:
        raise click.BadParameter(f"--payload is not JSON: {_fault(error)}") from error


def _fault(error: ValueError) -> str:
    """What is wrong with a text, and where."""
    text = str(error)
    return f"nested too deeply: {text}" if " limit " in text else text


class _BatchOptions(NamedTuple):
    """The batch to send into, if any: its id, the type of its callback, its tenant."""

    id: str
    on_complete: str
    tenant: str


@contextmanager
def _sender(url: str, into: _BatchOptions) -> Iterator[Producer | OpenBatch]:
    """Sends jobs, alone or into a batch, which is closed at the end unless an error ends the block."""
    with _echoed_warnings(), Producer(url) as producer, _echoed_guesses(producer):
        if not into.id:
            yield producer
            return
        callback = NewJob(into.on_complete) if into.on_complete else None
        with producer.batch(into.tenant, on_complete=callback, id=into.id) as batch:
            yield batch


def _send(url: str, job: NewJob, count: int, into: _BatchOptions) -> list[str]:
    """Send a job `count` times; the ids."""
    ids: list[str] = []
    with _sender(url, into) as producer:
        hidden = count < _BATCH_SIZE or not is_terminal(sys.stderr)
        with click.progressbar(length=count, label="enqueued", file=sys.stderr, hidden=hidden) as bar:
            for start in range(0, count, _BATCH_SIZE):
                numbers = range(start, min(start + _BATCH_SIZE, count))
                ids += producer.enqueue_many(
                    [job._replace(id=_numbered(job.id, number, count)) for number in numbers]
                )
                bar.update(len(numbers))
    return ids


@contextmanager
def _echoed_warnings() -> Iterator[None]:
    """Print the producer's warnings of unknown types and streams in the style of the tool."""

    def echo(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"jobworker: {strip_control(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UnknownDestination)
        warnings.showwarning = echo
        yield


@contextmanager
def _echoed_guesses(producer: Producer) -> Iterator[None]:
    """Say which types went to the default stream because no service is known: it may read another one."""
    try:
        yield
    finally:
        stream = extension().streams[0].stream
        for job_type in sorted(producer.guessed)[:MAX_IDS_NAMED]:
            click.echo(
                f"jobworker: no service is registered yet, so jobs of type {strip_control(job_type)} go to "
                f"{stream}; if their service reads another stream, give --stream or set JOBWORKER_STREAM",
                err=True,
            )


def _numbered(job_id: str | None, number: int, count: int) -> str | None:
    return job_id if job_id is None or count == 1 else f"{job_id}-{number}"


class _InvalidLine(ValueError):
    """A line that is no job; the lines before it were sent."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"line {number}: {text}")
        self.number = number


def _how_to_continue(path: str, stored: int) -> str:
    """Which lines are stored, and the command that sends the others."""
    lines = f"lines 1 to {stored} are stored" if stored else "no line before is stored"
    if path == "-":
        return f"{lines}: send the lines from {stored + 1} on again"
    options = [
        f" --{name} {shlex.quote(str(value))}"
        for name in (
            *("tenant", "project", "stream", "delay", "run-at", "expires-at", "timeout", "batch"),
            "on-complete",
        )
        if (value := click.get_current_context().params.get(name.replace("-", "_")))
    ]
    if click.get_current_context().params.get("keep_result"):
        options.append(" --keep-result")
    job_type = click.get_current_context().params.get("type")
    command = (
        f"jobworker enqueue --lines -{''.join(options)}{f' {shlex.quote(job_type)}' if job_type else ''}"
    )
    return f"{lines}; send the others: tail -n +{stored + 1} {shlex.quote(path)} | {with_deployment(command)}"


def _send_lines(url: str, path: str, defaults: NewJob, into: _BatchOptions) -> list[str]:
    """Send one job per line; the ids. Raises ValueError for the first invalid line; the lines before it
    were sent. Every error says which lines are stored and how to send the others."""
    ids: list[str] = []
    stored = 0
    size = 0 if path == "-" else os.path.getsize(path)
    with (
        nullcontext(standard_input("--lines -")) if path == "-" else open(path, "rb") as file,
        _sender(url, into) as producer,
    ):
        hidden = not size or not is_terminal(sys.stderr)
        with click.progressbar(length=size, label="enqueued", file=sys.stderr, hidden=hidden) as bar:
            numbered = enumerate(file, 1)
            while batch := list(islice(numbered, _BATCH_SIZE)):
                try:
                    ids += _send_batch(producer, _parse_lines(batch, defaults))
                except _InvalidLine as error:
                    raise ValueError(f"{error}; {_how_to_continue(path, error.number - 1)}") from None
                except StoreUnavailable as error:
                    doubt = f"; some of the lines {stored + 1} to {batch[-1][0]} may be stored too"
                    raise type(error)(f"{error}; {_how_to_continue(path, stored)}{doubt}") from error
                stored = batch[-1][0]
                bar.update(sum(len(line) for _, line in batch))
    return ids


def _send_batch(producer: Producer | OpenBatch, jobs: Iterator[tuple[int, NewJob]]) -> list[str]:
    number = 0

    def remember_number() -> Iterator[NewJob]:
        nonlocal number
        for number, job in jobs:  # noqa: B007  (an error message needs the number of the line being sent)
            yield job

    try:
        return producer.enqueue_many(remember_number())
    except _InvalidLine:
        raise
    except ValueError as error:
        raise _InvalidLine(number, str(error)) from None


def _parse_lines(lines: list[tuple[int, bytes]], defaults: NewJob) -> Iterator[tuple[int, NewJob]]:
    for number, line in lines:
        if line.strip():
            yield number, _parse_line(number, line, defaults)


def _parse_line(number: int, line: bytes, defaults: NewJob) -> NewJob:
    try:
        fields = orjson.loads(line.decode())  # its own error for bad UTF-8 names no place
    except ValueError as error:
        raise _InvalidLine(number, f"not a JSON object: {_fault(error)}") from None
    if not isinstance(fields, dict):
        raise _InvalidLine(number, f"not a JSON object, but {line.strip()!r:.80}")
    unknown = fields.keys() - set(NewJob._fields)
    if unknown:
        raise _InvalidLine(number, f"a job has no field {', '.join(map(repr, sorted(unknown)))}")
    if "payload" in fields:
        fields["payload"] = _line.decode(line).payload
    job = defaults._replace(**fields)
    if not job.type:
        raise _InvalidLine(number, "no type, and no TYPE was given as default")
    if isinstance(job.timeout, int | float) and not MIN_TIMEOUT_S <= job.timeout <= MAX_TIMEOUT_S:
        limits = f"{MIN_TIMEOUT_S:g} to {MAX_TIMEOUT_S:,.0f} seconds"
        raise _InvalidLine(number, f"timeout is {job.timeout}: a service takes {limits}")
    return job


class _Line(msgspec.Struct):
    """The part of a line that is sent as it is: parsing would round numbers."""

    payload: msgspec.Raw


_line = msgspec.json.Decoder(_Line)
