"""``jobworker limit``: list, set and clear limits of job types."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..admin.deployment import StreamTable
from ..admin.limits import LimitState, limit_states
from ..admin.words import strip_control
from ..config.quantities import Count
from ..flow import FlowConfig, Limit, parse_limits
from ..shards import shard_count
from .common import AS_JSON, NEGATIVE_RESULT, STREAMS, CliGroup, JobType, echo_json, print_table, verb

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Attempts against other operators who change the limits at the same time.
_TRIES = 10


@click.group("limit", cls=CliGroup)
def limit() -> None:
    """List, set and clear limits of job types.

    A limit says how many jobs run at once and how many start in a time. It holds for all services of the
    deployment within about a second. Running jobs are not stopped.

    \b
    jobworker limit set shout --key tenant --concurrency 4 --rate 100/min
    jobworker limit list
    jobworker limit clear shout/tenant
    """


def open_store(url: str, streams: Sequence[str]) -> tuple["OperatorStore", list[str]]:
    """The store, and the names of the streams."""
    from ..store.redis.operator import OperatorStore

    store = OperatorStore(url)
    return store, list(StreamTable(streams, need_group=False).names(store))


def change_config(store: "OperatorStore", stream: str, change: Callable[[FlowConfig], FlowConfig]) -> None:
    """Replace limits and weights of a stream."""
    for _ in range(_TRIES):
        present = store.flow_config(stream)
        new = change(present)
        if new == present or store.configure(stream, new):
            return
    raise click.ClickException(f"the limits of {stream} keep changing; try again")


def _change(
    store: "OperatorStore", stream: str, change: Callable[[Sequence[Limit]], Sequence[Limit]]
) -> None:
    change_config(
        store, stream, lambda config: msgspec.structs.replace(config, limits=tuple(change(config.limits)))
    )


@verb(limit, "list")
@STREAMS
@AS_JSON
def list_(url: str, streams: tuple[str, ...], as_json: bool) -> None:
    """List the limits and weights by stream.

    RUNNING: jobs of the type that a service has taken and not settled. WAITING: jobs in lanes that wait for
    the limit.

    \b
    jobworker limit list
    """
    store, names = open_store(url, streams)
    configs = {name: store.flow_config(name) for name in names}
    states = {name: limit_states(name, one, store.lane_counts(name)) for name, one in configs.items()}
    if as_json:
        return echo_json({"streams": {name: _to_json(one, states[name]) for name, one in configs.items()}})
    rows = [_row(one) for of_stream in states.values() for one in of_stream]
    if rows:
        print_table(["STREAM", "NAME", "TYPE", "KEY", "CONCURRENCY>", "RATE>", "RUNNING>", "WAITING>"], rows)
    else:
        click.echo("no limits")
    for name, config in configs.items():
        _echo_weights(name, config)


def _to_json(config: FlowConfig, states: Sequence[LimitState]) -> dict[str, Any]:
    now = [
        {
            "name": one.limit.name,
            "running": one.running,
            "waiting": one.waiting,
            "keys": {value: {"running": busy[0], "waiting": busy[1]} for value, busy in one.busy.items()},
        }
        for one in states
    ]
    return {**msgspec.to_builtins(config), "now": now}


def _row(state: LimitState) -> list[str]:
    one = state.limit
    cells = [state.stream, one.name, one.type, one.key, str(one.concurrency or "-"), one.rate or "-"]
    return [strip_control(cell) for cell in (*cells, str(state.running), str(state.waiting))]


def _echo_weights(stream: str, config: FlowConfig) -> None:
    if config.weights:
        weights = ", ".join(f"{tenant} {weight:g}" for tenant, weight in sorted(config.weights.items()))
        click.echo(strip_control(f"weights of {stream}: {weights}"))


@verb(limit, "set")
@click.argument("type", type=JobType())
@click.option("--key", default="global", show_default=True, help="tenant, project, global or metadata.NAME.")
@click.option("--concurrency", type=Count(0), default=0, help="Jobs that run at once.")
@click.option("--rate", default=None, help="Starts in a time, such as 100/min, 5/s or 10/10s.")
@click.option("--name", default=None, help="Name of the limit.  [default: TYPE/KEY]")
@STREAMS
@AS_JSON
def set_(
    url: str, type: str, key: str, concurrency: int, rate: str | None, name: str | None,
    streams: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Set a limit of TYPE, or replace the one of the same name.

    \b
    jobworker limit set shout --key tenant --concurrency 4
    """
    given = {"type": type, "key": key, "concurrency": concurrency, "rate": rate, "name": name}
    (new,) = parse_limits([{field: value for field, value in given.items() if value is not None}])
    store, names = open_store(url, streams)
    if key != "tenant" and any(map(shard_count, names)):
        raise click.ClickException(
            f"--key {key}: the streams have shards, which only share limits with --key tenant: all jobs of a "
            "tenant are in one shard"
        )
    for stream in names:
        _change(store, stream, lambda limits: [*(one for one in limits if one.name != new.name), new])
    if as_json:
        echo_json({"set": msgspec.to_builtins(new), "streams": names})
    else:
        click.echo(strip_control(f"{new.name} is set"))


@verb(limit, "clear")
@click.argument("names", nargs=-1, required=True)
@STREAMS
@AS_JSON
def clear(url: str, names: tuple[str, ...], streams: tuple[str, ...], as_json: bool) -> None:
    """Remove limits by name.

    Exit code 1: no limit has one of the names.

    \b
    jobworker limit clear shout/tenant
    """
    store, stream_names = open_store(url, streams)
    found = {one.name for stream in stream_names for one in store.flow_config(stream).limits}
    for stream in stream_names:
        _change(store, stream, lambda limits: [one for one in limits if one.name not in names])
    cleared = {name: name in found for name in names}
    if as_json:
        echo_json({"cleared": cleared})
    for name, was_set in cleared.items() if not as_json else ():
        click.echo(strip_control(f"{name} is cleared" if was_set else f"no limit is called {name}"))
    if not all(cleared.values()):
        sys.exit(NEGATIVE_RESULT)
