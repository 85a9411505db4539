"""Pipelined Redis connection: sends commands together, returns replies in order, never retries."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from redis.exceptions import NoScriptError, RedisError, ResponseError

from ...errors import StoreUnavailable
from .connect import Connection, Endpoint, has_ended, require_version, unavailable
from .features import Features, features_of, server_info
from .lua import Command, LuaScripts

log = logging.getLogger(__name__)

#: A reply as the client library gives it; the error of one command is a value at its index.
Reply = Any

#: Commands per send: while the server runs one batch, we pack the next.
_PIPELINE_COMMANDS = 250


class Begun:
    """Commands that were sent together, and their replies once these have come."""

    def __init__(self, connection: "PipelinedConnection", commands: Sequence[Command]) -> None:
        self.connection = connection
        self.commands = commands
        self.replies: list[Reply] | None = None


class PipelinedConnection:
    """Connection that opens on demand and closes after any network error. Scripts are sent by their SHA.

    After a lost reply it is unknown whether the server ran a command, so nothing is sent twice.
    """

    def __init__(self, endpoint: Endpoint, key: str, scripts: LuaScripts) -> None:
        self._scripts = scripts
        self._endpoint = endpoint
        self._key = key
        self._connection: Connection | None = None
        # Commands whose replies have not come, oldest first.
        self._begun: deque[Begun] = deque()
        self._features = Features()

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """Send the commands; returns one reply for each, an error reply as a value at its index.

        Raises `StoreUnavailable` when the server cannot be reached, is loading or does not answer in time,
        `ConfigurationError` for a server that is too old.
        """
        try:
            return self._repeat_missing(commands, self._exchange(commands))
        except (RedisError, OSError) as error:
            raise self._lost(error) from error

    def begin(self, commands: Sequence[Command]) -> Begun:
        """Send a few commands; other calls may come before `finish`. Raises as `call` does."""
        begun = Begun(self, commands)
        try:
            connection = self._ready()
            connection.send_packed_command(connection.pack_commands(commands))
        except (RedisError, OSError) as error:
            raise self._lost(error) from error
        self._begun.append(begun)
        return begun

    def finish(self, begun: Begun) -> list[Reply]:
        """The replies to commands that were begun here, as of `call`; waits for those that have not come."""
        try:
            if begun.replies is None and self._connection is not None:
                self._read_begun(self._connection)
            if begun.replies is None:
                raise ConnectionError("the connection was closed before the replies came")
            return self._repeat_missing(begun.commands, begun.replies)
        except (RedisError, OSError) as error:
            raise self._lost(error) from error

    def _read_begun(self, connection: Connection) -> None:
        while self._begun:
            replies = list(_replies(connection, len(self._begun[0].commands)))
            self._begun.popleft().replies = replies

    def _repeat_missing(self, commands: Sequence[Command], replies: list[Reply]) -> list[Reply]:
        """The replies, with those of scripts that the server had to load first."""
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            self._load_scripts()
            again = self._exchange([commands[i] for i in missing])
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        return replies

    def _lost(self, error: Exception) -> StoreUnavailable:
        self.close()
        self._endpoint.forget()
        return unavailable(error, "the job store did not answer")

    def features(self) -> Features:
        """Newer commands of the server; connects if need be. Raises as `call` does."""
        try:
            self._ready()
        except (RedisError, OSError) as error:
            raise self._lost(error) from error
        return self._features

    def close(self) -> None:
        """Drop the connection; the next call opens another. Replies that have not come are lost."""
        self._begun.clear()
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _exchange(self, commands: Sequence[Command]) -> list[Reply]:
        connection = self._ready()
        replies: list[Reply] = []
        rest = iter(commands)
        unanswered = 0
        while batch := list(islice(rest, _PIPELINE_COMMANDS)):
            connection.send_packed_command(connection.pack_commands(batch))
            self._read_begun(connection)
            replies.extend(_replies(connection, unanswered))  # the server runs this batch meanwhile
            unanswered = len(batch)
        replies.extend(_replies(connection, unanswered))
        return replies

    def _ready(self) -> Connection:
        if self._connection is not None and not self._begun and has_ended(self._connection):
            self.close()
        if self._connection is None:
            connection = self._endpoint.connection(self._key)
            connection.connect()
            try:
                self._features = _inspect(connection)
            except BaseException:
                connection.disconnect()
                raise
            self._connection = connection
        return self._connection

    def _load_scripts(self) -> None:
        for reply in self._exchange(
            [("SCRIPT", "LOAD", source) for source in self._scripts.sources.values()]
        ):
            if isinstance(reply, Exception):
                raise reply


def _replies(connection: Connection, count: int) -> Iterator[Reply]:
    for _ in range(count):
        try:
            yield connection.read_response(disable_decoding=True)
        except ResponseError as error:
            yield error


def _inspect(connection: Connection) -> Features:
    """Check the version of the server; returns its features."""
    info = server_info(connection)
    if info is None:
        log.warning("server.version_unknown", extra={"hint": "this user may not run INFO"})
        return Features()
    require_version(info)
    return features_of(info)
