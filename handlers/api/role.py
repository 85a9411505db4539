"""The role ``api``: one process that answers questions over HTTP with the service's own model."""

import asyncio
import logging
import socket
import sys
from functools import partial
from typing import ClassVar

from jobworker.worker import ConfigurationError
from jobworker.worker.api_role import ApiLink
from jobworker.worker.http.server import BoundedProtocol, SupervisedServer, config

from ..encoder.load import load_from_settings
from ..jobstore.open import open_rebuilds
from ..settings import HandlerSettings
from ..vectors.open import open_store
from .access import ApiAccess
from .app import DEADLINE_S, Api
from .models import Models
from .search import Searcher

log = logging.getLogger("jobworker.api")

REPORT_EVERY_S = 0.5
#: A pass of this length is a hung device: no more reports are sent, so that the supervisor restarts the role.
HUNG_AFTER_S = 60.0
#: The thread of the model gives way to that of the requests after this time (Python's default is 5 ms).
SWITCH_INTERVAL_S = 0.001


class ApiProtocol(BoundedProtocol):
    """HTTP connection of a client, often a pool of a service."""

    max_connections: ClassVar[int] = 512
    #: Megabytes of texts over a slow line.
    request_within_s: ClassVar[float] = 20.0


def run(settings: HandlerSettings, link: ApiLink, listener: socket.socket) -> None:
    """Serve until the supervisor asks to stop. Raises SystemExit 3 if the model cannot be used."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Its other events are about uvicorn itself, or are logged by `BoundedProtocol` with the client.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    asyncio.run(_Role(settings, link).serve(listener))


class _Role:
    def __init__(self, settings: HandlerSettings, link: ApiLink) -> None:
        self._settings, self._link = settings, link
        self._totals: dict[str, float] = {}
        self._failure = ""

    async def serve(self, listener: socket.socket) -> None:
        settings = self._settings
        models = Models(
            partial(load_from_settings, settings),
            [*settings.serve_model_names, settings.model],
            self._on_batch,
        )
        searcher = Searcher(
            partial(open_store, settings) if settings.milvus_uri else None,
            open_rebuilds(settings.redis_url).state, models, settings.milvus_prefix, settings.sparse,
        )  # fmt: skip
        access = ApiAccess(settings.serve_token_file)
        api = Api(models, searcher, access, self._link, max_body_bytes=settings.max_payload)
        drain_s = max(1, int(min(settings.drain_timeout_s, DEADLINE_S)))
        server = SupervisedServer(config(api.application(), drain_s, ApiProtocol))
        loop = asyncio.get_running_loop()
        loop.add_reader(self._link, self._on_message, server)
        tasks = [
            loop.create_task(self._load(models, searcher, server)),
            loop.create_task(self._report(models)),
        ]
        await server.serve(sockets=[listener])
        for task in tasks:
            task.cancel()
        self._send_report(models)
        models.close()
        searcher.close()
        if self._failure:
            raise SystemExit(3)

    def _on_message(self, server: SupervisedServer) -> None:
        if self._link.stop_requested():
            server.stop()

    async def _load(self, models: Models, searcher: Searcher, server: SupervisedServer) -> None:
        try:
            await models.load_own()
        except ConfigurationError as error:
            self._failure = str(error)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
        if self._failure:
            self._link.failed(self._failure)
            server.stop()
            return
        self._link.ready()
        encoder = models.own.encoder
        log.info("api.ready", extra={"model": encoder.name, "revision": encoder.revision, "dim": encoder.dim})
        await searcher.warm_up()

    def _on_batch(self, requests: int, tokens: int) -> None:
        self._link.metrics.histogram("z_novel_api_batch_requests").add(requests)

    async def _report(self, models: Models) -> None:
        """Send the metrics twice a second, unless a pass hangs."""
        while True:
            if models.longest_pass_s() < HUNG_AFTER_S:
                self._send_report(models)
            await asyncio.sleep(REPORT_EVERY_S)

    def _send_report(self, models: Models) -> None:
        metrics = self._link.metrics
        metrics.gauge("z_novel_api_waiting_tokens", (), models.waiting_tokens())
        for name, total in models.take_counters().items():
            if grown := total - self._totals.get(name, 0.0):
                metrics.count(f"z_novel_{name}_total", by=max(0.0, grown))
            self._totals[name] = total
        self._link.report()
