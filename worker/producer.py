"""Producer: puts jobs on their streams, from Python."""

# orjson writes null for NaN and infinities, which must be refused.
import math
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

from .envelope import (
    BATCH_FIELD,
    is_batch_id,
)
from .errors import StoreUnavailable
from .extension import extension
from .host.endpoints import only_stream, store_url
from .keys import base_stream, is_derived
from .new_job import MAX_SECONDS, NewJob, Time, check_tenant, check_text, encode_job, new_job
from .producer_batch import SHARDS_LIFETIME_S, HeldJobs, OpenBatch, PreparedJob
from .results import CancelOutcome, JobResult, decode_result
from .shards import logical_stream, shard_count, shard_names, shard_number
from .store.announcements import Announcement, shards_in_use, stream_for, suggestion
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

#: Interval at which a wait for a result looks for new streams, such as shards of another number (seconds).
_STREAMS_LIFETIME_S = 5.0

#: First and longest pause between two looks for a result (seconds).
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5


class UnknownDestination(UserWarning):
    """No service of the deployment runs the job's type, or reads its stream: probably a typing error.

    The job is sent all the same. With ``warnings.simplefilter("error", UnknownDestination)`` it is not sent,
    and the warning is raised.
    """


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
        #: Announced services, by which jobs are sent to shards, and the number of shards of each stream.
        self._services: list[Announcement] = []
        self._shard_counts: dict[str, int] = {}
        self._mono_next_shards_s = 0.0
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
        check_text("id", id)
        if (
            isinstance(timeout, bool)
            or not isinstance(timeout, int | float)
            or not 0 <= timeout <= MAX_SECONDS
        ):
            raise ValueError(f"timeout is {timeout!r:.80}: a number of seconds from 0 on is needed")
        give_up_s = time.monotonic() + timeout
        pause_s, look_s = _FIRST_PAUSE_S, -math.inf
        while True:
            if time.monotonic() - look_s >= _STREAMS_LIFETIME_S:
                streams, look_s = self._streams_of(stream), time.monotonic()
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

        check_text("id", id)
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
                check_text("stream", name)
        with self._stores.borrow() as store:
            announced = [source.stream for one in store.announcements() for source in one.sources]
        if stream is not None:
            return list(dict.fromkeys([*names, *(one for one in announced if logical_stream(one) in names)]))
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
        stream: str = "",
    ) -> OpenBatch:
        """Open a batch: jobs that are counted together. Use it as a context manager.

        When the batch is closed and all its jobs have ended, done or dead-lettered, the job ``on_complete``
        is enqueued once, with the counts in its metadata. Its fields are those of `NewJob` except ``id`` and
        ``delay``. ``tenant_id`` is that of the callback and of jobs that name none. ``name`` is for people.
        A batch of the same ``id`` that has not finished is continued. Its record is on the stream of
        ``on_complete``, else on ``stream``, else on that of its first job; only in the last case it is
        created with that job. It is never in a shard: the number of shards may change.

        Raises `ValueError` for a wrong argument, its subclass `BatchFinished` for a batch that has finished,
        and `StoreUnavailable`.
        """
        id = os.urandom(16).hex() if id is None else id
        if not isinstance(id, str) or not is_batch_id(id):
            raise ValueError(f"id {id!r:.80}: a batch has at most 64 letters, digits, '_', '.', ':' or '-'")
        if tenant_id:
            check_tenant("tenant_id", tenant_id)
        if name:
            check_text("name", name)
        if stream:
            check_text("stream", stream)
            _refuse_derived(stream)
        fields, home = {"name": name.encode(), "tenant_id": tenant_id.encode()}, stream
        if on_complete is not None:
            prepared = self._prepare_callback(new_job(on_complete), id, tenant_id)
            home, fields["on_complete"] = logical_stream(prepared.stream), prepared.data

        def prepare(item: NewJob | Mapping[str, Any], stream: str | None) -> PreparedJob:
            job = new_job(item)
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
        return PreparedJob(id, self._shard_of(to, id, job), data)

    def _shard_of(self, stream: str, id: str, job: NewJob) -> str:
        """The shard of a job, or the stream itself where no running service spreads it."""
        if time.monotonic() >= self._mono_next_shards_s:
            self._note_services(self._announced_services())
        count = self._shard_counts.get(stream)
        if count is None:
            count = shards_in_use(self._services, stream, self._wall_now_s())
            if len(self._shard_counts) < _MAX_CHECKED:
                self._shard_counts[stream] = count
        if not count:
            return stream
        return shard_names(stream, count)[shard_number(count, job.tenant_id, id, job.metadata)]

    def _send(self, jobs: Iterable[NewJob | Mapping[str, Any]], stream: str | None) -> list[str]:
        ids: list[str] = []
        waiting: dict[str, HeldJobs] = {}
        try:
            for item in jobs:
                id, to, data = self._prepare(new_job(item), stream)
                ids.append(id)
                held = waiting.get(to) or waiting.setdefault(to, HeldJobs())
                held.jobs.append(data)
                if len(held.jobs) >= _BATCH_JOBS:
                    self._flush(to, waiting.pop(to))
        finally:
            # Also after an error: the jobs before it were accepted, in their order.
            for name, held in waiting.items():
                self._flush(name, held)
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
        self._services = services
        self._shard_counts.clear()
        self._mono_next_shards_s = time.monotonic() + SHARDS_LIFETIME_S
        if not services:  # no service has run yet: it finds the job when it starts
            self._mono_next_check_s = time.monotonic() + _CHECK_INTERVAL_S

    def _announced_services(self) -> list[Announcement]:
        try:
            with self._stores.borrow() as store:
                return store.announcements()
        except StoreUnavailable:  # sending the job reports it
            return []

    def _flush(self, stream: str, held: HeldJobs) -> None:
        with self._stores.borrow() as store:
            store.add(held.destination(stream), held.jobs)


def _redis(url: str) -> ProducerStore:
    # Imported late: a caller with a store of its own needs no client library.
    from .store.redis.producer import RedisProducerStore

    return RedisProducerStore(url or store_url())


def _named_stream(job: NewJob, default: str | None) -> str:
    """The stream that the caller names; empty if the type decides. Raises ValueError."""
    for name in (job.stream, default):
        if name is not None and name != "":
            check_text("stream", name)
            return name
    return ""


@lru_cache(maxsize=_MAX_CHECKED)  # an error is not kept
def _refuse_derived(stream: str) -> None:
    """Raises ValueError for a key of the service: a job would damage its records, and never run."""
    if is_derived(stream) or shard_count(stream):
        base = logical_stream(base_stream(stream))
        other = f"stream {base!r:.600}" if base != stream else "a stream that a service reads"
        raise ValueError(
            f"stream {stream!r:.600} is a key in which the service keeps records: send the job to {other}, "
            "with a delay if it is to run later; jobworker dlq requeue sends dead letters back"
        )
