"""Crash breakers: slow down the jobs of a tenant or type that kill worker after worker, and those alone."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from .admission import AdmittedJob, tenant_of

#: Worker deaths are counted for this long (seconds).
_WINDOW_S = 60.0
#: Deaths within the window that open the breaker of a tenant's jobs of one type, and of a whole type. Jobs
#: that survive take deaths away, so a type with many healthy tenants stays closed.
_TENANT_OPENS_AT, _TYPE_OPENS_AT = 3, 8
#: First and longest pause behind a death while a breaker is open (seconds).
_PAUSE_S = (1.0, 5.0)
#: A job of an open breaker that has no outcome for this long does not keep the next one from starting.
_LOST_S = 60.0
#: Jobs in flight whose tenants are remembered. Forgetting them only delays the end of a slowdown.
_REMEMBERED_JOBS = 100_000
#: First and longest wait of one job before it runs again, from its second death on (seconds). After the
#: first it runs again at once: its worker may have been killed by chance.
_RERUN_S = (1.0, 5.0)


class CrashKey(NamedTuple):
    """The jobs of one tenant and type. ``tenant_id`` None: all jobs of the type."""

    type_no: int
    tenant_id: str | None


class CrashChange(NamedTuple):
    """A breaker that opened or closed, for the log."""

    key: CrashKey
    is_open: bool
    deaths: int


class _CrashBreaker:
    """Recent worker deaths under certain jobs, oldest first."""

    def __init__(self, opens_at: int) -> None:
        self._opens_at = opens_at
        self.deaths: deque[float] = deque(maxlen=4 * opens_at)
        self.mono_next_s = 0.0

    @property
    def open(self) -> bool:
        return len(self.deaths) >= self._opens_at

    def record_death(self, mono_now_s: float) -> None:
        self.deaths.append(mono_now_s)
        if self.open:
            first, longest = _PAUSE_S
            pause_s = min(longest, first * 2.0 ** (len(self.deaths) - self._opens_at))
            self.mono_next_s = mono_now_s + pause_s

    def record_survival(self) -> None:
        self.deaths.popleft()
        self.mono_next_s = 0.0

    def expire(self, mono_now_s: float) -> None:
        while self.deaths and mono_now_s - self.deaths[0] > _WINDOW_S:
            self.deaths.popleft()


class CrashBreakers:
    """The breakers of all types and their tenants.

    While one is open, its jobs run isolated and one after another, with a growing pause behind each worker
    death. A death counts against the only job that its worker had started. Time without deaths, and jobs that
    end without one, close it. With ``enabled`` false nothing is slowed down.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._breakers: dict[CrashKey, _CrashBreaker] = {}
        self._running: dict[tuple[int, bytes], CrashKey] = {}
        #: Openings and closings since the last reset by the reader.
        self.changes: list[CrashChange] = []
        #: How often a breaker opened: the queues must be looked through again.
        self.openings = 0

    @property
    def watching(self) -> bool:
        """Whether any worker died lately under a job."""
        return bool(self._breakers)

    def key_of(self, job: AdmittedJob) -> CrashKey:
        """The tenant and type of a job."""
        return CrashKey(job.type_no, tenant_of(job.entry.data))

    def is_open(self, key: CrashKey) -> bool:
        """Whether the jobs of this tenant and type are slowed down."""
        return any(breaker.open for breaker in self._of(key))

    def slows(self, job: AdmittedJob) -> bool:
        """Whether a job has to wait for its turn. It costs nothing while no worker dies."""
        if CrashKey(job.type_no, None) not in self._breakers:
            return False
        return self.is_open(self.key_of(job))

    def may_start(self, key: CrashKey, mono_now_s: float) -> bool:
        """Whether a job of this tenant and type may start now."""
        return all(not one.open or one.mono_next_s <= mono_now_s for one in self._of(key))

    def slowed(self, type_no: int) -> int:
        """Number of open breakers of a type."""
        return sum(one.open for key, one in self._breakers.items() if key.type_no == type_no)

    def record_start(self, jobs: Iterable[AdmittedJob], mono_now_s: float) -> None:
        """Jobs were dispatched: remember whose they are, if their type is watched."""
        for job in jobs:
            if CrashKey(job.type_no, None) not in self._breakers:
                continue
            if len(self._running) >= _REMEMBERED_JOBS:
                self._running.clear()
            key = self._running[job.stream_no, job.entry.id] = self.key_of(job)
            for breaker in self._of(key):
                breaker.mono_next_s = max(breaker.mono_next_s, mono_now_s + _LOST_S)

    def record_survival(self, stream_no: int, ids: Iterable[bytes]) -> None:
        """Jobs ended, well or not, and their worker lives."""
        for entry_id in ids:
            if (key := self._running.pop((stream_no, entry_id), None)) is not None:
                self._update(key, None)

    def record_death(self, key: CrashKey, mono_now_s: float) -> None:
        """A worker died under one job of this tenant and type."""
        if self._enabled:
            self._update(key, mono_now_s)

    def rerun_after_s(self, deaths: int) -> float:
        """Seconds until a job runs again after this number of worker deaths under it."""
        first, longest = _RERUN_S
        waits = self._enabled and deaths > 1
        return min(longest, first * 2.0 ** min(deaths - 2, 10)) if waits else 0.0

    def expire(self, mono_now_s: float) -> None:
        """Forget old deaths."""
        for key, breaker in list(self._breakers.items()):
            was_open = breaker.open
            breaker.expire(mono_now_s)
            self._note(key, breaker, was_open)
        if not self._breakers:
            self._running.clear()

    def _of(self, key: CrashKey) -> list[_CrashBreaker]:
        found = (self._breakers.get(one) for one in (key, CrashKey(key.type_no, None)))
        return [breaker for breaker in found if breaker is not None]

    def _update(self, key: CrashKey, mono_death_s: float | None) -> None:
        """Count a death, or a survival, for the tenant and for the whole type."""
        for one, opens_at in ((key, _TENANT_OPENS_AT), (CrashKey(key.type_no, None), _TYPE_OPENS_AT)):
            if mono_death_s is not None:
                self._breakers.setdefault(one, _CrashBreaker(opens_at))
            if (breaker := self._breakers.get(one)) is None:
                continue
            was_open = breaker.open
            if mono_death_s is None:
                breaker.record_survival()
            else:
                breaker.record_death(mono_death_s)
            self._note(one, breaker, was_open)

    def _note(self, key: CrashKey, breaker: _CrashBreaker, was_open: bool) -> None:
        if breaker.open != was_open:
            self.changes.append(CrashChange(key, breaker.open, len(breaker.deaths)))
            self.openings += breaker.open
        if not breaker.deaths:
            del self._breakers[key]
