"""``jobworker pause`` and ``resume``: keep a type of job from being run, everywhere, until it is resumed."""

import sys
from datetime import UTC, datetime

import click

from ..admin.deployment import Deployment, services_of
from ..admin.status_client import Service
from ..admin.words import format_duration, strip_control
from ..keys import PAUSED_KEY
from ..store.operator import Pause
from .common import AS_JSON, BAD_NEWS, JobType, say_json, table, verb, verb_on_deployment


def add_to(main: click.Group) -> None:
    """Make them verbs of ``jobworker``."""
    types = click.argument("types", type=JobType(), metavar="[TYPE]...", nargs=-1)
    note = click.option("--note", default="", help="Why, for whoever looks at it next.")
    verb_on_deployment(main)(types(note(AS_JSON(pause))))
    every = click.argument("types", type=JobType(), metavar="TYPE...", nargs=-1, required=True)
    verb(main)(every(AS_JSON(resume)))


def pause(deployment: Deployment, types: tuple[str, ...], note: str, as_json: bool) -> None:
    """Keep types of jobs from being run; or list them.

    Without TYPE what is paused is listed. A type that no service knows is paused too, and named.

    It is kept in the store and heeded by every service of the deployment within a second, over restarts,
    until `jobworker resume`. Jobs that a worker has already are finished; others wait where they are and
    lose nothing. Other types go on, also those of the same stream.

    \b
    jobworker pause embedding_batch --note 'model is being exchanged'
    jobworker pause
    """
    from ..store.redis.operator import RedisOperatorStore

    store = RedisOperatorStore(deployment.url)
    for kind in types:
        store.pause(kind, note)
    unknown = _unknown(types, services_of(deployment)) if types else []
    paused, now_s = store.pauses(), store.wall_now_s(PAUSED_KEY)
    if as_json:
        say_json({"paused": [shown(one) for one in paused], "unknown": unknown})
        return
    rows = [
        [
            strip_control(one.kind),
            format_duration(max(0.0, now_s - one.wall_since_s)),
            strip_control(one.note),
        ]
        for one in paused
    ]
    if rows:
        table(["PAUSED", "FOR>", "NOTE"], rows)
    else:
        click.echo("nothing is paused")


def _unknown(types: tuple[str, ...], services: list[Service]) -> list[str]:
    """Name the types that none of the services runs, if any service answers: a slip of the keyboard?"""
    known = sorted({str(kind) for service in services for kind in service.said.get("types", ())})
    unknown = [kind for kind in types if known and kind not in known]
    for kind in unknown:
        runs = ", ".join(strip_control(one) for one in known)
        click.echo(f"no service that answers runs {strip_control(kind)}; they run: {runs}", err=True)
    return unknown


def resume(url: str, types: tuple[str, ...], as_json: bool) -> None:
    """Let paused types of jobs run again.

    What had piled up goes first.

    \b
    jobworker resume embedding_batch

    Exit code 1: one of them was not paused.
    """
    from ..store.redis.operator import RedisOperatorStore

    store = RedisOperatorStore(url)
    resumed = {kind: store.resume(kind) for kind in types}
    if as_json:
        say_json({"resumed": resumed})
    for kind, was_paused in resumed.items() if not as_json else ():
        click.echo(f"{strip_control(kind)} {'goes on' if was_paused else 'was not paused'}")
    if not all(resumed.values()):
        sys.exit(BAD_NEWS)


def shown(pause: Pause) -> dict[str, str]:
    """A pause for machines."""
    since = datetime.fromtimestamp(pause.wall_since_s, UTC).isoformat(timespec="milliseconds")
    return {"type": pause.kind, "since": since.replace("+00:00", "Z"), "note": pause.note}
