"""Check of names: streams with jobs that no service reads, and types of waiting jobs that no service handles.

Both are mostly typing errors of producers. `read_names` only reads; `name_findings` does no input or output.
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..errors import StoreRefused, StoreUnavailable
from ..extension import extension
from ..keys import Source
from ..shards import unread_shard_advice
from ..store.announcements import suggestion
from ..store.operator import START, sample, walk
from .dead_letters import read_letter
from .find_job import SILENT_S
from .finding import Finding
from .identity import read_identity
from .status_client import Service, handled_types

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore
    from ..store.redis.server_facts import RedisFacts

#: Jobs of each stream, retry set and dead-letter queue whose type is looked at, and bytes of them.
_SAMPLE_JOBS, _SAMPLE_BYTES = 1000, 16 * 1024 * 1024
_RETRY_PAGE = 50
#: Findings of each kind; one typing error in a loop must not hide the rest of the report.
_MAX_FINDINGS = 10


class UnreadStream(NamedTuple):
    """A stream with jobs that no running service reads: number of entries, and of scheduled jobs sampled."""

    name: str
    waiting: int
    scheduled: int


class Names(NamedTuple):
    """Names in use. ``types`` and ``streams`` are those of services; ``services_run``: of running ones.

    ``waiting`` and ``refused`` count jobs by stream and type: those that wait, and those that were
    dead-lettered as ``unknown_type``. ``complete``: all keys of the store were looked at.
    """

    types: frozenset[str]
    streams: frozenset[str]
    services_run: bool
    unread: list[UnreadStream]
    waiting: Counter[tuple[str, str]]
    refused: Counter[tuple[str, str]]
    complete: bool


def read_names(store: "RedisFacts", sources: Sequence[Source], services: Sequence[Service]) -> Names:
    """Read names from the job store. Raises `StoreUnavailable`."""
    announcements, now_s = store.announcements(), store.wall_now_s(sources[0].stream)
    types, services_run = handled_types(announcements, services, now_s)
    read = {source.stream for source in sources}
    read |= {name for one in announcements if one.is_running(now_s) for name in one.streams}
    found = store.find_streams()
    waiting: Counter[tuple[str, str]] = Counter()
    unread = []
    for name in found.names:
        try:
            if name not in read and (stream := _unread(store, name, waiting)):
                unread.append(stream)
        except StoreUnavailable:  # a key of another type; a store that is gone fails in the next call too
            continue
    refused: Counter[tuple[str, str]] = Counter()
    for source in sources:
        with suppress(StoreRefused):  # other findings name the key
            group = store.group(source)
            _count_types(store, source.stream, group.last_delivered if group else START, waiting)
            refused.update((source.stream, job_type) for job_type in _refused_types(store, source.stream))
    return Names(types, frozenset(read), services_run, unread, waiting, refused, found.complete)


def _unread(store: "RedisFacts", name: str, waiting: Counter[tuple[str, str]]) -> UnreadStream | None:
    """The stream if it holds jobs of ours without a reader. Other programs may use the same store."""
    facts = store.stream(Source(name, ""))
    if facts.lags and not any(facts.pendings.values()) and all(lag == 0 for lag in facts.lags.values()):
        return None
    for group in facts.lags:
        state = store.group(Source(name, group))
        if state and any(consumer.idle_s <= SILENT_S for consumer in state.consumers):
            return None
    types: Counter[tuple[str, str]] = Counter()
    scheduled = _count_types(store, name, START, types)
    if not types:
        return None
    waiting.update(types)
    behind = max((facts.length if lag is None else lag for lag in facts.lags.values()), default=facts.length)
    return UnreadStream(name, behind, scheduled)


def _count_types(store: "OperatorStore", stream: str, start: bytes, types: Counter[tuple[str, str]]) -> int:
    """Count the types of jobs that wait in a stream and its retry set; returns the number in the set."""
    for entry in sample(walk(partial(store.entries, stream), start), _SAMPLE_JOBS, _SAMPLE_BYTES):
        _count(entry.data, stream, types)
    scheduled, size = 0, 0
    while page := store.retries(stream, scheduled, _RETRY_PAGE):
        for one in page:
            _count(one.data, stream, types)
            size += len(one.data)
        scheduled += len(page)
        if scheduled >= _SAMPLE_JOBS or size > _SAMPLE_BYTES:
            break
    return scheduled


def _count(data: bytes | None, stream: str, types: Counter[tuple[str, str]]) -> None:
    job = read_identity(data)
    if job.id and job.type:
        types[stream, job.type] += 1


def _refused_types(store: "OperatorStore", stream: str) -> Iterator[str]:
    for entry in sample(walk(partial(store.dead_before, stream)), _SAMPLE_JOBS, _SAMPLE_BYTES):
        letter = read_letter(stream, entry)
        if letter.reason == "unknown_type" and letter.type:
            yield letter.type


def name_findings(names: Names) -> Iterator[Finding]:
    """Streams that no service reads, and types that no service handles."""
    for stream in names.unread[:_MAX_FINDINGS]:
        jobs = [f"{stream.waiting} jobs wait"] if stream.waiting else []
        jobs += [f"{stream.scheduled} are scheduled"] if stream.scheduled else []
        says = f"no running service reads this stream; {' and '.join(jobs)}"
        yield Finding("wrong", stream.name, says, _reading(stream.name, names))
    if len(names.unread) > _MAX_FINDINGS:
        more = len(names.unread) - _MAX_FINDINGS
        yield Finding("wrong", "streams", f"{more} more streams with jobs that no service reads", "as above")
    if not names.complete:
        yield Finding("note", "streams", "not all keys of the store were searched for streams without reader")
    if names.types:
        yield from _type_findings(names)


def _reading(name: str, names: Names) -> str:
    """What to do for a stream that no service reads. A shard has the group of its stream."""
    if advice := unread_shard_advice(name):
        return advice
    group = dict(extension().streams).get(name, "workers")
    option = f"--stream {shlex.quote(f'{name}={group}')}"
    do = f"restart a service of these jobs with {option} beside its other --stream: it then runs them"
    return f"{suggestion(name, names.streams)} {do}"


def _type_findings(names: Names) -> Iterator[Finding]:
    whose = "no running service handles" if names.services_run else "no service has handled lately"
    unknown = [(key, count) for key, count in names.waiting.most_common() if key[1] not in names.types]
    for (stream, job_type), count in unknown[:_MAX_FINDINGS]:
        do = "start a service with a --handler for it, or send these jobs again under the right type"
        yield Finding("wrong", stream, f"{count} waiting jobs have the type {job_type!r:.100}, which {whose}",
                      f"{suggestion(job_type, names.types)} {do}")  # fmt: skip
    refused = [(key, count) for key, count in names.refused.most_common() if key[1] not in names.types]
    for (stream, job_type), count in refused[:_MAX_FINDINGS]:
        says = f"{count} jobs of the type {job_type!r:.100} were dead-lettered: {whose} it"
        do = f"jobworker dlq list --reason unknown_type --stream {shlex.quote(stream)}"
        yield Finding("note", stream, says, f"{suggestion(job_type, names.types)} {do}")
