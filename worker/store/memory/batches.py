"""Batches of jobs in memory: the rules of the Lua scripts ``batch_*.lua`` and ``prelude_batch.lua``."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...keys import batches_key
from ..batches import MAX_FINISHED, OPEN_S, PAGE, BatchJob, DueBatch, StreamBatch, Sweep, parse_batch

if TYPE_CHECKING:
    from .server import MemoryServer

_CLOSED, _SWEPT = b"closed", b"-1"


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
        if id in self._hashes and self._expires.get(id, self._wall_now_s()) < self._wall_now_s():
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


class MemoryBatchStore:
    """`BatchProducerStore` and `BatchStore` over a `MemoryServer`."""

    _server: "MemoryServer"

    def batch_hash(self, stream: str, id: str) -> StreamBatch | None:
        with self._server.lock:
            fields = self._batches(stream).get(id)
            return None if fields is None else parse_batch(fields)

    def batch_ids(self, stream: str, count: int) -> list[str]:
        with self._server.lock:
            batches = self._batches(stream)
            parts = (batches.open, batches.finished)
            newest = [id for part in parts for id in sorted(part, key=part.__getitem__, reverse=True)]
            return newest[:count]

    def batch_open(self, stream: str, id: str, fields: Mapping[str, bytes]) -> bool:
        with self._server.lock:
            batches = self._batches(stream)
            record = batches.create(id)
            if b"finished" in record:
                return False
            for name, value in {"created": self._now(), **fields}.items():
                record.setdefault(name.encode(), value)
            batches.touch(id)
            return True

    def batch_add(self, stream: str, id: str, home: str, jobs: Sequence[BatchJob]) -> bool:
        with self._server.lock:
            self._server.check(stream)
            batches = self._batches(stream)
            record = batches.create(id)
            if b"finished" in record:
                return False
            for job in jobs:
                if job.delay_s > 0:
                    self._server.schedule(stream, job.data, job.delay_s)
                else:
                    self._server.append(stream, job.data)
            add(record, "total", len(jobs))
            if home:
                record.setdefault(b"home", home.encode())
            batches.keep(id, OPEN_S)
            return True

    def batch_close(self, stream: str, id: str) -> bool:
        with self._server.lock:
            batches = self._batches(stream)
            record = batches.get(id)
            if record is None:
                return False
            record.setdefault(b"closed", self._now())
            record.setdefault(b"total", b"0")
            if b"finished" not in record:
                batches.touch(id)
                batches.due[id] = _CLOSED
            return True

    def batch_due(self, stream: str) -> list[DueBatch]:
        with self._server.lock:
            return [DueBatch(*item) for item in list(self._batches(stream).due.items())[:PAGE]]

    def batch_seen(self, stream: str, due: DueBatch) -> None:
        with self._server.lock:
            marks = self._batches(stream).due
            if marks.get(due.id) == due.mark:
                del marks[due.id]

    def batch_finish(self, stream: str, id: str, callback: bytes, error: str, keep_s: float) -> bool:
        with self._server.lock:
            batches = self._batches(stream)
            record = batches.get(id)
            if record is None or b"closed" not in record or b"finished" in record:
                return False
            if callback:
                self._server.check(stream)
                record[b"callback"] = self._server.append(stream, callback)
            elif error:
                record[b"error"] = error.encode()
            record[b"finished"] = self._now()
            batches.keep(id, keep_s)
            batches.open.pop(id, None)
            batches.finished[id] = self._server.wall_now_s()
            return True

    def batch_seal(self, stream: str, id: str, keep_s: float) -> None:
        with self._server.lock:
            self._batches(stream).create(id)[b"finished"] = self._now()
            self._batches(stream).keep(id, keep_s)

    def batch_sweep(self, stream: str, rank: int, keep_s: float) -> Sweep:
        with self._server.lock:
            batches = self._batches(stream)
            oldest = sorted(batches.finished, key=batches.finished.__getitem__)
            surplus = len(oldest) - MAX_FINISHED
            for number, id in enumerate(oldest):
                if number < surplus:
                    batches.drop(id)
                if number < surplus or batches.finished[id] < self._server.wall_now_s() - keep_s:
                    del batches.finished[id]
            found = sorted(batches.open, key=batches.open.__getitem__)[rank : rank + PAGE]
            for id in found:
                if batches.get(id) is None:
                    del batches.open[id]
                    continue
                if not batches.has_expiry(id):
                    batches.keep(id, OPEN_S)
                batches.due.setdefault(id, _SWEPT)
            return Sweep(len(batches.open), rank + PAGE if len(found) == PAGE else 0)

    def _batches(self, stream: str) -> MemoryBatches:
        self._server.check(*(batches_key(stream, part) for part in ("jobs", "due")))
        return self._server.stream(stream).batches

    def _now(self) -> bytes:
        return b"%d" % self._server.wall_now_s()
