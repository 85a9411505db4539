"""The HTTP API in tests: in this process without a socket, and a client of the one of a service."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jobworker.handlers.api.access import ApiAccess
from jobworker.handlers.api.app import Api
from jobworker.handlers.api.models import Models
from jobworker.handlers.api.search import Searcher
from jobworker.handlers.encoder.base import DummyEncoder, Encoder, Plan, Vectors
from jobworker.handlers.vectors.ports import VectorStore
from jobworker.worker.api_role import ApiLink
from jobworker.worker.ipc.control import ControlSocket
from support.service import SOON_S, Service, eventually

DIM = 8
HOST = "127.0.0.1:8000"


class ApiAnswer(NamedTuple):
    """A response. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class GatedEncoder(DummyEncoder):
    """Each pass waits for the gate; ``passes`` has the number of texts of each."""

    def __init__(self, *, budget: int = 1000) -> None:
        super().__init__(DIM)
        self._budget = budget
        self.gate = threading.Event()
        self.running = threading.Event()
        self.passes: list[int] = []

    def forward(self, plan: Plan) -> Vectors:
        self.passes.append(plan.texts)
        self.running.set()
        assert self.gate.wait(SOON_S)
        return super().forward(plan)


class World:
    """The API without a socket. Create and use it in an event loop."""

    def __init__(
        self,
        encoder: Encoder | None = None,
        store: VectorStore | None = None,
        *,
        token_file: Path | None = None,
        others: Mapping[str, Encoder] | None = None,
        deadline_s: float = SOON_S,
        max_body_bytes: int = 100_000,
    ) -> None:
        self.encoder = encoder or DummyEncoder(DIM)
        self.batches: list[int] = []
        self.states: dict[str, dict[str, str]] = {}
        others = {} if others is None else others
        self.models = Models(
            lambda name: others[name] if name else self.encoder,
            ["served-name"],
            lambda requests, tokens: self.batches.append(requests),
        )
        searcher = Searcher(
            (lambda: store) if store else None, lambda alias: self.states.get(alias, {}), self.models, "z_"
        )
        self._peers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link = ApiLink(ControlSocket(self._peers[0]))
        access = ApiAccess(str(token_file or ""))
        api = Api(
            self.models, searcher, access, self.link, max_body_bytes=max_body_bytes, deadline_s=deadline_s
        )
        self.application = api.application()
        self._searcher = searcher

    async def request(
        self, method: str, path: str, body: Any = None, *, host: str = HOST, **headers: str
    ) -> ApiAnswer:
        """One request; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = [(b"host", host.encode())] + [(k.encode(), v.encode()) for k, v in headers.items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "headers": sent, "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000), "scheme": "http", "root_path": "",
        }  # fmt: skip
        messages: list[Any] = []
        bodies = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> Any:
            return bodies.pop() if bodies else await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            messages.append(message)

        await self.application(scope, receive, send)
        start = messages[0]
        found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return ApiAnswer(start["status"], found, b"".join(one.get("body", b"") for one in messages[1:]))

    async def post(self, path: str, body: Any, **headers: str) -> ApiAnswer:
        """As `request`."""
        return await self.request("POST", path, body, **headers)

    def close(self) -> None:
        """End its threads and close its sockets."""
        self.models.close()
        self._searcher.close()
        for one in self._peers:
            one.close()


def in_world(
    scenario: Callable[[World], Coroutine[Any, Any, None]], *, loaded: bool = True, **options: Any
) -> None:
    """Run a scenario with a World whose model is loaded."""

    async def run() -> None:
        world = World(**options)
        try:
            if loaded:
                await world.models.load_own()
            await asyncio.wait_for(scenario(world), SOON_S)
        finally:
            world.close()

    asyncio.run(run())


class ApiClient:
    """Client of the API of a service."""

    def __init__(self, service: Service, token: str = "") -> None:
        event = eventually(lambda: service.logged("api.listening"))[0]
        self.url = str(event["serve_url"])
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> ApiAnswer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=SOON_S)
        try:
            connection.request(method, path, data, {**self._headers, **headers})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return ApiAnswer(response.status, found, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> ApiAnswer:
        """As `request`."""
        return self.request("POST", path, body, **headers)

    def embed(self, texts: Any, **more: Any) -> list[list[float]]:
        """Vectors of texts by `/v1/embeddings`."""
        answer = self.post("/v1/embeddings", {"input": texts, **more})
        assert answer.status == 200, answer
        return [row["embedding"] for row in answer.json()["data"]]
