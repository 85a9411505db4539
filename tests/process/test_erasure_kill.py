"""`vectors_delete` in the running service: workers die, older jobs are retried late; nothing is left."""

import json
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers import BUILTIN
from jobworker.handlers.embedding.handler import CACHE_FILE
from jobworker.handlers.embedding.vector_cache import _origins_of
from jobworker.handlers.jobstore.erasures import Scope
from jobworker.handlers.vectors.milvus.store import open_vectors
from support.milvus import lite_server
from support.service import STREAM, Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

MEMORY = "stream:memory:update"
TYPES = ("entity_upsert", "summary_write_back", "vectors_delete")
#: One less than the deaths that make poison of a job: chance must not let one job be under all of them.
KILLS = 2
DRAINED_WITHIN_S = 200.0
#: The bar: after this, nothing of the scope is left.
GONE_WITHIN_S = 60.0


def wire(
    kind: str, id: str, payload: dict[str, Any], at: datetime, project: str = "p", tries: int = 0
) -> bytes:
    job = {
        "id": id,
        "type": kind,
        "tenant_id": "t",
        "project_id": project,
        "payload": payload,
        "created_at": at.isoformat(),
        "retry_count": tries,
    }
    return json.dumps(job).encode()


def work(number: int, at: datetime, project: str = "p", tries: int = 0) -> tuple[str, bytes]:
    """Stream and bytes of one of 60 different jobs."""
    kind, of = number % 3, number % 60
    where = f"{project}:{of}"
    if kind == 0:
        ids = [f"{where}:{segment}" for segment in range(5)]
        payload = {
            "ids": ids,
            "texts": [f"text {id_}" for id_ in ids],
            "chapter_ids": [f"{project}.c{of}"] * 5,
        }
        versions = {"version": of, "replace": True} if of % 2 else {}
        return STREAM, wire("embedding_batch", where, payload | versions, at, project, tries)
    if kind == 1:
        entities = [{"entity_id": f"e{of}", "name": f"name {of}", "description": where}]
        return MEMORY, wire("entity_upsert", where, {"entities": entities}, at, project, tries)
    content = {"chapter_id": f"{project}.c{of}", "content": f"Chapter {of} is long. Snow fell."}
    return MEMORY, wire("summary_write_back", where, content, at, project, tries)


def add(one: Service, job: tuple[str, bytes]) -> None:
    one.add_raw({"data": job[1]}, job[0])


def rows_of(uri: str, project: str) -> int:
    store, count = open_vectors(uri), 0
    for name in store.collections():
        after = ""
        while page := store.scan(name, Scope("t", project), after, 1000):
            count, after = count + len(page), page[-1].id
    store.close()
    return count


def keys_of(one: Service, project: str) -> list[bytes]:
    return [
        key for kind in ("summary", "entity", "entities") for key in one.client.keys(f"{kind}:t:{project}:*")
    ]


def cached_of(folder: Path, project: str) -> int:
    (file,) = folder.rglob(CACHE_FILE)
    with sqlite3.connect(file) as db:
        ((own, *_),) = [_origins_of(f"p/t/{project}")]
        return int(db.execute("SELECT count(*) FROM vectors WHERE origin BETWEEN ? AND ?", own).fetchone()[0])


def test_nothing_of_a_project_is_left_with_kills_and_200_late_retries(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    shuffle, started = random.Random(seed), datetime.now(UTC)
    handlers = {kind: BUILTIN[kind] for kind in TYPES} | {"embedding_batch": "support.embedding:Embedding"}
    options = {"retry_initial": 0.1, "retry_max": 1, "max_retries": 20, "model": "dummy:8"}
    with (
        lite_server(tmp_path / "milvus") as milvus,
        service(tmp_path, handlers, milvus_uri=milvus.uri, procs=3, cache="16MiB", **options) as one,
    ):
        for number in range(60):
            add(one, work(number, started))
            add(one, work(number, started, "q"))
        one.wait_until_drained(DRAINED_WITHIN_S)
        kept = rows_of(milvus.uri, "q")
        assert rows_of(milvus.uri, "p") == kept == 20 * 5 + 20 + 20
        assert keys_of(one, "p")
        assert cached_of(tmp_path, "p")

        late = [work(shuffle.randrange(60), started, tries=1) for _ in range(200)]
        deletion = wire("vectors_delete", "erase", {"all": True}, started + timedelta(milliseconds=1))
        for number, job in enumerate(late):
            add(one, job)
            if number == 20:
                add(one, (MEMORY, deletion))
        for kill in range(KILLS):
            left = 180 * (KILLS - kill) // (KILLS + 1)
            eventually(
                lambda left=left: one.unsettled() + one.unsettled(MEMORY) <= left,  # type: ignore[misc]
                DRAINED_WITHIN_S,
                f"seed {seed}",
            )
            workers = eventually(lambda: [role for role in one.roles() if role.startswith("worker")])
            one.kill_role(shuffle.choice(workers))
        one.wait_until_drained(DRAINED_WITHIN_S)
        assert [one.dead_letters(stream) for stream in (STREAM, MEMORY)] == [[], []], f"seed {seed}"
        eventually(lambda: not cached_of(tmp_path, "p"), GONE_WITHIN_S, f"cache, seed {seed}")
        assert (rows_of(milvus.uri, "p"), keys_of(one, "p")) == (0, []), f"seed {seed}"
        assert rows_of(milvus.uri, "q") == kept
        assert cached_of(tmp_path, "q")

        add(one, work(0, datetime.now(UTC)))
        one.wait_until_drained(DRAINED_WITHIN_S)
        assert rows_of(milvus.uri, "p") == 5, "newer work is stored"
        assert cached_of(tmp_path, "p") == 5
