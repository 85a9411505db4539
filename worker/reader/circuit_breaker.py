"""Circuit breakers: one per job type, opened while a dependency of the type's handler does not answer."""

from .crash_breaker import CrashBreakers

#: First and longest time between two probes of an open breaker (seconds).
_PROBE_S = (1.0, 15.0)
#: A probe without an outcome for this long may be lost with its worker: another one starts. Longer than
#: clients wait for a store, so that probes do not occupy one worker after another.
_PROBE_LOST_S = 60.0
#: How often one job may report `Unavailable` for free while others of its type succeed. After that the fault
#: is taken to be the job's own.
_FREE_RETRIES = 5
#: Jobs whose free retries are remembered. Forgetting them only gives some jobs more free retries.
_REMEMBERED_JOBS = 10_000
#: Limit of the exponent of the probe interval; the interval has reached its longest value before.
_MAX_FAILURES = 16


class CircuitBreaker:
    """Circuit breaker of one job type."""

    def __init__(self) -> None:
        self.open = False
        #: How often a job succeeded while the breaker was open.
        self.recoveries = 0
        self._failures = 0
        self._probing = False
        self._mono_probe_at_s = 0.0

    def record_failure(self, mono_now_s: float) -> None:
        """A job found its dependency unavailable: open the breaker, longer after each failed probe."""
        if self.open and not self._probing:
            return  # a job that was running when the breaker opened
        first, longest = _PROBE_S
        self._mono_probe_at_s = mono_now_s + min(longest, first * 2**self._failures)
        self._failures = min(self._failures + 1, _MAX_FAILURES)
        self.open = True
        self._probing = False

    def record_success(self) -> None:
        """A job succeeded: close the breaker."""
        self.open = False
        self.recoveries += 1
        self._failures = 0
        self._probing = False

    def try_half_open(self, mono_now_s: float) -> bool:
        """Whether one job may run as a probe now. If its outcome never arrives, another probe follows."""
        if not self.open or mono_now_s < self._mono_probe_at_s:
            return False
        self._probing = True
        self._mono_probe_at_s = mono_now_s + _PROBE_LOST_S
        return True

    def repeat_probe(self, mono_now_s: float) -> None:
        """A job that never reached its handler may have been the probe: another one starts at once."""
        if self._probing:
            self._mono_probe_at_s = mono_now_s


class CircuitBreakers:
    """Circuit breakers of all types, by type number, and the free retries of single jobs.

    ``crashes`` are the breakers that look at worker deaths instead of dependencies.
    """

    def __init__(self, types: int, *, slow_crashes: bool = True) -> None:
        self.crashes = CrashBreakers(enabled=slow_crashes)
        self._breakers = [CircuitBreaker() for _ in range(types)]
        # Free retries of a job, and the recoveries of its type at the last one.
        self._free_retries: dict[tuple[int, bytes], tuple[int, int]] = {}

    def __getitem__(self, type_no: int) -> CircuitBreaker:
        return self._breakers[type_no]

    def __len__(self) -> int:
        return len(self._breakers)

    @property
    def any_open(self) -> bool:
        """Whether any breaker is open."""
        return any(breaker.open for breaker in self._breakers)

    def is_within_grace(self, type_no: int, key: tuple[int, bytes]) -> bool:
        """Whether a job that reports `Unavailable` is retried for free; the call counts one free retry.

        It is, always while no job of its type succeeds, and at most five times while others do. ``key`` is
        the stream number and the entry id.
        """
        recoveries = self._breakers[type_no].recoveries
        count, last_recoveries = self._free_retries.get(key, (0, -1))
        if last_recoveries != recoveries:
            count += 1
        if len(self._free_retries) > _REMEMBERED_JOBS:
            self._free_retries.clear()
        self._free_retries[key] = (count, recoveries)
        return count <= _FREE_RETRIES
