"""``jobworker``: what an operator or a script asks of a deployment, by verbs."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from . import keys
from .embedded import DataDir
from .errors import ConfigurationError, Exit, StoreUnavailable
from .keys import Source
from .log import redacted
from .options import DATA_DIR, REDIS_URL
from .producer import NewJob, Producer
from .settings import parse_source

#: Jobs handed to the producer at once; between two of these the progress bar moves.
_ENQUEUE_AT_ONCE = 1000


class _Group(click.Group):
    """Turns the errors that a user can mend into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except StoreUnavailable as error:
            click.echo(f"jobworker: {redacted(str(error))}", err=True)
            context.exit(Exit.STORE_UNREACHABLE)
        except (ConfigurationError, ValueError) as error:
            click.echo(f"jobworker: {error}", err=True)
            context.exit(Exit.USAGE)


@click.group(cls=_Group, context_settings={"max_content_width": 110})
def main() -> None:
    """Look into a jobworker deployment and send it jobs.

    Every verb takes --redis-url (better given as JOBWORKER_REDIS_URL, which no process list shows), or the
    --data-dir of a service on this machine that has brought its own store.

    Exit codes: 0 done, 2 bad usage, 5 the job store does not answer.
    """


def _verb(command: Callable[..., None]) -> click.Command:
    """A command of `main` that is given the store's url first of all."""

    @wraps(command)
    def with_url(redis_url: str, data_dir: str, **options: Any) -> None:
        command(_url(redis_url or _embedded_url(data_dir)), **options)

    return main.command()(REDIS_URL(DATA_DIR(with_url)))


def _embedded_url(data_dir: str) -> str:
    if not Path(data_dir).is_dir():
        return ""
    data = DataDir(data_dir)
    try:
        return str(data.endpoints().get("redis_url", ""))
    finally:
        data.close()


def _url(url: str) -> str:
    """The url, if there is one. Raises `ConfigurationError` where nothing says which store."""
    if not url:
        raise ConfigurationError(
            "which deployment? Give --redis-url (or JOBWORKER_REDIS_URL), or the --data-dir of a service here"
        )
    return url


def _payload(text: str) -> Any:
    """JSON from the text itself, from a file after ``@``, or from standard input for ``-``."""
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"--payload is no JSON: {error}") from error


@_verb
@click.argument("type")
@click.option("--payload", default="{}", show_default=True, help="JSON, @FILE, or - for standard input.")
@click.option("--tenant", default="", help="Whose job it is.")
@click.option("--project", default="", help="Which project of the tenant's.")
@click.option("--stream", default=None, help="Stream to send it to.  [default: that of the type]")
@click.option(
    "--id", "job_id", default=None, help="Job id; with --count a number is added.  [default: random]"
)
@click.option("--delay", type=click.FloatRange(min=0), default=None, help="Run it so many seconds from now.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=None, help="Limit in seconds."
)
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Send it so many times.")
@click.option("--json", "as_json", is_flag=True, help='Print {"ids": [...]}.')
def enqueue(
    url: str, type: str, payload: str, tenant: str, project: str, stream: str | None,
    job_id: str | None, delay: float | None, timeout: float | None, count: int, as_json: bool,
) -> None:  # fmt: skip
    """Send a job of TYPE.

    \b
    jobworker enqueue embedding_batch --tenant t1 --project p1 \\
        --payload '{"tenant_id": "t1", "project_id": "p1", "ids": ["s1"], "texts": ["It rained."]}'
    """
    body = _payload(payload)
    ids: list[str] = []
    with Producer(url) as producer:
        quiet = count < _ENQUEUE_AT_ONCE or not sys.stderr.isatty()
        with click.progressbar(length=count, label="enqueued", file=sys.stderr, hidden=quiet) as bar:
            for start in range(0, count, _ENQUEUE_AT_ONCE):
                jobs = [
                    NewJob(type, body, tenant_id=tenant, project_id=project, stream=stream, delay=delay,
                           timeout=timeout, id=_numbered(job_id, number, count))
                    for number in range(start, min(start + _ENQUEUE_AT_ONCE, count))
                ]  # fmt: skip
                ids += producer.enqueue_many(jobs)
                bar.update(len(jobs))
    if as_json:
        click.echo(json.dumps({"ids": ids}))
    else:
        click.echo(ids[0] if count == 1 else f"{count} jobs enqueued, {ids[0]} … {ids[-1]}")


def _numbered(job_id: str | None, number: int, count: int) -> str | None:
    return job_id if job_id is None or count == 1 else f"{job_id}-{number}"


@_verb
@click.option(
    "--stream", "streams", multiple=True, help="NAME=GROUP; repeatable.  [default: the service's table]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def stats(url: str, streams: tuple[str, ...], as_json: bool) -> None:
    """How much waits, runs, is retried and was given up, stream by stream.

    QUEUED was not given to any worker yet; PENDING was, and is not finished; RETRYING waits for its next
    try; DEAD was given up; OLDEST is how long the oldest queued job has waited.
    """
    from .redis_store import RedisReaperStore

    sources = [parse_source(text) for text in streams] or list(keys.DEFAULT_SOURCES)
    store = RedisReaperStore(url)
    rows = [_row(store, source) for source in sources]
    store.close()
    if as_json:
        click.echo(json.dumps({"streams": rows}))
        return
    click.echo(
        f"{'STREAM':28} {'GROUP':16} {'QUEUED':>8} {'PENDING':>8} {'RETRYING':>8} {'DEAD':>8} {'OLDEST':>9}"
    )
    for row in rows:
        click.echo(
            f"{row['stream']:28} {row['group']:16} {row['queued']:8} {row['pending']:8} {row['retrying']:8}"
            f" {row['dead']:8} {row['oldest_age_s']:7.1f} s"
        )


def _row(store: Any, source: Source) -> dict[str, Any]:
    return {"stream": source.stream, "group": source.group, **store.depths(source)._asdict()}
