"""Lanes of one stream in memory: the same decisions as the scripts ``sort``, ``take`` and ``configure``."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ...conditions import SERIES
from ...flow import FlowConfig, Lane, Limit, tenant_key, type_key
from ..ports import LARGEST_TENANTS, WaitingJob
from .conditions import MemoryConditions

#: Flows of one kind: the type, and whether the lanes are those of series.
_Queue = tuple[str, bool]
_ONE_AT_A_TIME = Limit("~", "", "", concurrency=1)


@dataclass
class WaitingLane:
    """A lane and its jobs. ``parked_by`` is the key that it waits for. ``outdated``: its limits changed.

    ``limited``: a limit has blocked it.
    """

    lane: Lane
    jobs: deque[WaitingJob] = field(default_factory=deque)
    parked_by: str | None = None
    parked_tag: float = 0.0
    outdated: bool = False
    limited: bool = False

    @property
    def queue(self) -> _Queue:
        """The queue that gives the lane its turns."""
        return self.lane.type, bool(self.lane.series)

    @property
    def flow(self) -> tuple[int, str]:
        """Sorts by urgency."""
        return 10 - self.lane.priority, self.lane.tenant_id

    @property
    def arrived(self) -> tuple[int, int]:
        """Position of its first job."""
        ms, _, sequence = self.jobs[0].id.partition(b"-")
        return int(ms), int(sequence)


class MemoryLanes:
    """Waiting jobs, slots and limits of one stream. ``wall_now_s`` is the server's clock (unix seconds)."""

    def __init__(self, wall_now_s: Callable[[], float], conditions: MemoryConditions) -> None:
        self._conditions = conditions
        self.config = FlowConfig()
        self.lanes: dict[bytes, WaitingLane] = {}
        #: Entry id -> the limit keys of which the running job holds a slot.
        self.slots: dict[bytes, tuple[str, ...]] = {}
        self._wall_now_s = wall_now_s
        self._virtual_time = 0.0
        self._finish: dict[tuple[int, str], float] = {}
        #: Queue and flow -> start tag.
        self._tags: dict[tuple[_Queue, tuple[int, str]], float] = {}
        self._starts: dict[str, list[float]] = {}
        self._until: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        #: Jobs of the last `take` that waited for a limit, by type.
        self.taken_limited: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(one.jobs) for one in self.lanes.values())

    def by_type(self) -> dict[str, int]:
        """Number of waiting jobs by type, without those of series."""
        counts: Counter[str] = Counter()
        for one in self.lanes.values():
            if not one.lane.series:
                counts[one.lane.type] += len(one.jobs)
        return dict(counts)

    @property
    def in_series(self) -> int:
        """Number of waiting jobs of series."""
        return sum(len(one.jobs) for one in self.lanes.values() if one.lane.series)

    def ids(self) -> set[bytes]:
        """Entries that wait."""
        return {job.id for one in self.lanes.values() for job in one.jobs}

    def oldest_by_tenant(self) -> dict[str, float]:
        """Arrival (unix seconds) of the oldest job of each of the tenants with the most jobs."""
        numbers: Counter[str] = Counter()
        oldest_ms: dict[str, int] = {}
        for one in self.lanes.values():
            tenant = one.lane.tenant_id
            numbers[tenant] += len(one.jobs)
            oldest_ms[tenant] = min(oldest_ms.get(tenant, one.arrived[0]), one.arrived[0])
        return {tenant: oldest_ms[tenant] / 1000 for tenant, _ in numbers.most_common(LARGEST_TENANTS)}

    def put(self, name: bytes, jobs: Iterable[WaitingJob], version: int, *, in_front: bool = False) -> None:
        """Add jobs to a lane."""
        is_new = name not in self.lanes
        waiting = self.lanes.setdefault(name, WaitingLane(Lane.decode(name)))
        for job in jobs:
            waiting.jobs.appendleft(job) if in_front else waiting.jobs.append(job)
        if version == self.config.version:
            if is_new or waiting.outdated:
                waiting.outdated = False
                self._open(waiting)
        elif is_new:
            waiting.outdated = True

    def remove(self, id: bytes) -> bool:
        """Remove a job from its lane; False if it waits in none."""
        for name, one in list(self.lanes.items()):
            for job in one.jobs:
                if job.id == id:
                    one.jobs.remove(job)
                    if not one.jobs:
                        del self.lanes[name]
                        self._close(one)
                    return True
        return False

    def take_outdated(self, count: int) -> list[WaitingJob]:
        """Remove jobs whose limits have changed."""
        taken: list[WaitingJob] = []
        for name, one in list(self.lanes.items()):
            while one.outdated and one.jobs and len(taken) < count:
                taken.append(one.jobs.popleft())
            if not one.jobs:
                del self.lanes[name]
        return taken

    def take(self, types: set[str], count: int) -> list[WaitingJob]:
        """Remove the jobs whose turn it is, and let them hold their slots."""
        self._wake_due()
        self.taken_limited.clear()
        taken: list[WaitingJob] = []
        while len(taken) < count and (waiting := self._next(types)):
            if waiting.lane.series and self._conditions.is_superseded(
                waiting.lane.series, waiting.jobs[0].id
            ):
                taken.append(self._pop(waiting))
                continue
            key = next((key for key in self._keys(waiting.lane) if self._wait_s(key) != 0.0), None)
            start = max(self._tags[waiting.queue, waiting.flow], self._virtual_time)
            if key is not None:
                waiting.parked_by, waiting.parked_tag = key, start
                waiting.limited |= self._limit(key) is not None and not key.startswith(SERIES)
                self._close(waiting)
            else:
                taken.append(self._serve(waiting, start))
                if waiting.limited:
                    self.taken_limited[waiting.lane.type] += 1
            for other in waiting.lane.limit_keys:
                if other != key and self._wait_s(other) == 0.0:
                    self._wake(other)
        if not self.lanes:
            self._finish.clear()
            self._virtual_time = 0.0
        return taken

    def due_s(self) -> float | None:
        """Seconds until a parked lane may be woken by time alone."""
        waits = [self._wait_s(one.parked_by) for one in self.lanes.values() if one.parked_by is not None]
        return min((wait for wait in waits if wait is not None), default=None)

    def release(self, id: bytes) -> None:
        """The job has ended: free its slots."""
        for key in self.slots.pop(id, ()):
            self._wake(key)

    def asked_types(self) -> frozenset[str]:
        """Types of which jobs were asked to wait."""
        now_s = self._wall_now_s()
        return frozenset(name for name, until_s in self._asked.items() if until_s > now_s)

    def wait_for(self, key: str, type_name: str, wait_s: float) -> None:
        """Let the jobs of a key wait."""
        self._asked[type_name] = max(self._asked.get(type_name, 0.0), self._wall_now_s() + wait_s)
        self._until[key] = max(self._until.get(key, 0.0), self._wall_now_s() + wait_s)

    def configure(self, config: FlowConfig) -> bool:
        """Replace limits and weights if the version is the present one."""
        if config.version != self.config.version:
            return False
        before, after = (
            {(limit.name, limit.type, limit.key) for limit in one.limits} for one in (self.config, config)
        )
        affected = {type_name for _, type_name, _ in before ^ after}
        for one in self.lanes.values():
            if one.lane.type in affected:
                one.parked_by, one.outdated = None, True
                self._close(one)
            elif one.parked_by in one.lane.limit_keys:
                one.parked_by = None
                self._open(one)
        self.config = FlowConfig(config.version + 1, config.limits, config.weights, config.origin)
        return True

    # -- turns

    def _open_lanes(self, queue: _Queue, flow: tuple[int, str]) -> list[WaitingLane]:
        return [
            one
            for one in self.lanes.values()
            if (one.queue, one.flow) == (queue, flow) and not one.outdated and one.parked_by is None
        ]

    def _open(self, waiting: WaitingLane) -> None:
        start = max(self._virtual_time, self._finish.get(waiting.flow, 0.0))
        self._tags.setdefault((waiting.queue, waiting.flow), start)

    def _close(self, waiting: WaitingLane) -> None:
        if not self._open_lanes(waiting.queue, waiting.flow):
            self._tags.pop((waiting.queue, waiting.flow), None)

    def _next(self, types: set[str]) -> WaitingLane | None:
        """The lane whose turn it is."""
        while queues := [
            (tag, flow, queue) for (queue, flow), tag in self._tags.items() if queue[0] in types
        ]:
            tag, flow, queue = min(queues)
            finish = self._finish.get(flow, 0.0)
            if finish > max(tag, self._virtual_time):  # it was served in another type
                self._tags[queue, flow] = finish
            else:
                return min(self._open_lanes(queue, flow), key=lambda one: one.arrived)
        return None

    def _pop(self, waiting: WaitingLane) -> WaitingJob:
        job = waiting.jobs.popleft()
        if not waiting.jobs:
            del self.lanes[waiting.lane.encode()]
            self._close(waiting)
        return job

    def _serve(self, waiting: WaitingLane, start: float) -> WaitingJob:
        lane = waiting.lane
        job = self._pop(waiting)
        if lane.limit_keys:
            self.slots[job.id] = lane.limit_keys
        for key in lane.limit_keys:
            self._starts.setdefault(key, []).append(self._wall_now_s())
        weight = self.config.weights.get(lane.tenant_id, 1.0) * 2.0**lane.priority
        finish = start + max(1, job.cost) / weight
        self._finish[waiting.flow] = finish
        self._virtual_time = start
        if (waiting.queue, waiting.flow) in self._tags:
            self._tags[waiting.queue, waiting.flow] = finish
        return job

    # -- limits

    def _keys(self, lane: Lane) -> tuple[str, ...]:
        return (type_key(lane.type), tenant_key(lane.type, lane.tenant_id), *lane.limit_keys)

    def _limit(self, key: str) -> Limit | None:
        if key.startswith(SERIES):
            return _ONE_AT_A_TIME
        return next((one for one in self.config.limits if one.name == key.partition("=")[0]), None)

    def _wait_s(self, key: str) -> float | None:
        """Seconds until the key has room: 0.0 if it has, None where only the end of a job makes room."""
        now_s = self._wall_now_s()
        if self._until.get(key, 0.0) > now_s:
            return self._until[key] - now_s
        limit = self._limit(key)
        if limit is None:
            return 0.0
        running = Counter(key for keys in self.slots.values() for key in keys)[key]
        if limit.concurrency and running >= limit.concurrency:
            return None
        starts = self._starts.get(key, [])
        if limit.starts and len(starts) >= limit.starts:
            return max(0.0, starts[-limit.starts] + limit.per_ms / 1000 - now_s)
        return 0.0

    def _wake(self, key: str) -> None:
        parked = [one for one in self.lanes.values() if one.parked_by == key]
        if parked:
            first = min(parked, key=lambda one: (one.parked_tag, one.lane.encode()))
            first.parked_by = None
            self._open(first)

    def _wake_due(self) -> None:
        for one in self.lanes.values():
            if one.parked_by is not None and self._wait_s(one.parked_by) == 0.0:
                one.parked_by = None
                self._open(one)
