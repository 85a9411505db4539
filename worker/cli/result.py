"""``jobworker result``: what the handler of a job returned."""

import sys
from typing import Any

import click

from ..admin.deployment import StreamTable
from ..admin.words import strip_control
from ..producer import Producer
from ..results import SUCCEEDED
from ..safe_text import safe_json
from .common import AS_JSON, NEGATIVE_RESULT, STREAMS, Age, echo_json, explain_command, verb


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command: Any = result
    for option in (
        AS_JSON,
        STREAMS,
        click.option("--wait", type=Age(), default=0.0, metavar="TIME",
                     help="Wait for the end of the job, at most 10s, 5m, ...  [default: do not wait]"),
        click.argument("id"),
    ):  # fmt: skip
        command = option(command)
    verb(main, "result")(command)


def result(url: str, id: str, wait: float, streams: tuple[str, ...], as_json: bool) -> None:
    """Show the result of a job that was enqueued with --keep-result.

    \b
    jobworker result job-1 --wait 10s
    jobworker result job-1 --json

    Exit code 1: there is no result, or the job did not succeed. A result is kept for --result-ttl of the
    service (1 h).
    """
    from ..store.redis.operator import OperatorStore

    names = StreamTable(streams, need_group=False).names(OperatorStore(url))
    with Producer(url) as producer:
        try:
            found = producer.result(id, wait, stream=names)
        except TimeoutError:
            why = "It has not ended, did not ask for its result, or the result has expired"
            click.echo(f"no result of {strip_control(id)}. {why}; try: {explain_command(id)}", err=True)
            sys.exit(NEGATIVE_RESULT)
    if as_json:
        echo_json({"id": id, "state": found.state, "value": found.value, "error": found.error,
                   "reason": found.reason})  # fmt: skip
    else:
        reason = f" ({found.reason})" if found.reason and found.reason != found.state else ""
        error = f": {found.error}" if found.error else ""
        click.echo(strip_control(f"{found.state}{reason}{error}"))
        if found.state == SUCCEEDED and not found.error:
            click.echo(strip_control(safe_json(found.value, str)))
    if found.state != SUCCEEDED:
        sys.exit(NEGATIVE_RESULT)
