"""``jobworker pause`` and ``resume``: stop and restart a job type in the whole deployment."""

import sys
from datetime import UTC, datetime

import click

from ..admin.deployment import Deployment
from ..admin.status_client import handled_types
from ..admin.words import format_duration, strip_control
from ..keys import PAUSED_KEY
from ..store.operator import Pause
from .common import AS_JSON, BAD_NEWS, JobType, echo_json, print_table, verb, verb_on_deployment


def add_to(main: click.Group) -> None:
    """Add the verbs to ``jobworker``."""
    types = click.argument("types", type=JobType(), metavar="[TYPE]...", nargs=-1)
    note = click.option("--note", default="", help="Why, for the next operator.")
    verb_on_deployment(main)(types(note(AS_JSON(pause))))
    required_types = click.argument("types", type=JobType(), metavar="TYPE...", nargs=-1, required=True)
    verb(main)(required_types(AS_JSON(resume)))


def pause(deployment: Deployment, types: tuple[str, ...], note: str, as_json: bool) -> None:
    """Pause job types, or list the paused ones.

    Without TYPE the paused types are listed. A type that no service runs is paused too, with a warning.

    The pause is kept in the job store. Every service of the deployment follows it within a second, also
    after a restart, until `jobworker resume`. Jobs that were dispatched to a worker finish; others wait and
    use up no retry. Other types continue, also on the same stream.

    \b
    jobworker pause shout --note 'new release is being installed'
    jobworker pause
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(deployment.url)
    for job_type in types:
        store.pause(job_type, note)
    pauses, now_s = store.pauses(), store.wall_now_s(PAUSED_KEY)
    unknown: list[str] = []
    if types:
        served, _ = handled_types(store.announcements(), deployment.answering_services(), now_s)
        unknown = _echo_unknown(types, served)
    if as_json:
        echo_json({"paused": [_to_json(one) for one in pauses], "unknown": unknown})
        return
    rows = [
        [
            strip_control(one.kind),
            format_duration(max(0.0, now_s - one.wall_since_s)),
            strip_control(one.note),
        ]
        for one in pauses
    ]
    if rows:
        print_table(["PAUSED", "FOR>", "NOTE"], rows)
    else:
        click.echo("nothing is paused")


def _echo_unknown(types: tuple[str, ...], served: frozenset[str]) -> list[str]:
    """Warn of types that no service handles: a typing error would leave the right type running.
    Returns them; none if those of the services are unknown."""
    unknown = [job_type for job_type in types if served and job_type not in served]
    for job_type in unknown:
        listed = ", ".join(strip_control(one) for one in sorted(served))
        click.echo(
            f"no service handles {strip_control(job_type)}; it is paused all the same. They handle: {listed}",
            err=True,
        )
    return unknown


def resume(url: str, types: tuple[str, ...], as_json: bool) -> None:
    """Resume paused job types.

    The jobs that waited run first.

    \b
    jobworker resume shout

    Exit code 1: one of the types was not paused.
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    resumed = {job_type: store.resume(job_type) for job_type in types}
    if as_json:
        echo_json({"resumed": resumed})
    for job_type, was_paused in resumed.items() if not as_json else ():
        if was_paused:
            click.echo(f"{strip_control(job_type)} resumed")
    if not all(resumed.values()):
        _echo_not_paused([job_type for job_type in types if not resumed[job_type]], store.pauses())
        sys.exit(BAD_NEWS)


def _echo_not_paused(types: list[str], pauses: list[Pause]) -> None:
    paused = ", ".join(strip_control(pause.kind) for pause in pauses)
    hint = f"paused are: {paused}" if paused else "no type is paused"
    for job_type in types:
        click.echo(f"{strip_control(job_type)} was not paused, so nothing changed; {hint}", err=True)


def _to_json(pause: Pause) -> dict[str, str]:
    since = datetime.fromtimestamp(pause.wall_since_s, UTC).isoformat(timespec="milliseconds")
    return {"type": pause.kind, "since": since.replace("+00:00", "Z"), "note": pause.note}
