"""``jobworker weight``: list, set and clear weights of tenants."""

import sys

import click
import msgspec

from ..admin.words import strip_control
from ..config.quantities import Number
from ..flow import parse_weights
from .common import AS_JSON, NEGATIVE_RESULT, STREAMS, CliGroup, echo_json, print_table, verb
from .limit import change_config, open_store


@click.group("weight", cls=CliGroup)
def weight() -> None:
    """List, set and clear weights of tenants.

    A tenant of weight 3 gets three times the share of a tenant of weight 1, while both have jobs in lanes. A
    weight holds for all services of the deployment at once.

    \b
    jobworker weight set big-publisher 3
    jobworker weight list
    jobworker weight clear big-publisher
    """


@verb(weight, "list")
@STREAMS
@AS_JSON
def list_(url: str, streams: tuple[str, ...], as_json: bool) -> None:
    """List the tenants whose weight is set, by stream.

    \b
    jobworker weight list
    """
    store, names = open_store(url, streams)
    weights = {name: store.flow_config(name).weights for name in names}
    if as_json:
        return echo_json({"streams": weights})
    rows = [
        [strip_control(name), strip_control(tenant), f"{number:g}"]
        for name, of_stream in weights.items()
        for tenant, number in sorted(of_stream.items())
    ]
    if rows:
        print_table(["STREAM", "TENANT", "WEIGHT>"], rows)
    else:
        click.echo("every tenant has the weight 1")


@verb(weight, "set")
@click.argument("tenant")
@click.argument("number", type=Number(0.001, 1000.0))
@STREAMS
@AS_JSON
def set_(url: str, tenant: str, number: float, streams: tuple[str, ...], as_json: bool) -> None:
    """Set the weight of TENANT to NUMBER, from 0.001 to 1000.

    \b
    jobworker weight set big-publisher 3
    """
    store, names = open_store(url, streams)
    for stream in names:
        change_config(
            store,
            stream,
            lambda config: msgspec.structs.replace(
                config, weights=parse_weights({**config.weights, tenant: number})
            ),
        )
    if as_json:
        echo_json({"set": {tenant: number}, "streams": names})
    else:
        click.echo(strip_control(f"{tenant} has the weight {number:g}"))


@verb(weight, "clear")
@click.argument("tenants", nargs=-1, required=True)
@STREAMS
@AS_JSON
def clear(url: str, tenants: tuple[str, ...], streams: tuple[str, ...], as_json: bool) -> None:
    """Give tenants the weight 1 again.

    Exit code 1: one of the tenants had no weight.

    \b
    jobworker weight clear big-publisher
    """
    store, names = open_store(url, streams)
    found = {tenant for name in names for tenant in store.flow_config(name).weights}
    for stream in names:
        change_config(
            store,
            stream,
            lambda config: msgspec.structs.replace(
                config, weights={one: to for one, to in config.weights.items() if one not in tenants}
            ),
        )
    cleared = {tenant: tenant in found for tenant in tenants}
    if as_json:
        echo_json({"cleared": cleared})
    for tenant, was_set in cleared.items() if not as_json else ():
        text = f"{tenant} has the weight 1" if was_set else f"no weight of {tenant} is set"
        click.echo(strip_control(text))
    if not all(cleared.values()):
        sys.exit(NEGATIVE_RESULT)
