"""XREADGROUP BLOCK in two steps, for an event loop: send the command, take the reply when it has come.

Each stream has a connection of its own, because a blocked connection takes no other command.
"""

import math
import time
from typing import Any, NoReturn

from redis.exceptions import RedisError, ResponseError

from ...errors import AnswerTooLarge, StoreRefused, StoreUnavailable
from ...keys import DATA_FIELD, Source
from ..ports import Entry
from .connect import Connection, Endpoint, MeteredSocket, has_ended, unavailable
from .features import features_of, server_info
from .key_faults import concerns_one_stream

#: The server checks blocked clients ten times a second, so its answer comes a moment after BLOCK is over.
_BLOCK_MARGIN_S = 1.0
#: A larger answer of several entries is dropped. The sizes of entries are unknown before they come, and each
#: may be as large as the server allows (512 MB).
_ANSWER_BYTES = 64 * 1024 * 1024
#: Limit of the server, where it has one: it sends at least one entry, and may send one beyond the limit.
_SERVER_ANSWER_BYTES = _ANSWER_BYTES // 2


#: A read that was blocked while its stream was deleted. UNBLOCKED alone has other causes, such as a failover.
_STREAM_DELETED = "UNBLOCKED the stream key no longer exists"


class GroupMissing(Exception):
    """The stream or its group is not on this server: it was deleted, or moved to another node."""


class BlockingRead:
    """XREADGROUP on a connection of its own. At most one read is under way.

    Any error closes the connection, except `GroupMissing`. Entries of a lost reply stay pending for this
    consumer.
    """

    def __init__(self, endpoint: Endpoint, source: Source, consumer: str, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._source = source
        self._consumer = consumer
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._sized_reads = False
        self._mono_deadline_s: float | None = None

    @property
    def under_way(self) -> bool:
        """Whether a read was begun and not finished."""
        return self._mono_deadline_s is not None

    def begin(self, count: int, block_ms: int) -> int:
        """Send the command; returns the descriptor that becomes readable with its reply.

        The descriptor is the socket's own. The reply cannot be in the parser's buffer already: the reply
        before it was parsed whole, the server sends nothing unasked, and one command is outstanding. This
        holds for TLS too, whose session tickets came with the replies to the handshake.
        """
        if self.under_way:
            raise RuntimeError(f"a read of {self._source.stream} is under way")
        try:
            connection = self._opened()
            connection.send_command(*self._command(count, block_ms))
        except (RedisError, OSError) as error:
            self._fail(error)
        metered: MeteredSocket = connection.metered_socket
        metered.allow(_ANSWER_BYTES if count > 1 else math.inf)
        self._mono_deadline_s = time.monotonic() + block_ms / 1000 + _BLOCK_MARGIN_S + self._timeout_s
        return int(metered.fileno())

    def finish(self) -> list[Entry]:
        """Take the reply; waits for it until BLOCK and the timeout are over.

        Raises `GroupMissing`, `AnswerTooLarge` or `StoreUnavailable`. No read is under way afterwards.
        """
        if self._mono_deadline_s is None:
            return []
        wait_s = max(self._mono_deadline_s - time.monotonic(), 0.001)
        self._mono_deadline_s = None
        try:
            reply = self._reply(wait_s)
        except AnswerTooLarge:
            self.drop()
            raise
        except (RedisError, OSError) as error:
            if isinstance(error, ResponseError) and str(error).startswith(("NOGROUP", _STREAM_DELETED)):
                raise GroupMissing(self._source.stream) from error
            self._fail(error)
        return entries_of(reply[0][1]) if reply else []

    def drop(self) -> None:
        """Close the connection. The reply of a read under way is lost."""
        self._mono_deadline_s = None
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _fail(self, error: Exception) -> NoReturn:
        self.drop()
        if concerns_one_stream(error):
            raise StoreRefused(f"reading {self._source.stream}: {type(error).__name__}: {error}") from error
        self._endpoint.forget()
        raise unavailable(error, f"reading {self._source.stream}") from error

    def _command(self, count: int, block_ms: int) -> list[str | int]:
        command: list[str | int] = ["XREADGROUP", "GROUP", self._source.group, self._consumer, "COUNT", count]
        if self._sized_reads:
            command += ["MAXSIZE", _SERVER_ANSWER_BYTES]
        if block_ms > 0:  # for the server, BLOCK 0 means without end
            command += ["BLOCK", block_ms]
        return [*command, "STREAMS", self._source.stream, ">"]

    def _opened(self) -> Connection:
        if self._connection is None or has_ended(self._connection):
            self.drop()
            self._connection = self._endpoint.connection(self._source.stream)
            self._connection.connect()
            self._sized_reads = features_of(server_info(self._connection) or b"").sized_reads
        return self._connection

    def _reply(self, wait_s: float) -> Any:
        connection = self._connection
        if connection is None:
            raise StoreUnavailable(f"reading {self._source.stream}: the connection was closed")
        connection.metered_socket.settimeout(wait_s)
        reply = connection.read_response(disable_decoding=True)
        connection.metered_socket.settimeout(self._timeout_s)
        return reply


def entries_of(rows: list[Any]) -> list[Entry]:
    """Entries of an XREADGROUP reply, each with one delivery and no deaths."""
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
