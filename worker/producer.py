"""Producer: puts jobs on their streams, from Python."""

# orjson writes null for NaN and infinities, which must be refused.
import json
import os
import re
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import orjson

from .conditions import EXPIRES_AT, NOT_BEFORE, parse_time
from .envelope import (
    BATCH_FIELD,
    MAX_METADATA_ENTRIES,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    MAX_NAME_CHARS,
    MAX_NESTING,
    is_batch_id,
    nesting_of,
    read_envelope,
)
from .errors import MalformedJob, StoreUnavailable
from .extension import extension
from .host.endpoints import only_stream, store_url
from .keys import base_stream, is_derived
from .producer_batch import OpenBatch, PreparedJob
from .results import KEEP_RESULT, CancelOutcome, JobResult, decode_result
from .safe_text import is_unicode
from .settings import MAX_PAYLOAD_BYTES
from .store.announcements import Announcement, stream_for, suggestion
from .store.ports import ProducerStore

#: Jobs held back for one pipeline: enough to hide the round trip, little to lose when it fails.
_BATCH_JOBS = 1000

#: Pairs of type and stream that are checked, each by one short call; beyond, a producer invents names.
_MAX_CHECKED = 1000
#: Time between two looks for services where none has run yet (seconds). Jobs of a type that is not built in
#: may go to the wrong stream meanwhile.
_CHECK_INTERVAL_S = 5.0
#: How long a type is sent to the stream that a registered service named (seconds).
_ROUTE_LIFETIME_S = 60.0

#: First and longest pause between two looks for a result (seconds).
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5

#: Longest delay and timeout, a hundred years: the sum with the store's clock stays exact.
_MAX_SECONDS = 3_155_760_000

#: Brackets from which on a job is read back to see whether it nests too deeply: far below any limit.
_NESTING_LOOKED_AT = 200

_TENANT = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
#: msgspec writes these: with Z for UTC, and with the private fields of dataclasses.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


#: A point in time as callers give it.
Time = datetime | str | float


class UnknownDestination(UserWarning):
    """No service of the deployment runs the job's type, or reads its stream: probably a typing error.

    The job is sent all the same. With ``warnings.simplefilter("error", UnknownDestination)`` it is not sent,
    and the warning is raised.
    """


class NewJob(NamedTuple):
    """A job to be enqueued. ``delay`` and ``timeout`` are seconds; ``stream`` and ``id`` None are chosen.

    ``run_at`` and ``expires_at`` are times: RFC 3339, unix seconds, or a `datetime` with a time zone.

    With ``keep_result``, what its handler returns is kept for `Producer.result`.
    """

    type: str
    payload: Any = None
    tenant_id: str = ""
    project_id: str = ""
    stream: str | None = None
    id: str | None = None
    metadata: Mapping[str, str] | None = None
    delay: float | None = None
    timeout: float | None = None
    run_at: Time | None = None
    expires_at: Time | None = None
    keep_result: bool = False


class _Route(NamedTuple):
    """The stream of a type, and when the services are looked at again (monotonic seconds)."""

    stream: str
    mono_until_s: float


class _StorePool:
    """Idle stores of a producer. A store has one user at a time: threads, signal handlers and forked
    processes never share a connection.

    There is no lock: a lock that another thread holds during a fork is never released in the child.
    """

    def __init__(self, make: Callable[[], ProducerStore]) -> None:
        self._make = make
        self._idle = deque([make()])  # the first at once: a wrong URL is an error of the constructor
        _pools.add(self)

    @contextmanager
    def borrow(self) -> Iterator[ProducerStore]:
        """A store of the caller's own. After any error its connections are closed: replies may be left."""
        try:
            store = self._idle.pop()
        except IndexError:
            store = self._make()
        try:
            yield store
        except BaseException:
            store.close()
            raise
        self._idle.append(store)

    def close(self) -> None:
        """Drop the connections of idle stores."""
        for store in list(self._idle):
            store.close()

    def forget(self) -> None:
        """In a forked child: drop the parent's stores without a word to the server."""
        self._idle.clear()


_pools: weakref.WeakSet[_StorePool] = weakref.WeakSet()


def _forget_inherited_stores() -> None:
    for pool in list(_pools):
        pool.forget()


