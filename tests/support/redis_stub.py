"""A stub of a Redis server on the wire, for versions that no package brings."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

#: An answer of the stub as bytes of the protocol; None closes the connection without an answer.
Answer = bytes | None


def bulk(data: bytes) -> bytes:
    """A bulk string."""
    return b"$%d\r\n%s\r\n" % (len(data), data)


class RedisStub:
    """Answers the commands of a handshake and INFO; ``answer`` gets all others. ``seen`` has those."""

    def __init__(self, info: bytes, answer: Callable[[list[bytes]], Answer]) -> None:
        self._info = info
        self._answer = answer
        self.seen: list[list[bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while command := _read(stream):
                reply = self._reply(command)
                if reply is None:
                    return
                connection.sendall(reply)

    def _reply(self, command: list[bytes]) -> Answer:
        if command[0].upper() == b"INFO":
            return bulk(self._info)
        if command[0].upper() in (b"CLIENT", b"SELECT", b"PING"):
            return b"+OK\r\n"
        self.seen.append(command)
        return self._answer(command)


def _read(stream: BinaryIO) -> list[bytes]:
    head = stream.readline()
    if not head:
        return []
    words = []
    for _ in range(int(head[1:])):
        length = int(stream.readline()[1:])
        words.append(stream.read(length))
        stream.readline()
    return words


@contextmanager
def redis_stub(version: str, answer: Callable[[list[bytes]], Answer]) -> Iterator[RedisStub]:
    """A stub that says to be Redis of a version, or Valkey if it begins with that word."""
    info = b"redis_version:%s\r\n" % version.encode()
    if version.startswith("valkey"):
        info = b"redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.0.0\r\n"
    stub = RedisStub(b"# Server\r\n" + info, answer)
    try:
        yield stub
    finally:
        stub.close()
