"""Tenants with the most waiting jobs."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..errors import StoreRefused
from ..keys import Source
from ..store.operator import START, sample, walk
from .identity import read_identity

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Limits of what is read of one stream: a dashboard must not slow the store down.
MAX_ENTRIES, _MAX_BYTES = 2000, 8 * 1024 * 1024


class WaitingTenants(NamedTuple):
    """Queued jobs by tenant id, most first, among the ``scanned`` oldest; ``complete`` if these are all."""

    jobs: list[tuple[str, int]]
    scanned: int
    complete: bool


def waiting_tenants(store: "OperatorStore", sources: Sequence[Source]) -> WaitingTenants:
    """Count the queued jobs of each tenant: in each stream the oldest 2,000, or the oldest 8 MiB.

    Jobs that a reader has fetched are not queued. A stream that the store refuses is left out. Raises
    `StoreUnavailable`.
    """
    counts: Counter[str] = Counter()
    complete = True
    for source in sources:
        try:
            complete = _count(store, source, counts) and complete
        except StoreRefused:
            complete = False
    return WaitingTenants(counts.most_common(), counts.total(), complete)


def _count(store: "OperatorStore", source: Source, counts: Counter[str]) -> bool:
    """Whether all queued jobs of the stream were counted."""
    group = store.group(source)
    last_id = group.last_delivered if group else START
    for entry in sample(walk(partial(store.entries, source.stream), last_id), MAX_ENTRIES, _MAX_BYTES):
        counts[read_identity(entry.data).tenant_id] += 1
        last_id = entry.id
    return not store.entries(source.stream, last_id, 1)