os.register_at_fork(after_in_child=_forget_inherited_stores)


class Producer:
    """Enqueues jobs; a stream is never trimmed. Use it as a context manager, or call `close`.

    Without a URL it uses ``JOBWORKER_REDIS_URL``, else the embedded store of the service in
    ``JOBWORKER_DATA_DIR`` (``./jobworker-data``). Raises `ConfigurationError` if neither names a store.

    Threads may share one, and so may a process and its forked children: each thread that enqueues at the same
    time gets a connection of its own.

    A job without ``stream`` goes where its type belongs. A type that is not built in goes to a stream of a
    registered service that handles it (``stream:story:gen`` if that service reads it, else its first one);
    else to the one of ``JOBWORKER_STREAM`` if that names exactly one; else to ``stream:story:gen``.
    """

    def __init__(
        self,
        redis_url: str = "",
        *,
        store: ProducerStore | None = None,
        wall_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._stores = _StorePool(lambda: _redis(redis_url) if store is None else store)
        self._wall_now_s = wall_now_s
        #: Pairs of type and stream that were compared with what the services announce.
        self._checked: set[tuple[str, str]] = set()
        self._mono_next_check_s = 0.0
        #: Streams of types that are not built in.
        self._routes: dict[str, _Route] = {}
        #: The environment is not for a store of the caller's own, such as that of a test.
        self._own_stream = only_stream() if store is None else ""
        #: Types that were sent to the default stream because no service was registered.
        self.guessed: set[str] = set()

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
        run_at: Time | None = None,
        expires_at: Time | None = None,
        keep_result: bool = False,
    ) -> str:
        """Put one job on its stream; returns its id.

        It starts after ``delay`` seconds, or not before ``run_at``. If it has not started by ``expires_at``
        it is dead-lettered. Both times are RFC 3339, unix seconds, or a `datetime` with a time zone; they are
        sent in ``metadata``. A service counts a ``timeout`` below 0.1 s as 0.1 s, and one above 24 h as 24 h.

        With ``keep_result``, `result` returns what the handler returned; ``id`` must be unique in its stream
        then.

        When this returns the store has acknowledged the job. Raises `ValueError` for a job that the service
        would refuse, `StoreUnavailable` when the store did not answer: the job may have been taken then, and
        enqueuing it again under the same id is the safe thing to do.
        """
        job = NewJob(
            type,
            payload,
            tenant_id,
            project_id,
            stream,
            id,
            metadata,
            delay,
            timeout,
            run_at,
            expires_at,
            keep_result,
        )
        return self._send([job], None)[0]

    def enqueue_many(
        self, jobs: Iterable[NewJob | Mapping[str, Any]], *, stream: str | None = None
    ) -> list[str]:
        """Put many jobs on their streams, pipelined; returns their ids in order.

        ``jobs`` are `NewJob` or mappings with its fields; ``stream`` is that of the jobs which name none. The
        order of jobs is kept within a stream. Raises as `enqueue` does; the jobs before the one that could
        not be enqueued may have been, so give them ids of your own if you mean to try again.
        """
        return self._send(jobs, stream)

    def result(self, id: str, timeout: float, *, stream: str | Sequence[str] | None = None) -> JobResult:
        """Wait until a job that was enqueued with ``keep_result`` has ended, at most ``timeout`` seconds.

        Without ``stream`` (one name or several), the streams of all registered services are looked at. Raises
        `TimeoutError` if there is no result by then, `StoreUnavailable` as the store does, and `ValueError`
        for a record that is damaged.
        """
        _check_text("id", id)
        if (
            isinstance(timeout, bool)
            or not isinstance(timeout, int | float)
            or not 0 <= timeout <= _MAX_SECONDS
        ):
            raise ValueError(f"timeout is {timeout!r:.80}: a number of seconds from 0 on is needed")
        streams = self._streams_of(stream)
        give_up_s = time.monotonic() + timeout
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._stores.borrow() as store:
                for name in streams:
                    if (record := store.result(name, id)) is not None:
                        return decode_result(record)
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"job {id} has no result after {timeout:g} s")
            time.sleep(min(pause_s, left_s))
            pause_s = min(_LONGEST_PAUSE_S, 1.5 * pause_s)

    def cancel(self, id: str, *, stream: str | None = None, discard: bool = False) -> CancelOutcome:
        """Cancel a job: remove it if it waits, or ask the service that runs it to end it.

        A cancelled job becomes a dead letter, or is dropped with ``discard``. The job is searched for: at
        most 100,000 entries and retries of each stream are read. Raises `StoreUnavailable` as the store does.
        """
        from .cancel import (
            SCAN_LIMIT,
            Canceller,
            JobFilter,
            outcome_of,
        )  # few programs cancel

        _check_text("id", id)
        streams = self._streams_of(stream)
        with self._stores.borrow() as store:
            search = Canceller(
                store, streams, JobFilter(frozenset([id])), by="producer", discard=discard,
                scan_limit=SCAN_LIMIT, wall_now_s=self._wall_now_s,
            )  # fmt: skip
            return outcome_of(list(search.run()))

    def _streams_of(self, stream: str | Sequence[str] | None) -> list[str]:
        """The streams in which a job may be."""
        if stream is not None:
            names = [stream] if isinstance(stream, str) else list(stream)
            for name in names:
                _check_text("stream", name)
            return names
        with self._stores.borrow() as store:
            announced = [name for one in store.announcements() for name in one.streams]
        routes = [route.stream for route in self._routes.values()]
        own = [self._own_stream] if self._own_stream else []
        return list(dict.fromkeys([*announced, *own, *routes, *(one.stream for one in extension().streams)]))

    def batch(
        self,
        tenant_id: str = "",
        *,
        on_complete: NewJob | Mapping[str, Any] | None = None,
        name: str = "",
        id: str | None = None,
    ) -> OpenBatch:
        """Open a batch: jobs that are counted together. Use it as a context manager.

        When the batch is closed and all its jobs have ended, done or dead-lettered, the job ``on_complete``
        is enqueued once, with the counts in its metadata. Its fields are those of `NewJob` except ``id`` and
        ``delay``. ``tenant_id`` is that of the callback and of jobs that name none. ``name`` is for people.
        A batch of the same ``id`` that has not finished is continued.

        Raises `ValueError` for a wrong argument and for a batch that has finished, and `StoreUnavailable`.
        """
        id = os.urandom(16).hex() if id is None else id
        if not isinstance(id, str) or not is_batch_id(id):
            raise ValueError(f"id {id!r:.80}: a batch has at most 64 letters, digits, '_', '.', ':' or '-'")
        if tenant_id:
            _check_tenant("tenant_id", tenant_id)
        if name:
            _check_text("name", name)
        fields, home = {"name": name.encode(), "tenant_id": tenant_id.encode()}, ""
        if on_complete is not None:
            prepared = self._prepare_callback(_new_job(on_complete), id, tenant_id)
            home, fields["on_complete"] = prepared.stream, prepared.data

        def prepare(item: NewJob | Mapping[str, Any], stream: str | None) -> PreparedJob:
            job = _new_job(item)
            metadata = {**(job.metadata or {}), BATCH_FIELD: id}
            return self._prepare(
                job._replace(tenant_id=job.tenant_id or tenant_id, metadata=metadata), stream
            )

        return OpenBatch(id, home, extension().streams[0].stream, fields, self._stores.borrow, prepare)

    def _prepare_callback(self, job: NewJob, batch: str, tenant_id: str) -> PreparedJob:
        if job.id is not None or job.delay is not None:
            raise ValueError("on_complete: the batch gives the job its id, and it cannot have a delay")
        if job.metadata and job.metadata.get(BATCH_FIELD) == batch:
            raise ValueError("on_complete: the callback cannot be a job of its own batch")
        return self._prepare(job._replace(tenant_id=job.tenant_id or tenant_id), None)

    def _prepare(self, job: NewJob, stream: str | None) -> PreparedJob:
        """Check and encode a job, and find its stream."""
        id, data = encode_job(job, self._wall_now_s())
        to = _named_stream(job, stream) or self._home_of(job.type)
        _refuse_derived(to)
        self._check_destination(job.type, to)
        return PreparedJob(id, to, data)

    def _send(self, jobs: Iterable[NewJob | Mapping[str, Any]], stream: str | None) -> list[str]:
        ids: list[str] = []
        waiting: dict[str, list[bytes]] = {}
        try:
            for item in jobs:
                id, to, data = self._prepare(_new_job(item), stream)
                ids.append(id)
                batch = waiting.setdefault(to, [])
                batch.append(data)
                if len(batch) >= _BATCH_JOBS:
                    self._flush(to, batch)
        finally:
            # Also after an error: the jobs before it were accepted, and their order stands.
            for name, batch in waiting.items():
                self._flush(name, batch)
        return ids

    def close(self) -> None:
        """Drop the connections. A later call opens new ones."""
        self._stores.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _home_of(self, type: str) -> str:
        """The stream of a type. Raises `StoreUnavailable` if a type of the user cannot be looked up: a guess
        might leave the job on a stream that no service reads."""
        if (built_in := extension().stream_of_type.get(type)) is not None:
            return built_in
        now_s = time.monotonic()
        route = self._routes.get(type)
        if route is None or route.mono_until_s <= now_s:
            if len(self._routes) >= _MAX_CHECKED:
                self._routes.clear()
            self._routes[type] = route = self._find_route(type, now_s)
        return route.stream

    def _find_route(self, type: str, mono_now_s: float) -> _Route:
        default = extension().streams[0].stream
        services: list[Announcement] = []
        if mono_now_s >= self._mono_next_check_s:
            with self._stores.borrow() as store:
                services = store.announcements()
            self._note_services(services)
        found = stream_for(type, services, default, self._wall_now_s())
        if found is not None:
            self._checked.add((type, found))
            return _Route(found, mono_now_s + _ROUTE_LIFETIME_S)
        if not services and not self._own_stream and len(self.guessed) < _MAX_CHECKED:
            self.guessed.add(type)
        return _Route(self._own_stream or default, mono_now_s + _CHECK_INTERVAL_S)

    def _check_destination(self, type: str, stream: str) -> None:
        """Warn once of a type or stream that no service has announced. One store call for each new pair."""
        if (type, stream) in self._checked or len(self._checked) >= _MAX_CHECKED:
            return
        if time.monotonic() < self._mono_next_check_s:
            return
        services = self._announced_services()
        self._note_services(services)
        if not services:
            return
        self._checked.add((type, stream))
        types = {name for service in services for name in service.types}
        streams = {name for service in services for name in service.streams}
        for verb, name, known in (("runs the type", type, types), ("reads the stream", stream, streams)):
            if name not in known:
                # The level is that of the caller of `enqueue` or `enqueue_many`.
                text = f"no service of this deployment {verb} {name!r:.600}: {suggestion(name, known)}"
                warnings.warn(text, UnknownDestination, stacklevel=5)

    def _note_services(self, services: list[Announcement]) -> None:
        if not services:  # no service has run yet: it finds the job when it starts
            self._mono_next_check_s = time.monotonic() + _CHECK_INTERVAL_S

    def _announced_services(self) -> list[Announcement]:
        try:
            with self._stores.borrow() as store:
                return store.announcements()
        except StoreUnavailable:  # sending the job reports it
            return []

    def _flush(self, stream: str, batch: list[bytes]) -> None:
        some = batch.copy()
        batch.clear()
        if some:
            with self._stores.borrow() as store:
                store.add(stream, some)


