"""``jobworker web``: serve the operator's page for a browser."""

import os
import sys

import click

from ..admin.deployment import Deployment
from ..config.quantities import Duration
from ..errors import ConfigurationError
from ..extension import how_to_install
from ..options import ENV_PREFIX, ExplicitOption
from ..telemetry import log
from .common import STREAMS, is_terminal, verb_on_deployment


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command = STREAMS(web)
    for option in reversed((
        click.option("--listen", cls=ExplicitOption, default="127.0.0.1:9465", show_default=True,
                     metavar="HOST:PORT", envvar=f"{ENV_PREFIX}_WEB_LISTEN",
                     help="Address to listen on; port 0 picks one."),
        click.option("--token-file", cls=ExplicitOption, default="", type=click.Path(dir_okay=False),
                     envvar=f"{ENV_PREFIX}_WEB_TOKEN_FILE",
                     help=f"File with the token for logging in.  [default: {ENV_PREFIX}_WEB_TOKEN]"),
        click.option("--allow-actions", is_flag=True, envvar=f"{ENV_PREFIX}_WEB_ALLOW_ACTIONS",
                     help="Allow requeue, delete, retry now, pause and resume; needs a token."),
        click.option("--show-payloads", is_flag=True, envvar=f"{ENV_PREFIX}_WEB_SHOW_PAYLOADS",
                     help="Show the payloads of jobs too (tenants' texts)."),
        click.option("--serve-url", cls=ExplicitOption, default="", envvar=f"{ENV_PREFIX}_SERVE_URL",
                     help="API for the search page.  [default: that of the service of --data-dir]"),
        click.option("--interval", type=Duration(0.2), default=2.0, show_default=True,
                     help="Seconds between two snapshots of the deployment."),
    )):  # fmt: skip
        command = option(command)
    verb_on_deployment(main)(command)


def web(
    deployment: Deployment, streams: tuple[str, ...], listen: str, token_file: str, allow_actions: bool,
    show_payloads: bool, serve_url: str, interval: float,
) -> None:  # fmt: skip
    """Serve the operator's web page.

    Shows queues, workers, retries, dead letters and where any job is. By default it is read-only and
    reachable from this machine only. Another address, or actions, need a token of 16 characters or more. It
    is read from the environment or from a file, never from an option.

    \b
    jobworker web
    ssh -L 9465:127.0.0.1:9465 host                      # then open http://127.0.0.1:9465
    JOBWORKER_WEB_TOKEN=$(openssl rand -hex 24) jobworker web --allow-actions

    Exit code 0: stopped by INT or TERM.
    """
    try:
        from ..web.serve import Options, serve
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"the page needs {error.name}: {how_to_install('web')}") from error
    log.set_up("web", "info", "text" if is_terminal(sys.stderr) else "json")
    api_url = serve_url or str(deployment.endpoints.get("serve_url", ""))
    options = Options(listen, token_file, allow_actions, show_payloads, interval, api_url)
    serve(deployment, streams, options, lambda url: click.echo(f"serving {url} (pid {os.getpid()})"))
