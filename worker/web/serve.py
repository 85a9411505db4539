"""Runs the page: checks what it was told, listens, and ends when it is told to."""

import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ..admin.deployment import Deployment, services_of, source_list
from ..admin.overview import overview_poller_of
from ..errors import ConfigurationError
from ..settings import parse_address
from ..store.redis.operator import RedisOperatorStore
from .access import Access, is_loopback
from .app import application
from .background import BackgroundTasks
from .history import History
from .pages import Site
from .rendering import Renderer

log = logging.getLogger("jobworker.web")

TOKEN_VARIABLE = "JOBWORKER_WEB_TOKEN"
#: A person waits for the page: a store that is slower is shown as silent.
_STORE_TIMEOUT_S = 5.0
#: Requests under way when it is told to end; no page takes longer but one that looks through millions.
_GRACE_S = 3
#: Connections that may wait to be taken in: browsers of a few people.
_BACKLOG = 128


@dataclass(frozen=True)
class Options:
    """How the page is run."""

    listen: str
    token_file: str
    allow_actions: bool
    show_payloads: bool
    interval_s: float


def read_token(path: str) -> str:
    """The file's, else the environment's, else none. Raises `ConfigurationError` for a file without one."""
    if not path:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the token from {path}: {error}") from error
    if not token:
        raise ConfigurationError(f"{path} holds no token")
    return token


def check(options: Options, token: str) -> tuple[str, int]:
    """Where to listen. Raises `ConfigurationError` for a page that would be open to others."""
    host, port = parse_address(options.listen, "--listen")
    hint = f"give one in {TOKEN_VARIABLE} or --token-file, made by: openssl rand -hex 24"
    if not token and not is_loopback(host):
        raise ConfigurationError(
            f"{options.listen} can be reached from other machines, which needs a token: {hint}"
        )
    if not token and options.allow_actions:
        raise ConfigurationError(f"--allow-actions needs a token: {hint}")
    return host, port


def serve(
    deployment: Deployment, streams: tuple[str, ...], options: Options, say: Callable[[str], None]
) -> None:
    """Serve until INT or TERM; `say` is told the address. Raises `ConfigurationError` where it cannot."""
    token = read_token(options.token_file)
    address = check(options, token)
    access = Access(token)
    listener = _listen(address)
    board = History(overview_poller_of(deployment, streams).look, options.interval_s)
    renderer = Renderer(
        allow_actions=options.allow_actions, show_payloads=options.show_payloads, guarded=access.guarded
    )
    site = Site(
        source_list(streams), board, BackgroundTasks(), renderer,
        lambda: RedisOperatorStore(deployment.url, timeout_s=_STORE_TIMEOUT_S),
        lambda: services_of(deployment), options.show_payloads,
    )  # fmt: skip
    server = uvicorn.Server(
        uvicorn.Config(
            application(site, access, allow_actions=options.allow_actions), log_config=None, access_log=False,
            server_header=False, lifespan="off", ws="none", timeout_graceful_shutdown=_GRACE_S,
        )
    )  # fmt: skip
    # What it says at INFO is of its own workings.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # uvicorn sends the signal that ended it once more when it is done: that shall not end us otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    board.start()
    try:
        say(_url(listener))
        server.run(sockets=[listener])
    finally:
        board.close()
        listener.close()


def _listen(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {address[0]}:{address[1]}: {error}") from error
    listener.listen(_BACKLOG)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
