"""Ports of the job store: what reader, reaper and producer ask of it; free of client library types.

Entry ids are bytes in the server's form, ``b"<milliseconds>-<sequence>"``. No call waits longer than the
store's timeout. Every call may raise:

- `StoreUnavailable`: the store does not answer or refuses for now;
- `StoreRefused`, a subclass of it: the keys of the stream are the reason;
- `Fenced`: a newer reader owns this consumer's name.

Any other error is a bug.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from ..errors import StoreRefused
from ..flow import FlowConfig
from ..keys import Source
from .announcements import Announcement
from .batches import BatchProducerStore, BatchStore
from .cron import CronStore
from .forwarding import ForwardStore

#: Idle time (seconds) that a released entry shows: above any lease. Servers refuse times before 1970.
RELEASED_IDLE_S = 30 * 24 * 3600.0
#: Tenants that are shown by themselves: those with the most waiting jobs.
LARGEST_TENANTS = 10


def do_nothing() -> None:
    """Default of callbacks."""


class Entry(NamedTuple):
    """An entry as it was delivered. ``data`` is None where the entry has no such field."""

    id: bytes
    data: bytes | None
    deliveries: int = 1
    deaths: int = 0


class Retry(NamedTuple):
    """Settlement of one entry by a retry: the job's new JSON and its delay (seconds)."""

    id: bytes
    delay_s: float
    data: bytes


class OwnedKey(NamedTuple):
    """An idempotency key: its bucket and name, and the first entry of the job that may own it."""

    bucket: str
    name: str
    first_id: bytes


class Dead(NamedTuple):
    """Settlement of one entry by a dead letter: the letter's JSON.

    Empty: none is made, because the entry is gone from the stream, or its job was cancelled and is dropped.
    ``key`` is freed if the job owns it. ``result`` is the record that is kept as the result of job
    ``job_id``; empty: none is.
    """

    id: bytes
    data: bytes
    key: OwnedKey | None = None
    job_id: str = ""
    result: bytes = b""


class Kept(NamedTuple):
    """Settlement of one entry as done, with the record that is kept as the result of job ``job_id``.

    ``is_dropped``: the job was not run, and a result that is there already is kept instead.
    """

    id: bytes
    job_id: str
    result: bytes
    is_dropped: bool = False


class Candidate(NamedTuple):
    """A job that may not run before the store has compared it with others (see `conditions`).

    ``data`` is the job as it waits in the retry ZSET until ``due_s`` (unix seconds); empty if it is due.
    """

    id: bytes
    first_id: bytes
    series: str = ""
    due_s: float = 0.0
    data: bytes = b""


class Screened(NamedTuple):
    """Jobs that may not run, by entry id.

    ``superseded`` names the first entry of the job that runs instead. ``delayed`` were moved into the retry
    ZSET. ``lost`` are not ours any more.
    """

    superseded: dict[bytes, bytes]
    delayed: set[bytes]
    lost: set[bytes]


class WaitingJob(NamedTuple):
    """A job for a lane: the id of its entry and its cost (bytes)."""

    id: bytes
    cost: int


class PutBack(NamedTuple):
    """Settlement of one entry by its return to its lane. Jobs with ``key`` wait for ``wait_s``."""

    job: WaitingJob
    lane: bytes
    key: str
    wait_s: float

    @property
    def id(self) -> bytes:
        """The id of the entry."""
        return self.job.id


class TakenJobs(NamedTuple):
    """Jobs whose turn it is; they are pending for this consumer now.

    The limits of ``outdated`` have changed: they must be sorted again. ``waiting`` counts the jobs that still
    wait, ``due_s`` is the time until one of them may start (None: only another event lets one start).
    ``limited`` counts by type those of ``entries`` whose lane a limit has blocked since it was last empty.
    """

    entries: list[Entry]
    outdated: list[Entry]
    waiting: int
    due_s: float | None
    limited: Mapping[str, int] = {}


class Backlog(NamedTuple):
    """Jobs of a stream that are not delivered yet (``lag``), jobs in lanes by type, version of the limits.

    Handlers asked jobs of ``asked_types`` to wait. ``in_series`` counts the jobs in lanes that have a
    supersede key; ``waiting`` counts the others.
    ``cancels`` is another number after each new entry of `ReaderStore.cancels`; ``cancelled`` counts the jobs
    of the stream that were cancelled while they waited.
    """

    lag: int
    waiting: dict[str, int]
    version: int
    asked_types: frozenset[str]
    in_series: int = 0
    cancels: int = 0
    cancelled: int = 0


