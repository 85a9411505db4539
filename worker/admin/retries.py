"""Jobs that wait for their next try, and a choice among them: gone through page by page, made due now."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

from ..store.operator import OperatorStore, Scheduled
from .find_job import JobIdentity, read_identity

#: Jobs of one page: each comes with its bytes, which may be megabytes.
_PAGE = 100
#: Rounds through all that waits: retries that become due meanwhile shift the pages, and some are passed over.
_ROUNDS = 10


class ScheduledRetry(NamedTuple):
    """A job that waits, in which stream's retries, and what it is called."""

    stream: str
    scheduled: Scheduled
    job: JobIdentity


class RetryPage(NamedTuple):
    """Chosen jobs, and behind how many of all to go on (None: that was all)."""

    jobs: list[ScheduledRetry]
    behind: int | None


@dataclass(frozen=True)
class RetrySet:
    """The retries of some streams, those that fit everything that is given. Every call raises
    `StoreUnavailable` as the store does."""

    store: OperatorStore
    streams: Sequence[str]
    ids: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()

    def __contains__(self, job: JobIdentity) -> bool:
        return (
            (not self.ids or job.id in self.ids)
            and (not self.types or job.type in self.types)
            and (not self.tenants or job.tenant_id in self.tenants)
        )

    def only(self, id: str) -> Self:
        """The same, narrowed down to one job."""
        return replace(self, ids=frozenset([id]))

    def soonest_first(self) -> Iterator[ScheduledRetry]:
        """The chosen jobs, stream by stream, soonest first in each."""
        return (one for one in self._everything() if one.job in self)

    def page(self, size: int, look_at: int, behind: int = 0) -> RetryPage:
        """The next chosen jobs behind so many of all; gives up after looking at so many."""
        chosen: list[ScheduledRetry] = []
        looked_at = behind
        for one in islice(self._everything(), behind, None):
            if len(chosen) == size or looked_at - behind == look_at:
                return RetryPage(chosen, looked_at)
            looked_at += 1
            if one.job in self:
                chosen.append(one)
        return RetryPage(chosen, None)

    def _everything(self) -> Iterator[ScheduledRetry]:
        for stream in self.streams:
            start = 0
            while page := self.store.retries(stream, start, _PAGE):
                start += len(page)
                yield from (ScheduledRetry(stream, one, read_identity(one.data)) for one in page)

    def try_now(self, *, dry_run: bool = False) -> int:
        """Make them due at once; returns how many were waiting for later (a dry run: how many there are)."""
        if dry_run:
            return sum(1 for _ in self.soonest_first())
        moved = 0
        for _ in range(_ROUNDS):
            found = self.soonest_first()
            changed = 0
            while some := list(islice(found, _PAGE)):
                changed += self._hasten(some)
            moved += changed
            if not changed:
                break
        return moved

    def _hasten(self, some: Sequence[ScheduledRetry]) -> int:
        return sum(
            self.store.retry_now(name, [one.scheduled.data for one in some if one.stream == name])
            for name in {one.stream for one in some}
        )
