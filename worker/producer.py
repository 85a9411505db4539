"""Producer: puts jobs on their streams, from Python."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from .envelope import (
    MAX_METADATA_ENTRIES,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    MAX_NAME_CHARS,
    Envelope,
    read_envelope,
)
from .errors import MalformedJob
from .extension import extension
from .settings import MAX_PAYLOAD_BYTES
from .store.ports import ProducerStore

#: Jobs held back for one pipeline: enough to hide the round trip, little to lose when it fails.
_BATCH_JOBS = 1000

#: Brackets from which on a job is read back to see whether it nests too deeply: far below any limit.
_NESTING_LOOKED_AT = 200

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_encode = msgspec.json.Encoder().encode
#: Slow, but refuses NaN and infinities, for which the quick encoder writes null.
_dump_finite = json.JSONEncoder(allow_nan=False).encode


class NewJob(NamedTuple):
    """A job to be enqueued. ``delay`` and ``timeout`` are seconds; ``stream`` and ``id`` None are chosen."""

    type: str
    payload: Any = None
    tenant_id: str = ""
    project_id: str = ""
    stream: str | None = None
    id: str | None = None
    metadata: Mapping[str, str] | None = None
    delay: float | None = None
    timeout: float | None = None


class Producer:
    """Enqueues jobs; a stream is never trimmed. Use it as a context manager, or call `close`.

    A job without ``stream`` goes where its type belongs; a type that is not built in goes to the first
    default stream, ``stream:story:gen``.
    """

    def __init__(
        self,
        redis_url: str = "",
        *,
        store: ProducerStore | None = None,
        wall_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = _redis(redis_url) if store is None else store
        self._wall_now_s = wall_now_s

    def enqueue(
        self,
        type: str,
        payload: Any,
        *,
        tenant_id: str = "",
        project_id: str = "",
        stream: str | None = None,
        id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        delay: float | None = None,
        timeout: float | None = None,
    ) -> str:
        """Put one job on its stream, or let it wait ``delay`` seconds first; returns its id.

        When this returns the store has acknowledged the job. Raises `ValueError` for a job that the service
        would refuse, `StoreUnavailable` when the store did not answer: the job may have been taken then, and
        enqueuing it again under the same id is the safe thing to do.
        """
        job = NewJob(type, payload, tenant_id, project_id, stream, id, metadata, delay, timeout)
        return self.enqueue_many([job])[0]

    def enqueue_many(
        self, jobs: Iterable[NewJob | Mapping[str, Any]], *, stream: str | None = None
    ) -> list[str]:
        """Put many jobs on their streams, pipelined; returns their ids in order.

        ``jobs`` are `NewJob` or mappings with its fields; ``stream`` is that of the jobs which name none. The
        order of jobs is kept within a stream. Raises as `enqueue` does; the jobs before the one that could
        not be enqueued may have been, so give them ids of your own if you mean to try again.
        """
        ids: list[str] = []
        waiting: dict[str, list[bytes]] = {}
        try:
            for item in jobs:
                job = _new_job(item)
                id, data = self._encoded(job)
                ids.append(id)
                self._put(waiting, job.stream or stream or _home_of(job.type), job, data)
        finally:
            # Also after an error: the jobs before it were accepted, and their order stands.
            for name, batch in waiting.items():
                self._flush(name, batch)
        return ids

    def close(self) -> None:
        """Drop the connection."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, waiting: dict[str, list[bytes]], stream: str, job: NewJob, data: bytes) -> None:
        if job.delay:
            self._store.schedule(stream, data, _seconds("delay", job.delay))
            return
        batch = waiting.setdefault(stream, [])
        batch.append(data)
        if len(batch) >= _BATCH_JOBS:
            self._flush(stream, batch)

    def _flush(self, stream: str, batch: list[bytes]) -> None:
        some = batch.copy()
        batch.clear()
        if some:
            self._store.add(stream, some)

    def _encoded(self, job: NewJob) -> tuple[str, bytes]:
        """The job's id and its JSON, checked by the rules that the service reads it by."""
        id = job.id if job.id is not None else os.urandom(16).hex()
        _check_names(id, job)
        _check_kinds(job)
        metadata = _metadata(job)
        _check_lengths(job.type, metadata or {})
        data = _encode(
            Envelope(
                id=id,
                type=job.type,
                tenant_id=job.tenant_id,
                project_id=job.project_id,
                payload=msgspec.Raw(_payload_json(job.payload)),
                metadata=metadata,
                created_at=_rfc3339(self._wall_now_s()),
                timeout=None if job.timeout is None else _seconds("timeout", job.timeout),
            )
        )
        # A service with the default limit would dead-letter it at once.
        if len(data) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"job {id} is {len(data)} bytes of JSON, more than {MAX_PAYLOAD_BYTES}")
        if isinstance(job.payload, msgspec.Raw) or data.count(b"[") + data.count(b"{") > _NESTING_LOOKED_AT:
            _check_readable(id, data)
        return id, data


