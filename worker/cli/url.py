"""``jobworker url``: print the addresses of a deployment."""

import click

from ..admin.deployment import Deployment, stopped_service
from ..admin.words import strip_control
from ..errors import ConfigurationError
from ..extension import extension
from ..telemetry.log import redacted
from .common import AS_JSON, echo_json, print_table, verb_on_deployment


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    name = click.argument("name", type=click.Choice(_names()), required=False, default=None)
    verb_on_deployment(main)(name(AS_JSON(url)))


def _names() -> list[str]:
    """``redis``, ``metrics``, ``serve`` and the stores of the built-in types."""
    return ["redis", *(_short(field) for field in extension().endpoints), "metrics", "serve"]


def _short(field: str) -> str:
    return field.removesuffix("_url").removesuffix("_uri")


def url(deployment: Deployment, name: str | None, as_json: bool) -> None:
    """Print the addresses of a deployment, or the one of NAME alone.

    The list hides passwords. With NAME or --json the address is complete, for a script or another program.

    \b
    jobworker url
    export JOBWORKER_REDIS_URL="$(jobworker url redis)"
    redis-cli -u "$(jobworker url redis)"
    """
    addresses = _addresses(deployment)
    if stopped_service("", deployment.endpoints):
        click.echo("jobworker: no service runs there: these are the addresses of its last run", err=True)
    if as_json:
        echo_json({name: addresses[name]} if name and name in addresses else {} if name else addresses)
    elif name is None:
        print_table(
            ["NAME", "ADDRESS"], [[key, strip_control(redacted(one))] for key, one in addresses.items()]
        )
    elif name not in addresses:
        raise ConfigurationError(f"the address of {name} is not known here: endpoints.json does not list it")
    else:
        click.echo(addresses[name])


def _addresses(deployment: Deployment) -> dict[str, str]:
    found = {"redis": deployment.url}
    for field in extension().endpoints:
        if address := deployment.endpoints.get(field):
            found[_short(field)] = str(address)
    found["metrics"] = deployment.metrics_urls[0]
    if api := deployment.endpoints.get("serve_url"):
        found["serve"] = str(api)
    return found
