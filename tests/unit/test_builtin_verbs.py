"""Verbs of the built-in types: what they count, enqueue and show."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from jobworker.handlers.jobstore.records import RecordKey
from jobworker.handlers.jobstore.redis_records import RedisRecords
from jobworker.handlers.jobstore.usage import (
    KEPT_DAYS,
    OTHERS,
    RedisUsages,
    Usage,
    UsageMeter,
    day_of,
    days_since,
)
from jobworker.handlers.vectors import open as open_module
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row, TransientStoreError
from jobworker.worker import StoreUnavailable
from jobworker.worker.cli import main
from support.redis_servers import RedisServer, running

DAY_S = 86_400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running("valkey", tmp_path_factory.mktemp("valkey")) as one:
        yield one


@pytest.fixture(autouse=True)
def empty(server: RedisServer) -> None:
    server.client.flushall()


def run(server: RedisServer, *words: str, code: int = 0) -> Any:
    found = CliRunner().invoke(main, [*words, "--redis-url", server.url])
    assert found.exit_code == code, found.output
    return found


def test_a_dry_run_counts_and_changes_nothing(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryVectors()
    store.ensure_collection("story_segments", 2)
    row = Row("a", np.ones(2, np.float32), "t", "p")
    store.upsert(
        "story_segments", [row, row._replace(id="b", project_id="q"), row._replace(id="c", tenant_id="u")]
    )
    RedisRecords(server.url).put(RecordKey("summary", "t", "p", "c"), 1, {"summary": "s"}, "now")
    monkeypatch.setattr(open_module, "open_store", lambda settings: store)
    words = ("erase", "--tenant", "t", "--dry-run", "--milvus-uri", "http://milvus.example")
    assert json.loads(run(server, *words, "--json").output) == {
        "rows": {"story_segments": 2}, "summaries": 1, "entities": 0,
    }  # fmt: skip
    assert "rows of story_segments" in run(server, *words, "--project", "p").output
    assert store.count("story_segments") == 3
    assert server.client.keys("*") == [b"summary:t:p:c"]


def test_erase_enqueues_a_job_when_it_is_confirmed(server: RedisServer) -> None:
    run(server, "erase", "--tenant", "t", code=2)
    assert server.client.xlen("stream:memory:update") == 0
    id_ = json.loads(run(server, "erase", "--tenant", "t", "--project", "p", "--yes", "--json").output)["job"]
    ((_, fields),) = server.client.xrange("stream:memory:update")
    job = json.loads(fields[b"data"])
    assert (job["id"], job["type"], job["tenant_id"], job["project_id"]) == (id_, "vectors_delete", "t", "p")
    assert job["payload"] == {"all": True}
    run(server, "erase", "--tenant", "", "--yes", code=2)


def test_usage_is_shown_by_tenant_for_the_days_that_were_asked_for(server: RedisServer) -> None:
    usages, now = RedisUsages(server.url), time.time()
    usages.add(day_of(now), {"t1": Usage(10, 5, 2_500, 1), "t2": Usage(100, 0, 9_000, 7)})
    usages.add(day_of(now), {"t1": Usage(rows=2)})
    usages.add(day_of(now - 10 * DAY_S), {"t1": Usage(1000, 0, 0, 0)})
    shown = json.loads(run(server, "usage", "--since", "1d", "--json").output)
    assert list(shown["tenants"]) == ["t2", "t1"]
    assert shown["tenants"]["t1"] == {"embedded_tokens": 10, "spared_tokens": 5, "model_ms": 2, "rows": 3}
    one = json.loads(run(server, "usage", "--tenant", "t1", "--json").output)["tenants"]
    assert one["t1"]["embedded_tokens"] == 1010
    assert "t2" in run(server, "usage").output
    assert 0 < server.client.ttl(f"jobworker:usage:{day_of(now)}") <= KEPT_DAYS * DAY_S


def test_a_day_has_room_for_a_bounded_number_of_tenants(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.handlers.jobstore.usage.MAX_TENANTS", 3)
    usages = RedisUsages(server.url)
    for tenant in ("a", "b", "c", "d", "e", "a"):
        usages.add("2026-01-02", {tenant: Usage(rows=1)})
    found = {tenant: one.rows for tenant, one in usages.read(["2026-01-02"]).items()}
    assert found == {"a": 2, "b": 1, "c": 1, OTHERS: 2}


def test_a_job_store_that_does_not_answer_costs_no_counts() -> None:
    class Failing:
        down, added = True, dict[str, Usage]()

        def add(self, day: str, usage: Any) -> None:
            if self.down:
                raise StoreUnavailable("down")
            self.added = dict(usage)

        def read(self, days: Any) -> dict[str, Usage]:
            return {}

    usages = Failing()
    meter = UsageMeter(usages)
    meter.add({"t": Usage(rows=1)})
    meter.flush()
    usages.down = False
    meter.add({"t": Usage(rows=2)})
    meter.flush()
    assert usages.added == {"t": Usage(rows=3)}


def test_an_age_is_counted_in_days_and_bounded() -> None:
    noon = 1_767_355_200.0  # 2026-01-02T12:00:00Z
    assert days_since(60, noon) == ["2026-01-02"]
    assert days_since(DAY_S, noon) == ["2026-01-01", "2026-01-02"]
    assert len(days_since(10_000 * DAY_S, noon)) == KEPT_DAYS


def test_the_cache_and_the_model_are_counted_for_their_tenant(server: RedisServer, tmp_path: Path) -> None:
    from jobworker.handlers.embedding.handler import EmbeddingBatch
    from jobworker.handlers.encoder.base import DummyEncoder
    from jobworker.handlers.settings import HandlerSettings
    from jobworker.worker import Job

    handler = EmbeddingBatch(DummyEncoder(8), MemoryVectors())
    handler.setup(HandlerSettings(redis_url=server.url, cache_bytes=1 << 24, data_dir=str(tmp_path)))
    texts = {"ids": ["a", "b"], "texts": ["one two three", "four"]}
    for number in range(2):
        handler.handle(Job(f"j{number}", "embedding_batch", "t", "p", texts, {}, "", "s", "1-0", 0))
    (used,) = RedisUsages(server.url).read([day_of(time.time())]).values()
    assert used.embedded_tokens == used.spared_tokens == handler.counters["embedded_tokens"] > 0
    assert used.rows == 4


def test_a_dry_run_without_milvus_says_why(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(MemoryVectors):
        def scan(self, *_: object, **__: object) -> Any:
            raise TransientStoreError("no answer from milvus.example")

    store = Away()
    store.ensure_collection("story_segments", 2)
    monkeypatch.setattr(open_module, "open_store", lambda settings: store)
    done = run(server, "erase", "--tenant", "t", "--dry-run", "--milvus-uri", "http://milvus.example", code=1)
    assert "the rows cannot be counted: no answer from milvus.example" in done.output


@pytest.mark.parametrize("scope", [("--tenant", "a b"), ("--tenant", "t", "--project", "p p")])
def test_a_dry_run_names_an_id_that_no_row_can_have(server: RedisServer, scope: tuple[str, ...]) -> None:
    done = run(server, "erase", *scope, "--dry-run", "--milvus-uri", "http://milvus.example", code=2)
    assert f"{scope[-2]} '{scope[-1]}' does not match" in done.output
