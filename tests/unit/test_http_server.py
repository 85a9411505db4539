"""HTTP server: clients that do not take their answer."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from jobworker.worker.http.listening import listen
from jobworker.worker.http.server import BoundedProtocol, SupervisedServer, config
from support.service import SOON_S, eventually

ANSWER_BYTES = 24 * 1024 * 1024
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class HastyProtocol(BoundedProtocol):
    request_within_s: ClassVar[float] = 1.0


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * ANSWER_BYTES})


def asked(address: tuple[str, int], pause: Callable[[], None], request: bytes = REQUEST) -> int:
    """Bytes of the answer that a client gets which pauses after the first of them."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.settimeout(SOON_S)
        client.connect(address)
        client.sendall(request)
        taken = len(client.recv(100))
        pause()
        try:
            while 0 < taken < ANSWER_BYTES and (more := client.recv(1 << 20)):
                taken += len(more)
        except ConnectionResetError:
            pass
        return taken


def served(scenario: Callable[[tuple[str, int], SupervisedServer], None]) -> None:
    async def run() -> None:
        with listen(("127.0.0.1", 0), "--listen") as listener:
            server = SupervisedServer(config(answer, 1, HastyProtocol))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                await asyncio.to_thread(scenario, listener.getsockname(), server)
            finally:
                server.stop()
                await serving

    asyncio.run(asyncio.wait_for(run(), SOON_S))


def test_an_answer_that_is_not_taken_in_time_is_given_up() -> None:
    def scenario(address: tuple[str, int], server: SupervisedServer) -> None:
        def until_closed() -> None:
            eventually(lambda: not server.server_state.connections)

        assert asked(address, until_closed) < ANSWER_BYTES
        assert asked(address, lambda: None) >= ANSWER_BYTES

    served(scenario)


def test_half_requests_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HastyProtocol, "max_connections", 3)
    monkeypatch.setattr(HastyProtocol, "request_within_s", SOON_S)

    def scenario(address: tuple[str, int], server: SupervisedServer) -> None:
        slow = [socket.create_connection(address, SOON_S) for _ in range(6)]
        for one in slow:
            one.sendall(REQUEST[:9])
        assert asked(address, lambda: None) >= ANSWER_BYTES
        assert len(server.server_state.connections) <= 3
        for one in slow:
            one.close()

    served(scenario)


def test_bytes_that_are_no_request_are_logged_with_their_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "jobworker")

    def scenario(address: tuple[str, int], server: SupervisedServer) -> None:
        asked(address, lambda: None, b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3")

    served(scenario)
    (record,) = [one for one in caplog.records if one.message == "http.request_invalid"]
    assert record.__dict__["client"] == "127.0.0.1"
