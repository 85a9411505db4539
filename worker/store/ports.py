"""Ports of the job store: what reader, reaper and producer ask of it; free of client library types.

Entry ids are bytes in the server's form, ``b"<milliseconds>-<sequence>"``. Every call raises
`StoreUnavailable` when the store does not answer or refuses for now, and `Fenced` when a newer reader
holds this consumer's name; anything else is a bug. No call waits longer than the store's timeout.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ..keys import Source

#: How idle an entry looks that was handed back: above any lease; servers refuse times before 1970.
HANDED_BACK_IDLE_S = 30 * 24 * 3600.0


class Entry(NamedTuple):
    """One entry as it was delivered. ``data`` is None where the entry has no such field."""

    id: bytes
    data: bytes | None
    deliveries: int = 1
    deaths: int = 0


class Retry(NamedTuple):
    """Settle by trying again: the job's new JSON and how long it waits (seconds)."""

    id: bytes
    delay_s: float
    data: bytes


class Dead(NamedTuple):
    """Settle by giving up: the dead letter's JSON."""

    id: bytes
    data: bytes


class Settlement(NamedTuple):
    """What becomes of some entries of one stream; settled in one atomic step."""

    source: Source
    done: Sequence[bytes] = ()
    retries: Sequence[Retry] = ()
    dead: Sequence[Dead] = ()


class Promotion(NamedTuple):
    """How many retries became due and were moved, and seconds until the next (None: nothing waits)."""

    moved: int
    next_due_s: float | None


class Depths(NamedTuple):
    """How much waits where. ``queued`` counts undelivered entries; ages are seconds."""

    queued: int
    pending: int
    retrying: int
    dead: int
    oldest_age_s: float
    lag: int


class ReaderStore(Protocol):
    """A consumer group seen by its one reader."""

    def acquire(self, sources: Sequence[Source]) -> None:
        """Make the groups (from id 0) where they are missing, and take the consumer's name: a new epoch
        that fences off any earlier reader of that name.

        Raises `NameHeld`, and takes no name, where another service renewed it within the lease.
        """

    def hold(self, sources: Sequence[Source]) -> None:
        """Renew the name: for another lease no other service can take it."""

    def resign(self, sources: Sequence[Source]) -> None:
        """Give the name up, where it is ours: another service can take it at once."""

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        """Ask for at most ``count`` new entries and return at once; the result is a file descriptor
        that becomes readable when `finish_read` will not block. One read at a time for each source."""

    def finish_read(self, source: Source) -> list[Entry]:
        """Take the answer of the read begun before; empty when it timed out with nothing new.

        Raises `AnswerTooLarge` where several entries were asked for and they are more bytes than a process
        can well hold; they stay pending and are found by `own_pending`."""

    def reading(self, source: Source) -> bool:
        """Whether a read of this source was begun and not yet finished."""

    def abandon_reads(self) -> None:
        """Drop reads in progress. What they might deliver stays pending and is found by `own_pending`."""

    def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
        """A page of what this consumer was given and has not settled, by id; start after ``b"0-0"``."""

    def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
        """The ids of such a page, without fetching the entries; some may be gone from the stream."""

    def take_over(
        self, source: Source, min_idle_ms: int, count: int, cursor: bytes
    ) -> tuple[bytes, list[Entry]]:
        """Claim entries that other consumers left idle; the cursor is ``b"0-0"`` at start and at the end."""

    def settle(self, settlements: Sequence[Settlement]) -> set[bytes]:
        """Carry out outcomes, each settlement atomically; returns the ids that were not ours any more
        (acknowledged already, or another consumer's by now): nothing was done for those. A done id that
        no consumer owns any more may be left out of them."""

    def charge(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        """Durably set how many workers have died under each id that is still ours; returns those set. Setting
        a count (rather than adding one) makes it safe to repeat."""

    def renew(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        """Reset the idle time of entries in flight; returns the ids that are not ours any more."""

    def release(self, source: Source, ids: Sequence[bytes]) -> None:
        """Hand entries back at once: any reader's next `take_over` may have them, and that they were
        delivered here is not counted."""

    def bodies(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """The ``data`` of entries; an id that is gone from the stream is left out."""

    def paused(self) -> set[str]:
        """The types that an operator has paused, for every reader of the deployment."""

    def close(self) -> None:
        """Drop every connection."""


class ReaperStore(Protocol):
    """What the reaper asks: moving due retries, keeping streams and consumers tidy, counting."""

    def promote(self, stream: str, limit: int) -> Promotion:
        """Move at most ``limit`` due retries back into the stream, in one atomic step."""

    def trim(self, stream: str) -> int:
        """Drop the entries that every group has finished; returns how many."""

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        """Delete consumers other than ``keep`` that own nothing and were idle so long, atomically."""

    def depths(self, source: Source) -> Depths:
        """Count what waits."""

    def close(self) -> None:
        """Drop every connection."""


class ProducerStore(Protocol):
    """What a producer asks."""

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """Append jobs in order, pipelined; returns how many were acknowledged by the store."""

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        """Let a job wait in the retry ZSET; the reaper moves it into the stream when it is due."""

    def close(self) -> None:
        """Drop every connection."""
