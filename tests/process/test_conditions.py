"""Start conditions with real services: keys, series and times, over two hosts whose processes are killed."""

import random
import time
from collections import defaultdict
from pathlib import Path

import pytest

from support.hosts import hosts, overlaps, starts
from support.operator import run, run_json
from support.redis_servers import RedisServer
from support.service import SOON_S, Service, eventually

pytestmark = pytest.mark.process


def metric(services: list[Service], name: str) -> float:
    return sum(one.metric(name, task_type="sleep") for one in services)


def started_ids(services: list[Service]) -> list[str]:
    """Ids of the jobs that were started, in order; each as often as it was."""
    events = [event for one in services for event in one.events("start")]
    return [event.id for event in sorted(events, key=lambda event: event.mono_s)]


def wait_until_drained(services: list[Service], store: RedisServer) -> None:
    services[0].wait_until_drained(60.0)
    assert services[0].dead_letters() == []


def test_one_job_of_each_key_runs_though_readers_and_workers_are_killed(
    tmp_path: Path, store: RedisServer
) -> None:
    rng = random.Random(1)
    with hosts(tmp_path, store, "one", "two", retry_initial=0.1, retry_max=0.2) as services:
        key_of: dict[str, str] = {}
        for round_ in range(8):
            jobs = [
                {
                    "type": "sleep", "id": f"{round_}-{number}", "payload": {"s": 0.005},
                    "metadata": {"idempotency_key": f"k{number}"},
                }
                for number in range(60)
            ]  # fmt: skip
            key_of |= {f"{round_}-{number}": f"k{number}" for number in range(60)}
            services[0].enqueue_many(jobs)
            service, role = rng.choice(services), rng.choice(["reader", "reader", "worker 0"])
            service.wait_for_successor(role, service.kill_role(role))
        wait_until_drained(services, store)
        ran: dict[str, set[str]] = defaultdict(set)
        for id in started_ids(services):
            ran[key_of[id]].add(id)
        assert len(ran) == 60
        assert all(len(ids) == 1 for ids in ran.values())
        ended = {event.id for one in services for event in one.events("end")}
        assert ended == {id for ids in ran.values() for id in ids}


def test_an_older_job_of_a_series_never_starts_beside_or_after_a_newer_one(
    tmp_path: Path, store: RedisServer
) -> None:
    rng = random.Random(2)
    with hosts(tmp_path, store, "one", "two", procs=3) as services:
        chapter_of: dict[str, str] = {}
        for number in range(150):
            chapter = f"c{number % 3}"
            metadata = {"supersede_key": chapter, "not_before": str(time.time() + rng.choice([-1, -1, 0.3]))}
            id = services[0].enqueue("sleep", {"s": 0.02}, id=f"{number:03d}", metadata=metadata)
            chapter_of[id] = chapter
            if number % 25 == 0:
                service = rng.choice(services)
                service.wait_for_successor("reader", service.kill_role("reader"))
            time.sleep(rng.uniform(0, 0.02))  # saves of an author
        wait_until_drained(services, store)
        eventually(lambda: store.client.zcard("retry:stream:story:gen") == 0)
        wait_until_drained(services, store)
        by_chapter: dict[str, list[str]] = defaultdict(list)
        for id in started_ids(services):
            by_chapter[chapter_of[id]].append(id)
        for chapter, ids in by_chapter.items():
            assert ids == sorted(ids), chapter
            assert ids[-1] == max(id for id in chapter_of if chapter_of[id] == chapter)
        assert len(by_chapter) == 3
        assert set(overlaps(services, chapter_of).values()) == {1}
        assert len(starts(services)) < 150


def test_a_hundred_saves_in_a_row_are_two_runs_at_most(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one", "two") as services:
        for number in range(100):
            metadata = {"supersede_key": "chapter-7", "not_before": str(time.time() + 1.0)}
            services[number % 2].enqueue("sleep", {"s": 0.05}, id=str(number), metadata=metadata)
            time.sleep(0.03)  # saves of an author
        eventually(lambda: "99" in starts(services), SOON_S)
        wait_until_drained(services, store)
        assert len(started_ids(services)) <= 2
        assert started_ids(services)[-1] == "99"
        eventually(lambda: metric(services, "z_novel_jobs_superseded_total") >= 98)


def test_delayed_and_expired_jobs_are_explained(tmp_path: Path, store: RedisServer) -> None:
    with hosts(tmp_path, store, "one") as (one,):
        run(one, "enqueue", "noop", "--id", "later", "--run-at", "2100-01-01T00:00:00Z")
        run(one, "enqueue", "noop", "--id", "late", "--expires-at", "2020-01-01T00:00:00Z")
        eventually(lambda: run_json(one, "explain", "later")["found"][0]["state"] == "delayed")
        (found,) = run_json(one, "explain", "later")["found"]
        assert found["why"].startswith("delayed until 2100-01-01T00:00:00Z: ")
        eventually(lambda: one.dead_letters())
        (found,) = run_json(one, "explain", "late")["found"]
        assert "dead-lettered (expired)" in found["why"]
        assert starts([one]) == {}
