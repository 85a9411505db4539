"""What one stream of the in-memory server keeps of batches: the rules of ``prelude_batch.lua``."""

from collections import Counter
from collections.abc import Callable, Iterable

from ..batches import OPEN_S, parse_batch


class MemoryBatches:
    """What one stream keeps of batches."""

    def __init__(self, wall_now_s: Callable[[], float]) -> None:
        self._wall_now_s = wall_now_s
        #: Batch id of pending entries.
        self.members: dict[bytes, str] = {}
        self.due: dict[str, bytes] = {}
        #: Batch id -> time of creation or of the end.
        self.open: dict[str, float] = {}
        self.finished: dict[str, float] = {}
        self._hashes: dict[str, dict[bytes, bytes]] = {}
        self._expires: dict[str, float] = {}

    def get(self, id: str) -> dict[bytes, bytes] | None:
        """The hash of a batch; None if there is none, or its time is over."""
        if self._expires.get(id, float("inf")) < self._wall_now_s():
            self.drop(id)
        return self._hashes.get(id)

    def create(self, id: str) -> dict[bytes, bytes]:
        """The hash of a batch, created if it is missing."""
        return self.get(id) or self._hashes.setdefault(id, {})

    def keep(self, id: str, seconds: float) -> None:
        """Let the hash expire after this time."""
        self._expires[id] = self._wall_now_s() + seconds

    def has_expiry(self, id: str) -> bool:
        """Whether the hash will expire."""
        return id in self._expires

    def drop(self, id: str) -> None:
        """Delete the hash of a batch."""
        self._hashes.pop(id, None)
        self._expires.pop(id, None)

    def touch(self, id: str) -> None:
        """List a batch, keep it for another while, and make it due if all its jobs may have ended."""
        fields = self.create(id)
        one = parse_batch(fields)
        if one.wall_finished_s is not None:
            return
        if one.total is None or one.done + one.dead >= one.total:
            self.due[id] = b"%d" % (one.done + one.dead)
        if not one.home:
            self.open.setdefault(id, self._wall_now_s())
        self.keep(id, OPEN_S)

    def count(self, id: str, outcome: str, number: int) -> None:
        """Count jobs that ended: ``outcome`` is done or dead."""
        fields = self.get(id)
        if fields is not None:
            add(fields, outcome, number)
            self.touch(id)

    def leave(self, ids: Iterable[bytes], outcome: str = "") -> None:
        """Take entries out of their batches, with an outcome if their jobs ended."""
        left = Counter(batch for id in ids if (batch := self.members.pop(id, None)) is not None)
        for batch, number in left.items() if outcome else ():
            self.count(batch, outcome, number)


def add(fields: dict[bytes, bytes], name: str, number: int) -> None:
    """Add to a counter."""
    fields[name.encode()] = b"%d" % (int(fields.get(name.encode(), b"0")) + number)
