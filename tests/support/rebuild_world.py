"""A collection in memory and its rebuild, killed at any step, for unit tests of rebuilds."""

import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.fence import WriteIntent
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.rebuild.handler import IndexRebuild
from jobworker.handlers.rebuild.memory import MemoryShadow
from jobworker.handlers.rebuild.ports import RawRow
from jobworker.handlers.rebuild.rebuild import Clock
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors import versioned_writer
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter
from jobworker.worker import Job

NAME, ALIAS = "story_segments", "z_novel_story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
OLD = DummyEncoder(8)


class Killed(BaseException):
    """Simulates SIGKILL: no later call reaches a store."""


class World:
    """A store, its rebuilds and a clock that only `sleep` moves."""

    def __init__(self, rows: int, shadow: type[MemoryShadow] = MemoryShadow) -> None:
        self.now_s = 0.0
        self.store = MemoryVectors()
        self.store.ensure_collection(NAME, 8)
        self.fence = MemoryFence(lambda: self.now_s)
        self.shadow = shadow(self.store)
        self.expected: dict[str, str] = {}
        self.counters: dict[str, int] = {}
        self.write(*(f"r{number:04d}" for number in range(rows)))

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def write(self, *ids: str, text: str = "first", model: str = "dummy:8") -> None:
        """Write as a worker does; a write that would wait for admission fails at once."""
        own_s = itertools.count(0, versioned_writer.WAIT_S)
        dim = self.store._dims[ALIAS]
        vectors = DummyEncoder(dim).encode([f"{text} {id_}" for id_ in ids]) if ids else []
        rows = [
            Row(id_, vector, "t", "p", text_content=f"{text} {id_}")
            for id_, vector in zip(ids, vectors, strict=True)
        ]
        writer = VersionedWriter(
            self.store, self.fence, prefix="z_novel_", model=model,
            mono_s=lambda: next(own_s), sleep=lambda s: None,
        )  # fmt: skip
        writer.write(NAME, [VersionedRows("job", rows)])
        self.expected |= {row.id: row.text_content for row in rows}

    def remove(self, id_: str) -> None:
        """Delete as a worker does; does nothing while writes are paused."""
        intent = WriteIntent(ALIAS, "removal", "job", (id_,))
        if self.fence.admit([intent])[0].verdict == "in":
            self.store.delete(NAME, [id_], **SCOPE)
            self.fence.release([intent])
            self.expected.pop(id_, None)

    def rebuild(self, entry: str = "1-0", id: str = "job", around: Any = None, **payload: Any) -> None:
        """Run the handler; `around` is called before and after every call to a store or a rebuild's state."""
        wrap = (lambda target: target) if around is None else lambda target: Intercepted(target, around)
        handler = IndexRebuild(wrap(self.shadow), wrap(self.fence), Clock(lambda: self.now_s, self.sleep))
        handler.setup(HandlerSettings())
        self.counters = handler.counters
        payload = {"collection": NAME, **payload}
        handler.handle(Job(id, "index_rebuild", "", "", payload, {}, "", "s", entry, 0))

    def create_foreign(self, number: int) -> int:
        """Create a collection of another program if the name is free; returns how many were created."""
        name = f"{ALIAS}_v{number}"
        if self.shadow.exists(name):
            return 0
        self.shadow._rows[name], self.shadow._dims[name] = {}, 3
        return 1

    def check(self, foreign: int = 0) -> None:
        """Every row has the text that was written last; only the live collection and those of other programs
        are left."""
        found = self.store.get(NAME, list(self.expected), **SCOPE)
        assert {row.id: row.text_content for row in found} == self.expected
        assert self.store.count(NAME) == len(self.expected)
        assert len(self.shadow._rows) == 1 + foreign
        assert self.fence.admit([]) == []
        self.write("after")
        assert self.fence.changed(ALIAS, [], 10) == []


class LaggingReads(MemoryShadow):
    """Misses rows for some seconds at random, as Milvus does while it replaces segments."""

    world: World
    shuffle: random.Random
    until_s, share = -10.0, 0.0

    def max_read_lag_s(self) -> float:
        return 5.0

    def _visible(self, ids: Iterable[str]) -> list[str]:
        # Between two such times, reads are complete for longer than the pause between two polls.
        if self.world.now_s >= self.until_s + 1.5 and self.shuffle.random() < 0.3:
            self.until_s, self.share = self.world.now_s + self.shuffle.uniform(0, 3), self.shuffle.random()
        blind = self.world.now_s < self.until_s
        return [id_ for id_ in ids if not (blind and zlib.crc32(id_.encode()) / 2**32 < self.share)]

    def page(self, collection: str, after: str, limit: int, fields: Sequence[str] = ("*",)) -> list[RawRow]:
        return self.fetch(collection, sorted(id_ for id_ in self._rows[collection] if id_ > after)[:limit])

    def fetch(self, collection: str, ids: Sequence[str]) -> list[RawRow]:
        return super().fetch(collection, self._visible(ids))

    def count(self, collection: str) -> int:
        return len(self._visible(self._rows[collection]))


class Intercepted:
    """Calls `around(name, before)` before and after each call to the target."""

    def __init__(self, target: Any, around: Callable[[str, bool], None]) -> None:
        self._target, self._around = target, around

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self._around(name, True)
            answer = getattr(self._target, name)(*args, **named)
            self._around(name, False)
            return answer

        return call


def kill_at(step: int) -> Callable[[str, bool], None]:
    """Kill at that step (two a call) and every later one: code in `finally` reaches no store either."""
    count = itertools.count()

    def around(name: str, before: bool) -> None:
        if next(count) >= step:
            raise Killed

    return around


def count_steps(world: World) -> int:
    """How many steps a whole rebuild has."""
    count = itertools.count()
    world.rebuild(around=lambda name, before: next(count))
    return next(count)
