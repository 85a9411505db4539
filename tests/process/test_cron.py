"""Cron tables on running services: each tick once through kills, HUP, wrong files, the verbs, doctor."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support.operator import findings, run, run_json
from support.redis_servers import RedisServer
from support.service import COMMAND, STREAM, Service, ending, eventually, handlers, service

pytestmark = pytest.mark.process

SECONDLY = '[[cron]]\nname = "secondly"\nschedule = "@every 1s"\ntype = "noop"\n'
NIGHTLY = '[[cron]]\nname = "nightly"\nschedule = "0 3 * * *"\ntimezone = "Europe/Berlin"\ntype = "noop"\n'


def tick_of(id: str) -> int:
    return int(datetime.strptime(id.split(":", 2)[2], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def config(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "jobworker.toml"
    file.write_text(text)
    return file


def on(store: RedisServer, folder: Path, instance: str, text: str) -> Service:
    file = config(folder, text)
    return Service(
        folder, handlers("Noop"), procs=1, redis_url=store.url, instance=instance, config=file
    )  # fmt: skip


def test_two_services_whose_reapers_are_killed_enqueue_each_tick_once(
    tmp_path: Path, store: RedisServer
) -> None:
    one, two = (on(store, tmp_path / name, name, SECONDLY) for name in ("one", "two"))
    with ending(one), ending(two):
        one.start()
        two.start()

        def ids() -> list[str]:
            return [event.id for each in (one, two) for event in each.events("start")]

        eventually(ids)
        for _ in range(7):
            for each in (one, two):
                each.wait_for_successor("reaper", each.kill_role("reaper"))
        kills = sum(len(each.logged("child.exited", child="reaper")) for each in (one, two))
        seen = len(ids())
        eventually(lambda: len(ids()) > seen + 2)
        found = Counter(ids())
        assert set(found.values()) == {1}
        ticks = sorted(map(tick_of, found))
        assert ticks == list(range(ticks[0], ticks[-1] + 1))
        assert kills >= 10
        assert run_json(store, "cron", "list")["other_files"] == []
        for each in (one, two):
            assert each.terminate() == 0
            each.assert_nothing_left()


def test_hup_reloads_the_tables_and_refuses_a_wrong_one(tmp_path: Path, store: RedisServer) -> None:
    with ending(on(store, tmp_path / "one", "one", NIGHTLY)) as one:
        one.start()

        def names() -> list[str]:
            return [entry["name"] for entry in run_json(store, "cron", "list")["cron"]]

        eventually(lambda: names() == ["nightly"])
        reaper = one.roles()["reaper"]
        config(one.folder, NIGHTLY + SECONDLY)
        one.send(signal.SIGHUP)
        eventually(lambda: names() == ["nightly", "secondly"])
        eventually(lambda: one.events("start"))
        config(one.folder, NIGHTLY + SECONDLY.replace("@every 1s", "61 * * * *"))
        one.send(signal.SIGHUP)
        (rejected,) = eventually(lambda: one.logged("tables.rejected"))
        assert "[[cron]] 'secondly'" in rejected["error"]
        assert "Bad minute" in rejected["error"]
        seen = len(one.events("start"))
        eventually(lambda: len(one.events("start")) > seen)
        config(one.folder, NIGHTLY)
        one.send(signal.SIGHUP)
        eventually(lambda: names() == ["nightly"])
        assert one.roles()["reaper"] == reaper
        one.wait_for_successor("reaper", one.kill_role("reaper"))
        eventually(lambda: len(one.logged("child.ready", child="reaper")) == 2)
        assert names() == ["nightly"], "a later reaper has the tables of the last HUP"
        status = json.loads(one.get("/status")[1])
        assert [entry["name"] for entry in status["cron"]] == ["nightly"]
        assert one.terminate() == 0
        one.assert_nothing_left()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (NIGHTLY.replace("0 3", "0 33"), "[[cron]] 'nightly': schedule '0 33 * * *': Bad hour"),
        (NIGHTLY.replace("Berlin", "Berlinn"), "'nightly': timezone 'Europe/Berlinn' is not known"),
        (NIGHTLY.replace("type =", "typ ="), "'nightly': no key 'typ'"),
    ],
)
def test_a_service_with_a_wrong_table_does_not_start(tmp_path: Path, text: str, says: str) -> None:
    file = config(tmp_path / "one", text)
    done = subprocess.run(
        [COMMAND, "--config", file], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env={**os.environ, "JOBWORKER_REDIS_URL": "redis://127.0.0.1:1"},
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    error = json.loads(done.stderr)["error"]
    assert says in error
    assert str(file) in error


class TestVerbs:
    def test_a_table_is_listed_run_paused_and_resumed(self, tmp_path: Path, store: RedisServer) -> None:
        with ending(on(store, tmp_path / "one", "one", NIGHTLY)) as one:
            one.start()
            (entry,) = eventually(lambda: run_json(store, "cron", "list")["cron"])
            assert re.fullmatch(r"20\d\d-\d\d-\d\dT0[12]:00:00Z", entry.pop("next"))
            assert entry == {
                "name": "nightly", "schedule": "0 3 * * *", "timezone": "Europe/Berlin", "type": "noop",
                "stream": STREAM, "missed": "skip", "last": None, "last_job_id": None, "last_state": None,
                "late_s": 0.0, "paused": None,
            }  # fmt: skip
            (named,) = run_json(store, "cron", "list", "--stream", STREAM)["cron"]
            assert named["name"] == "nightly"
            elsewhere = run(store, "cron", "list", "--stream", "stream:elsewhere=workers")
            assert "there is no stream 'stream:elsewhere'" in elsewhere.stderr
            (id,) = run_json(store, "cron", "run", "nightly", "--stream", STREAM)["enqueued"].values()
            assert id.startswith("cron:nightly:run:")
            one.wait_for_end(id)
            run(store, "cron", "pause", "nightly", "--note", "import")
            assert "paused (import)" in run(store, "cron", "list").output
            assert "cron: nightly is paused (import)" in findings(store, code=1)["note"]
            assert run_json(store, "cron", "resume", "nightly")["resumed"] == {"nightly": True}
            run(store, "cron", "resume", "nightly", code=1)
            assert "did you mean 'nightly'?" in run(store, "cron", "run", "nightyl", code=2).output
            assert one.terminate() == 0

    def test_the_fate_of_the_last_job_and_a_pause_are_followed(
        self, tmp_path: Path, store: RedisServer
    ) -> None:
        with ending(on(store, tmp_path / "one", "one", SECONDLY)) as one:
            one.start()
            eventually(
                lambda: [e["last_state"] for e in run_json(store, "cron", "list")["cron"]] == ["finished"]
            )
            enqueued = ("z_novel_cron_enqueued_total", frozenset({("name", "secondly")}))
            eventually(lambda: one.metrics().get(enqueued))
            run(store, "cron", "pause", "secondly")
            (entry,) = run_json(store, "cron", "list")["cron"]
            paused_since = entry["last"]
            time.sleep(2.5)  # two ticks that must not be enqueued
            (entry,) = run_json(store, "cron", "list")["cron"]
            assert entry["last"] == paused_since
            run(store, "cron", "resume", "secondly")
            eventually(lambda: run_json(store, "cron", "list")["cron"][0]["last"] > paused_since)
            found = Counter(map(tick_of, (event.id for event in one.events("start"))))
            assert set(found.values()) == {1}
            assert one.terminate() == 0

    def test_doctor_names_a_host_with_another_file_and_a_damaged_key(
        self, tmp_path: Path, store: RedisServer
    ) -> None:
        one, two = on(store, tmp_path / "one", "one", NIGHTLY), on(store, tmp_path / "two", "two", NIGHTLY)
        with ending(one), ending(two):
            one.start()
            two.start()
            config(two.folder, NIGHTLY.replace("0 3", "0 4"))
            two.send(signal.SIGHUP)
            eventually(lambda: run_json(store, "cron", "list")["other_files"])
            (wrong,) = [text for text in findings(store, code=1)["wrong"] if text.startswith("cron")]
            assert "/one has other tables" in wrong
            config(one.folder, NIGHTLY.replace("0 3", "0 4"))
            one.send(signal.SIGHUP)
            eventually(lambda: not run_json(store, "cron", "list")["other_files"])
            store.client.rename(f"cron:{STREAM}", "aside")
            store.client.set(f"cron:{STREAM}", "text")
            eventually(lambda: one.logged("cron.refused"))
            (wrong,) = [text for text in findings(store, code=1)["wrong"] if text.startswith("cron")]
            assert f"key cron:{STREAM} is a string, not a hash" in wrong
            id = one.enqueue("noop")
            eventually(lambda: one.events("end", id) or two.events("end", id))
            store.client.rename("aside", f"cron:{STREAM}")
            for each in (one, two):
                assert each.terminate() == 0


def test_a_service_without_tables_leaves_no_key(tmp_path: Path) -> None:
    with service(tmp_path, handlers("Noop"), procs=1) as one:
        one.wait_for_end(one.enqueue("noop"))
        eventually(lambda: one.client.hlen("jobworker:services"))
        assert one.client.keys("cron:*") == []
