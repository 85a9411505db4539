"""``jobworker pause`` and ``resume``: stop and restart a job type in the whole deployment."""

import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from ..admin.deployment import Deployment
from ..admin.words import format_duration, strip_control
from ..errors import ConfigurationError
from ..keys import PAUSED_KEY
from ..store.operator import Pause
from .common import AS_JSON, NEGATIVE_RESULT, JobType, echo_json, print_table, verb, verb_on_deployment

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore


#: How long to wait for services to follow a pause (seconds): they read the pauses and report within a second.
_FOLLOW_TIMEOUT_S, _POLL_S = 3.0, 0.1


def add_to(main: click.Group) -> None:
    """Add the verbs to ``jobworker``."""
    types = click.argument("types", type=JobType(), metavar="[TYPE]...", nargs=-1)
    note = click.option("--note", default="", help="Why, for the next operator.")
    force = click.option("--force", is_flag=True, help="Pause also types that no registered service handles.")
    verb_on_deployment(main)(types(note(force(AS_JSON(pause)))))
    required_types = click.argument("types", type=JobType(), metavar="TYPE...", nargs=-1, required=True)
    verb(main)(required_types(AS_JSON(resume)))


def pause(
    deployment: Deployment, types: tuple[str, ...], note: str, force: bool, as_json: bool
) -> None:  # fmt: skip
    """Pause job types, or list the paused ones.

    Without TYPE the paused types are listed. A type that no registered service handles is refused, unless
    --force is given.

    The pause is kept in the job store. Every service of the deployment follows it within a second, also
    after a restart, until `jobworker resume`. The command waits up to 3 s until the services that answer at
    --metrics-url follow it. Jobs that were dispatched to a worker finish; others wait and use up no retry.
    Other types continue, also on the same stream.

    \b
    jobworker pause shout --note 'new release is being installed'
    jobworker pause

    Exit code 2: no registered service handles one of the types; none is paused then.
    """
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(deployment.url)
    unknown = _check_types(store, deployment, types, force) if types else []
    for job_type in types:
        store.pause(job_type, note)
    following, waiting = _await_services(deployment, frozenset(types)) if types else ([], [])
    pauses, now_s = store.pauses(), store.wall_now_s(PAUSED_KEY)
    if as_json:
        echo_json({"paused": [_to_json(one) for one in pauses], "unknown": unknown,
                   "following": following, "waiting": waiting})  # fmt: skip
        return
    if types:
        click.echo(_effect(following, waiting), err=True)
    _print_pauses(pauses, now_s)


def _print_pauses(pauses: Sequence[Pause], now_s: float) -> None:
    rows = [
        [
            strip_control(one.job_type),
            format_duration(max(0.0, now_s - one.wall_since_s)),
            strip_control(one.note),
        ]
        for one in pauses
    ]
    if rows:
        print_table(["PAUSED", "FOR>", "NOTE"], rows)
    else:
        click.echo("nothing is paused")


def _check_types(
    store: "OperatorStore", deployment: Deployment, types: tuple[str, ...], force: bool
) -> list[str]:
    """The types that no registered service handles: a typing error would leave the right type running.

    None if the types of the services are not known. Raises `ConfigurationError` for one without `force`.
    """
    handled = {name for one in store.announcements() for name in one.types}
    handled |= {str(name) for one in deployment.answering_services() for name in one.status.get("types", ())}
    unknown = [job_type for job_type in types if handled and job_type not in handled]
    listed = ", ".join(strip_control(one) for one in sorted(handled))
    for job_type in unknown:
        text = f"no registered service handles {strip_control(job_type)}; they handle: {listed}"
        if not force:
            raise ConfigurationError(f"{text}. Nothing was paused; --force pauses it all the same")
        click.echo(f"{text}; it is paused all the same", err=True)
    return unknown


def _await_services(deployment: Deployment, types: frozenset[str]) -> tuple[list[str], list[str]]:
    """Wait until the services that answer follow the pause. Returns the names of those that do, and of those
    that do not at the end."""
    give_up_at = time.monotonic() + _FOLLOW_TIMEOUT_S
    while True:
        following: list[str] = []
        waiting: list[str] = []
        for service in deployment.answering_services():
            concerned = types.intersection(service.status.get("types", ()))
            done = concerned <= service.types_with("z_novel_paused")
            if concerned:
                (following if done else waiting).append(service.consumer)
        if not waiting or time.monotonic() >= give_up_at:
            return following, waiting
        time.sleep(_POLL_S)  # a status page sends no event


def _effect(following: list[str], waiting: list[str]) -> str:
    """When the pause takes effect, in words."""
    parts = []
    if following:
        parts.append(f"in effect in {strip_control(', '.join(following))}")
    if waiting:
        parts.append(f"not yet in effect in {strip_control(', '.join(waiting))}: look at its log")
    return "; ".join([*parts, "every other running service follows within 1 s. Jobs that run finish"])


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
        sys.exit(NEGATIVE_RESULT)


def _echo_not_paused(types: list[str], pauses: list[Pause]) -> None:
    paused = ", ".join(strip_control(pause.job_type) for pause in pauses)
    hint = f"paused are: {paused}" if paused else "no type is paused"
    for job_type in types:
        click.echo(f"{strip_control(job_type)} was not paused, so nothing changed; {hint}", err=True)


def _to_json(pause: Pause) -> dict[str, str]:
    since = datetime.fromtimestamp(pause.wall_since_s, UTC).isoformat(timespec="milliseconds")
    return {"type": pause.job_type, "since": since.replace("+00:00", "Z"), "note": pause.note}