class Settlement(NamedTuple):
    """Outcomes of entries of one stream; each entry is settled in one atomic step.

    ``sure``: the leases of ``done`` cannot have expired. Their refusals are not looked for, which is quicker.
    """

    source: Source
    done: Sequence[bytes] = ()
    retries: Sequence[Retry] = ()
    dead: Sequence[Dead] = ()
    sure: bool = False
    put_back: Sequence[PutBack] = ()
    #: Version of the limits by which the lanes of ``put_back`` were chosen.
    version: int = 0
    #: Entries that are acknowledged without having been run.
    dropped: Sequence[bytes] = ()
    kept: Sequence[Kept] = ()
    result_ttl_s: float = 3600.0

    @property
    def ids(self) -> list[bytes]:
        """The ids of all its entries."""
        others = (
            self.dropped,
            [one.id for one in self.retries],
            [one.id for one in self.dead],
            [one.id for one in self.put_back],
            [one.id for one in self.kept],
        )
        return [*self.done, *itertools.chain(*others)]


class Settled(NamedTuple):
    """Result of one settlement.

    ``refused``: ids that were not ours any more. They were acknowledged already or belong to another
    consumer, and nothing was done for them. ``unsettled``: ids for which the store refused the step with
    ``error``, because of the stream's keys; they are as they were before. ``cancelled``: ids that should have
    been retried or put back, but were cancelled; they are as they were before, too. The value is that of
    `ReaderStore.cancels`. ``is_replicated`` is False if fewer replicas than asked for have it in time; it is
    valid all the same.
    """

    refused: set[bytes]
    unsettled: set[bytes]
    error: StoreRefused | None = None
    cancelled: Mapping[bytes, bool] = {}
    is_replicated: bool = True


class KeyFault(NamedTuple):
    """A key that the store cannot work with: what is wrong, and the command that repairs it.

    ``blocks``: the reader cannot work on the stream. A stream that takes no new entries can still be read.
    """

    key: str
    problem: str
    repair: str
    blocks: bool = True


class Promotion(NamedTuple):
    """Number of due retries that were moved, and seconds until the next is due (None: there is none)."""

    moved: int
    next_due_s: float | None


class Depths(NamedTuple):
    """Queue depths of one stream and group; ages are seconds.

    ``queued`` counts the undelivered entries (``lag``) and the jobs in lanes (``waiting``).
    ``tenant_ages_s`` has the age of the oldest job in lanes of the `LARGEST_TENANTS` with the most jobs
    there.
    """

    queued: int
    pending: int
    retrying: int
    dead: int
    oldest_age_s: float
    lag: int
    waiting: int = 0
    other_groups: tuple[str, ...] = ()
    tenant_ages_s: Mapping[str, float] = {}


def sum_depths(parts: Sequence[Depths]) -> Depths:
    """The depths of streams that count as one, at least one; the age is that of the oldest job."""
    ages_s: dict[str, float] = {}
    for part in parts:
        for tenant, age_s in part.tenant_ages_s.items():
            ages_s[tenant] = max(age_s, ages_s.get(tenant, 0.0))
    return Depths(
        queued=sum(part.queued for part in parts),
        pending=sum(part.pending for part in parts),
        retrying=sum(part.retrying for part in parts),
        dead=sum(part.dead for part in parts),
        oldest_age_s=max(part.oldest_age_s for part in parts),
        lag=sum(part.lag for part in parts),
        waiting=sum(part.waiting for part in parts),
        other_groups=tuple(dict.fromkeys(name for part in parts for name in part.other_groups)),
        tenant_ages_s=ages_s,
    )


