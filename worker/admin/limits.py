"""State of the limits of a stream: what runs within each, and what waits for it."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ..flow import FlowConfig, Limit
from ..store.operator import LaneCounts
from ..store.ports import LARGEST_TENANTS


class LimitState(NamedTuple):
    """A limit with the number of running jobs, and of the jobs in lanes that wait for it, over all its keys.

    ``busy`` has both numbers by value of the key, those with the most waiting jobs first.
    """

    stream: str
    limit: Limit
    running: int
    waiting: int
    busy: dict[str, tuple[int, int]]


def limit_states(stream: str, config: FlowConfig, counts: LaneCounts) -> list[LimitState]:
    """The state of each limit of a stream."""
    by_name: dict[str, dict[str, tuple[int, int]]] = {limit.name: {} for limit in config.limits}
    keys = sorted(counts.running.keys() | counts.parked.keys())
    for key in sorted(keys, key=lambda key: -counts.parked.get(key, 0)):
        name, _, value = key.partition("=")
        if name in by_name:
            by_name[name][value] = counts.running.get(key, 0), counts.parked.get(key, 0)
    return [_state(stream, limit, by_name[limit.name]) for limit in config.limits]


def _state(stream: str, limit: Limit, busy: dict[str, tuple[int, int]]) -> LimitState:
    running, waiting = (sum(numbers[part] for numbers in busy.values()) for part in (0, 1))
    return LimitState(stream, limit, running, waiting, busy)


def sum_limits(states: Iterable[LimitState]) -> list[LimitState]:
    """The states with those of one stream and limit added up: each shard has its own."""
    found: dict[tuple[str, Limit], dict[str, tuple[int, int]]] = {}
    for one in states:
        busy = found.setdefault((one.stream, one.limit), {})
        for value, (running, waiting) in one.busy.items():
            before = busy.get(value, (0, 0))
            busy[value] = before[0] + running, before[1] + waiting
    return [_state(stream, limit, busy) for (stream, limit), busy in found.items()]


def sum_lanes(one: LaneCounts, other: LaneCounts) -> LaneCounts:
    """The counts of two shards of a stream together."""
    priorities = Counter(one.by_priority) + Counter(other.by_priority)
    tenants = Counter(one.largest_tenants) + Counter(other.largest_tenants)
    return LaneCounts(
        one.waiting + other.waiting,
        dict(sorted(priorities.items(), reverse=True)),
        dict(tenants.most_common(LARGEST_TENANTS)),
        dict(Counter(one.running) + Counter(other.running)),
        dict(Counter(one.parked) + Counter(other.parked)),
    )
