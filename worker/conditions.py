"""Start conditions of a job: its earliest and latest start, and the jobs that it repeats or replaces.

Producers write them into ``metadata``. Pure decisions; the store keeps what several jobs share.
"""

import base64
import hashlib
import math
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import msgspec

from .envelope import Header, fresh_job, requeued_job
from .errors import MalformedJob

NOT_BEFORE, EXPIRES_AT = "not_before", "expires_at"
IDEMPOTENCY_KEY, SUPERSEDE_KEY = "idempotency_key", "supersede_key"
#: Keys of ``metadata`` that hold a start condition.
CONDITION_KEYS = frozenset({NOT_BEFORE, EXPIRES_AT, IDEMPOTENCY_KEY, SUPERSEDE_KEY})

#: Start of the limit key of a series. No limit has this name, because a limit's name has no ``~``.
SERIES = "~="
#: Longest idempotency key that the store has as it is (characters); a UUID has 36.
_LONGEST_PLAIN_KEY = 40
#: Pairs of type and tenant whose digests are kept.
_MOST_SCOPES = 10_000
#: The end of the year 9999, the last time that RFC 3339 can express (unix seconds).
_LATEST_S = 253_402_300_799


class _Metadata(msgspec.Struct):
    metadata: dict[str, object] | None = None


_metadata = msgspec.json.Decoder(_Metadata)


class Conditions(NamedTuple):
    """Start conditions of an entry. Times are unix seconds.

    ``first_id`` is the id of the job's first entry: it orders jobs by age and names the job in the store. Of
    the jobs of a ``series`` the newest is run; empty for none. A job whose entry is not its first has waited
    for its ``due_s`` already.
    """

    first_id: bytes
    series: str = ""
    due_s: float = 0.0
    expires_s: float = math.inf


def read_conditions(job: Header, entry_id: bytes) -> Conditions:
    """The start conditions of an entry, except for its idempotency key (see `UniqueKeys`).

    Once an operator requeues a job, its times do not count. Raises `MalformedJob` for a time that cannot be
    read.
    """
    metadata = job.metadata or {}
    first_id = job.first_id.encode() or entry_id
    series = series_of(job.type, job.tenant_id, metadata)
    if job.requeued:
        return Conditions(first_id, series)
    due_s = 0.0 if job.first_id else _time(metadata, NOT_BEFORE, 0.0)
    return Conditions(first_id, series, due_s, _time(metadata, EXPIRES_AT, math.inf))


class UniqueKeys:
    """Names of idempotency keys in the store. One object serves many jobs, because each job has one."""

    def __init__(self) -> None:
        #: Digests by type and tenant.
        self._scopes: dict[tuple[str, str], str] = {}

    def name_of(self, type_name: str, tenant_id: str, key: str) -> str:
        """The name of a key: the digest of type and tenant, then the key itself, or its digest if it is long.

        A digest of each key would cost the reader more time than all else that it does about the key.
        """
        scope = self._scopes.get((type_name, tenant_id))
        if scope is None:
            if len(self._scopes) >= _MOST_SCOPES:
                self._scopes.clear()
            scope = self._scopes[type_name, tenant_id] = _scope(type_name, tenant_id)
        if len(key) > _LONGEST_PLAIN_KEY:
            key = _hash(key, size=32).hex()
        return scope + key


def unique_name(job: Header) -> str:
    """The name of a job's idempotency key; empty if it has none that counts."""
    key = (job.metadata or {}).get(IDEMPOTENCY_KEY)
    return UniqueKeys().name_of(job.type, job.tenant_id, key) if key and not job.requeued else ""


def unique_bucket(first_id: bytes, window_s: float) -> str:
    """The part of the key space in which a job claims its idempotency key: jobs of one window share one."""
    window_ms = max(1, round(window_s * 1000))
    return f"{window_ms}/{int(first_id.partition(b'-')[0]) // window_ms}"


def requeued(task: bytes, original_id: str) -> bytes:
    """The job of a dead letter as it is sent again. ``original_id`` is the entry that was dead-lettered."""
    try:
        has_conditions = not CONDITION_KEYS.isdisjoint(_metadata.decode(task).metadata or ())
    except ValueError:  # another kind of metadata: the job is malformed
        has_conditions = False
    return requeued_job(task, original_id) if has_conditions else fresh_job(task)


def expires_s(job: Header) -> float:
    """The latest start of a job that was admitted (unix seconds)."""
    return math.inf if job.requeued else _time(job.metadata or {}, EXPIRES_AT, math.inf)


def has_keys(job: Header) -> bool:
    """Whether other jobs may replace this one, so that its first entry has to be known."""
    metadata = job.metadata or {}
    return bool(metadata.get(IDEMPOTENCY_KEY) or metadata.get(SUPERSEDE_KEY))


def series_of(type_name: str, tenant_id: str, metadata: Mapping[str, str] | None) -> str:
    """Limit key of type, tenant and supersede key; empty if there is no key."""
    key = metadata.get(SUPERSEDE_KEY) if metadata else None
    return SERIES + _hash(type_name, tenant_id, key, size=16).hex() if key else ""


def parse_time(text: str) -> float:
    """Unix seconds of an RFC 3339 time or of unix seconds as text. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = _rfc3339(text)
    if not 0 <= seconds <= _LATEST_S:
        raise ValueError(f"{text!r:.80} is out of range")
    return seconds


def _rfc3339(text: str) -> float:
    try:
        parsed = msgspec.convert(text, datetime)
    except msgspec.ValidationError:
        parsed = None
    if parsed is None or parsed.tzinfo is None:
        raise ValueError(f"{text!r:.80} is neither RFC 3339 with a time zone nor unix seconds")
    return parsed.timestamp()


def _time(metadata: Mapping[str, str], key: str, default: float) -> float:
    if not (text := metadata.get(key)):
        return default
    try:
        return parse_time(text)
    except ValueError as error:
        raise MalformedJob(f"metadata.{key}: {error}") from None


def _scope(type_name: str, tenant_id: str) -> str:
    """11 characters: short, because each key of the last day begins with one."""
    return base64.b64encode(_hash(type_name, tenant_id, size=8))[:11].decode()


def _hash(*names: str, size: int) -> bytes:
    joined = "".join([f"{len(name)}:{name}" for name in names])
    return hashlib.blake2b(joined.encode(), digest_size=size).digest()
