"""Batches on running services: exact counts and one callback through kills, the verbs, the page, HTTP."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker import Producer
from support.operator import run, run_json
from support.redis_servers import RedisServer
from support.service import STREAM, Service, ending, eventually, handlers
from support.web import page

pytestmark = pytest.mark.process

#: The callbacks have a stream of their own, whose entries can be counted.
CALLBACKS = "stream:memory:update"
LEASE_S = 2.0


def host(folder: Path, server: RedisServer, name: str) -> Service:
    (folder / name).mkdir()
    return Service(
        folder / name, handlers("Sleep", "Noop", "Flaky", "Permanent"), redis_url=server.url, instance=name,
        procs=2, lease=LEASE_S, retry_initial=0.05, environment={"TOYS_DIR": str(folder / name / "toys")},
    )  # fmt: skip


def some_job(rng: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"type": "sleep", "payload": {"s": 0.01}},
        {"type": "noop", "payload": None},
        {"type": "flaky", "payload": {"times": 1}},
        {"type": "permanent", "payload": None},
    ]
    return rng.choice(kinds) | {"stream": STREAM, "tenant_id": f"t{rng.randrange(3)}"}


def test_counts_and_callback_are_exact_though_every_role_and_a_host_is_killed(
    tmp_path: Path, store: RedisServer
) -> None:
    rng = random.Random(7)
    one, two = host(tmp_path, store, "one"), host(tmp_path, store, "two")
    with ending(one), ending(two), Producer(store.url) as producer:
        one.start()
        two.start()
        callback = {"type": "noop", "payload": None, "stream": CALLBACKS}
        with producer.batch("t1", on_complete=callback, name="Import", id="import-7") as batch:
            batch.enqueue_many(some_job(rng) for _ in range(600))

        def shown() -> dict[str, Any]:
            return dict(run_json(store, "batch", "show", "import-7"))

        for number in range(12):
            service = rng.choice([one, two])
            role = rng.choice(["reader", "reaper", "worker 0", "worker 1"])
            service.wait_for_successor(role, service.kill_role(role))
            now = shown()
            assert now["done"] + now["dead"] <= now["total"] == 600
            if number == 6:
                os.kill(two.pid, signal.SIGKILL)
                two.wait()
                two.launch()
                two.wait_until_ready()
            time.sleep(rng.uniform(0.0, 0.2))  # jobs run meanwhile
        done = eventually(lambda: (now := shown())["state"] == "finished" and now, 60.0, "finished")
        letters = [letter for letter in one.dead_letters() if letter["task"]["metadata"]["batch_id"]]
        assert (done["done"], done["dead"]) == (600 - len(letters), len(letters))
        assert len(letters) > 100
        for service in (one, two):  # a reaper that starts again must not enqueue it again
            service.wait_for_successor("reaper", service.kill_role("reaper"))
        eventually(lambda: [e for each in (one, two) for e in each.events("end", "batch:import-7")])
        one.wait_until_drained()
        assert store.client.xinfo_stream(CALLBACKS)["entries-added"] == 1
        assert shown()["done"] == done["done"]


def test_verbs_page_http_and_metrics_show_a_batch(tmp_path: Path, store: RedisServer) -> None:
    with ending(host(tmp_path, store, "one")) as one, Producer(store.url) as producer:
        one.start()
        assert "there are no batches" in run(store, "batch", "list").output
        batch = producer.batch("t1", name="Import of 'A'", id="import-8")
        batch.enqueue("noop", None, stream=STREAM)
        batch.enqueue("permanent", None, stream=STREAM)
        batch.enqueue("noop", None, stream=STREAM, delay=3600)
        (letter,) = eventually(one.dead_letters)
        assert letter["task"]["metadata"] == {"batch_id": "import-8"}
        eventually(lambda: run_json(store, "batch", "show", "import-8")["percent"] == 66.6)
        eventually(lambda: one.metric("z_novel_batches_open", stream=STREAM) == 1, 40.0)
        batch.close()

        status, body = one.get("/batches/import-8")
        assert status == 200
        shown = json.loads(body)
        assert shown == run_json(store, "batch", "show", "import-8")
        assert (shown["total"], shown["done"], shown["dead"], shown["state"]) == (3, 1, 1, "closed")
        assert one.get("/batches/none")[0] == 404
        assert one.get("/batches/%2E%2E%2Fx")[0] == 404
        text = run(store, "batch", "show", "import-8").output
        assert "[##########################--------------] 66.6 %" in text
        assert "3: 1 done, 1 dead, 1 left" in text
        run(store, "batch", "show", "none", code=1)
        (row,) = run_json(store, "batch", "list")["batches"]
        assert row == shown
        with page(store) as web:
            body = web.get("/queues").body
            assert "import-8" in body
            assert "66.6 %" in body

        run(store, "dlq", "requeue", "--type", "permanent")
        eventually(lambda: len(one.events("start")) >= 3)
        eventually(lambda: run_json(store, "batch", "show", "import-8")["dead"] == 1)
        run(store, "retry", "now", "--type", "noop")
        eventually(lambda: run_json(store, "batch", "show", "import-8")["state"] == "finished")
        (finished,) = eventually(lambda: one.logged("batch.finished"))
        assert (finished["batch"], finished["completed"], finished["dead"]) == ("import-8", 2, 1)
        eventually(lambda: one.metric("z_novel_batches_finished_total", stream=STREAM) == 1, 40.0)


def test_lines_are_sent_into_a_batch_and_an_interrupted_command_is_continued(
    tmp_path: Path, store: RedisServer
) -> None:
    with ending(host(tmp_path, store, "one")) as one:
        one.start()
        lines = tmp_path / "jobs.jsonl"
        lines.write_text('{"payload": 1}\n{"payload": 2}\n{"payload": \n{"payload": 4}\n')
        into = ["--tenant", "t1", "--batch", "import-9", "--on-complete", "sleep"]
        failed = run(store, "enqueue", "noop", "--lines", str(lines), *into, code=2)
        assert "--batch import-9 --on-complete sleep" in failed.output
        assert run_json(store, "batch", "show", "import-9")["state"] == "open"
        run(store, "enqueue", "noop", "--lines", "-", *into, stdin='{"payload": 3}\n{"payload": 4}\n')
        shown = eventually(
            lambda: (now := run_json(store, "batch", "show", "import-9"))["finished_at"] and now
        )
        assert (shown["total"], shown["done"], shown["tenant_id"]) == (4, 4, "t1")
        assert shown["callback_id"] == "batch:import-9"
        assert "needs --batch" in run(store, "enqueue", "noop", "--on-complete", "noop", code=2).output