class ReaderStore(Protocol):
    """A consumer group as its reader uses it."""

    def acquire(self, sources: Sequence[Source]) -> None:
        """Create missing groups (from id 0) and take the consumer's name with a new epoch.

        The epoch fences off any earlier reader of that name. Raises `NameHeld`, and takes no name, where
        another service renewed it within the lease.
        """

    def renew_name(self, sources: Sequence[Source]) -> None:
        """Renew the name: no other service can take it for another lease."""

    def release_name(self, sources: Sequence[Source]) -> None:
        """Release the name if it is ours: another service can take it at once."""

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        """Request at most ``count`` new entries without waiting for them.

        Returns a file descriptor that is readable when `finish_read` does not block. Each source has at
        most one read under way.
        """

    def finish_read(self, source: Source) -> list[Entry]:
        """Take the answer of the read under way; empty where BLOCK ended without a new entry.

        Raises `AnswerTooLarge` where several entries were requested and exceed the bytes that a process can
        hold. They stay pending, and `own_pending` finds them.
        """

    def is_reading(self, source: Source) -> bool:
        """Whether a read of this source was begun and not finished."""

    def abandon_read(self, source: Source) -> None:
        """Drop the read of one source, if one is under way, as `abandon_reads` does."""

    def abandon_reads(self) -> None:
        """Drop reads under way. Entries that they deliver stay pending, and `own_pending` finds them."""

    def own_pending(self, source: Source, after: bytes, count: int) -> list[Entry]:
        """A page of entries that are pending for this consumer, by id; start after ``b"0-0"``."""

    def own_ids(self, source: Source, after: bytes, count: int) -> list[bytes]:
        """The ids of such a page without the entries; some may be gone from the stream."""

    def claim(self, source: Source, min_idle_ms: int, count: int, cursor: bytes) -> tuple[bytes, list[Entry]]:
        """Claim entries that other consumers left idle; the cursor is ``b"0-0"`` at start and at the end.

        Fewer than ``count`` may be returned before the end, even none.
        """

    def has_lost(self, source: Source, min_idle_ms: int) -> bool:
        """Whether a consumer whose name no service holds has entries that can be claimed. A cheap look."""

    def settle(
        self, settlements: Sequence[Settlement], meanwhile: Callable[[], None] = do_nothing
    ) -> list[Settled]:
        """Settle entries, each entry atomically; returns one result for each settlement.

        ``meanwhile`` is called once while the store settles. It may call other methods, and what it raises is
        raised: then the entries may be settled or not. `StoreRefused` is not raised: it is in the result of
        its settlement.
        """

    def set_deaths(self, source: Source, deaths: Mapping[bytes, int]) -> dict[bytes, int]:
        """Durably set the number of workers that died under each id that is still ours; returns those set.

        The count is set, not incremented, so a call is safe to repeat.
        """

    def renew(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        """Reset the idle time of entries in flight; returns the ids that are not ours any more."""

    def release(self, source: Source, ids: Sequence[bytes]) -> None:
        """Make entries claimable at once by any reader. Their last delivery is not counted."""

    def hand_back(self, source: Source, jobs: Mapping[bytes, bytes]) -> int:
        """Give entries that were not started back to the stream, atomically each; returns their number.

        ``jobs`` has the JSON of each by its id. They get new ids at the end of the stream, so an idle reader
        takes them at once. Ids that are not ours any more are left out.
        """

    def idle_readers(self, source: Source) -> int:
        """Number of other consumers without an entry whose service lives; 0 while entries are undelivered."""

    def fetch(self, source: Source, ids: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """The ``data`` of entries; an id that is gone from the stream is left out."""

    def ask_state(self, sources: Iterable[Source]) -> None:
        """Ask ahead what `backlog` of each source and `paused_types` return: their answers come together."""

    def paused_types(self) -> set[str]:
        """The types that an operator has paused, for every reader of the deployment."""

    def key_faults(self, source: Source) -> list[KeyFault]:
        """The keys of a stream that the store cannot work with, as far as the store shows them."""

    def pause_faults(self) -> list[KeyFault]:
        """As `key_faults`, for the key of the paused types."""

    def backlog(self, source: Source) -> Backlog:
        """Count the jobs that wait."""

    def flow_config(self, source: Source) -> FlowConfig:
        """Limits and weights of the stream."""

    def configure(self, source: Source, config: FlowConfig) -> bool:
        """Replace limits and weights; False, without effect, if ``config.version`` is no longer current."""

    def sort(self, source: Source, version: int, lanes: Mapping[bytes, Sequence[WaitingJob]]) -> set[bytes]:
        """Move entries of this consumer into lanes, atomically. Returns the ids that are not ours any more.

        ``version`` is that of the limits by which the lanes were chosen.
        """

    def take(self, source: Source, types: Iterable[str], count: int) -> TakenJobs:
        """Take at most ``count`` jobs of these types out of their lanes, atomically.

        They are those whose turn it is, within the limits.
        """

    def cancels(self, source: Source) -> dict[bytes, bool]:
        """Entries that were cancelled, perhaps ended since, and whether each becomes a dead letter."""

    def end_cancels(self, source: Source, ids: Sequence[bytes]) -> None:
        """Forget cancelled entries that have ended."""

    def register_batches(self, source: Source, batches: Mapping[bytes, str]) -> set[str]:
        """Record the batches of pending entries, by entry id, so that their end is counted.

        Returns the batches that have no record: their jobs are not counted. Safe to repeat.
        """

    def claim_keys(
        self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float
    ) -> dict[bytes, bytes]:
        """Claim idempotency keys atomically: first entry of each job and name of its key.

        Returns the owner's first entry for each entry whose key another job owns: one that was sent less than
        ``window_s`` before. A repeated call returns the same.
        """

    def begin_claim(self, source: Source, keys: Sequence[tuple[bytes, str]], window_s: float) -> None:
        """As `claim_keys`, without waiting for the result: `finish_claim` returns it.

        One claim of a source may be under way; other calls may come before its end.
        """

    def finish_claim(self, source: Source) -> dict[bytes, bytes]:
        """The result of the claim that was begun last; empty if there is none."""

    def screen(self, source: Source, candidates: Sequence[Candidate]) -> Screened:
        """Compare jobs with others of their supersede keys, and delay those that are not due.

        Each job is decided atomically, and a repeated call decides the same.
        """

    def share_shards(self, stream: str, lease_s: float, count: int) -> set[int]:
        """Take a share of a stream's shards for a time, beside the other readers; returns their numbers.

        They say which shards a reader serves first, not who runs a job. With ``lease_s`` 0 the reader leaves.
        """

    def slot_holders(self, source: Source, ids: Sequence[bytes]) -> set[bytes]:
        """The ids of entries that hold slots of limits."""

    def close(self) -> None:
        """Drop every connection."""


class ReaperStore(CronStore, BatchStore, ForwardStore, Protocol):
    """Maintenance of streams: due retries, trimming, idle consumers, depths, cron, batches."""

    def ask_due(self, streams: Iterable[str], limit: int) -> None:
        """Ask ahead what `promote` and `batch_due` of each stream return: their answers come together."""

    def promote(self, stream: str, limit: int) -> Promotion:
        """Move at most ``limit`` due retries into the stream, in one atomic step."""

    def trim(self, stream: str) -> int:
        """Delete the entries that every group has finished; returns their number."""

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        """Delete consumers other than ``keep`` that own nothing and were idle for ``idle_ms``, atomically."""

    def forget_keys(self, stream: str) -> int:
        """Delete idempotency keys whose window has passed, by buckets; returns the number of buckets."""

    def mend_slots(self, source: Source) -> int:
        """Free the slots of entries that are no longer pending; returns the number of these entries."""

    def mend_batches(self, source: Source, cursor: bytes) -> tuple[bytes, int]:
        """Count the jobs of batches whose entries were deleted by hand as dead. It looks at a page of them.

        Returns the cursor of the next call (``b"0"``: from the start), and the number of these entries.
        """

    def depths(self, source: Source) -> Depths:
        """Count entries, retries and dead letters."""

    def announce(
        self, service: str, types: Iterable[str], sources: Iterable[Source], shards: int = 0
    ) -> None:
        """Record what a service handles, and delete outdated records of others. Best effort: a store that
        refuses is not an error."""

    def key_faults(self, source: Source) -> list[KeyFault]:
        """As `ReaderStore.key_faults`."""

    def close(self) -> None:
        """Drop every connection."""


class CancelRequest(NamedTuple):
    """A job that is to be cancelled.

    ``entry_id`` is empty for a job of the retry ZSET, which ``data`` names. If the job waits, ``letter``
    becomes a dead letter and ``result`` the result of ``job_id``, unless they are empty; and the idempotency
    key ``unique`` is free again, if the job with the entry ``first_id`` owns it.
    """

    entry_id: bytes
    data: bytes
    letter: bytes = b""
    job_id: str = ""
    result: bytes = b""
    unique: str = ""
    first_id: bytes = b""


class CancelReply(IntEnum):
    """What `CancelStore.cancel` did with one job."""

    #: It has ended, or it is in another place by now.
    GONE = 0
    #: It waited in the stream or in a lane, and was removed.
    REMOVED = 1
    #: It waited in the retry ZSET, and was removed.
    UNSCHEDULED = 2
    #: A service has it: that ends it.
    ASKED = 3
    #: It is on its way into a shard: only there it can be cancelled.
    MOVING = 4


class CancelStore(Protocol):
    """Cancellation of jobs, by producers and operators."""

    def stream_page(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """A page of the stream, finished entries too, oldest first, after an id."""

    def last_id(self, stream: str) -> bytes:
        """The id of the newest entry; ``0-0`` for a stream that does not exist."""

    def retry_page(self, stream: str, start: int, count: int) -> list[bytes]:
        """A page of the retry ZSET, soonest first, from a rank on."""

    def cancel(
        self, stream: str, requests: Sequence[CancelRequest], *, result_ttl_s: float, dry_run: bool = False
    ) -> list[CancelReply]:
        """Cancel jobs, each in one atomic step; with ``dry_run``, only say what would be done."""

    def announcements(self) -> list[Announcement]:
        """As `ProducerStore.announcements`."""

    def close(self) -> None:
        """Drop every connection."""


class ProducerStore(BatchProducerStore, CancelStore, Protocol):
    """Enqueueing of jobs, their results and their cancellation."""

    def result(self, stream: str, job_id: str) -> bytes | None:
        """The kept result of a job; None if there is none."""

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """Append jobs in order, pipelined; returns how many the store acknowledged."""

    def announcements(self) -> list[Announcement]:
        """What the services of the deployment handle; empty if unknown."""

    def close(self) -> None:
        """Drop every connection."""
