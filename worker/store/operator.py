"""What operators' tools ask of a job store; free of client library types.

Entry ids are bytes, ``b"<milliseconds>-<sequence>"``. Every call raises `StoreUnavailable` when the store
does not answer or refuses for now. Nothing here takes a reader's name, so it may run beside any service.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from ..keys import Source
from .ports import Entry

#: Before every entry.
START = b"0-0"
#: Entries of the first page, and of any: a page is in the server's memory while it is sent.
_FIRST_PAGE, _PAGE = 16, 1000
#: Bytes that a page should have, going by the entries before: jobs may be megabytes.
_PAGE_BYTES = 2 * 1024 * 1024


class Scheduled(NamedTuple):
    """A job that waits for its next try, due at a unix time (seconds, the store's clock)."""

    due_wall_s: float
    data: bytes


class Lease(NamedTuple):
    """A pending entry: whose it is, seconds since it was last renewed, and how often it was delivered."""

    id: bytes
    consumer: str
    idle_s: float
    deliveries: int


class Consumer(NamedTuple):
    """One reader of a group: how many entries it holds, and seconds since it was last heard of."""

    name: str
    pending: int
    idle_s: float


class GroupState(NamedTuple):
    """How far a group is, and who reads for it."""

    last_delivered: bytes
    pending: int
    consumers: list[Consumer]


class Pause(NamedTuple):
    """A type that was paused by hand: since when (unix seconds, the store's clock) and why."""

    kind: str
    wall_since_s: float
    note: str


class OperatorStore(Protocol):
    """The streams, retries, dead letters and pauses of a deployment."""

    #: Where the store is; it may hold a password. Empty for a store in memory.
    url: str

    def wall_now_s(self, stream: str) -> float:
        """The store's clock, unix seconds."""

    def dead_count(self, stream: str) -> int:
        """How many dead letters the stream has."""

    def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """A page of dead letters, oldest first, behind the id `after` (`START`: from the first)."""

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        """A page of dead letters, newest first, in front of the id `before` (`START`: from the last)."""

    def requeue(self, stream: str, jobs: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """Put jobs on their stream and take the dead letters of these ids away: ``(letter's id, job)``, each
        in one atomic step. False where the letter was gone already; its job is not put anywhere then."""

    def purge(self, stream: str, ids: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many were still there."""

    def retries(self, stream: str, start: int, count: int) -> list[Scheduled]:
        """A page of what waits for its next try, soonest first, from a rank on."""

    def retry_now(self, stream: str, jobs: Sequence[bytes]) -> int:
        """Make waiting jobs due at once, by their bytes; returns how many were still waiting for later."""

    def pause(self, kind: str, note: str) -> None:
        """Have no reader of the deployment hand out jobs of this type until `resume`."""

    def resume(self, kind: str) -> bool:
        """Take a pause back; False where the type was not paused."""

    def pauses(self) -> list[Pause]:
        """The types that are paused, by name."""

    def group(self, source: Source) -> GroupState | None:
        """How far the group is; None where it (or its stream) does not exist."""

    def entry(self, stream: str, id: bytes) -> Entry | None:
        """One entry with the deaths charged to it, or None where the stream has none of that id."""

    def entries(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """A page of the stream, finished or not, oldest first."""

    def lease(self, source: Source, id: bytes) -> Lease | None:
        """Who holds an entry; None where it is not pending."""

    def leases(self, source: Source, after: bytes, count: int) -> list[Lease]:
        """A page of what is pending, oldest first."""

    def close(self) -> None:
        """Drop every connection."""


def order_of(id: bytes) -> tuple[int, int]:
    """What entry ids are sorted by: as text ``10-0`` would stand before ``9-0``."""
    ms, _, sequence = id.partition(b"-")
    return int(ms), int(sequence)


def walk(page: Callable[[bytes, int], list[Entry]], start: bytes = START) -> Iterator[list[Entry]]:
    """Every page from an id on, in either direction; pages of large entries are short ones."""
    count = _FIRST_PAGE
    while entries := page(start, count):
        yield entries
        start = entries[-1].id
        mean = sum(len(entry.data or b"") for entry in entries) / len(entries)
        count = max(1, min(_PAGE, int(_PAGE_BYTES / max(1.0, mean))))