def encode_job(job: NewJob, wall_now_s: float) -> tuple[str, bytes]:
    """The job's id and its JSON, checked by the rules that the service reads it by. Raises ValueError."""
    id = job.id if job.id is not None else os.urandom(16).hex()
    _check_names(id, job)
    metadata = _with_times(_metadata(job), job, wall_now_s)
    if metadata is not None:
        _check_metadata(metadata)
    wire: dict[str, Any] = {"id": id, "type": job.type}
    if job.tenant_id:
        wire["tenant_id"] = job.tenant_id
    if job.project_id:
        wire["project_id"] = job.project_id
    wire["payload"] = job.payload
    if metadata is not None:
        wire["metadata"] = metadata
    wire["created_at"] = _rfc3339(wall_now_s)
    if job.timeout is not None:
        wire["timeout"] = _seconds("timeout", job.timeout)
    data = _wire_json(wire)
    # A service with the default limit would dead-letter it at once.
    if len(data) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"job {id} is {len(data)} bytes of JSON, more than {MAX_PAYLOAD_BYTES}")
    brackets = data.count(b"[") + data.count(b"{")
    if isinstance(job.payload, orjson.Fragment) or brackets > _NESTING_LOOKED_AT:
        _check_readable(id, data)
    return id, data


def _redis(url: str) -> ProducerStore:
    # Imported late: a caller with a store of its own needs no client library.
    from .store.redis.producer import RedisProducerStore

    return RedisProducerStore(url or store_url())


