"""``jobworker enqueue``: send one job, the same job many times, or one job per line of a file."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec

from ..admin.words import strip_control
from ..flow import HIGHEST_PRIORITY
from ..options import SECONDS
from ..producer import NewJob, Producer, UnknownDestination
from ..quantities import Count, Duration
from ..safe_text import escape_control
from .common import JobType, complete_streams, echo_json, is_terminal, standard_input, verb

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
                 "project_id, id, stream, metadata, delay, timeout. TYPE and the options are "
                 "the defaults of a line."),
    click.option("--tenant", default="", help="Tenant of the job."),
    click.option("--project", default="", help="Project of the tenant."),
    click.option("--stream", default=None, shell_complete=complete_streams,
                 help="Stream to send it to.  [default: the stream of the type]"),
    click.option("--id", "job_id", default=None,
                 help="Job id; with --count a number is appended.  [default: random]"),
    click.option("--priority", type=Count(0, HIGHEST_PRIORITY),
                 help="0 to 10; higher is more urgent.  [default: 5]"),
    click.option("--delay", type=Duration(), help="Run it this much later (seconds, or 15m)."),
    click.option("--timeout", type=SECONDS, help="Timeout (seconds, or 5m)."),
    click.option("--count", type=Count(1), default=1, show_default=True,
                 help="Number of times to send it."),
    click.option("--json", "as_json", is_flag=True, help='Print {"ids": [...]}.'),
]  # fmt: skip


def enqueue(
    url: str, type: str, payload: str, lines: str | None, tenant: str, project: str, stream: str | None,
    job_id: str | None, priority: int | None, delay: float | None, timeout: float | None, count: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Send a job of TYPE, or one for each line of --lines.

    Exit code 0: the job store has accepted every job. After an interruption some jobs were sent. Give each
    line its own id: then the whole file can be sent again.

    \b
    jobworker enqueue shout --tenant t1 --project p1 \\
        --payload '{"tenant_id": "t1", "project_id": "p1", "ids": ["s1"], "texts": ["It rained."]}'
    jobworker enqueue --lines jobs.jsonl
    jobworker enqueue audit --lines - < events.jsonl      # lines like {"payload": {"who": "me"}}
    """
    metadata = None if priority is None else {"priority": str(priority)}
    defaults = NewJob(type, None, tenant, project, stream, job_id, metadata, delay, timeout)
    if lines is not None:
        if job_id is not None or count != 1 or payload != "{}":
            raise click.UsageError(
                "--lines gives payloads and ids itself: leave out --payload, --id and --count"
            )
        ids = _send_lines(url, lines, defaults)
    elif not type:
        raise click.UsageError("give a TYPE of job, or --lines FILE")
    else:
        ids = _send(url, defaults._replace(payload=_payload(payload)), count)
    if as_json:
        echo_json({"ids": ids})
    elif len(ids) == 1:
        click.echo(escape_control(ids[0]))
    else:
        span = f", {ids[0]} … {ids[-1]}" if ids else ""
        click.echo(f"{len(ids)} jobs enqueued{escape_control(span)}")


def _payload(text: str) -> Any:
    """JSON from the text, from a file (``@FILE``) or from standard input (``-``). Raises
    `click.BadParameter`."""
    try:
        if text == "-":
            text = standard_input("--payload -").read().decode()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"--payload: {error}") from error
    except RecursionError as error:
        raise click.BadParameter("--payload is nested too deeply") from error
    except ValueError as error:
        raise click.BadParameter(f"--payload is not JSON: {error}") from error


def _send(url: str, job: NewJob, count: int) -> list[str]:
    """Send a job `count` times; the ids."""
    ids: list[str] = []
    with _echoed_warnings(), Producer(url) as producer:
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


def _numbered(job_id: str | None, number: int, count: int) -> str | None:
    return job_id if job_id is None or count == 1 else f"{job_id}-{number}"


def _send_lines(url: str, path: str, defaults: NewJob) -> list[str]:
    """Send one job per line; the ids. Raises ValueError for the first invalid line; the lines before it
    were sent."""
    ids: list[str] = []
    size = 0 if path == "-" else os.path.getsize(path)
    with (
        nullcontext(standard_input("--lines -")) if path == "-" else open(path, "rb") as file,
        _echoed_warnings(),
        Producer(url) as producer,
    ):
        hidden = not size or not is_terminal(sys.stderr)
        with click.progressbar(length=size, label="enqueued", file=sys.stderr, hidden=hidden) as bar:
            numbered = enumerate(file, 1)
            while batch := list(islice(numbered, _BATCH_SIZE)):
                ids += _send_batch(producer, _parse_lines(batch, defaults))
                bar.update(sum(len(line) for _, line in batch))
    return ids


def _send_batch(producer: Producer, jobs: Iterator[tuple[int, NewJob]]) -> list[str]:
    number = 0

    def remember_number() -> Iterator[NewJob]:
        nonlocal number
        for number, job in jobs:  # noqa: B007  (an error message needs the number of the line being sent)
            yield job

    try:
        return producer.enqueue_many(remember_number())
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("line ") else f"line {number}: {text}") from None


def _parse_lines(lines: list[tuple[int, bytes]], defaults: NewJob) -> Iterator[tuple[int, NewJob]]:
    for number, line in lines:
        if line.strip():
            yield number, _parse_line(number, line, defaults)


def _parse_line(number: int, line: bytes, defaults: NewJob) -> NewJob:
    try:
        fields = _decode(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: not a JSON object: {error}") from None
    unknown = fields.keys() - set(NewJob._fields)
    if unknown:
        raise ValueError(f"line {number}: a job has no field {', '.join(map(repr, sorted(unknown)))}")
    job = defaults._replace(**fields)
    if not job.type:
        raise ValueError(f"line {number}: no type, and no TYPE was given as default")
    return job


_decode = msgspec.json.Decoder(dict[str, Any]).decode
