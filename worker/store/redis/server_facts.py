"""What `jobworker doctor` reads of a Redis server: its settings, its clock, how each stream is cared for."""

import time
from typing import Any

from ...keys import Source
from ..facts import ServerFacts, StreamFacts
from .base import checked, is_no_group
from .operator import RedisOperatorStore

#: Pending entries that are looked up in the stream: where a producer trims, the oldest are gone first.
_PENDING_LOOKED_AT = 100


class RedisFacts(RedisOperatorStore):
    """Reads only; every call raises `StoreUnavailable` as the store's other sides do."""

    def nodes(self, sources: list[Source]) -> dict[str, str]:
        """A stream on each server: one, or on a cluster those that hold the streams."""
        return {self._endpoint.node(source.stream): source.stream for source in reversed(sources)}

    def server(self, stream: str) -> ServerFacts:
        """The server that holds the stream."""
        self.one(stream, ("PING",))  # the first call also connects
        began_wall_s, began_s = time.time(), time.monotonic()
        theirs_s = self.wall_now_s(stream)
        took_s = time.monotonic() - began_s
        info, config = self.call(stream, [("INFO",), ("CONFIG", "GET", "appendfsync")])
        return ServerFacts(
            {} if isinstance(info, Exception) else _fields(info),
            {} if isinstance(config, Exception) else _pairs(config),
            theirs_s - (began_wall_s + took_s / 2),
            took_s,
        )

    def stream(self, source: Source) -> StreamFacts:
        """How a stream is looked after."""
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
        groups = [_pairs(flat) for flat in self.one(stream, ("XINFO", "GROUPS", stream))] if exists else []
        due = checked(first)
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
            checked(dead),
        )

    def _missing(self, source: Source) -> int:
        reply = self.call(source.stream, [("XPENDING", *source, "-", "+", _PENDING_LOOKED_AT)])[0]
        ids = [] if is_no_group(reply) else [row[0] for row in checked(reply)]
        found = self.call(source.stream, [("XRANGE", source.stream, id, id) for id in ids]) if ids else []
        return sum(not checked(rows) for rows in found)


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines() if ":" in line)
    return {name: value for name, _, value in lines}


def _pairs(flat: list[Any]) -> dict[str, Any]:
    return {
        name.decode(): value.decode() if isinstance(value, bytes) else value
        for name, value in zip(flat[::2], flat[1::2], strict=True)
    }
