"""Audit archive of the running service with kills: every entry is in the file once, and tools read it."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from support.service import Service, eventually, service

pytestmark = pytest.mark.process

STREAM = "stream:audit:log"
ARCHIVE = {"audit": "jobworker.handlers.audit.handler:Archive"}
DRAINED_WITHIN_S = 60.0


def archived(one: Service) -> list[dict[str, Any]]:
    """Every line of every day, read as zstdcat does, without knowledge of units."""
    lines = []
    for path in sorted((one.data_dir / "audit").glob("*.jsonl.zst")):
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader,
        ):
            lines += [json.loads(line) for line in reader.read().splitlines()]
    return lines


def enqueue_entries(one: Service, start: int, stop: int) -> list[str]:
    jobs = [
        {"type": "audit", "id": f"a-{n}", "payload": {"n": n, "text": "x" * 300}} for n in range(start, stop)
    ]
    return one.enqueue_many(jobs, STREAM)


def assert_each_once(one: Service, count: int) -> None:
    one.wait_until_drained(DRAINED_WITHIN_S)
    lines = archived(one)
    assert sorted(line["payload"]["n"] for line in lines) == list(range(count))
    assert one.dead_letters(STREAM) == []


def test_worker_kills_lose_and_duplicate_no_entry(tmp_path: Path) -> None:
    rng, kills, entries_a_kill = random.Random(5), 8, 1500
    with service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1) as one:
        for n in range(kills):
            before = size(one)
            enqueue_entries(one, n * entries_a_kill, (n + 1) * entries_a_kill)
            worker = f"worker {rng.randrange(2)}"
            eventually(lambda before=before: size(one) > before or not one.unfinished())  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)  # a random moment is the point
            if worker in one.roles():
                one.kill_role(worker)
        assert_each_once(one, kills * entries_a_kill)
        eventually(lambda: one.metric("z_novel_audit_entries_total") > 0)


def size(one: Service) -> int:
    return sum(path.stat().st_size for path in (one.data_dir / "audit").glob("*.jsonl.zst"))


def test_a_writer_killed_with_the_file_lock_does_not_block_the_others(tmp_path: Path) -> None:
    """A worker stopped between two instructions may hold the lock; its end must release it."""
    with service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1) as one:
        enqueue_entries(one, 0, 4000)
        pid = one.roles()["worker 0"]
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert_each_once(one, 4000)


def test_a_restart_after_a_kill_archives_no_entry_twice(tmp_path: Path) -> None:
    one = Service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1)
    try:
        one.start()
        enqueue_entries(one, 0, 3000)
        eventually(lambda: size(one) > 0)
        one.kill()
        one.start()
        enqueue_entries(one, 3000, 3100)
        assert_each_once(one, 3100)
        assert one.terminate() == 0
        one.assert_nothing_left()
    finally:
        one.destroy()


def test_a_torn_end_of_a_killed_service_is_repaired(tmp_path: Path) -> None:
    with service(tmp_path, ARCHIVE, procs=1) as one:
        enqueue_entries(one, 0, 10)
        assert_each_once(one, 10)
        path = max((one.data_dir / "audit").glob("*.jsonl.zst"))
        whole = path.read_bytes()
        with path.open("ab") as file:
            file.write(whole[: len(whole) // 2])
        enqueue_entries(one, 10, 20)
        assert_each_once(one, 20)
        (cut,) = one.logged("audit.tail_cut")
        assert cut["bytes"] == len(whole) // 2
