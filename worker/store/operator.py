"""Values that the operator's store returns, and paging over entries; free of client library types.

The store itself is `OperatorStore` in ``redis/operator.py``. Entry ids are bytes,
``b"<milliseconds>-<sequence>"``.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .ports import Entry

#: Before every entry.
START = b"0-0"
#: Entries of the first page, and of any page: the server has a whole page in memory while it sends it.
_FIRST_PAGE, _PAGE = 16, 1000
#: Target size of a page (bytes), by the mean of the page before: jobs may be megabytes.
_PAGE_BYTES = 2 * 1024 * 1024


class LaneCounts(NamedTuple):
    """Jobs of a stream that wait in lanes: by priority, of the ten tenants with the most, by the limit key
    that they wait for (``parked``); and running jobs by limit key."""

    waiting: int
    by_priority: dict[int, int]
    largest_tenants: dict[str, int]
    running: dict[str, int]
    parked: dict[str, int]


class LanePlace(NamedTuple):
    """A job's place in its lane: jobs of the lane before it, and the key for which the lane waits, if any.

    ``is_outdated``: limits have changed since, and a reader will sort the lane again.
    """

    ahead: int
    blocked_by: str | None
    is_outdated: bool = False


class Rivals(NamedTuple):
    """First entries of the job that owns an entry's idempotency key, and of the newest job with its supersede
    key; empty where that is the entry's own job, or unknown."""

    owner: bytes = b""
    newest: bytes = b""


class Scheduled(NamedTuple):
    """A job in the retry ZSET, due at a unix time (seconds, the store's clock)."""

    due_wall_s: float
    data: bytes


class Lease(NamedTuple):
    """A pending entry: its consumer, seconds since the last renewal, number of deliveries."""

    id: bytes
    consumer: str
    idle_s: float
    deliveries: int


class Consumer(NamedTuple):
    """A reader of a group: number of its pending entries, seconds since its last command
    or heartbeat."""

    name: str
    pending: int
    idle_s: float


class GroupState(NamedTuple):
    """A consumer group: its last delivered entry, number of pending entries, its consumers."""

    last_delivered: bytes
    pending: int
    consumers: list[Consumer]


class Pause(NamedTuple):
    """A type that an operator paused: since when (unix seconds, the store's clock) and why."""

    job_type: str
    wall_since_s: float
    note: str


class FoundStreams(NamedTuple):
    """Streams of the job store by name, read or not. ``complete``: all keys were looked at."""

    names: list[str]
    complete: bool


def order_of(id: bytes) -> tuple[int, int]:
    """Sort key of entry ids: as text, ``10-0`` sorts before ``9-0``."""
    ms, _, sequence = id.partition(b"-")
    return int(ms), int(sequence)


def walk(page: Callable[[bytes, int], list[Entry]], start: bytes = START) -> Iterator[list[Entry]]:
    """Every page from an id on, in either direction; pages of large entries are shorter."""
    count = _FIRST_PAGE
    while entries := page(start, count):
        yield entries
        start = entries[-1].id
        mean = sum(len(entry.data or b"") for entry in entries) / len(entries)
        count = max(1, min(_PAGE, int(_PAGE_BYTES / max(1.0, mean))))


def sample(pages: Iterator[list[Entry]], max_entries: int, max_bytes: int) -> Iterator[Entry]:
    """The entries of pages up to the end of the page that reaches a limit."""
    count = size_bytes = 0
    for page in pages:
        yield from page
        count += len(page)
        size_bytes += sum(len(entry.data or b"") for entry in page)
        if count >= max_entries or size_bytes >= max_bytes:
            return
