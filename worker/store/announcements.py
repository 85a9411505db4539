"""Announcements: which types and streams each service of a deployment handles, as the job store records it.

Producers warn of unknown names by it, and `jobworker doctor` finds jobs that no service handles. Records can
be written by any client of the store, so they are parsed as untrusted.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from ..keys import Source
from ..shards import MOST_SHARDS, shard_names

#: Interval of renewals (seconds), and the age at which the service counts as stopped: two renewals missed.
RENEW_INTERVAL_S, STOPPED_AFTER_S = 30.0, 90.0
#: Age at which a record is deleted. It outlives a stop over night, so that producers do not warn meanwhile.
FORGET_AFTER_S = 7 * 24 * 3600.0
#: Longest record that is parsed: 255 types and 255 streams of the longest names fit.
_MAX_BYTES = 512 * 1024


class Announcement(NamedTuple):
    """Types and streams of one service, renewed at a unix time (seconds, the store's clock). ``sources`` keep
    the order of its --stream table; shards follow their stream. ``shards`` is the number of shards of each
    stream, 0 for none."""

    service: str
    types: frozenset[str]
    sources: tuple[Source, ...]
    wall_renewed_s: float
    shards: int = 0

    @property
    def streams(self) -> set[str]:
        """Names of the streams."""
        return {source.stream for source in self.sources}

    def is_running(self, wall_now_s: float) -> bool:
        """Whether the service renewed the record lately."""
        return abs(wall_now_s - self.wall_renewed_s) < STOPPED_AFTER_S

    def is_outdated(self, wall_now_s: float) -> bool:
        """Whether the record can be deleted."""
        return abs(wall_now_s - self.wall_renewed_s) > FORGET_AFTER_S


def stream_for(
    job_type: str, announcements: Iterable[Announcement], preferred: str, wall_now_s: float
) -> str | None:
    """The stream of the services that handle a type: ``preferred`` if one of them reads it, else the first
    stream of the first service by name. Running services come first. None if no service handles the type."""
    handling = [one for one in announcements if job_type in one.types and one.sources]
    running = [one for one in handling if one.is_running(wall_now_s)]
    candidates = sorted(running or handling, key=lambda one: one.service)
    if any(preferred in one.streams for one in candidates):
        return preferred
    return candidates[0].sources[0].stream if candidates else None


def shards_in_use(announcements: Iterable[Announcement], stream: str, wall_now_s: float) -> int:
    """Over how many shards a producer spreads a stream: the most that a running service reads; 0 for none."""
    running = (one for one in announcements if 0 < one.shards <= MOST_SHARDS and one.is_running(wall_now_s))
    counts = (one.shards for one in running if one.streams.issuperset(shard_names(stream, one.shards)))
    return max(counts, default=0)


class _Record(msgspec.Struct, omit_defaults=True):
    types: list[str]
    #: Stream -> consumer group.
    streams: dict[str, str]
    renewed: float
    shards: int = 0


def suggestion(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, in words."""
    from difflib import get_close_matches  # only then: most names are right

    names = sorted(known)
    close = get_close_matches(name, names, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names):.500}."


_decode = msgspec.json.Decoder(_Record).decode


def encode(types: Iterable[str], sources: Iterable[Source], wall_now_s: float, shards: int = 0) -> bytes:
    """The record of one service."""
    return msgspec.json.encode(_Record(sorted(types), dict(sources), round(wall_now_s, 3), shards))


def parse(records: Mapping[bytes, bytes]) -> list[Announcement]:
    """The valid records; others are left out."""
    found = []
    for service, data in records.items():
        try:
            record = _decode(data if len(data) <= _MAX_BYTES else b"")
        except (ValueError, RecursionError):
            continue
        name = service.decode(errors="replace")
        sources = tuple(Source(*pair) for pair in record.streams.items())
        found.append(Announcement(name, frozenset(record.types), sources, record.renewed, record.shards))
    return found
