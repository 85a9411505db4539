"""Summary jobs in the running service: kills with shuffled, repeated versions; a model over HTTP."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.vectors.milvus.store import open_vectors
from jobworker.handlers.vectors.ports import Row
from support.llm_stub import Reply, llm_stub, says
from support.milvus import LiteServer, lite_server
from support.service import Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

STREAM, GROUP = "stream:memory:update", "cg-mem-writer"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
WRITE_BACK = "jobworker.handlers.summaries.handler:WriteBack"
DRAINED_WITHIN_S = 120.0


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[tuple[Service, LiteServer]]:
    handlers = dict.fromkeys(("summary_write_back", "memory_update"), WRITE_BACK)
    options = {"retry_initial": 0.1, "retry_max": 1, "max_retries": 20, "model": "dummy:8"} | options
    with (
        lite_server(folder / "milvus") as milvus,
        service(folder, handlers, milvus_uri=milvus.uri, **options) as one,
    ):
        yield one, milvus


def job(chapter: int, version: int) -> dict[str, Any]:
    payload = {"chapter_id": f"c{chapter}", "chapter_version": version}
    payload["content"] = f"Chapter {chapter} came to its version {version}. Snow fell on the pass all night."
    kind = ("summary_write_back", "memory_update")[version % 2]
    return {"id": f"c{chapter}.{version}", "type": kind, "payload": payload, **SCOPE}


def assert_equal_texts(one: Service, milvus: LiteServer, chapters: int, version: int) -> None:
    store = open_vectors(milvus.uri)
    for chapter in range(chapters):
        record = one.client.hgetall(f"summary:t:p:c{chapter}")
        assert record[b"chapter_version"] == str(version).encode()
        assert f"Chapter {chapter} came to its version {version}.".encode() in record[b"summary"]
        (row,) = store.get("story_segments", [f"summary:c{chapter}"], strong=True, **SCOPE)
        assert isinstance(row, Row)
        assert (row.text_content.encode(), row.version) == (record[b"summary"], version)
    store.close()


def test_the_newest_version_wins_in_any_order_with_workers_killed(tmp_path: Path) -> None:
    chapters, versions, kills, seed = 8, 10, 5, random.randrange(2**32)
    shuffle = random.Random(seed)
    jobs = [job(c, v) for c in range(chapters) for v in range(1, versions + 1)] * 2
    shuffle.shuffle(jobs)
    with running(tmp_path, procs=3) as (one, milvus):
        one.enqueue_many(jobs, STREAM)
        for kill in range(kills):
            left = len(jobs) * (kills - kill) // (kills + 1)
            eventually(lambda left=left: one.unsettled() <= left, DRAINED_WITHIN_S, f"seed {seed}")  # type: ignore[misc]
            workers = eventually(lambda: [role for role in one.roles() if role.startswith("worker")])
            one.kill_role(shuffle.choice(workers))
        one.wait_until_drained(DRAINED_WITHIN_S)
        assert one.dead_letters(STREAM) == [], f"seed {seed}"
        assert_equal_texts(one, milvus, chapters, versions)


def test_a_model_is_called_over_http_and_its_key_never_shows(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Reply:
        chapter = request["messages"][1]["content"]
        found = {"summary": chapter[:40], "entity_updates": [{"name": "Lin", "description": "a traveller"}]}
        return says("I refuse." if "rubbish" in chapter else found)

    with llm_stub(answer) as stub:
        key = {"JOBWORKER_LLM_KEY": "sk-very-secret"}
        options = {"llm_url": stub.url, "llm_model": "m", "environment": key, "procs": 1}
        with running(tmp_path, **options) as (one, milvus):
            one.enqueue_many([job(1, 3)], STREAM)
            bad = one.enqueue(
                "memory_update", {"chapter_id": "c2", "content": "rubbish"}, stream=STREAM, **SCOPE
            )
            letter = one.dead_letter(bad, STREAM)
            assert letter["reason"] == "permanent"
            assert "an invalid answer twice" in letter["error"]
            one.wait_until_drained()
            assert one.client.hget("summary:t:p:c1", "summary") == b"Chapter 1 came to its version 3. Snow fe"
            store = open_vectors(milvus.uri)
            assert store.count("entity_profiles") == 1
            store.close()
            everywhere = one.log_text + "".join(one.everyone().values())
            eventually(lambda: one.metric("z_novel_llm_requests_total") == 3)
        assert stub.headers[0]["authorization"] == "Bearer sk-very-secret"
        assert "sk-very-secret" not in everywhere
