"""``jobworker enqueue``: send one job, the same job many times, or a job for each line of a file."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec

from ..producer import NewJob, Producer
from .common import JobType, stream_names, verb

#: Jobs handed to the producer at once; between two of these the progress bar moves.
_AT_ONCE = 1000
_POSITIVE = click.FloatRange(min=0, min_open=True)


def add_to(main: click.Group) -> None:
    """Make it a verb of ``jobworker``."""
    command = enqueue
    for option in reversed(_OPTIONS):
        command = option(command)
    verb(main)(command)


_OPTIONS = [
    click.argument("type", type=JobType(), required=False, default=""),
    click.option("--payload", default="{}", show_default=True, help="JSON, @FILE, or - for standard input."),
    click.option("--lines", type=click.Path(exists=True, allow_dash=True, dir_okay=False), metavar="FILE",
                 help="A JSON object a line (- for standard input): type, payload, tenant_id, project_id, "
                 "id, stream, metadata, delay, timeout. TYPE and the options fill in what a line lacks."),
    click.option("--tenant", default="", help="Whose job it is."),
    click.option("--project", default="", help="Which project of the tenant's."),
    click.option("--stream", default=None, shell_complete=stream_names,
                 help="Stream to send it to.  [default: that of the type]"),
    click.option("--id", "job_id", default=None,
                 help="Job id; with --count a number is added.  [default: random]"),
    click.option("--delay", type=click.FloatRange(min=0), help="Run it so many seconds from now."),
    click.option("--timeout", type=_POSITIVE, help="Limit in seconds."),
    click.option("--count", type=click.IntRange(1), default=1, show_default=True,
                 help="Send it so many times."),
    click.option("--json", "as_json", is_flag=True, help='Print {"ids": [...]}.'),
]  # fmt: skip


def enqueue(
    url: str, type: str, payload: str, lines: str | None, tenant: str, project: str, stream: str | None,
    job_id: str | None, delay: float | None, timeout: float | None, count: int, as_json: bool,
) -> None:  # fmt: skip
    """Send a job of TYPE, or one for each line of --lines.

    When it ends with exit code 0, the store has taken every job. Where it is stopped half-way some were
    sent: give the lines ids of their own, then sending all of them again does no harm.

    \b
    jobworker enqueue embedding_batch --tenant t1 --project p1 \\
        --payload '{"tenant_id": "t1", "project_id": "p1", "ids": ["s1"], "texts": ["It rained."]}'
    jobworker enqueue --lines jobs.jsonl
    jobworker enqueue audit --lines - < events.jsonl      # lines like {"payload": {"who": "me"}}
    """
    given = NewJob(type, None, tenant, project, stream, job_id, None, delay, timeout)
    if lines is not None:
        if job_id is not None or count != 1 or payload != "{}":
            raise click.UsageError("--lines has its own payloads and ids: leave out --payload, --id, --count")
        ids = _send_lines(url, lines, given)
    elif not type:
        raise click.UsageError("which TYPE of job? (or --lines FILE)")
    else:
        ids = _send(url, given._replace(payload=_payload(payload)), count)
    if as_json:
        click.echo(json.dumps({"ids": ids}))
    elif len(ids) == 1:
        click.echo(ids[0])
    else:
        click.echo(f"{len(ids)} jobs enqueued" + (f", {ids[0]} … {ids[-1]}" if ids else ""))


def _payload(text: str) -> Any:
    """JSON from the text itself, from a file after ``@``, or from standard input for ``-``."""
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"--payload: {error}") from error
    except ValueError as error:
        raise click.BadParameter(f"--payload is no JSON: {error}") from error


def _send(url: str, job: NewJob, count: int) -> list[str]:
    """The same job so many times."""
    ids: list[str] = []
    with Producer(url) as producer:
        quiet = count < _AT_ONCE or not sys.stderr.isatty()
        with click.progressbar(length=count, label="enqueued", file=sys.stderr, hidden=quiet) as bar:
            for start in range(0, count, _AT_ONCE):
                numbers = range(start, min(start + _AT_ONCE, count))
                ids += producer.enqueue_many(
                    [job._replace(id=_numbered(job.id, number, count)) for number in numbers]
                )
                bar.update(len(numbers))
    return ids


def _numbered(job_id: str | None, number: int, count: int) -> str | None:
    return job_id if job_id is None or count == 1 else f"{job_id}-{number}"


def _send_lines(url: str, path: str, given: NewJob) -> list[str]:
    """One job for each line. Raises ValueError that names the first line that is none; those before it
    were sent."""
    ids: list[str] = []
    size = 0 if path == "-" else os.path.getsize(path)
    with (
        nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file,
        Producer(url) as producer,
    ):
        hidden = not size or not sys.stderr.isatty()
        with click.progressbar(length=size, label="enqueued", file=sys.stderr, hidden=hidden) as bar:
            numbered = enumerate(file, 1)
            while some := list(islice(numbered, _AT_ONCE)):
                ids += _send_some(producer, _jobs(some, given))
                bar.update(sum(len(line) for _, line in some))
    return ids


def _send_some(producer: Producer, jobs: Iterator[tuple[int, NewJob]]) -> list[str]:
    number = 0

    def noted() -> Iterator[NewJob]:
        nonlocal number
        for number, job in jobs:  # noqa: B007  (the line that is being sent is what an error is about)
            yield job

    try:
        return producer.enqueue_many(noted())
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("line ") else f"line {number}: {text}") from None


def _jobs(lines: list[tuple[int, bytes]], given: NewJob) -> Iterator[tuple[int, NewJob]]:
    for number, line in lines:
        if line.strip():
            yield number, _job(number, line, given)


def _job(number: int, line: bytes, given: NewJob) -> NewJob:
    try:
        said = _decode(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: no JSON object: {error}") from None
    unknown = said.keys() - set(NewJob._fields)
    if unknown:
        raise ValueError(f"line {number}: a job knows no field {', '.join(map(repr, sorted(unknown)))}")
    job = given._replace(**said)
    if not job.type:
        raise ValueError(f"line {number}: no type, and none was given before --lines")
    return job


_decode = msgspec.json.Decoder(dict[str, Any]).decode