def _new_job(item: NewJob | Mapping[str, Any]) -> NewJob:
    if isinstance(item, NewJob):
        return item
    if not isinstance(item, Mapping):
        raise ValueError(f"a job is a NewJob or a mapping with its fields, not {item!r:.80}")
    if unknown := [field for field in item if field not in NewJob._fields]:
        raise ValueError(f"a job has no field {', '.join(sorted(map(repr, unknown))):.200}")
    if "type" not in item:
        raise ValueError("a job needs a type")
    return NewJob(**item)


def _named_stream(job: NewJob, default: str | None) -> str:
    """The stream that the caller names; empty if the type decides. Raises ValueError."""
    for name in (job.stream, default):
        if name is not None and name != "":
            _check_text("stream", name)
            return name
    return ""


@lru_cache(maxsize=_MAX_CHECKED)  # an error is not kept
def _refuse_derived(stream: str) -> None:
    """Raises ValueError for a key of the service: a job would damage its records, and never run."""
    if is_derived(stream):
        base = base_stream(stream)
        other = f"stream {base!r:.600}" if base != stream else "a stream that a service reads"
        raise ValueError(
            f"stream {stream!r:.600} is a key in which the service keeps records: send the job to {other}, "
            "with a delay if it is to run later; jobworker dlq requeue sends dead letters back"
        )


