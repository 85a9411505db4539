"""The built-in handlers process entries as the Go producers write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from jobworker.handlers import BUILTIN
from jobworker.handlers.audit.handler import Archive
from jobworker.handlers.embedding.handler import EmbeddingBatch, EntityUpsert
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.erasure.handler import VectorsDelete
from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.jobstore.records import RecordKey
from jobworker.handlers.rebuild.handler import IndexRebuild
from jobworker.handlers.rebuild.memory import MemoryShadow
from jobworker.handlers.rebuild.rebuild import Clock
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.handler import WriteBack
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row
from jobworker.worker import Job
from jobworker.worker.envelope import job_of, read_envelope

NAME = "story_segments"


class World:
    """Stores within this process, and a clock that moves when a caller sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s = folder, 0.0
        self.store, self.fence, self.records = MemoryVectors(), MemoryFence(), MemoryRecords()
        self.shadow = MemoryShadow(self.store)
        self.encoder = DummyEncoder(8)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def run(self, handler: Any, job: Job) -> None:
        handler.setup(HandlerSettings(data_dir=str(self.folder), cache_bytes=0))
        outcomes = handler.handle_batch([job]) if hasattr(handler, "handle_batch") else [handler.handle(job)]
        assert outcomes == [None]

    def rows(self, job: Job, *ids: str) -> list[Any]:
        return self.store.get(NAME, ids, tenant_id=job.tenant_id, project_id=job.project_id, strong=True)


def embeds(world: World, job: Job) -> None:
    world.run(EmbeddingBatch(world.encoder, world.store, world.fence), job)
    found = world.rows(job, *job.payload["ids"])
    assert [row.text_content for row in found] == job.payload["texts"]
    assert [(row.chapter_id, row.story_time, row.segment_type) for row in found] == [
        ("ch-1", 1, "dialogue"),
        ("ch-1", 2, "narration"),
    ]


def rebuilds(world: World, job: Job) -> None:
    world.store.ensure_collection(NAME, 8)
    world.store.upsert(NAME, [Row("r", world.encoder.encode(["x"])[0], "t", "p", text_content="x")])
    clock = Clock(lambda: world.now_s, world.sleep)
    world.run(IndexRebuild(world.shadow, world.fence, clock), job)
    assert world.shadow.live_collection(NAME) == f"z_novel_{NAME}_v2"
    assert world.store.count(NAME) == 1


def summarises(world: World, job: Job) -> None:
    world.run(WriteBack(world.encoder, world.store, world.fence, world.records), job)
    chapter, version = job.payload["chapter_id"], job.payload.get("chapter_version", 0)
    record = world.records.get(RecordKey("summary", job.tenant_id, job.project_id, chapter))
    (row,) = world.rows(job, f"summary:{chapter}")
    assert record is not None
    assert record.fields["summary"].strip()
    assert (row.text_content, row.version) == (record.fields["summary"], version)


def archives(world: World, job: Job) -> None:
    world.run(Archive(), job)
    (file,) = (world.folder / "audit").iterdir()
    with file.open("rb") as opened:
        decompressor = zstandard.ZstdDecompressor()
        line = json.loads(decompressor.stream_reader(opened, read_across_frames=True).read())
    assert [line[name] for name in ("id", "tenant_id", "payload")] == [job.id, job.tenant_id, job.payload]


def stores_entities(world: World, job: Job) -> None:
    world.run(EntityUpsert(world.encoder, world.store, world.fence), job)
    rows = world.store._rows["z_novel_entity_profiles"].values()
    assert [(row.name, row.version) for row in rows] == [("林冲", 3), ("𠮷野", 3)]


def deletes(world: World, job: Job) -> None:
    for name in ("story_segments", "entity_profiles"):
        world.store.ensure_collection(name, 8)
    row = Row("a", world.encoder.encode(["x"])[0], job.tenant_id, job.project_id, "ch-1")
    world.store.upsert(NAME, [row, row._replace(id="b", chapter_id="ch-3")])
    world.run(VectorsDelete(world.store, world.fence, world.fence, world.records), job)
    assert [row.id for row in world.rows(job, "a", "b")] == ["b"]


RUNS: dict[str, Callable[[World, Job], None]] = {
    "embedding_batch": embeds,
    "index_rebuild": rebuilds,
    "summary_write_back": summarises,
    "memory_update": summarises,
    "entity_upsert": stores_entities,
    "vectors_delete": deletes,
    "audit": archives,
}


def test_every_type_is_here() -> None:
    assert RUNS.keys() == BUILTIN.keys()


@pytest.mark.parametrize("name", RUNS)
def test_what_the_go_producers_write_is_carried_out(tmp_path: Path, name: str) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / f"{name}.json"
    job = job_of(read_envelope(golden.read_bytes()), "stream:x", "1767312000000-0")
    RUNS[name](World(tmp_path), job)
