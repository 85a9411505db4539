"""Local endpoint of a language model: real HTTP; answers with the first sentences of a chapter."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson

_SENTENCE = re.compile(r"[^。！？.!?]+[。！？.!?]+[”’」』]*")
_SPEAKER = re.compile(r"(?:^|[。！？”\s])([\u4e00-\u9fff]{2,3})(?:笑道|说道|问道|忙道|道：)")


@contextmanager
def llm_stub(chars: int, delay_s: float) -> Iterator[str]:
    """Yields the URL of an endpoint that answers after `delay_s`, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(delay_s)  # simulated inference
            body = orjson.dumps(_completion(request["messages"][-1]["content"], chars))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(chapter: str, chars: int) -> dict[str, object]:
    summary = ""
    for sentence in _SENTENCE.findall(chapter):
        if len(summary) + len(sentence.strip()) > chars:
            break
        summary += sentence.strip()
    names = list(dict.fromkeys(_SPEAKER.findall(chapter)))[:5]
    found = {
        "summary": summary or chapter[:chars],
        "entity_updates": [
            {"name": name, "entity_type": "person", "description": f"{name}在这一回里说话。"}
            for name in names
        ],
        "new_events": [{"description": summary[:50] or "…", "participants": names}],
        "relation_changes": [],
    }
    message = {"role": "assistant", "content": orjson.dumps(found).decode()}
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
