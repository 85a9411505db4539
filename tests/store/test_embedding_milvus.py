"""The embedding handler on a real Milvus Lite: rows that a job promises can be read from the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.embedding.handler import EmbeddingBatch
from jobworker.handlers.encoder.base import DummyEncoder
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.vectors.milvus.store import TransientStoreError, open_vectors
from jobworker.worker import Job, PermanentError
from support.milvus import LiteServer, lite_server, wait_until

SEGMENTS = "story_segments"
DIM = 8


def job(number: int, *texts: str, tenant: str = "t001", **more: Any) -> Job:
    payload = {"ids": [f"{number}.{place}" for place in range(len(texts))], "texts": list(texts), **more}
    return Job(f"job-{number}", "embedding_batch", tenant, "p1", payload, {}, "", "s", f"{number}-0", 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    with lite_server(tmp_path_factory.mktemp("embed") / "lite") as running:
        yield running


def handler(server: LiteServer, prefix: str, data_dir: Path) -> EmbeddingBatch:
    made = EmbeddingBatch(DummyEncoder(DIM))
    made.setup(
        HandlerSettings(
            milvus_uri=server.uri, milvus_prefix=prefix, data_dir=str(data_dir), cache_bytes=1 << 24
        )
    )
    return made


def texts_of(server: LiteServer, prefix: str, *ids: str, tenant: str = "t001") -> list[str]:
    store = open_vectors(server.uri, prefix=prefix)
    rows = store.get(SEGMENTS, ids, tenant_id=tenant, project_id="p1", strong=True)
    expected = DummyEncoder(DIM).encode([getattr(row, "text_content", "") for row in rows])
    for row, vector in zip(rows, expected, strict=True):
        assert np.allclose(row.vector, vector, atol=1e-6)
    store.close()
    return [getattr(row, "text_content", "") for row in rows]


def test_a_large_batch_with_bad_jobs_in_it(server: LiteServer, tmp_path: Path) -> None:
    """Through all stages in parts: each good job's rows are there, each bad one says what is wrong."""
    embed = handler(server, "large_", tmp_path)
    jobs = [job(number, f"{number} 甲" + "字" * 600, f"{number} 乙") for number in range(60)]
    jobs[10] = job(10, "a", segment_types=["x" * 33])
    jobs[20] = job(0, "another tenant's id", tenant="t002")
    jobs[30] = job(30, "", "嗯", collection="notes")
    outcomes = embed.handle_batch(jobs)
    failed = {place: type(outcome) for place, outcome in enumerate(outcomes) if outcome}
    assert failed == {10: PermanentError, 20: PermanentError}
    good = [number for number in range(60) if number not in (10, 20, 30)]
    ids = [f"{number}.{place}" for number in good for place in range(2)]
    assert [text[:4].split()[0] for text in texts_of(server, "large_", *ids)] == [
        str(number) for number in good for _ in range(2)
    ]
    assert texts_of(server, "large_", "0.0", tenant="t002") == []


def test_the_same_jobs_again_leave_the_same_rows_and_cost_no_forward_pass(
    server: LiteServer, tmp_path: Path
) -> None:
    jobs = [job(number, f"{number} 甲", f"{number} 乙") for number in range(20)]
    first = handler(server, "twice_", tmp_path)
    assert first.handle_batch(jobs) == [None] * 20
    again = handler(server, "twice_", tmp_path)
    assert again.handle_batch(jobs) == [None] * 20
    assert again.counters["embedded_tokens"] == 0
    assert again.counters["embedding_cache_hits"] == 40
    store = open_vectors(server.uri, prefix="twice_")
    assert store.count(SEGMENTS) == 40
    store.close()
    assert texts_of(server, "twice_", "7.1") == ["7 乙"]


def test_a_long_text_is_stored_up_to_the_fields_bytes_and_found_by_all_of_it(
    server: LiteServer, tmp_path: Path
) -> None:
    embed = handler(server, "long_", tmp_path)
    text = "头" + "😀" * 30_000 + "尾"
    assert embed.handle_batch([job(1, text)]) == [None]
    store = open_vectors(server.uri, prefix="long_")
    (row,) = store.get(SEGMENTS, ["1.0"], tenant_id="t001", project_id="p1", strong=True)
    assert getattr(row, "text_content", "") == "头" + "😀" * ((65_535 - 3) // 4)
    assert np.allclose(row.vector, DummyEncoder(DIM).encode([text])[0], atol=1e-6)
    (hit,) = store.search(SEGMENTS, row.vector, tenant_id="t001", project_id="p1", limit=1, strong=True)
    assert hit.id == "1.0"
    store.close()


def test_a_store_that_dies_and_comes_back(tmp_path: Path) -> None:
    """Every job of the batch may be tried again, and the next try succeeds."""
    with lite_server(tmp_path / "lite") as server:
        embed = handler(server, "back_", tmp_path)
        jobs = [job(number, f"{number} 甲" + "字" * 600) for number in range(30)]
        port = server.port
        server.kill()
        outcomes = embed.handle_batch(jobs)
        assert {type(outcome) for outcome in outcomes} == {TransientStoreError}
        with lite_server(tmp_path / "lite", port=port) as again:
            # The client is some seconds away from trying to connect again; so is a job's next try.
            wait_until(lambda: embed.handle_batch(jobs) == [None] * 30, 30, "the jobs' next try")
            assert len(texts_of(again, "back_", *(f"{number}.0" for number in range(30)))) == 30
