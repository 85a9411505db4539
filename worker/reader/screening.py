"""Screening: compares admitted jobs with others of their keys, and delays those that are not due."""

import logging
import math
from collections.abc import Iterable, Sequence

from ..envelope import read_header, with_first_id
from ..outcome import Drop
from ..store.ports import Candidate
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
        dropped: list[RejectedEntry] = []
        keys = [] if is_taken else [(job.entry.id, job.unique) for job in jobs if job.unique]
        if keys and (owners := self._store.claim_keys(self._streams[stream_no], keys, self._window_s)):
            dropped = [
                drop(job, Drop.DUPLICATE, owners[job.entry.id]) for job in jobs if job.entry.id in owners
            ]
            jobs = [job for job in jobs if job.entry.id not in owners]
        conditional = [job for job in jobs if job.conditions is not None]
        if candidates := [one for job in conditional if (one := self._candidate(job, is_taken=is_taken))]:
            jobs = self._compare(stream_no, jobs, candidates, dropped)
        return jobs, dropped

    def _candidate(self, job: AdmittedJob, *, is_taken: bool) -> Candidate | None:
        """A job that must be compared or delayed."""
        if job.conditions is None:
            return None
        first_id, series, due_s, expires_s = job.conditions
        self._wall_next_expiry_s = min(self._wall_next_expiry_s, expires_s)
        data = b""
        if due_s > self._wall_s() and not is_taken:
            assert job.entry.data is not None, "an admitted job has data"
            data = with_first_id(job.entry.data, first_id.decode())
        return Candidate(job.entry.id, first_id, series, due_s, data) if series or data else None

    def _compare(
        self,
        stream_no: int,
        jobs: Sequence[AdmittedJob],
        candidates: Sequence[Candidate],
        dropped: list[RejectedEntry],
    ) -> Sequence[AdmittedJob]:
        """The jobs that may run; adds those that are superseded to ``dropped``."""
        screened = self._store.screen(self._streams[stream_no], candidates)
        if screened.delayed:
            fields = {"stream": self._streams[stream_no].stream, "jobs": len(screened.delayed)}
            log.debug("jobs.delayed", extra=fields)
        for job in jobs:
            if by := screened.superseded.get(job.entry.id):
                dropped.append(drop(job, Drop.SUPERSEDED, by))
        gone = screened.superseded.keys() | screened.delayed | screened.lost
        return [job for job in jobs if job.entry.id not in gone]

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
