"""The archive under kills of the real service: every entry is in the file, once, and tools can read it."""

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
    """Every line of every day, read as a tool would that knows nothing of units."""
    found = []
    for path in sorted((one.data_dir / "audit").glob("*.jsonl.zst")):
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader,
        ):
            found += [json.loads(line) for line in reader.read().splitlines()]
    return found


def put(one: Service, start: int, stop: int) -> list[str]:
    jobs = [
        {"type": "audit", "id": f"a-{n}", "payload": {"n": n, "text": "x" * 300}} for n in range(start, stop)
    ]
    return one.enqueue_many(jobs, STREAM)


def assert_each_once(one: Service, count: int) -> None:
    one.wait_until_drained(DRAINED_WITHIN_S)
    lines = archived(one)
    assert sorted(line["payload"]["n"] for line in lines) == list(range(count))
    assert one.dead_letters(STREAM) == []


def test_workers_killed_at_any_moment_leave_each_entry_once(tmp_path: Path) -> None:
    rng, kills, a_time = random.Random(5), 8, 1500
    with service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1) as one:
        for n in range(kills):
            before = size(one)
            put(one, n * a_time, (n + 1) * a_time)
            worker = f"worker {rng.randrange(2)}"
            eventually(lambda before=before: size(one) > before or not one.unfinished())  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)  # a random moment is the point
            if worker in one.roles():
                one.kill_role(worker)
        assert_each_once(one, kills * a_time)
        eventually(lambda: one.metric("z_novel_audit_entries_total") > 0)


def size(one: Service) -> int:
    return sum(path.stat().st_size for path in (one.data_dir / "audit").glob("*.jsonl.zst"))


def test_a_writer_killed_while_it_holds_the_file_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """Stopped between two instructions a worker may hold the file's lock; its end must give that back."""
    with service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1) as one:
        put(one, 0, 4000)
        pid = one.roles()["worker 0"]
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert_each_once(one, 4000)


def test_the_service_killed_and_started_again_archives_nothing_twice(tmp_path: Path) -> None:
    one = Service(tmp_path, ARCHIVE, procs=2, retry_initial=0.1)
    try:
        one.start()
        put(one, 0, 3000)
        eventually(lambda: size(one) > 0)
        one.kill()
        one.start()
        put(one, 3000, 3100)
        assert_each_once(one, 3100)
        assert one.terminate() == 0
        one.assert_nothing_left()
    finally:
        one.destroy()


def test_a_torn_end_of_a_killed_service_is_repaired(tmp_path: Path) -> None:
    with service(tmp_path, ARCHIVE, procs=1) as one:
        put(one, 0, 10)
        assert_each_once(one, 10)
        path = max((one.data_dir / "audit").glob("*.jsonl.zst"))
        whole = path.read_bytes()
        with path.open("ab") as file:
            file.write(whole[: len(whole) // 2])
        put(one, 10, 20)
        assert_each_once(one, 20)
        (cut,) = one.logged("audit.tail_cut")
        assert cut["bytes"] == len(whole) // 2
