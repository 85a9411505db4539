"""A vector store that is down or hangs: its type waits, no retry is used up, other types continue."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.vectors.milvus.store import open_vectors
from support.milvus import LiteServer, lite_server
from support.service import STREAM, Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

#: How long an outage lasts; MILVUS_DOWN_S=60 makes it as long as a real one.
DOWN_S = float(os.environ.get("MILVUS_DOWN_S", "2"))
#: A paused type is tried again after 15 s at the latest, then everything that waited has to be run.
BACK_WITHIN_S = 90.0
SCOPE: dict[str, Any] = {"tenant_id": "t", "project_id": "p"}
HANDLERS = {"embedding_batch": "support.embedding:Embedding", "noop": "support.toys:Noop"}
JOBS = 40


@contextlib.contextmanager
def running(tmp_path: Path) -> Iterator[tuple[Service, LiteServer]]:
    """A service that has stored one text."""
    with (
        lite_server(tmp_path / "milvus") as milvus,
        service(tmp_path / "one", HANDLERS, procs=3, milvus_uri=milvus.uri) as one,
    ):
        one.enqueue("embedding_batch", {"ids": ["first"], "texts": ["first"]}, **SCOPE)
        one.wait_until_drained()
        yield one, milvus


def embed(one: Service) -> dict[str, str]:
    """Send jobs of two texts each; returns the texts by id."""
    texts = {f"{job}.{part}": f"text {part} of {job}" for job in range(JOBS) for part in range(2)}
    for job in range(JOBS):
        ids = [f"{job}.{part}" for part in range(2)]
        one.enqueue("embedding_batch", {"ids": ids, "texts": [texts[id_] for id_ in ids]}, **SCOPE)
    return texts


def assert_unharmed(one: Service) -> None:
    """No job has failed, waits for a retry or was given up."""
    assert one.metric("z_novel_jobs_failed_total", task_type="embedding_batch") == 0
    assert one.client.zcard(f"retry:{STREAM}") == 0
    assert one.dead_letters() == []


def assert_stored(one: Service, uri: str, texts: dict[str, str]) -> None:
    """Wait until all is done, then look for every text."""
    one.wait_until_drained(BACK_WITHIN_S)
    store = open_vectors(uri)
    found = {
        row.id: row.text_content for row in store.get("story_segments", list(texts), strong=True, **SCOPE)
    }
    store.close()
    assert found == texts


def test_an_outage_pauses_the_type_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with running(tmp_path) as (one, milvus):
        port = milvus.port
        milvus.kill()
        one.enqueue("embedding_batch", {"ids": ["first"], "texts": ["again"]}, **SCOPE)
        eventually(
            lambda: one.metric("z_novel_circuit_open", task_type="embedding_batch") == 1, BACK_WITHIN_S
        )
        texts = embed(one)
        down_until = time.monotonic() + DOWN_S
        while time.monotonic() < down_until:
            one.wait_for_end(one.enqueue("noop"))
            time.sleep(0.5)  # the outage is a length of time
        assert_unharmed(one)
        with lite_server(tmp_path / "milvus", port=port) as again:
            assert_stored(one, again.uri, texts)
            assert_unharmed(one)
            eventually(lambda: one.metric("z_novel_circuit_open", task_type="embedding_batch") == 0)
            one.wait_until_ready()


def test_a_store_that_stands_still_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with running(tmp_path) as (one, milvus):
        milvus.process.send_signal(signal.SIGSTOP)
        try:
            texts = embed(one)
            time.sleep(min(DOWN_S, 20.0))  # a length of time, within what one call may take
        finally:
            milvus.process.send_signal(signal.SIGCONT)
        assert_stored(one, milvus.uri, texts)
        assert_unharmed(one)
