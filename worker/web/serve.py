"""HTTP server of the page: checks the options, listens, ends on INT or TERM."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..admin.deployment import Deployment, StreamTable
from ..admin.overview import open_poller
from ..errors import ConfigurationError
from ..extension import extension, imported
from ..http.listening import listen, url_of
from ..http.server import BoundedServer, config
from ..settings import parse_address
from ..store.redis.operator import OperatorStore
from ..urls import is_loopback
from .access import Access
from .app import application
from .background import BackgroundTasks
from .history import History
from .pages import Site
from .rendering import Renderer

TOKEN_VARIABLE = "JOBWORKER_WEB_TOKEN"
#: A person waits for the page: a slower store gets an error page.
_STORE_TIMEOUT_S = 5.0
#: Time for requests in progress at the end. Only a search through millions of entries takes longer.
_DRAIN_S = 3


@dataclass(frozen=True)
class Options:
    """Options of ``jobworker web``. ``api_url`` is empty if no API is known."""

    listen: str
    token_file: str
    allow_actions: bool
    show_payloads: bool
    interval_s: float
    api_url: str = ""


def read_token(path: str) -> str:
    """The token from the file, else from the environment, else empty. Raises `ConfigurationError` for a file
    that cannot be read or is empty."""
    if not path:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the token from {path}: {error}") from error
    if not token:
        raise ConfigurationError(f"{path} is empty: write a token into it")
    return token


def check(options: Options, token: str) -> tuple[str, int]:
    """The address to listen on. Raises `ConfigurationError` for an address that needs a token without one."""
    host, port = parse_address(options.listen, "--listen")
    hint = f"set {TOKEN_VARIABLE} or --token-file; make one with: openssl rand -hex 24"
    if not token and not is_loopback(host):
        raise ConfigurationError(
            f"{options.listen} is reachable from other machines and needs a token: {hint}"
        )
    if not token and options.allow_actions:
        raise ConfigurationError(f"--allow-actions needs a token: {hint}")
    return host, port


def serve(
    deployment: Deployment, streams: tuple[str, ...], options: Options, on_listening: Callable[[str], None]
) -> None:
    """Serve until INT or TERM; `on_listening` gets the url. Raises `ConfigurationError` if the options or the
    address cannot be used."""
    token = read_token(options.token_file)
    address = check(options, token)
    access = Access(token)
    listener = listen(address, "--listen")
    table = StreamTable(streams)
    if streams:  # an unknown group is an error of the start
        table.sources(OperatorStore(deployment.url, timeout_s=_STORE_TIMEOUT_S))
    history = History(open_poller(deployment, table).snapshot, options.interval_s)
    more = [imported(target)(options.api_url) for target in extension().pages]
    renderer = Renderer(
        [page.templates for page in more],
        allow_actions=options.allow_actions,
        show_payloads=options.show_payloads,
        requires_token=access.requires_token,
        more_pages=tuple((page.path, page.name) for page in more if page.name),
    )
    site = Site(
        table, history, BackgroundTasks(), renderer,
        lambda: OperatorStore(deployment.url, timeout_s=_STORE_TIMEOUT_S),
        deployment.answering_services, options.show_payloads,
    )  # fmt: skip
    app = application(site, access, more, allow_actions=options.allow_actions)
    server = BoundedServer(config(app, _DRAIN_S))
    # Its other events are about uvicorn itself, or are logged by `BoundedProtocol` with the client.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    _handle_signals(server)
    history.start()
    try:
        on_listening(url_of(listener))
        server.run(sockets=[listener])
    finally:
        history.close()
        listener.close()


def _handle_signals(server: BoundedServer) -> None:
    """End the server on INT and TERM, also before uvicorn sets handlers of its own."""
    # uvicorn raises the signal again after its shutdown: the default handler would change the exit code.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the program that started this one may have blocked them
