"""Idempotency and supersede keys of one stream in memory: the same decisions as the script ``screen``."""

from collections.abc import Callable
from typing import NamedTuple

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
        #: Digest -> first entry of the owner, and the end of its claim.
        self._owners: dict[str, tuple[bytes, float]] = {}
        self._newest: dict[str, _Newest] = {}

    def claim(self, unique: str, first_id: bytes, window_s: float) -> bytes | None:
        """Take an idempotency key; the first entry of another job that has it."""
        now_s = self._wall_now_s()
        owner, until_s = self._owners.get(unique, (first_id, 0.0))
        if until_s > now_s:
            return None if owner == first_id else owner
        self._owners[unique] = first_id, now_s + window_s
        return None

    def free(self, unique: str, first_id: bytes) -> None:
        """Free an idempotency key that the job owns."""
        if unique and self._owners.get(unique, (b"", 0.0))[0] == first_id:
            del self._owners[unique]

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
