"""All that an operator sees at a glance: streams, rates, workers and the last failures."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import StoreUnavailable
from ..keys import Source
from ..store.operator import START, OperatorStore, Pause
from ..store.ports import Depths, ReaperStore
from .dead_letters import Letter, read_letter
from .deployment import Deployment, source_list
from .find_job import read_identity
from .status_client import Service, fetch_all_statuses

#: Dead letters looked at of each stream: the newest are shown.
_LETTERS = 10
#: Jobs under way whose ids are looked up in the store; the others show their entry ids.
_NAMED = 64
#: What is counted by type, and under which name its rate is shown.
_RATES = {
    "done": "z_novel_jobs_completed_total", "failed": "z_novel_jobs_failed_total",
    "retried": "z_novel_jobs_retried_total", "dead": "z_novel_jobs_dead_total",
}  # fmt: skip


@dataclass
class Overview:
    """One look. ``rates`` by type and what (a second), None before the second look; ``names``: job ids by
    stream and entry id; ``trouble``: why the store could not be asked."""

    wall_s: float
    streams: list[tuple[Source, Depths]] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)
    totals: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] | None = None
    pauses: list[Pause] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    trouble: str = ""

    def workers(self) -> Counter[str]:
        """How many workers of all services are in which state."""
        return Counter(str(worker["state"]) for service in self.services for worker in service.workers())

    def rate(self, what: str) -> float:
        """The sum over all types, a second."""
        return sum(by_type.get(what, 0.0) for by_type in (self.rates or {}).values())


#: A store or service that is slower is shown as silent; the page must go on moving.
_TIMEOUT_S = 2.0


class OverviewPoller:
    """Looks again and again, and makes rates of what was counted in between."""

    def __init__(
        self,
        counts: ReaperStore,
        store: OperatorStore,
        sources: Sequence[Source],
        ask: Callable[[], list[Service]],
        *,
        mono_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._counts = counts
        self._store = store
        self._sources = sources
        self._ask = ask
        self._mono_s = mono_s
        self._wall_s = wall_s
        self._mono_last_s = 0.0
        self._last: dict[tuple[str, int], Counter[tuple[str, str]]] | None = None
        self._names: dict[tuple[str, str], str] = {}

    def look(self) -> Overview:
        """Everything as it is now; a store that does not answer leaves its part empty."""
        seen = Overview(self._wall_s(), services=self._ask())
        self._count(seen)
        try:
            seen.streams = [(source, self._counts.depths(source)) for source in self._sources]
            seen.pauses = self._store.pauses()
            seen.wall_s = self._store.wall_now_s(self._sources[0].stream)
            seen.letters = self._newest_letters()
            seen.names = self._names_of(seen.services)
        except StoreUnavailable as error:
            seen.trouble = str(error)
        return seen

    def _count(self, seen: Overview) -> None:
        """Totals over all services, and rates against the look before. A service that was started meanwhile
        counts from nothing, so only what the same process says twice makes a rate."""
        now_s = self._mono_s()
        counted = {
            (service.url, int(service.said["pid"])): _counters(service.said)
            for service in seen.services
            if service.said
        }
        seen.totals = _by_type(counted.values())
        if self._last is not None:
            both = counted.keys() & self._last.keys()
            grown = sum((counted[key] - self._last[key] for key in both), Counter[tuple[str, str]]())
            elapsed_s = max(0.001, now_s - self._mono_last_s)
            seen.rates = {
                kind: {what: grown[kind, what] / elapsed_s for what in _RATES} for kind in seen.totals
            }
        self._last, self._mono_last_s = counted, now_s

    def _newest_letters(self) -> list[Letter]:
        letters = [
            read_letter(source.stream, entry)
            for source in self._sources
            for entry in self._store.dead_before(source.stream, START, _LETTERS)
        ]
        return sorted(letters, key=lambda letter: letter.wall_s, reverse=True)[:_LETTERS]

    def _names_of(self, services: Sequence[Service]) -> dict[tuple[str, str], str]:
        """Ids of the jobs under way; what was looked up once is remembered while it runs."""
        running = [
            (job["stream"], job["entry_id"]) for service in services for _, _, job in service.running()
        ][:_NAMED]
        self._names = {key: self._names.get(key) or self._name(*key) for key in running}
        return self._names

    def _name(self, stream: str, entry_id: str) -> str:
        entry = self._store.entry(stream, entry_id.encode())
        return read_identity(entry.data).id if entry else ""


def _counters(said: dict[str, Any]) -> Counter[tuple[str, str]]:
    """What one service has counted, by type and what."""
    counted: Counter[tuple[str, str]] = Counter()
    for what, name in _RATES.items():
        for sample in said.get("metrics", {}).get(name, ()):
            counted[str(sample["task_type"]), what] += sample["value"]
    for kind in said.get("types", ()):
        counted[kind, "done"] += 0
    return counted


def _by_type(counted: Iterable[Counter[tuple[str, str]]]) -> dict[str, dict[str, float]]:
    """The sums over all services; a type that has done nothing is there too."""
    totals: dict[str, dict[str, float]] = {}
    for (kind, what), value in (pair for one in counted for pair in one.items()):
        totals.setdefault(kind, dict.fromkeys(_RATES, 0.0))[what] += value
    return totals


def overview_poller_of(deployment: Deployment, streams: tuple[str, ...]) -> OverviewPoller:
    """Looks at the deployment by its store and its services."""
    from ..store.redis.operator import RedisOperatorStore
    from ..store.redis.reaper import RedisReaperStore

    url, own = deployment.url, deployment.url if deployment.guessed else ""
    return OverviewPoller(
        RedisReaperStore(url, timeout_s=_TIMEOUT_S),
        RedisOperatorStore(url, timeout_s=_TIMEOUT_S),
        source_list(streams),
        lambda: fetch_all_statuses(deployment.metrics_urls, own),
    )
