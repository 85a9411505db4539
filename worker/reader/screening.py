"""Screening: compares admitted jobs with others of their idempotency and supersede keys; delays those that are
not due."""

import logging
import math
from collections.abc import Iterable, Sequence

from ..envelope import read_header, with_first_id
from ..outcome import Drop
from ..store.ports import Claim
from .admission import AdmittedJob, RejectedEntry, drop, reject_expired
from .context import ReaderContext
from .prefetch import PrefetchBuffer

log = logging.getLogger("jobworker.reader")


class Screening:
    """Decides about jobs with start conditions before they are prefetched, in one script for many.

    A decision is repeated for each delivery, with the same result: a reader may be killed at any moment.
    Methods raise as the store does.
    """

    def __init__(self, context: ReaderContext, buffer: PrefetchBuffer) -> None:
        self._store = context.store
        self._streams = context.settings.streams
        self._window_s = context.settings.unique_window_s
        self._wall_s = context.wall_s
        self._buffer = buffer
        #: The earliest time at which a prefetched job expires (unix seconds).
        self._wall_next_expiry_s = math.inf

    def screen(
        self, stream_no: int, jobs: Sequence[AdmittedJob], *, is_taken: bool
    ) -> tuple[Sequence[AdmittedJob], list[RejectedEntry]]:
        """The jobs that may run, and those that are dropped. Delayed jobs are in neither list.

        Jobs that were taken out of lanes were screened before; only a newer job of their series may have
        arrived since.
        """
        claims = []
        for _, _, entry, _, conditions in jobs:
            if conditions is None:
                continue
            self._wall_next_expiry_s = min(self._wall_next_expiry_s, conditions.expires_s)
            first_id, unique, series, due_s, _ = conditions
            if is_taken:
                unique, due_s = "", 0.0
            data = b""
            if due_s > self._wall_s():
                assert entry.data is not None, "an admitted job has data"
                data = with_first_id(entry.data, first_id.decode())
            if unique or series or data:
                claims.append(Claim(entry.id, first_id, unique, series, due_s, data))
        return self._decide(stream_no, jobs, claims) if claims else (jobs, [])

    def _decide(
        self, stream_no: int, jobs: Sequence[AdmittedJob], claims: Sequence[Claim]
    ) -> tuple[Sequence[AdmittedJob], list[RejectedEntry]]:
        screened = self._store.screen(self._streams[stream_no], claims, self._window_s)
        if not any(screened):
            return jobs, []
        if screened.delayed:
            fields = {"stream": self._streams[stream_no].stream, "jobs": len(screened.delayed)}
            log.debug("jobs.delayed", extra=fields)
        kept, dropped = [], []
        for job in jobs:
            id = job.entry.id
            if id in screened.duplicates:
                dropped.append(drop(job, Drop.DUPLICATE, screened.duplicates[id]))
            elif id in screened.superseded:
                dropped.append(drop(job, Drop.SUPERSEDED, screened.superseded[id]))
            elif id not in screened.delayed and id not in screened.lost:
                kept.append(job)
        return kept, dropped

    def take_expired(self) -> list[RejectedEntry]:
        """Remove the prefetched jobs whose latest start has passed."""
        now_s = self._wall_s()
        if now_s < self._wall_next_expiry_s:
            return []
        limited = [job for job in self._buffer if job.conditions and job.conditions.expires_s < math.inf]
        expired = [job for job in limited if job.conditions and job.conditions.expires_s <= now_s]
        for job in expired:
            self._buffer.discard(job.stream_no, {job.entry.id})
        left = (job.conditions.expires_s for job in limited if job.conditions)
        self._wall_next_expiry_s = min((one for one in left if one > now_s), default=math.inf)
        return [reject_expired(job, read_header(job.entry.data or b"")) for job in expired]


def has_series(jobs: Iterable[AdmittedJob]) -> bool:
    """Whether one of the jobs has a supersede key."""
    return any(job.conditions and job.conditions.series for job in jobs)