def _redis(url: str) -> ProducerStore:
    # Imported late: a caller with a store of its own needs no client library.
    from .store.redis.producer import RedisProducerStore

    return RedisProducerStore(url)


def _new_job(item: NewJob | Mapping[str, Any]) -> NewJob:
    if isinstance(item, NewJob):
        return item
    unknown = item.keys() - set(NewJob._fields)
    if unknown or "type" not in item:
        raise ValueError(f"a job has a type and knows no field {', '.join(map(repr, sorted(unknown)))}")
    return NewJob(**item)


def _home_of(type: str) -> str:
    return extension().stream_of_type.get(type, extension().streams[0].stream)


def _metadata(job: NewJob) -> dict[str, str] | None:
    """What the job was given, and the span that the caller is in, where he makes traces."""
    if "opentelemetry.sdk.trace" in sys.modules:
        from .telemetry.otel_context import with_traceparent  # only then: it needs the library

        return with_traceparent(job.metadata)
    return None if job.metadata is None else dict(job.metadata)


def _check_names(id: str, job: NewJob) -> None:
    for field, value in (("id", id), ("tenant_id", job.tenant_id), ("project_id", job.project_id)):
        optional = field != "id" and value == ""
        if not optional and (not isinstance(value, str) or not _ID.fullmatch(value)):
            raise ValueError(f"{field} {value!r:.80} does not match {_ID.pattern}")


def _check_kinds(job: NewJob) -> None:
    """What the type annotations say; a caller without a type checker should learn of it before the queue."""
    if not isinstance(job.type, str) or not job.type:
        raise ValueError(f"type {job.type!r:.80} is no name")
    for pair in (job.metadata or {}).items():
        if not all(isinstance(part, str) for part in pair):
            raise ValueError(f"metadata maps text to text, not {pair!r:.80}")


def _check_lengths(type: str, metadata: Mapping[str, str]) -> None:
    """What is longer the service would refuse as malformed. `_check_names` bounds the ids."""
    if len(type) > MAX_NAME_CHARS:
        raise ValueError(f"type {type!r:.80} has {len(type)} characters, more than {MAX_NAME_CHARS}")
    if len(metadata) > MAX_METADATA_ENTRIES:
        raise ValueError(f"metadata has {len(metadata)} entries, more than {MAX_METADATA_ENTRIES}")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            raise ValueError(
                f"metadata {key!r:.80}: a key has at most {MAX_METADATA_KEY_CHARS} characters "
                f"and a value {MAX_METADATA_VALUE_CHARS}"
            )


def _check_readable(id: str, data: bytes) -> None:
    try:
        read_envelope(data)
    except MalformedJob as error:
        raise ValueError(f"job {id} would be refused: {error}") from None


def _payload_json(payload: Any) -> bytes:
    try:
        data = _encode(payload)
        if b"null" in data:
            _dump_finite(msgspec.to_builtins(payload))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the payload is no JSON: {error}") from None
    return data


def _seconds(field: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{field} is {value!r}: a number of seconds above 0 is needed")
    return value


def _rfc3339(wall_s: float) -> str:
    second, ms = divmod(int(wall_s * 1000), 1000)
    return f"{_rfc3339_second(second)}.{ms:03d}Z"


@lru_cache(maxsize=1)  # thousands of jobs share a second
def _rfc3339_second(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
