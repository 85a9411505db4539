"""Advice for a job store that does not answer: by the error of a real socket or the server's own words."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from jobworker.worker.cli import main
from jobworker.worker.store_advice import store_advice


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", "free space"),
        ("MISCONF Valkey is configured to save RDB snapshots", "free space"),
        ("AuthenticationError: invalid username-password pair or user is disabled.", "user or password"),
        ("AuthenticationError: WRONGPASS invalid username-password pair", "user or password"),
        ("OutOfMemoryError: command not allowed when used memory > 'maxmemory'. OOM ", "maxmemory"),
        ("ReadOnlyError: READONLY You can't write against a read only replica.", "master"),
        ('InvalidResponse: Protocol Error: b"<html>"', "not a Redis server"),
        (
            "the job store refused: NOPERM User a has no permissions to run the 'xread' command",
            "jobworker.acl",
        ),
        ("something else", "--redis-url"),
    ],
)
def test_the_servers_words_select_the_advice(error: str, advice: str) -> None:
    assert advice in store_advice(error)


@contextmanager
def web_server(answer: bytes) -> Iterator[int]:
    """A server that answers whatever it is sent, as an HTTP server does; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1000)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def said(url: str) -> str:
    result = CliRunner().invoke(main, ["stats", "--redis-url", url])
    assert result.exit_code == 5, result.output
    return result.stderr


@pytest.mark.parametrize("answer", [b"<html>\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_web_server_is_no_redis_server(answer: bytes) -> None:
    with web_server(answer) as port:
        assert "this is not a Redis server" in said(f"redis://127.0.0.1:{port}")


def test_a_closed_port_and_a_wrong_host_name_the_option() -> None:
    assert "no server listens" in (closed := said("redis://127.0.0.1:1"))
    assert "--redis-url" in closed
    assert "host name cannot be resolved" in said("redis://no-such-host.invalid:6379")
    assert "path of the socket" in said("unix:///no/such/socket")
