"""Retry-set administration: list and page jobs that wait for a retry, make them due now."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Self

from ..errors import StoreRefused
from ..store.operator import Scheduled
from .identity import JobIdentity, read_identity
from .refusals import faults_of, refusal

if TYPE_CHECKING:  # the client library takes a while to load
    from ..store.redis.operator import OperatorStore

#: Jobs per store call. Each comes with its payload, which may be megabytes.
_BATCH_SIZE = 100
#: Passes over the retry set. Retries that become due in between shift the ranks, so one pass may miss some.
_MAX_PASSES = 10


class ScheduledRetry(NamedTuple):
    """A job that waits for a retry, and the stream that it returns to."""

    stream: str
    scheduled: Scheduled
    job: JobIdentity


class RetryPage(NamedTuple):
    """Matching jobs, and the offset of the next page among all retries (None: no more)."""

    jobs: list[ScheduledRetry]
    next_offset: int | None


@dataclass(frozen=True)
class RetrySet:
    """The waiting retries of some streams that match all conditions given. Every call raises
    `StoreUnavailable` as the store does."""

    store: "OperatorStore"
    streams: Sequence[str]
    ids: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()
    #: Leave out streams whose keys the store refuses, and note them here in words; None: raise.
    refused: dict[str, str] | None = None

    def __contains__(self, job: JobIdentity) -> bool:
        return (
            (not self.ids or job.id in self.ids)
            and (not self.types or job.type in self.types)
            and (not self.tenants or job.tenant_id in self.tenants)
        )

    def with_id(self, id: str) -> Self:
        """The same set, limited to one job."""
        return replace(self, ids=frozenset([id]))

    def soonest_first(self) -> Iterator[ScheduledRetry]:
        """The matching jobs, stream by stream, in each the soonest first."""
        return (retry for retry in self._scan() if retry.job in self)

    def page(self, size: int, scan_limit: int, offset: int = 0) -> RetryPage:
        """Up to `size` matching jobs behind the first `offset` retries. Scans at most `scan_limit`."""
        matching: list[ScheduledRetry] = []
        position = offset
        for retry in islice(self._scan(), offset, None):
            if len(matching) == size or position - offset == scan_limit:
                return RetryPage(matching, position)
            position += 1
            if retry.job in self:
                matching.append(retry)
        return RetryPage(matching, None)

    def _scan(self) -> Iterator[ScheduledRetry]:
        for stream in self.streams:
            start = 0
            try:
                while page := self.store.retries(stream, start, _BATCH_SIZE):
                    start += len(page)
                    yield from (ScheduledRetry(stream, one, read_identity(one.data)) for one in page)
            except StoreRefused as error:
                if self.refused is None:
                    raise
                self.refused[stream] = refusal(
                    f"retries of {stream}",
                    error,
                    partial(faults_of, self.store, stream, self.store.retry_key),
                )

    def make_due_now(self, *, dry_run: bool = False) -> int:
        """Skip the remaining backoff. Returns how many jobs it was skipped for; in a dry run, how many
        match."""
        if dry_run:
            return sum(1 for _ in self.soonest_first())
        moved = 0
        for _ in range(_MAX_PASSES):
            retries = self.soonest_first()
            moved_in_pass = 0
            while batch := list(islice(retries, _BATCH_SIZE)):
                moved_in_pass += self._make_batch_due(batch)
            moved += moved_in_pass
            if not moved_in_pass:
                break
        return moved

    def _make_batch_due(self, batch: Sequence[ScheduledRetry]) -> int:
        return sum(
            self.store.retry_now(stream, [retry.scheduled.data for retry in batch if retry.stream == stream])
            for stream in {retry.stream for retry in batch}
        )
