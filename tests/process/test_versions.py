"""Chapters in many versions, shuffled and repeated, while workers are killed: the newest version stays."""

import random
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.vectors.milvus.store import open_vectors
from support.milvus import lite_server
from support.service import Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

NAME = "story_segments"
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
SEGMENTS = range(6)
#: One less than the deaths that make poison of a job: chance must not let one job be under all of them.
KILLS = 2
#: Some ten jobs a second, and a machine that does other things too.
DRAINED_WITHIN_S = 240.0


def editions(chapters: int, versions: int, shuffle: random.Random) -> dict[tuple[int, int], list[str]]:
    """Chapter and version -> the ids that this edition has."""
    return {
        (chapter, version): [f"c{chapter}:{s}" for s in shuffle.sample(SEGMENTS, shuffle.randint(1, 6))]
        for chapter in range(chapters)
        for version in range(1, versions + 1)
    }


def job(chapter: int, version: int, ids: list[str]) -> dict[str, Any]:
    payload = {
        "ids": ids,
        "texts": [f"{id_} in version {version}" for id_ in ids],
        "chapter_ids": [f"c{chapter}"] * len(ids),
        "version": version,
        "replace": True,
    }
    return {"id": f"c{chapter}.{version}", "type": "embedding_batch", "payload": payload, **SCOPE}


def deliver(one: Service, jobs: list[dict[str, Any]], kills: int, shuffle: random.Random) -> None:
    """Enqueue all and kill one worker after each of `kills` equal parts of the work."""
    one.enqueue_many(jobs)
    for kill in range(kills):
        left = len(jobs) * (kills - kill) // (kills + 1)
        eventually(lambda left=left: one.unsettled() <= left, DRAINED_WITHIN_S, f"{left} jobs left")
        workers = eventually(lambda: [role for role in one.roles() if role.startswith("worker")])
        one.kill_role(shuffle.choice(workers))
    one.wait_until_drained(DRAINED_WITHIN_S)


def check(uri: str, made: dict[tuple[int, int], list[str]], versions: int, seed: int) -> None:
    store = open_vectors(uri)
    expected = {
        id_: f"{id_} in version {version}"
        for (_, version), ids in made.items()
        if version == versions
        for id_ in ids
    }
    every = sorted({id_ for ids in made.values() for id_ in ids})
    found = {row.id: row.text_content for row in store.get(NAME, every, strong=True, **SCOPE)}
    store.close()
    assert found == expected, f"seed {seed}"


def run(folder: Path, chapters: int, versions: int, kills: int) -> None:
    seed = random.randrange(2**32)
    shuffle = random.Random(seed)
    made = editions(chapters, versions, shuffle)
    jobs = [job(chapter, version, ids) for (chapter, version), ids in made.items()] * 2
    shuffle.shuffle(jobs)
    handlers = {"embedding_batch": "support.embedding:Embedding"}
    with lite_server(folder / "milvus") as milvus:
        options = {"milvus_uri": milvus.uri, "retry_initial": 0.1, "retry_max": 1, "max_retries": 20}
        with service(folder, handlers, procs=3, **options) as one:
            deliver(one, jobs, kills, shuffle)
            assert one.dead_letters() == []
            check(milvus.uri, made, versions, seed)


def test_the_newest_version_stays_whatever_the_order_and_whoever_dies(tmp_path: Path) -> None:
    run(tmp_path, chapters=6, versions=6, kills=KILLS)
