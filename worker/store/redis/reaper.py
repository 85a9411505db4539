"""The reaper's side of the job store on Redis."""

from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from ...keys import Source
from ..ports import Depths, Promotion
from .base import SCRIPT_BYTES, RedisStoreBase, checked, is_no_group
from .connection import Reply
from .lua import script

#: Entries dropped by one call of trim.lua; some ms of the server's time.
_TRIM_ENTRIES = 10_000
#: Rounds of one trim: a long backlog is dropped over several turns of the reaper.
_TRIM_ROUNDS = 20


class RedisReaperStore(RedisStoreBase):
    """`ReaperStore` on Redis."""

    def promote(self, stream: str, limit: int) -> Promotion:
        """See `ReaperStore.promote`. Stops early, with ``next_due_s`` 0, after 8 MiB of jobs."""
        command = script("promote", [stream, self.retry_key(stream)], limit, SCRIPT_BYTES)
        moved, next_due_s = self.one(stream, command)
        return Promotion(moved, None if next_due_s is None else float(next_due_s))

    def trim(self, stream: str) -> int:
        """See `ReaperStore.trim`. A long backlog is dropped over several calls."""
        dropped = 0
        for _ in range(_TRIM_ROUNDS):
            some = self.one(stream, script("trim", [stream], _TRIM_ENTRIES))
            dropped += some
            if some < _TRIM_ENTRIES // 2:
                break
        return dropped

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        """See `ReaperStore.remove_idle_consumers`."""
        two_keys = [source.stream, self.fence_key(source.stream)]
        command = script("remove_consumers", two_keys, source.group, keep, idle_ms)
        reply = self.call(source.stream, [command])[0]
        return 0 if is_no_group(reply) else int(checked(reply))

    def depths(self, source: Source) -> Depths:
        """See `ReaperStore.depths`. Where the server cannot tell the lag, it is the entries of the stream
        that are not pending: never too few."""
        stream = source.stream
        groups, length, retrying, dead, now = self.call(
            stream,
            [
                ("XINFO", "GROUPS", stream),
                ("XLEN", stream),
                ("ZCARD", self.retry_key(stream)),
                ("XLEN", self.dead_key(stream)),
                ("TIME",),
            ],
        )
        group = _group_named(source.group, groups)
        pending = group.get(b"pending", 0)
        last = group.get(b"last-delivered-id", b"0-0")
        first = self.one(stream, ("XRANGE", stream, b"(" + last, "+", "COUNT", 1))
        lag = group.get(b"lag")
        if lag is None:
            lag = max(checked(length) - pending, 0) if first else 0
        return Depths(
            queued=lag,
            pending=pending,
            retrying=checked(retrying),
            dead=checked(dead),
            oldest_age_s=_age_s(first[0][0], checked(now)) if first else 0.0,
            lag=lag,
        )


def _group_named(group: str, reply: Reply) -> dict[bytes, Any]:
    """The facts of one group; empty where it or its stream is missing."""
    if isinstance(reply, ResponseError) and "no such key" in str(reply):
        return {}
    for flat in checked(reply):
        facts = dict(zip(flat[::2], flat[1::2], strict=True))
        if facts[b"name"] == group.encode():
            return facts
    return {}


def _age_s(id: bytes, now: Sequence[bytes]) -> float:
    """How long ago an entry was added, by the server's clock; TIME gives seconds and microseconds."""
    wall_now_s = int(now[0]) + int(now[1]) / 1e6
    return max(0.0, wall_now_s - int(id.split(b"-")[0]) / 1000)
