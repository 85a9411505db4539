"""Non-blocking XREADGROUP BLOCK: begun now, finished when its descriptor is readable; one connection a
stream."""

import math
import time
from typing import Any

from redis.exceptions import RedisError, ResponseError

from ...errors import AnswerTooLarge, StoreUnavailable
from ...keys import DATA_FIELD, Source
from ..ports import Entry
from .connect import Connection, Endpoint, unavailable

#: The server looks at blocked clients ten times a second, and answers a moment later than BLOCK says.
_BLOCK_MARGIN_S = 1.0
#: An answer of several entries is given up when it is larger: each may be as large as the server allows, and
#: how large they are is not known before they come.
_ANSWER_BYTES = 64 * 1024 * 1024


class GroupMissing(Exception):
    """The stream or its group is gone: deleted under us."""


class _Metered:
    """A socket that raises `AnswerTooLarge` once it has received more than is left."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.left_bytes = math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv_into(self, *arguments: Any) -> int:
        count = int(self._sock.recv_into(*arguments))
        self.left_bytes -= count
        if self.left_bytes < 0:
            raise AnswerTooLarge(f"more than {_ANSWER_BYTES} bytes")
        return count


class BlockingRead:
    """XREADGROUP on a connection of its own, of which at most one is under way."""

    def __init__(self, endpoint: Endpoint, source: Source, consumer: str, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._source = source
        self._consumer = consumer
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._meter = _Metered(None)
        self._mono_deadline_s: float | None = None

    @property
    def under_way(self) -> bool:
        """Whether a read was begun and not finished."""
        return self._mono_deadline_s is not None

    def begin(self, count: int, block_ms: int) -> int:
        """Send the command; returns the descriptor that becomes readable with its reply.

        The descriptor is the socket's own. Its reply cannot be sitting in the parser already: the reply
        before was taken out of it whole, the server sends nothing unasked, and one command is outstanding.
        The same goes for TLS, whose session tickets came with the replies to the handshake.
        """
        if self.under_way:
            raise RuntimeError(f"a read of {self._source.stream} is under way")
        try:
            connection = self._opened()
            connection.send_command(*self._command(count, block_ms))
            self._meter.left_bytes = _ANSWER_BYTES if count > 1 else math.inf
        except (RedisError, OSError) as error:
            self.drop()
            self._endpoint.forget()
            raise unavailable(error, f"reading {self._source.stream}") from error
        self._mono_deadline_s = time.monotonic() + block_ms / 1000 + _BLOCK_MARGIN_S + self._timeout_s
        return int(connection._sock.fileno())

    def finish(self) -> list[Entry]:
        """Take the reply, waiting for it until BLOCK and the timeout are over.

        Raises `GroupMissing`, `AnswerTooLarge`, or `StoreUnavailable`; the read is no longer under way then.
        """
        if self._mono_deadline_s is None:
            return []
        wait_s = max(self._mono_deadline_s - time.monotonic(), 0.001)
        self._mono_deadline_s = None
        try:
            reply = self._reply(wait_s)
        except ResponseError as error:
            if str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise GroupMissing(self._source.stream) from error
            self.drop()
            self._endpoint.forget()
            raise unavailable(error, f"reading {self._source.stream}") from error
        except AnswerTooLarge:
            self.drop()
            raise
        except (RedisError, OSError) as error:
            self.drop()
            self._endpoint.forget()
            raise unavailable(error, f"reading {self._source.stream}") from error
        return entries_of(reply[0][1]) if reply else []

    def drop(self) -> None:
        """Close the connection; a read that was under way is given up."""
        self._mono_deadline_s = None
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _command(self, count: int, block_ms: int) -> list[str | int]:
        command: list[str | int] = ["XREADGROUP", "GROUP", self._source.group, self._consumer, "COUNT", count]
        if block_ms > 0:  # for the server, BLOCK 0 means for ever
            command += ["BLOCK", block_ms]
        return [*command, "STREAMS", self._source.stream, ">"]

    def _opened(self) -> Connection:
        if self._connection is None or self._has_ended(self._connection):
            self.drop()
            self._connection = self._endpoint.connection(self._source.stream)
            self._connection.connect()
            self._meter = self._connection._parser._sock = _Metered(self._connection._sock)
        return self._connection

    @staticmethod
    def _has_ended(connection: Connection) -> bool:
        try:
            return bool(connection.can_read(timeout=0))
        except (RedisError, OSError):
            return True

    def _reply(self, wait_s: float) -> Any:
        connection = self._connection
        if connection is None or connection._sock is None:
            raise StoreUnavailable(f"reading {self._source.stream}: the connection was closed")
        connection._sock.settimeout(wait_s)
        reply = connection.read_response(disable_decoding=True)
        connection._sock.settimeout(self._timeout_s)
        return reply


def entries_of(rows: list[Any]) -> list[Entry]:
    """Entries from the rows of a read of new ones, first delivery each."""
    new = tuple.__new__  # a named tuple's own constructor takes four times as long, once per job
    return [
        new(Entry, (id, fields[1] if len(fields) == 2 and fields[0] == DATA_FIELD else data_of(fields), 1, 0))
        for id, fields in rows
    ]


def data_of(fields: list[bytes] | None) -> bytes | None:
    """The ``data`` field of an entry: None where it has none, or was deleted from the stream."""
    if not fields:
        return None
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name == DATA_FIELD:
            return value
    return None
