"""The move of entries into shards on Redis."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from ...keys import DATA_FIELD, Source
from ...shards import MOST_SHARDS
from ..forwarding import ForwardEntry, Forwarding
from .base import SCRIPT_BYTES, SCRIPT_IDS, checked, chunks_by_size, too_few, wait_command
from .batches import RedisBatchStore
from .blocking_read import BlockingRead, GroupMissing
from .lua import Argument, script

#: Block time of a watch. It only bounds how soon a silently dead connection is noticed.
_WATCH_MS = 2000
_USED = "shards_of/"


class _Watch(BlockingRead):
    """XREAD of one entry after an id, on a connection of its own."""

    after = b"$"

    def _command(self, count: int, block_ms: int) -> list[str | int]:
        command: list[str | int] = [
            "XREAD",
            "COUNT",
            count,
            "BLOCK",
            block_ms,
            "STREAMS",
            self._source.stream,
        ]
        return [*command, self.after.decode()]


class RedisForwardStore(RedisBatchStore):
    """`ForwardStore` on Redis."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, wait_replicas: int = 0) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self._wait_replicas = wait_replicas
        self._watches: dict[str, _Watch] = {}

    def close(self) -> None:
        """Drop every connection."""
        for watch in self._watches.values():
            watch.drop()
        self._watches.clear()
        super().close()

    def forward_take(
        self, source: Source, by: str, lease_s: float, shards: int, count: int
    ) -> Forwarding | None:
        """It stops after 8 MiB of jobs."""
        two_keys = [source.stream, self.shards_key(source.stream)]
        limits = (min(count, SCRIPT_IDS), SCRIPT_BYTES)
        command = script("forward_take", two_keys, source.group, by, round(lease_s * 1000), shards, *limits)
        reply = self.one(source.stream, command)
        return Forwarding(reply[0], reply[1], list(_entries(reply[2]))) if reply else None

    def forward_add(self, shard: str, stream: str, entries: Sequence[ForwardEntry]) -> bool:
        """With ``wait_replicas`` one WAIT follows on the same connection."""
        two_keys = [shard, self.shards_key(shard)]
        calls = [
            script(
                "forward_add", two_keys, stream, *(argument for entry in part for argument in _checked(entry))
            )
            for part in chunks_by_size(entries, lambda entry: len(entry.value))
        ]
        replies = self.call(shard, [*calls, *wait_command(self._wait_replicas)])
        for reply in replies[: len(calls)]:
            checked(reply)
        return not self._wait_replicas or not too_few(replies[-1], self._wait_replicas)

    def forward_done(self, stream: str, ids: Sequence[bytes]) -> None:
        self.one(stream, script("forward_done", [stream, self.shards_key(stream)], *ids))

    def begin_watch(self, stream: str, after: bytes) -> int | None:
        watch = self._watches.get(stream)
        if watch is None:
            watch = self._watches[stream] = _Watch(self._endpoint, Source(stream, ""), "", self._timeout_s)
        watch.after = after
        return watch.begin(1, _WATCH_MS)

    def end_watch(self, stream: str) -> None:
        watch = self._watches.get(stream)  # closed with all others after an error of any of them
        with suppress(GroupMissing):  # the stream was deleted, or has moved
            if watch is not None:
                watch.finish()

    def used_shards(self, stream: str) -> set[int]:
        fields = self.one(stream, ("HKEYS", self.shards_key(stream)))
        names = (name.decode(errors="replace") for name in fields)
        numbers = {name.removeprefix(_USED) for name in names if name.startswith(_USED)}
        return {count for count in range(1, MOST_SHARDS + 1) if str(count) in numbers}

    def forget_shards(self, stream: str, shards: int) -> None:
        self.one(stream, ("HDEL", self.shards_key(stream), f"{_USED}{shards}"))


def _checked(entry: ForwardEntry) -> tuple[Argument, ...]:
    """An entry with a checksum, which tells two entries with the same id from each other."""
    return entry.id, zlib.crc32(entry.value), entry.field, entry.value


def _entries(flat: Sequence[Any]) -> Iterator[ForwardEntry]:
    """The field ``data`` of each entry; without one its first field, so that a reader refuses the entry."""
    for id, fields in zip(flat[::2], flat[1::2], strict=True):
        names = fields[::2]
        at = 2 * names.index(DATA_FIELD) if DATA_FIELD in names else 0
        yield ForwardEntry(id, fields[at], fields[at + 1])