def home_stream(type: str) -> str:
    """The stream of a job that names none: that of its type, else the first default stream."""
    return extension().stream_of_type.get(type, extension().streams[0].stream)


def _metadata(job: NewJob) -> dict[str, str] | None:
    """Metadata of the job, with the caller's span if the caller makes traces. Raises ValueError."""
    if job.metadata is not None and not isinstance(job.metadata, Mapping):
        raise ValueError(f"metadata maps text to text, it cannot be {job.metadata!r:.80}")
    metadata = None if job.metadata is None else dict(job.metadata)
    if "opentelemetry.sdk.trace" in sys.modules:
        from .telemetry.otel_context import with_traceparent  # only then: it needs the library

        metadata = with_traceparent(metadata)
    if not isinstance(job.keep_result, bool):
        raise ValueError(f"keep_result is {job.keep_result!r:.80}: True or False is needed")
    return {**(metadata or {}), KEEP_RESULT: "true"} if job.keep_result else metadata


def _with_times(metadata: dict[str, str] | None, job: NewJob, wall_now_s: float) -> dict[str, str] | None:
    """Metadata with the job's times. Raises ValueError for times that no service could read."""
    times: dict[str, str] = {}
    delay_s = None if job.delay is None or job.delay == 0 else _seconds("delay", job.delay)
    if delay_s is not None and job.run_at is not None:
        raise ValueError("give delay or run_at, not both")
    if delay_s is not None:
        times[NOT_BEFORE] = _rfc3339(wall_now_s + delay_s)
    if job.run_at is not None:
        times[NOT_BEFORE] = _checked_time("run_at", job.run_at)
    if job.expires_at is not None:
        times[EXPIRES_AT] = _checked_time("expires_at", job.expires_at)
    for key in (NOT_BEFORE, EXPIRES_AT):
        if metadata and metadata.get(key):
            _checked_time(f"metadata.{key}", metadata[key])
    return {**(metadata or {}), **times} if times else metadata


