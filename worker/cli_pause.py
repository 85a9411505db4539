"""``jobworker pause`` and ``resume``: keep a type of job from being run, everywhere, until it is resumed."""

import sys
from datetime import UTC, datetime

import click

from .cli_common import AS_JSON, BAD_NEWS, clean, say_json, span, table, verb
from .keys import PAUSED_KEY
from .operator_store import Pause


def add_to(main: click.Group) -> None:
    """Make them verbs of ``jobworker``."""
    types = click.argument("types", metavar="[TYPE]...", nargs=-1)
    note = click.option("--note", default="", help="Why, for whoever looks at it next.")
    verb(main)(types(note(AS_JSON(pause))))
    verb(main)(click.argument("types", metavar="TYPE...", nargs=-1, required=True)(AS_JSON(resume)))


def pause(url: str, types: tuple[str, ...], note: str, as_json: bool) -> None:
    """Pause types of jobs, or (without TYPE) list what is paused.

    It is kept in the store and heeded by every service of the deployment within a second, over restarts,
    until `jobworker resume`. Jobs that a worker has already are finished; others wait where they are and
    lose nothing. Other types go on, also those of the same stream.

    \b
    jobworker pause embedding_batch --note 'model is being exchanged'
    jobworker pause
    """
    from .redis_operator import RedisOperatorStore

    store = RedisOperatorStore(url)
    for kind in types:
        store.pause(kind, note)
    paused, now_s = store.pauses(), store.wall_now_s(PAUSED_KEY)
    if as_json:
        say_json({"paused": [shown(one) for one in paused]})
        return
    rows = [[clean(one.kind), span(max(0.0, now_s - one.wall_since_s)), clean(one.note)] for one in paused]
    if rows:
        table(["PAUSED", "FOR>", "NOTE"], rows)
    else:
        click.echo("nothing is paused")


def resume(url: str, types: tuple[str, ...], as_json: bool) -> None:
    """Let paused types of jobs run again; what had piled up goes first.

    \b
    jobworker resume embedding_batch

    Exit code 1: one of them was not paused.
    """
    from .redis_operator import RedisOperatorStore

    store = RedisOperatorStore(url)
    resumed = {kind: store.resume(kind) for kind in types}
    if as_json:
        say_json({"resumed": resumed})
    for kind, was_paused in resumed.items() if not as_json else ():
        click.echo(f"{clean(kind)} {'goes on' if was_paused else 'was not paused'}")
    if not all(resumed.values()):
        sys.exit(BAD_NEWS)


def shown(pause: Pause) -> dict[str, str]:
    """A pause for machines."""
    since = datetime.fromtimestamp(pause.wall_since_s, UTC).isoformat(timespec="milliseconds")
    return {"type": pause.kind, "since": since.replace("+00:00", "Z"), "note": pause.note}
