"""A rebuild resumes where its killed worker stopped, while jobs write and others search."""

import time
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.jobstore.open import open_rebuilds
from jobworker.handlers.rebuild.milvus import open_shadow
from jobworker.handlers.vectors.milvus.store import Row, open_vectors
from support.embedding import DIM
from support.milvus import lite_server
from support.service import eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

NAME, ALIAS = "story_segments", "z_novel_story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
ROWS = 6000
#: Between two searches: one after the other without a pause would only use the processor.
PAUSE_S = 0.1
#: Ten of these seconds are a wait for searches on the old collection.
REBUILT_WITHIN_S = 120.0


def rows() -> list[Row]:
    texts = [f"text {number}" for number in range(ROWS)]
    vectors = DummyEncoder(DIM).encode(texts)
    return [Row(f"r{n:06d}", vectors[n], "t", "p", text_content=texts[n]) for n in range(ROWS)]


def test_a_rebuild_survives_a_worker_kill_and_keeps_concurrent_writes(tmp_path: Path) -> None:
    handlers = {
        "embedding_batch": "support.embedding:Embedding",
        "index_rebuild": "jobworker.handlers.rebuild.handler:IndexRebuild",
    }
    expected = {row.id: row.text_content for row in rows()}
    with (
        lite_server(tmp_path / "milvus") as milvus,
        service(tmp_path, handlers, procs=2, milvus_uri=milvus.uri) as one,
    ):
        store, query = open_vectors(milvus.uri), rows()[5].vector
        store.upsert(NAME, rows())
        rebuilds = open_rebuilds(one.redis_url)
        one.enqueue("index_rebuild", {"collection": NAME})
        eventually(lambda: int(rebuilds.state(ALIAS).get("copied", 0)) > 0, saying="the first page")
        workers = [role for role in one.roles() if role.startswith("worker")]
        pids = [one.kill_role(role) for role in workers]
        changed = {f"r{number:06d}": f"changed {number}" for number in range(0, ROWS, 97)}
        one.enqueue("embedding_batch", {"ids": list(changed), "texts": list(changed.values())}, **SCOPE)
        searched = 0
        while one.unfinished() and searched < 5_000:
            assert store.search(NAME, query, limit=5, **SCOPE)
            searched += 1
            time.sleep(PAUSE_S)
        one.wait_until_drained(REBUILT_WITHIN_S)
        assert len(pids) == 2
        assert one.dead_letters() == []
        found = store.get(NAME, list(expected), strong=True, **SCOPE)
        assert {row.id: row.text_content for row in found} == expected | changed
        assert store.count(NAME) == ROWS
        shadow = open_shadow(milvus.uri, token=None, prefix="z_novel_", named=False)
        assert shadow.live_collection(NAME) == f"{ALIAS}_v2"
        for opened in (store, shadow, rebuilds):
            opened.close()
