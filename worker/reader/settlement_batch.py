"""Settlements of one tick: the outcomes of all workers, by what the store does with them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..keys import Source
from ..outcome import Failure
from ..store.ports import Dead, Kept, PutBack, Retry, Settlement
from .admission import AdmittedJob
from .crash_breaker import CrashKey
from .held_outcomes import FailedJob, KeptJob


class DeferredJob(NamedTuple):
    """A job whose dependency is unavailable, and what it reported."""

    job: AdmittedJob
    failure: Failure


class SettlementBatch:
    """Settlements of one tick, one for each stream, and what they mean for the circuit breakers."""

    def __init__(self) -> None:
        self.done: dict[int, list[bytes]] = defaultdict(list)
        #: Type numbers of the jobs in ``done``, in the same order.
        self.done_types: dict[int, list[int]] = defaultdict(list)
        #: Failed jobs whose entry is gone from the stream. They are acknowledged, too.
        self.missing: dict[int, list[bytes]] = defaultdict(list)
        #: Entries that are acknowledged in favour of other jobs.
        self.dropped: dict[int, list[bytes]] = defaultdict(list)
        self.retries: dict[int, list[Retry]] = defaultdict(list)
        self.dead: dict[int, list[Dead]] = defaultdict(list)
        #: Jobs that wait in their lanes again.
        self.put_back: dict[int, list[PutBack]] = defaultdict(list)
        #: Jobs that succeeded and whose result is kept.
        self.kept: dict[int, list[Kept]] = defaultdict(list)
        #: Cancelled entries that end with this batch.
        self.cancelled: dict[int, list[bytes]] = defaultdict(list)
        #: Metrics to count for an entry that did not succeed, once it is settled.
        self.counts: dict[tuple[int, bytes], list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        #: The failed jobs, and those that succeeded with a result, by stream number and entry id.
        self.failed: dict[tuple[int, bytes], FailedJob] = {}
        self.kept_jobs: dict[tuple[int, bytes], KeptJob] = {}
        #: Types whose dependencies answer: a job succeeded, or failed for a reason of its own.
        self.answered_types: set[int] = set()
        #: Jobs that were the only ones in a worker that died.
        self.worker_deaths: list[CrashKey] = []
        #: Jobs whose dependency is unavailable. They stay pending and use up no retry.
        self.deferred: list[DeferredJob] = []

    @property
    def has_ended(self) -> bool:
        """Whether any job is settled."""
        all_kinds = (self.done, self.missing, self.dropped, self.retries, self.dead, self.put_back, self.kept)
        return any(all_kinds)

    def settlements(
        self, streams: Sequence[Source], versions: Mapping[int, int], result_ttl_s: float, *, sure: bool
    ) -> dict[int, Settlement]:
        """One settlement for each stream that has outcomes, by stream number."""
        outcomes = (self.done, self.missing, self.dropped, self.retries, self.dead, self.put_back, self.kept)
        touched = {stream_no for one in outcomes for stream_no in one}
        return {
            no: Settlement(
                streams[no],
                self.done[no],
                self.retries[no],
                self.dead[no] + [Dead(id, b"") for id in self.missing[no]],
                sure,
                self.put_back.get(no, ()),
                versions[no],
                self.dropped.get(no, ()),
                self.kept.get(no, ()),
                result_ttl_s,
            )
            for no in sorted(touched)
        }
