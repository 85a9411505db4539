"""The operator's side of the job store on Redis."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from redis.exceptions import ResponseError

from ...keys import PAUSED_KEY, Source
from ..operator import START, Consumer, GroupState, Lease, Pause, Scheduled
from ..ports import Entry
from .base import SCRIPT_BYTES, SCRIPT_IDS, RedisStoreBase, checked, is_no_group
from .blocking_read import data_of
from .connection import Reply
from .lua import Argument, Command, script


class RedisOperatorStore(RedisStoreBase):
    """`OperatorStore` on Redis."""

    def wall_now_s(self, stream: str) -> float:
        """See `OperatorStore.wall_now_s`."""
        seconds, microseconds = self.one(stream, ("TIME",))
        return int(seconds) + int(microseconds) / 1e6

    # -- dead letters

    def dead_count(self, stream: str) -> int:
        """See `OperatorStore.dead_count`."""
        return int(self.one(stream, ("XLEN", self.dead_key(stream))))

    def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """See `OperatorStore.dead_after`."""
        return self._page(stream, ("XRANGE", self.dead_key(stream), b"(" + after, "+", "COUNT", count))

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        """See `OperatorStore.dead_before`."""
        end = "+" if before == START else b"(" + before
        return self._page(stream, ("XREVRANGE", self.dead_key(stream), end, "-", "COUNT", count))

    def requeue(self, stream: str, jobs: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """See `OperatorStore.requeue`."""
        both = [stream, self.dead_key(stream)]
        moved: list[bool] = []
        for some in _by_size(jobs):
            replies = self.call(stream, [script("requeue", both, id, job) for id, job in some])
            moved += [bool(checked(reply)) for reply in replies]
        return moved

    def purge(self, stream: str, ids: Sequence[bytes]) -> int:
        """See `OperatorStore.purge`."""
        commands = [("XDEL", self.dead_key(stream), *some) for some in _chunks(ids)]
        return sum(int(checked(reply)) for reply in (self.call(stream, commands) if commands else ()))

    # -- retries

    def retries(self, stream: str, start: int, count: int) -> list[Scheduled]:
        """See `OperatorStore.retries`."""
        command = ("ZRANGE", self.retry_key(stream), start, start + count - 1, "WITHSCORES")
        flat = self.one(stream, command)
        return [Scheduled(float(due), job) for job, due in zip(flat[::2], flat[1::2], strict=True)]

    def retry_now(self, stream: str, jobs: Sequence[bytes]) -> int:
        """See `OperatorStore.retry_now`."""
        now = f"{self.wall_now_s(stream):.6f}"
        commands = [("ZADD", self.retry_key(stream), "XX", "LT", "CH", now, job) for job in jobs]
        return sum(int(checked(reply)) for reply in (self.call(stream, commands) if commands else ()))

    # -- pauses

    def pause(self, kind: str, note: str) -> None:
        """See `OperatorStore.pause`."""
        since = {"since": self.wall_now_s(PAUSED_KEY), "note": note}
        self.one(PAUSED_KEY, ("HSET", PAUSED_KEY, kind, json.dumps(since)))

    def resume(self, kind: str) -> bool:
        """See `OperatorStore.resume`."""
        return bool(self.one(PAUSED_KEY, ("HDEL", PAUSED_KEY, kind)))

    def pauses(self) -> list[Pause]:
        """See `OperatorStore.pauses`."""
        flat = self.one(PAUSED_KEY, ("HGETALL", PAUSED_KEY))
        return sorted(_pause(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))

    # -- where a job is

    def group(self, source: Source) -> GroupState | None:
        """See `OperatorStore.group`."""
        groups, consumers = self.call(
            source.stream, [("XINFO", "GROUPS", source.stream), ("XINFO", "CONSUMERS", *source)]
        )
        if is_no_group(consumers) or _no_such_key(groups) or _no_such_key(consumers):
            return None
        mine = (facts for facts in map(_facts, checked(groups)) if facts[b"name"] == source.group.encode())
        found = next(mine, None)
        if found is None:
            return None
        readers = [_consumer(_facts(flat)) for flat in checked(consumers)]
        return GroupState(found[b"last-delivered-id"], found[b"pending"], readers)

    def entry(self, stream: str, id: bytes) -> Entry | None:
        """See `OperatorStore.entry`."""
        rows, deaths = self.call(stream, [("XRANGE", stream, id, id), ("HGET", self.deaths_key(stream), id)])
        found = checked(rows)
        return Entry(id, data_of(found[0][1]), deaths=int(checked(deaths) or 0)) if found else None

    def entries(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """See `OperatorStore.entries`."""
        return self._page(stream, ("XRANGE", stream, b"(" + after, "+", "COUNT", count))

    def lease(self, source: Source, id: bytes) -> Lease | None:
        """See `OperatorStore.lease`."""
        return next(iter(self._leases(source, id, id, 1)), None)

    def leases(self, source: Source, after: bytes, count: int) -> list[Lease]:
        """See `OperatorStore.leases`."""
        return self._leases(source, b"(" + after, b"+", count)

    def _leases(self, source: Source, first: bytes, last: bytes, count: int) -> list[Lease]:
        reply = self.call(source.stream, [("XPENDING", *source, first, last, count)])[0]
        if is_no_group(reply):
            return []
        return [Lease(id, name.decode(), idle / 1000, tries) for id, name, idle, tries in checked(reply)]

    def _page(self, stream: str, command: Command) -> list[Entry]:
        return [Entry(id, data_of(fields)) for id, fields in self.one(stream, command)]


def _facts(flat: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _consumer(facts: dict[bytes, Any]) -> Consumer:
    return Consumer(facts[b"name"].decode(), facts[b"pending"], facts[b"idle"] / 1000)


def _pause(kind: bytes, value: bytes) -> Pause:
    """Any value pauses the type, also one that was written with another tool."""
    try:
        said = json.loads(value)
        return Pause(kind.decode(), float(said["since"]), str(said.get("note", "")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Pause(kind.decode(errors="replace"), 0.0, value.decode(errors="replace"))


def _no_such_key(reply: Reply) -> bool:
    return isinstance(reply, ResponseError) and "no such key" in str(reply)


def _chunks(ids: Sequence[bytes]) -> Iterator[Sequence[Argument]]:
    return (ids[at : at + SCRIPT_IDS] for at in range(0, len(ids), SCRIPT_IDS))


def _by_size(jobs: Sequence[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    some: list[tuple[bytes, bytes]] = []
    size = 0
    for one in jobs:
        some.append(one)
        size += len(one[1])
        if size >= SCRIPT_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some
