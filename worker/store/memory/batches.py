"""Batches of jobs in memory: the rules of the Lua scripts ``batch_*.lua``."""

from collections.abc import Mapping, Sequence

from ...keys import batches_key
from ..batches import MAX_FINISHED, OPEN_S, PAGE, Added, DueBatch, StreamBatch, Sweep, parse_batch
from .batch_counts import MemoryBatches, add
from .server import MemoryServer

_CLOSED, _SWEPT = b"closed", b"-1"


class MemoryBatchStore:
    """`BatchProducerStore` and `BatchStore` over a `MemoryServer`."""

    _server: MemoryServer

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
            for name, value in {"created": b"%.3f" % self._server.wall_now_s(), **fields}.items():
                record.setdefault(name.encode(), value)
            batches.touch(id)
            return True

    def batch_add(
        self, stream: str, id: str, home: str, jobs: Sequence[bytes], total: int | None = None
    ) -> Added:
        with self._server.lock:
            self._server.check(stream)
            batches = self._batches(stream)
            record = batches.create(id)
            if b"finished" in record:
                return Added.FINISHED
            if total is not None and int(record.get(b"total", b"0")) != total:
                return Added.OTHER_TOTAL
            for job in jobs:
                self._server.append(stream, job)
            add(record, "total", len(jobs))
            if home:
                record.setdefault(b"home", home.encode())
            batches.keep(id, OPEN_S)
            return Added.YES

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
