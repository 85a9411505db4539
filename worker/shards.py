"""Shards: the streams over which a service spreads one logical stream, and each job's shard. Pure decisions.

A shard is a stream like any other: it has a group, lanes, retries and dead letters of its own. Only its name
says that it is one, so every program that knows the number of shards computes the same names.
"""

import binascii
import itertools
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

from .keys import Source

#: Most shards of a stream; each costs a reader a connection, and a stream's number takes a byte.
MOST_SHARDS = 64
_MARK = ":shard-"
#: Slots of a Redis Cluster.
_SLOTS = 16384
#: Jobs without a tenant that carry one of these share a shard, which compares them with each other.
_CONDITIONS = ("idempotency_key", "supersede_key")


@lru_cache(maxsize=256)
def shard_names(stream: str, count: int) -> tuple[str, ...]:
    """The shards of a stream that has ``count`` of them, by number."""
    return tuple(_name(stream, count, number) for number in range(count))


def _name(stream: str, count: int, number: int) -> str:
    """A name whose slot is in the middle of part ``number`` of ``count`` equal parts of all slots. So masters
    that share the slots evenly get as many shards each."""
    for salt in itertools.count():
        name = f"{stream}{_MARK}{count}.{number}.{salt}"
        place = binascii.crc_hqx(name.encode("utf-8", "surrogatepass"), 0) % _SLOTS * count / _SLOTS - number
        if 0.25 <= place < 0.75:
            return name
    raise AssertionError("some salt fits")


@lru_cache(maxsize=1024)
def logical_stream(name: str) -> str:
    """The stream that a shard belongs to; any other name itself."""
    return _place(name)[0]


def shard_count(name: str) -> int:
    """The number of shards that a shard is one of; 0 for a stream that is no shard."""
    return _place(name)[1]


def unread_shard_advice(name: str) -> str:
    """What to do for a shard that no service reads; empty for a stream that is no shard."""
    stream, count = _place(name)
    return f"restart the services of {stream} with --drain-shards {count}" if count else ""


def _place(name: str) -> tuple[str, int]:
    stream, mark, numbers = name.rpartition(_MARK)
    parts = numbers.split(".")
    if not (mark and len(parts) == 3 and all(p.isascii() and p.isdigit() and len(p) < 5 for p in parts)):
        return name, 0
    count, number = int(parts[0]), int(parts[1])
    if not 0 <= number < count <= MOST_SHARDS or shard_names(stream, count)[number] != name:
        return name, 0
    return stream, count


def spread(sources: Iterable[Source], counts: Iterable[int]) -> tuple[Source, ...]:
    """Each source, followed by its shards for each of these counts, read by the same group."""
    counts = tuple(counts)
    return tuple(
        Source(name, source.group)
        for source in sources
        for name in (source.stream, *(name for count in counts for name in shard_names(source.stream, count)))
    )


def shard_number(count: int, tenant_id: str, id: str, metadata: Mapping[str, str] | None) -> int:
    """The shard of a job. All jobs of a tenant have the same one. Jobs without a tenant are spread by their
    id, except those that are compared with others."""
    key = tenant_id
    if not tenant_id and not any((metadata or {}).get(name) for name in _CONDITIONS):
        key = id
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % count


class _Header(msgspec.Struct, frozen=True, gc=False):
    id: str = ""
    tenant_id: str | None = None
    metadata: dict[str, str] | None = None


_header = msgspec.json.Decoder(_Header)


def shard_number_of(count: int, data: bytes | None) -> tuple[int, Mapping[str, str]]:
    """The shard of a job on the wire, and its metadata. Jobs that no reader would accept share a shard."""
    try:
        header = _header.decode(data or b"")
    except (ValueError, RecursionError):
        header = _Header()
    metadata = header.metadata or {}
    return shard_number(count, header.tenant_id or "", header.id, metadata), metadata
