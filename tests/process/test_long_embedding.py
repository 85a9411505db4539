"""A job that takes longer than its timeout: it runs to its end, and continues where a killed worker was."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.embedding.handler import CACHE_FILE
from support.service import eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

HANDLERS = {"embedding_batch": "support.embedding:Slow"}
#: 3.5 seconds of work, and the timeout is 2 s.
TEXTS = 350
WITHIN_S = 90.0


def payload() -> dict[str, Any]:
    ids = [f"{number}" for number in range(TEXTS)]
    return {"ids": ids, "texts": [f"{id_} " + "\u5b57" * 200 for id_ in ids]}


def cached(path: Path) -> int:
    """Number of vectors in the cache."""
    db = sqlite3.connect(path)
    try:
        return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])
    finally:
        db.close()


def test_a_long_job_runs_to_its_end_and_a_retry_continues(tmp_path: Path) -> None:
    with service(tmp_path, HANDLERS, procs=2, cache="64MiB") as one:
        one.enqueue("embedding_batch", payload(), tenant_id="t", project_id="p")
        one.wait_until_drained(WITHIN_S)
        done = "z_novel_jobs_completed_total"
        eventually(lambda: one.metric(done, task_type="embedding_batch") == 1, WITHIN_S)
        assert one.metric("z_novel_jobs_failed_total", task_type="embedding_batch") == 0

        one.enqueue("embedding_batch", payload(), tenant_id="other", project_id="p")
        # Some parts of the second job are embedded, others are not.
        eventually(lambda: cached(one.data_dir / CACHE_FILE) > TEXTS * 1.3, WITHIN_S)
        for role in ("worker 0", "worker 1"):
            one.kill_role(role)
        assert one.unfinished()
        one.wait_until_drained(WITHIN_S)
        assert one.dead_letters() == []
        hits = "z_novel_embedding_cache_hits_total"
        eventually(lambda: one.metric(hits) > TEXTS * 0.25, WITHIN_S, "the next try finds what is embedded")
        assert cached(one.data_dir / CACHE_FILE) == 2 * TEXTS
