"""Facts about a Redis server and its streams, for `jobworker doctor`."""

import time
from typing import Any

from redis.exceptions import ResponseError

from ...errors import StoreRefused
from ...keys import Source
from ..facts import ServerFacts, StreamFacts
from .base import checked, is_no_group, pairs
from .features import features_of
from .operator import OperatorStore

#: Oldest pending entries that are looked up in the stream: a producer that trims deletes the oldest first.
_PENDING_CHECKED = 100


class RedisFacts(OperatorStore):
    """Read-only facts; every call raises `StoreUnavailable` where the server does not answer."""

    def nodes(self, sources: list[Source]) -> dict[str, str]:
        """Each server of the deployment, by name, with a stream that is on it."""
        return {self._endpoint.node(source.stream): source.stream for source in reversed(sources)}

    def server(self, stream: str) -> ServerFacts:
        """The server of a stream: INFO, CONFIG, clock skew and round trip."""
        self.one(stream, ("PING",))  # the first call also connects
        wall_started_s, mono_started_s = time.time(), time.monotonic()
        server_wall_s = self.wall_now_s(stream)
        round_trip_s = time.monotonic() - mono_started_s
        info, config = self.call(stream, [("INFO",), ("CONFIG", "GET", "appendfsync")])
        return ServerFacts(
            {} if isinstance(info, Exception) else _fields(info),
            {} if isinstance(config, Exception) else _decoded(config),
            server_wall_s - (wall_started_s + round_trip_s / 2),
            round_trip_s,
            [] if isinstance(info, Exception) else features_of(info).names,
        )

    def stream(self, source: Source) -> StreamFacts:
        """One stream: lengths, groups, consumers, overdue retries, and keys that the server refuses."""
        faults = self.key_faults(source)
        try:
            return self._stream(source)._replace(faults=faults)
        except StoreRefused:
            if not faults:
                raise
            return StreamFacts(source, True, 0, {}, {}, [], 0, 0.0, 0, faults)

    def _stream(self, source: Source) -> StreamFacts:
        stream = source.stream
        exists, length, dead, first = self.call(
            stream,
            [
                ("EXISTS", stream),
                ("XLEN", stream),
                ("XLEN", self.dead_key(stream)),
                ("ZRANGE", self.retry_key(stream), 0, 0, "WITHSCORES"),
            ],
        )
        groups = [_decoded(flat) for flat in self.one(stream, ("XINFO", "GROUPS", stream))] if exists else []
        due = [] if isinstance(first, ResponseError) else first
        group = self.group(source) if exists else None
        return StreamFacts(
            source,
            bool(checked(exists)),
            checked(length),
            {one["name"]: one.get("lag") for one in groups},
            {one["name"]: one["pending"] for one in groups},
            group.consumers if group else [],
            self._missing(source) if group else 0,
            max(0.0, self.wall_now_s(stream) - float(due[1])) if due else 0.0,
            0 if isinstance(dead, ResponseError) else dead,
        )

    def _missing(self, source: Source) -> int:
        reply = self.call(source.stream, [("XPENDING", *source, "-", "+", _PENDING_CHECKED)])[0]
        ids = [] if is_no_group(reply) else [row[0] for row in checked(reply)]
        replies = self.call(source.stream, [("XRANGE", source.stream, id, id) for id in ids]) if ids else []
        return sum(not checked(rows) for rows in replies)


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines() if ":" in line)
    return {name: value for name, _, value in lines}


def _decoded(flat: list[Any]) -> dict[str, Any]:
    return {
        name.decode(errors="replace"): value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in pairs(flat).items()
    }
