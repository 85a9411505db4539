"""The move of entries into shards in memory: the rules of the Lua scripts ``forward_*.lua``."""

from collections import deque
from collections.abc import Sequence

from ...keys import DATA_FIELD, Source
from ..forwarding import ForwardEntry, Forwarding
from .server import MemoryServer, order


class MemoryForwardStore:
    """`ForwardStore` over a `MemoryServer`, which has the batches."""

    _server: MemoryServer

    def forward_take(
        self, source: Source, by: str, lease_s: float, shards: int, count: int
    ) -> Forwarding | None:
        with self._server.lock:
            self._server.check(source.stream)
            stream, now_s = self._server.stream(source.stream), self._server.wall_now_s()
            state, group = stream.forwarding, stream.groups.get(source.group)
            if group is None or (state.by not in ("", by) and state.wall_until_s > now_s):
                return None
            state.by, state.wall_until_s = by, now_s + lease_s
            ids = [id for id in stream.entries if order(state.moved) < order(id) <= order(state.taken)]
            if not ids:
                state.moved = max(state.taken, b"%d-%d" % group.last_delivered, key=order)
                state.shards = shards
                ids = [id for id in stream.entries if order(id) > order(state.moved)][:count]
                state.taken = ids[-1] if ids else state.moved
                group.last_delivered = max(group.last_delivered, order(state.taken))
            state.used.add(state.shards)
            entries = [ForwardEntry(id, *_field(stream.entries[id])) for id in ids[:count]]
            return Forwarding(state.shards, state.taken, entries)

    def forward_add(self, shard: str, stream: str, entries: Sequence[ForwardEntry]) -> bool:
        with self._server.lock:
            self._server.check(shard)
            appended = self._server.stream(shard).forwarding.appended[stream]
            for entry in entries:
                if _is_new(appended, entry):
                    self._server.append(shard, entry.value if entry.field == DATA_FIELD else None)
                    appended.append(entry)
            return True

    def forward_done(self, stream: str, ids: Sequence[bytes]) -> None:
        with self._server.lock:
            self._server.check(stream)
            moved_from = self._server.stream(stream)
            moved_from.forwarding.moved = max(moved_from.forwarding.moved, ids[-1], key=order)
            for id in ids if len(moved_from.groups) == 1 else ():
                moved_from.entries.pop(id, None)

    def begin_watch(self, stream: str, after: bytes) -> int | None:
        return None

    def end_watch(self, stream: str) -> None:
        """Nothing is watched."""

    def used_shards(self, stream: str) -> set[int]:
        return set(self._server.stream(stream).forwarding.used)

    def forget_shards(self, stream: str, shards: int) -> None:
        self._server.stream(stream).forwarding.used.discard(shards)

    def share_shards(self, stream: str, lease_s: float, count: int) -> set[int]:
        """One reader owns all shards in memory."""
        return set(range(count)) if lease_s else set()


def _is_new(appended: deque[ForwardEntry], entry: ForwardEntry) -> bool:
    """Whether an entry was not appended before, also if the ids of its stream have gone back."""
    if not appended or order(appended[-1].id) < order(entry.id):
        return True
    return order(appended[0].id) < order(entry.id) and entry not in appended


def _field(data: bytes | None) -> tuple[bytes, bytes]:
    return (b"other", b"") if data is None else (DATA_FIELD, data)