def _checked_time(field: str, value: Any) -> str:
    """A time as the wire has it. Raises ValueError."""
    if isinstance(value, datetime):
        value = value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{field} is {value!r:.80}: give RFC 3339, unix seconds or a datetime")
    text = value if isinstance(value, str) else f"{value:.6f}"
    try:
        parse_time(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return text


def _check_text(field: str, value: Any) -> None:
    """Any text that a service accepts: not empty, bounded, and valid in UTF-8."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is {value!r:.80}: a text that is not empty is needed")
    if len(value) > MAX_NAME_CHARS:
        raise ValueError(f"{field} {value!r:.80} has {len(value)} characters, more than {MAX_NAME_CHARS}")
    if not is_unicode(value):
        raise ValueError(f"{field} {value!r:.80} has half a surrogate pair")


def _check_names(id: str, job: NewJob) -> None:
    _check_text("id", id)
    _check_text("type", job.type)
    for field, value in (("tenant_id", job.tenant_id), ("project_id", job.project_id)):
        if not isinstance(value, str) or value:
            _check_tenant(field, value)


def _check_tenant(field: str, value: Any) -> None:
    if not isinstance(value, str) or not _TENANT.fullmatch(value):
        raise ValueError(f"{field} {value!r:.80} does not match {_TENANT.pattern}")


def _check_metadata(metadata: Mapping[Any, Any]) -> None:
    if len(metadata) > MAX_METADATA_ENTRIES:
        raise ValueError(f"metadata has {len(metadata)} entries, more than {MAX_METADATA_ENTRIES}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata maps text to text, not {key!r:.80} to {value!r:.80}")
        if len(key) > MAX_METADATA_KEY_CHARS or len(value) > MAX_METADATA_VALUE_CHARS:
            raise ValueError(
                f"metadata {key!r:.80}: a key has at most {MAX_METADATA_KEY_CHARS} characters "
                f"and a value {MAX_METADATA_VALUE_CHARS}"
            )
        if not is_unicode(key) or not is_unicode(value):
            raise ValueError(f"metadata {key!r:.80} has half a surrogate pair")


def _check_readable(id: str, data: bytes) -> None:
    try:
        read_envelope(data)
    except MalformedJob as error:
        raise ValueError(f"job {id} would be refused: {error}") from None
    if (levels := nesting_of(data)) > MAX_NESTING:
        raise ValueError(f"job {id} has {levels} levels of lists and objects, more than {MAX_NESTING}")


def _wire_json(wire: dict[str, Any]) -> bytes:
    """The JSON of a job. Raises ValueError for a payload that JSON cannot hold."""
    payload = wire["payload"]
    try:
        try:
            data = orjson.dumps(wire, _fragment, _OPTIONS)
        except orjson.JSONEncodeError:
            # It refuses integers beyond 64 bits, keys that are numbers, and 255 levels. msgspec says what
            # else may be wrong.
            data = orjson.dumps({**wire, "payload": _fragment(payload)}, option=orjson.OPT_NON_STR_KEYS)
            payload = msgspec.to_builtins(payload, enc_hook=_checked)
        if b"null" in data:
            _refuse_nan(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the payload is no JSON: {error}") from None
    return data


def _fragment(value: Any) -> orjson.Fragment:
    """What msgspec takes and orjson does not: structs, sets, bytes, `msgspec.Raw`, ..."""
    data = msgspec.json.encode(value)
    msgspec.json.decode(data)  # a `msgspec.Raw` may hold anything
    return orjson.Fragment(data)


def _builtins(value: Any) -> Any:
    return None if isinstance(value, orjson.Fragment) else msgspec.to_builtins(value, enc_hook=_checked)


def _checked(value: Any) -> None:
    """A `msgspec.Raw` in a payload: `_fragment` has seen that it holds no NaN."""


_refuse_nan = json.JSONEncoder(allow_nan=False, default=_builtins).encode


def _seconds(field: str, value: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _MAX_SECONDS:
        raise ValueError(
            f"{field} is {value!r:.80}: a number of seconds above 0 is needed, at most {_MAX_SECONDS:,}"
        )
    return value


def _rfc3339(wall_s: float) -> str:
    second, ms = divmod(int(wall_s * 1000), 1000)
    return f"{_rfc3339_second(second)}.{ms:03d}Z"


@lru_cache(maxsize=1)  # thousands of jobs share a second
def _rfc3339_second(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
