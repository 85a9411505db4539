"""Batches: jobs that are counted together, and the callback that is enqueued when all have ended.

Settlement counts the jobs, in its own step. The reaper of every host looks at the batches that may have
finished; the job store decides which host finishes one, so each callback is enqueued once.
"""

import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import orjson

from .envelope import BATCH_FIELD, is_batch_id
from .errors import StoreRefused
from .new_job import NewJob, encode_job
from .settings import Settings
from .store.batches import BatchFinder, BatchStore, DueBatch, StreamBatch
from .telemetry.metrics import MetricsBuffer

log = logging.getLogger("jobworker.batches")

#: Interval at which open batches are checked although no job reported their end (seconds).
_SWEEP_INTERVAL_S = 10.0
_MAX_ERROR_CHARS = 300


class Batch(NamedTuple):
    """A batch with its counts over all streams. ``total`` is None while it is unknown."""

    id: str
    home: str
    record: StreamBatch
    total: int | None
    done: int
    dead: int

    @property
    def state(self) -> str:
        """``open`` while jobs may be added, then ``closed``, then ``finished``."""
        return self.record.state

    @property
    def callback_id(self) -> str:
        """Id of the callback."""
        return f"batch:{self.id}"

    @property
    def ended(self) -> int:
        """Jobs that are done or dead."""
        return self.done + self.dead

    @property
    def may_finish(self) -> bool:
        """Whether it is closed and all its jobs have ended."""
        return self.state == "closed" and self.total is not None and self.ended >= self.total

    @property
    def percent(self) -> float | None:
        """Share of ended jobs, 0 to 100, rounded down to a tenth; None while the total is unknown."""
        if self.total is None:
            return None
        return min(1000, self.ended * 1000 // self.total) / 10 if self.total else 100.0


def find_batch(store: BatchFinder, streams: Iterable[str], id: str) -> Batch | None:
    """The batch of this id, looked for on these streams; None if none of them knows it."""
    for stream in streams:
        found = store.batch_hash(stream, id)
        if found is not None:
            return read_batch(store, found.home or stream, id)
    return None


def read_batch(store: BatchFinder, home: str, id: str) -> Batch | None:
    """A batch by its home stream; None if it has no record."""
    record = store.batch_hash(home, id)
    if record is None:
        return None
    others = [found for stream in record.streams if (found := store.batch_hash(stream, id)) is not None]
    parts = [record, *others]
    totals = [one.total for one in parts if one.total is not None]
    total = sum(totals) if totals else None
    return Batch(id, home, record, total, sum(one.done for one in parts), sum(one.dead for one in parts))


def batch_facts(batch: Batch) -> dict[str, Any]:
    """A batch as JSON for people and programs."""
    record = batch.record
    return {
        "id": batch.id, "name": record.name, "tenant_id": record.tenant_id, "state": batch.state,
        "total": batch.total, "done": batch.done, "dead": batch.dead, "percent": batch.percent,
        "streams": [batch.home, *record.streams],
        "created_at": _time_text(record.wall_created_s), "closed_at": _time_text(record.wall_closed_s),
        "finished_at": _time_text(record.wall_finished_s),
        "callback_id": batch.callback_id if record.callback else None, "error": record.error or None,
    }  # fmt: skip


def _time_text(wall_s: float | None) -> str | None:
    if not wall_s:
        return None
    try:
        return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # another program wrote the field
        return None


class _Callback(msgspec.Struct):
    """A job on the wire, of which only the type is required."""

    type: str
    payload: msgspec.Raw = msgspec.Raw(b"null")
    tenant_id: str = ""
    project_id: str = ""
    metadata: dict[str, str] | None = None
    timeout: float | None = None


_callback = msgspec.json.Decoder(_Callback)


def callback_job(batch: Batch, wall_now_s: float) -> bytes:
    """The callback's JSON with the counts in its metadata. Raises ValueError for an ``on_complete`` that is
    no job."""
    try:
        wanted = _callback.decode(batch.record.on_complete)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    metadata = {name: text for name, text in (wanted.metadata or {}).items() if (name, text) != _self(batch)}
    counts = {"total": batch.total, "done": batch.done, "dead": batch.dead}
    metadata |= {f"batch_{name}": str(count) for name, count in counts.items()}
    metadata["completed_batch_id"] = batch.id
    job = NewJob(
        wanted.type, orjson.Fragment(bytes(wanted.payload)), wanted.tenant_id or batch.record.tenant_id,
        wanted.project_id, id=batch.callback_id, metadata=metadata, timeout=wanted.timeout,
    )  # fmt: skip
    return encode_job(job, wall_now_s)[1]


def _self(batch: Batch) -> tuple[str, str]:
    """The member of metadata that would count the callback in the batch that it completes."""
    return BATCH_FIELD, batch.id


class BatchFinisher:
    """Finishes the batches whose jobs have all ended. Methods raise as the store does."""

    def __init__(
        self,
        store: BatchStore,
        settings: Settings,
        metrics: MetricsBuffer,
        mono_s: Callable[[], float],
        wall_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._mono_s = mono_s
        self._wall_now_s = wall_now_s
        self._keep_s = settings.batch_ttl_s
        self._streams = [source.stream for source in settings.streams]
        #: By stream: when its open batches are looked at next, and from which rank on.
        self._mono_sweep_s = dict.fromkeys(self._streams, 0.0)
        self._ranks = dict.fromkeys(self._streams, 0)
        for stream in self._streams:  # start at 0, so that alerts see the first one as a rise
            self._metrics.count("z_novel_batches_finished_total", (stream,), 0)

    def run_once(self, stream: str) -> bool:
        """Finish what can be finished on one stream; whether a batch was due there."""
        now_s = self._mono_s()
        if now_s >= self._mono_sweep_s[stream]:
            swept = self._store.batch_sweep(stream, self._ranks[stream], self._keep_s)
            self._metrics.gauge("z_novel_batches_open", (stream,), swept.open)
            self._ranks[stream] = swept.next_rank
            self._mono_sweep_s[stream] = now_s + _SWEEP_INTERVAL_S
        found = self._store.batch_due(stream)
        for due in found:
            self._check_batch(stream, due)
        return bool(found)

    def find(self, id: str) -> Batch | None:
        """A batch of this service's streams."""
        return find_batch(self._store, self._streams, id) if is_batch_id(id) else None

    def _check_batch(self, stream: str, due: DueBatch) -> None:
        try:
            batch = find_batch(self._store, [stream], due.id)
            if batch is not None:
                self._finish(batch)
        except StoreRefused as error:  # one batch that another program damaged must not stop the others
            log.error("batch.unreadable", extra={"batch": due.id, "stream": stream, "error": str(error)})
        self._store.batch_seen(stream, due)

    def _finish(self, batch: Batch) -> None:
        if batch.may_finish:
            data, error = self._callback(batch)
            if self._store.batch_finish(batch.home, batch.id, data, error, self._keep_s):
                self._record(batch, has_callback=bool(data))
        elif batch.state != "finished":
            return
        # Also if an earlier reaper finished it and was killed here.
        for stream in batch.record.streams:
            self._store.batch_seal(stream, batch.id, self._keep_s)

    def _callback(self, batch: Batch) -> tuple[bytes, str]:
        """The callback, and why there is none."""
        if not batch.record.on_complete:
            return b"", ""
        try:
            return callback_job(batch, self._wall_now_s()), ""
        except ValueError as error:
            text = f"on_complete is no job: {error}"[:_MAX_ERROR_CHARS]
            log.error("batch.callback_invalid", extra={"batch": batch.id, "error": text})
            return b"", text

    def _record(self, batch: Batch, *, has_callback: bool) -> None:
        self._metrics.count("z_novel_batches_finished_total", (batch.home,))
        self._mono_sweep_s[batch.home] = 0.0  # one open batch less
        callback = {"job_id": batch.callback_id} if has_callback else {}
        counts = {"total": batch.total, "completed": batch.done, "dead": batch.dead}
        log.info("batch.finished", extra={"batch": batch.id, "stream": batch.home, **counts, **callback})
