"""Idempotency and supersede keys of one stream in memory: the same decisions as the scripts."""

from collections.abc import Callable
from typing import NamedTuple

from ..ports import OwnedKey

#: Time for which the newest job of a series is known, from its due time on (seconds).
_KEEP_NEWEST_S = 24 * 3600.0


class _Newest(NamedTuple):
    """The newest job of a series: its first and its present entry, its due time, the end of the record."""

    first_id: bytes
    id: bytes
    due_s: float
    wall_until_s: float


def _order(id: bytes) -> tuple[int, int]:
    ms, _, sequence = id.partition(b"-")
    return int(ms), int(sequence)


class MemoryConditions:
    """What the jobs of a stream have claimed. ``wall_now_s`` is the server's clock (unix seconds)."""

    def __init__(self, wall_now_s: Callable[[], float]) -> None:
        self._wall_now_s = wall_now_s
        #: Bucket -> name of a key -> first entry of the owner.
        self._buckets: dict[str, dict[str, bytes]] = {}
        self._newest: dict[str, _Newest] = {}

    def claim(self, name: str, first_id: bytes, window_ms: int) -> bytes | None:
        """Claim an idempotency key; the first entry of another job that owns it."""
        number = _order(first_id)[0] // window_ms
        for other in (number - 1, number, number + 1):
            owner = self._buckets.get(f"{window_ms}/{other}", {}).get(name, first_id)
            if owner != first_id and abs(_order(first_id)[0] - _order(owner)[0]) < window_ms:
                return owner
        self._buckets.setdefault(f"{window_ms}/{number}", {})[name] = first_id
        return None

    def free(self, key: OwnedKey) -> None:
        """Free an idempotency key if the job owns it."""
        bucket = self._buckets.get(key.bucket, {})
        if bucket.get(key.name) == key.first_id:
            del bucket[key.name]

    def free_name(self, name: str, first_id: bytes) -> None:
        """Free an idempotency key in every bucket in which the job owns it."""
        for bucket in self._buckets:
            self.free(OwnedKey(bucket, name, first_id))

    def forget(self) -> int:
        """Delete the buckets whose window has passed; returns their number."""
        outdated = []
        for bucket in self._buckets:
            window_ms, number = map(int, bucket.split("/"))
            if (number + 2) * window_ms <= int(self._wall_now_s()) * 1000:
                outdated.append(bucket)
        for bucket in outdated:
            del self._buckets[bucket]
        return len(outdated)

    def lead(
        self, series: str, id: bytes, first_id: bytes, due_s: float
    ) -> tuple[bytes | None, bytes | None]:
        """Make a job the newest of its series. Returns the first entry of a newer one, then that of a delayed
        one that it replaces."""
        before = self._newest_of(series)
        if before and _order(first_id) < _order(before.first_id):
            return before.first_id, None
        until_s = max(due_s, self._wall_now_s()) + _KEEP_NEWEST_S
        self._newest[series] = _Newest(first_id, id, due_s, until_s)
        replaces = before is not None and before.first_id != first_id and before.due_s > 0
        return None, before.first_id if before and replaces else None

    def is_superseded(self, series: str, id: bytes) -> bool:
        """Whether a newer job of the series than the one with this entry has been read."""
        newest = self._newest_of(series)
        return newest is not None and newest.id != id

    def _newest_of(self, series: str) -> _Newest | None:
        newest = self._newest.get(series)
        return newest if newest and newest.wall_until_s > self._wall_now_s() else None
