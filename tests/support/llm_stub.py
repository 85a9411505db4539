"""An OpenAI-compatible endpoint on a free port that gives the answers it was told to, in order."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """One answer. `drip_s`: a byte of the body so often, for ever."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})
    drip_s: float = 0.0


def says(content: object, finish_reason: str = "stop", **message: object) -> Reply:
    """A good answer with this text (or this object as JSON) as what the model said."""
    text = content if isinstance(content, str) or content is None else json.dumps(content, ensure_ascii=False)
    choice = {
        "index": 0, "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, **message},
    }  # fmt: skip
    return Reply(body=json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode())


class Stub:
    """What it was asked, in order, and what it answers: the last reply again and again."""

    def __init__(self, replies: Sequence[Reply] | Callable[[dict[str, Any]], Reply]) -> None:
        self._replies = replies
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.done = threading.Event()
        self.url = ""

    def reply(self, request: dict[str, Any]) -> Reply:
        """The answer to the request that was just noted."""
        if callable(self._replies):
            return self._replies(request)
        return self._replies[min(len(self.requests), len(self._replies)) - 1]


@contextmanager
def llm_stub(replies: Sequence[Reply] | Callable[[dict[str, Any]], Reply]) -> Iterator[Stub]:
    """Serve in threads of this process until the end of the block."""
    stub = Stub(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(request)
            stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            stub.paths.append(self.path)
            reply = stub.reply(request)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) if not reply.drip_s else 10**6))
            self.end_headers()
            try:
                self.wfile.write(reply.body)
                while reply.drip_s and not stub.done.wait(reply.drip_s):
                    self.wfile.write(b" ")
            except OSError:
                pass  # the client hung up, which is what a slow answer is for

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        stub.done.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
