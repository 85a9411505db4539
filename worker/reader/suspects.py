"""Suspects: jobs that may kill their worker, until each may run isolated."""

from collections import Counter, deque
from collections.abc import Callable, Iterator

from .admission import AdmittedJob
from .crash_breaker import CrashKey


class SuspectQueue:
    """Suspects by tenant and type, oldest first in each; tenants take turns.

    ``isolated`` jobs are suspects of their own; the others belong to a tenant or type that is slowed down.
    """

    def __init__(self) -> None:
        self._queues: dict[CrashKey, deque[tuple[float, AdmittedJob]]] = {}
        self._count: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[AdmittedJob]:
        return (job for queue in self._queues.values() for _, job in queue)

    def put(self, key: CrashKey, job: AdmittedJob, mono_due_s: float) -> None:
        """Append a job that may start from a time on."""
        self._queues.setdefault(key, deque()).append((mono_due_s, job))
        self._add(job, 1)

    def keys(self, count: int) -> list[CrashKey]:
        """The next tenants and types whose turn it is; they become the last ones."""
        keys = [key for key, _ in zip(self._queues, range(count), strict=False)]
        if len(keys) < len(self._queues):
            for key in keys:
                self._queues[key] = self._queues.pop(key)
        return keys

    def take_due(self, key: CrashKey, mono_now_s: float) -> AdmittedJob | None:
        """Remove and return the oldest job, if its time has come."""
        queue = self._queues.get(key)
        if not queue or queue[0][0] > mono_now_s:
            return None
        return self._remove(key, [queue[0]])[0]

    def take_if(self, key: CrashKey, condition: Callable[[AdmittedJob], bool]) -> list[AdmittedJob]:
        """Remove and return the jobs of a tenant and type that meet a condition."""
        return self._remove(key, [one for one in self._queues.get(key, ()) if condition(one[1])])

    def discard(self, condition: Callable[[AdmittedJob], bool]) -> None:
        """Forget all jobs that meet a condition."""
        for key in list(self._queues):
            self.take_if(key, condition)

    def count(self, stream_no: int) -> int:
        """Number of jobs of a stream."""
        return self._count[stream_no]

    def size_bytes(self, stream_no: int) -> int:
        """Bytes of the jobs of a stream."""
        return self._bytes[stream_no]

    def _remove(self, key: CrashKey, taken: list[tuple[float, AdmittedJob]]) -> list[AdmittedJob]:
        if taken:
            queue = self._queues[key]
            if taken[0] is queue[0] and len(taken) == 1:
                queue.popleft()
            else:
                gone = set(map(id, taken))
                self._queues[key] = queue = deque(one for one in queue if id(one) not in gone)
            if not queue:
                del self._queues[key]
        for _, job in taken:
            self._add(job, -1)
        return [job for _, job in taken]

    def _add(self, job: AdmittedJob, sign: int) -> None:
        self._count[job.stream_no] += sign
        self._bytes[job.stream_no] += sign * len(job.entry.data or b"")
