"""Embedding in the running service: end-to-end speed into Milvus Lite, memory of workers, recovery."""

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from hosts import roles_of
from rig import JOB_TYPE, LIMIT_S, Backlog, connect, free_port, server, service

#: The handler of `embedding_batch`, and the same with a store that keeps the rows of its process in memory.
EMBED = "jobworker.handlers.embedding.handler:EmbeddingBatch"
EMBED_WITHOUT_STORE = "bench_embed_handler:EmbedWithoutStore"
# Poll interval: short compared with everything that is measured here.
_POLL_S = 0.01


class Running(NamedTuple):
    """Ready service whose backlog is not released yet."""

    supervisor_pid: int
    backlog: Backlog
    metrics_url: str

    def metric(self, name: str) -> float:
        """A counter; 0 if it does not exist yet."""
        with urllib.request.urlopen(self.metrics_url, timeout=LIMIT_S) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def worker_pids(self) -> list[int]:
        """Process ids of all workers."""
        return roles_of(self.supervisor_pid).get("worker", [])

    def wait_drained(self, within_s: float = LIMIT_S) -> None:
        """Wait until every job is acknowledged, and so its rows stored. Raises RuntimeError if one fails."""
        _wait(lambda: self.backlog.drained, within_s, "acknowledged")
        if self.backlog.failed_jobs:
            raise RuntimeError(f"{self.backlog.failed_jobs} jobs failed")


@contextmanager
def running(
    jobs: Sequence[Sequence[str]], procs: int, model: str, handler: str = EMBED, **environment: str
) -> Iterator[Running]:
    """A ready service with a model in each worker, and a backlog of one job for each list of texts."""
    with server("") as url, connect(url) as client:
        backlog = Backlog(client, lambda number: _job(number, jobs[number]))
        backlog.fill(len(jobs))
        port = free_port()
        options = {"JOBWORKER_CACHE": "off", "JOBWORKER_MODEL": model} | environment
        with service(url, backlog, handler, procs, port, **options) as pid:
            yield Running(pid, backlog, f"http://127.0.0.1:{port}/metrics")


def end_to_end(
    jobs: Sequence[Sequence[str]],
    procs: int,
    model: str,
    *,
    handler: str = EMBED,
    observer: AbstractContextManager[object] | None = None,
    **environment: str,
) -> dict[str, Any]:
    """Seconds from the first job to the last acknowledgement, with the workers' first passes.

    `observer` is open during that time. The idle share is the time of all workers without a forward pass.
    """
    with running(jobs, procs, model, handler, **environment) as served:
        with observer or nullcontext():
            began = time.perf_counter()
            served.backlog.release(len(jobs))
            served.wait_drained()
            seconds = time.perf_counter() - began
        busy_s = _settled(served, "z_novel_forward_seconds_total")
        tokens = served.metric("z_novel_embedded_tokens_total")
        batches, batch_jobs = (
            served.metric("z_novel_batch_jobs_count"),
            served.metric("z_novel_batch_jobs_sum"),
        )
    return {
        "seconds": seconds,
        "tokens": tokens,
        "forward_idle_share": 1 - busy_s / seconds / procs,
        "jobs_a_batch": batch_jobs / batches if batches else 0,
    }


def memory(procs: int, model: str, **environment: str) -> dict[str, Any]:
    """Proportional set size of all workers together in MiB, after each had work."""
    # More jobs than one worker accepts at once.
    count = 8 * procs
    with running([["some text"]] * count, procs, model, **environment) as served:
        served.backlog.release(count)
        served.wait_drained()
        pids = served.worker_pids()
        total = sum(_pss_kib(pid) for pid in pids)
    return {"workers": len(pids), "pss_mib": round(total / 1024, 1)}


def recovery(model: str) -> dict[str, Any]:
    """Kill the only worker; seconds until a waiting job is acknowledged."""
    with running([["some text"], ["another text"]], 1, model) as served:
        (pid,) = served.worker_pids()
        os.kill(pid, signal.SIGKILL)
        began = time.perf_counter()
        served.backlog.release(2)
        served.wait_drained()
        return {"seconds": time.perf_counter() - began}


def _settled(served: Running, name: str) -> float:
    """A counter after it has stopped growing."""
    last, now = -1.0, served.metric(name)
    while now != last:
        time.sleep(1.2)  # workers report every half second
        last, now = now, served.metric(name)
    return now


def _job(number: int, texts: Sequence[str]) -> bytes:
    job = {
        "id": f"bench-{number}",
        "type": JOB_TYPE,
        "tenant_id": "t001",
        "project_id": "p123",
        "payload": {"ids": [f"{number}.{index}" for index in range(len(texts))], "texts": list(texts)},
        "created_at": "2026-01-02T10:00:00Z",
    }
    return orjson.dumps(job)


def _pss_kib(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def _wait(done: Callable[[], bool], within_s: float, what: str) -> None:
    give_up_at = time.monotonic() + within_s
    while not done():
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not within {within_s:.0f} s: {what}")
        time.sleep(_POLL_S)  # a group has no event that says "all acknowledged"
