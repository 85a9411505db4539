"""Usage by tenant: daily counters in the job store."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Protocol

from jobworker.worker import StoreUnavailable
from jobworker.worker.scripted_redis import Argument, ScriptedRedis

from .keys import usage_key
from .scripts import script

log = logging.getLogger("jobworker.usage")

#: How long a day is kept, and how many tenants it has room for; what further ones use is `OTHERS`.
KEPT_DAYS, MAX_TENANTS = 400, 10_000
#: No tenant has this name.
OTHERS = "(others)"


@dataclass(frozen=True)
class Usage:
    """Tokens given to the model, tokens that the cache spared, microseconds of the model, rows written."""

    embedded_tokens: int = 0
    spared_tokens: int = 0
    model_us: int = 0
    rows: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


_COUNTERS = tuple(field.name for field in fields(Usage))


class Usages(Protocol):
    """Port of the counters. Every method raises StoreUnavailable where the job store does not answer."""

    def add(self, day: str, usage: Mapping[str, Usage]) -> None:
        """Add to the counters of tenants on a day (``2026-01-02``, UTC)."""

    def read(self, days: Sequence[str]) -> dict[str, Usage]:
        """The sums of the days, by tenant."""


class RedisUsages(ScriptedRedis):
    """`Usages` on Redis: a hash for each day. One thread uses an object."""

    def __init__(self, url: str) -> None:
        super().__init__(url, scripts=script)

    def add(self, day: str, usage: Mapping[str, Usage]) -> None:
        key = usage_key(day)
        flat: list[Argument] = [
            part for tenant_id, one in usage.items() for part in (tenant_id, *astuple(one))
        ]
        limits = (KEPT_DAYS * 86_400, MAX_TENANTS * len(_COUNTERS), OTHERS)
        self.one(key, script("usage_add", [key], *limits, *flat))

    def read(self, days: Sequence[str]) -> dict[str, Usage]:
        sums: dict[str, Usage] = {}
        for day in days:
            key = usage_key(day)
            flat = self.one(key, ("HGETALL", key))
            for at in range(0, len(flat), 2):
                tenant_id, _, counter = flat[at].decode(errors="replace").rpartition("/")
                if counter in _COUNTERS:
                    more = Usage(**{counter: int(flat[at + 1])})
                    sums[tenant_id] = sums.get(tenant_id, Usage()) + more
        return sums


class UsageMeter:
    """Collects what jobs use, and adds it to the job store; fails no job. Not thread-safe but for `add`."""

    def __init__(self, usages: Usages | None, wall_s: Callable[[], float] = time.time) -> None:
        self._usages, self._wall_s = usages, wall_s
        self._pending: dict[str, Usage] = {}

    def add(self, usage: Mapping[str, Usage]) -> None:
        """Note what was used."""
        if self._usages is not None:
            for tenant_id, one in usage.items():
                self._pending[tenant_id] = self._pending.get(tenant_id, Usage()) + one

    def flush(self) -> None:
        """Add what was noted to the counters; keep it if the job store does not answer."""
        if self._usages is None or not self._pending:
            return
        try:
            self._usages.add(day_of(self._wall_s()), self._pending)
        except StoreUnavailable as error:
            log.warning("usage.kept_back", extra={"error": str(error)})
            return
        self._pending = {}


def day_of(wall_s: float) -> str:
    """The day of a time (unix seconds) in UTC."""
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d")


def days_since(age_s: float, wall_now_s: float) -> list[str]:
    """The days from an age to today, the oldest first, at most as many as are kept."""
    count = min(KEPT_DAYS, int(age_s // 86_400) + 1)
    today = datetime.fromtimestamp(wall_now_s, UTC)
    return [(today - timedelta(days=back)).strftime("%Y-%m-%d") for back in reversed(range(count))]


def open_usages(redis_url: str) -> Usages | None:
    """The counters of a job store; None for an empty URL."""
    return RedisUsages(redis_url) if redis_url else None
