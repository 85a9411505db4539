"""A store with the rows and records of a few projects, their jobs and a deletion, for tests of deletions."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.erasure.handler import VectorsDelete
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.handler import WriteBack
from jobworker.handlers.summaries.sinks import EntityUpdate, Findings
from jobworker.handlers.vectors import versioned_writer
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter
from jobworker.worker import Job
from support.rebuild_world import Intercepted

DIM = 8
#: Times of jobs in microseconds: before the deletion, the deletion, after it.
OLD_US, CUTOFF_US, NEW_US = 10**15, 2 * 10**15, 3 * 10**15
Around = Callable[[str, bool], None]


class OneEntity:
    """Finds the entity `hero` in each chapter."""

    limit_s = 0.0

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}

    def extract_findings(self, content: str) -> Findings:
        return Findings("made", [EntityUpdate(f"hero of {content}", "person", "brave")])


class ErasureWorld:
    """Stores in memory and a clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.store, self.records = MemoryVectors(), MemoryRecords()
        self.fence = MemoryFence(lambda: self.now_s)
        for name in ("story_segments", "entity_profiles"):
            self.store.ensure_collection(name, DIM)

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.5)

    def embed(
        self,
        *ids: str,
        created_us: int = OLD_US,
        job: str = "embed",
        project: str = "p",
        chapter: str = "c",
        collection: str = "story_segments",
        version: int | None = None,
        around: Around | None = None,
    ) -> None:
        """Write as `embedding_batch` does; a write that would wait for admission fails at once."""
        own_s = itertools.count(0, versioned_writer.WAIT_S)
        store, fence = wrapped(around, self.store), wrapped(around, self.fence)
        writer = VersionedWriter(
            store, fence, prefix="z_novel_", mono_s=lambda: next(own_s), sleep=lambda s: None
        )
        vector = np.ones(DIM, np.float32)
        rows = [
            Row(id_, vector, "t", project, chapter, 0, "", f"text of {id_}", version or 0, created_us)
            for id_ in ids
        ]
        writer.write(collection, [VersionedRows(job, rows, version, version is not None, job)])

    def summarise(
        self,
        chapter: str = "c",
        *,
        created_us: int = OLD_US,
        job: str = "summary",
        project: str = "p",
        around: Around | None = None,
    ) -> None:
        """Run `summary_write_back` with an entity `hero of <chapter>`."""
        parts = [wrapped(around, part) for part in (self.store, self.fence, self.records)]
        handler = WriteBack(DummyEncoder(DIM), *parts, model=OneEntity())
        handler.setup(HandlerSettings())
        own_s = itertools.count(0, versioned_writer.WAIT_S)
        handler._writer._mono_s, handler._writer._sleep = lambda: next(own_s), lambda s: None
        payload = {"chapter_id": chapter, "content": chapter}
        handler.handle(made("summary_write_back", job, payload, created_us, project))

    def erase(
        self,
        *,
        created_us: int = CUTOFF_US,
        job: str = "erase",
        project: str = "p",
        around: Around | None = None,
        **payload: Any,
    ) -> None:
        """Run `vectors_delete`; of the whole project unless the payload says what."""
        parts = [wrapped(around, part) for part in (self.store, self.fence, self.fence, self.records)]
        handler = VectorsDelete(*parts, lambda: self.now_s, self.sleep)
        handler.setup(HandlerSettings())
        handler.handle(made("vectors_delete", job, payload or {"all": True}, created_us, project))

    def ids(self, project: str = "p") -> list[str]:
        """Ids of all rows of the tenant's project."""
        return sorted(
            row.id
            for rows in self.store._rows.values()
            for row in rows.values()
            if project in ("", row.project_id)
        )

    def kept(self) -> list[str]:
        """Records, mentions and fence state, of all projects."""
        fields = [
            name
            for of in self.fence._collections.values()
            for kept in (of.min_versions, of.held, of.erasing)
            for name in kept
        ]
        return sorted([*self.records._stored, *self.records._mentions, *fields])


def made(type_: str, job: str, payload: dict[str, Any], created_us: int, project: str) -> Job:
    return Job(job, type_, "t", project, payload, {}, "", "s", f"{created_us // 1000}-0", 0)


def wrapped(around: Around | None, target: Any) -> Any:
    return target if around is None else Intercepted(target, around)
