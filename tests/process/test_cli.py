"""``jobworker`` as an operator uses it: every verb on a real store, without any service."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobworker.handlers.jobstore.open import open_rebuilds
from jobworker.worker.cli import main
from support.operator import COMMAND, COMMAND_S, Terminal, asked, findings, run
from support.redis_servers import RedisServer
from support.service import STREAM, eventually

pytestmark = pytest.mark.process

DLQ = f"dlq:{STREAM}"


def letter(store: RedisServer, id: str, reason: str = "exhausted", **more: Any) -> str:
    """Put a dead letter where the service would; returns its id."""
    tenant = more.pop("tenant", "t1")
    task = {"id": id, "type": "audit", "tenant_id": tenant, "retry_count": 3, "payload": [id]}
    said = {
        "task": task, "error": "ValueError: no such chapter", "reason": reason, "original_id": "77-0",
        "retry_count": 3, "deaths": 0, "worker": "h/i/0", "failed_at": "2026-01-02T10:00:00Z", **more,
    }  # fmt: skip
    return str(store.client.xadd(DLQ, {"data": json.dumps(said)}).decode())


def jobs(store: RedisServer, stream: str = STREAM) -> list[Any]:
    return [json.loads(fields[b"data"]) for _, fields in store.client.xrange(stream)]


class TestDeadLetters:
    def test_they_are_listed_newest_first_and_by_what_they_say(self, store: RedisServer) -> None:
        for number in range(5):
            letter(store, f"j{number}", "poison" if number % 2 else "timeout", tenant=f"t{number}")
        found = asked(store, "dlq", "list")
        assert [one["job_id"] for one in found["dead_letters"]] == ["j4", "j3", "j2", "j1", "j0"]
        assert not found["more"]
        found = asked(store, "dlq", "list", "--reason", "poison", "--limit", "1")
        assert ([one["job_id"] for one in found["dead_letters"]], found["more"]) == (["j3"], True)
        assert len(asked(store, "dlq", "list", "--newer-than", "1h")["dead_letters"]) == 5
        assert asked(store, "dlq", "list", "--older-than", "1h")["dead_letters"] == []
        assert len(asked(store, "dlq", "list", "--tenant", "t1", "--tenant", "t2")["dead_letters"]) == 2
        assert "ValueError: no such chapter" in run(store, "dlq", "list", "j3").stdout

    def test_a_tenants_text_is_shown_only_when_asked_for(self, store: RedisServer) -> None:
        id = letter(store, "j", payload_marker="x")
        assert "task" not in asked(store, "dlq", "show", id)["dead_letters"][0]
        assert asked(store, "dlq", "show", "j", "--payload")["dead_letters"][0]["task"]["payload"] == ["j"]
        assert '"payload"' not in run(store, "dlq", "show", id).stdout
        assert '"payload"' in run(store, "dlq", "show", "77-0", "--payload").stdout
        run(store, "dlq", "show", "nobody", code=1)

    def test_what_a_tenant_wrote_cannot_steer_the_terminal(self, store: RedisServer) -> None:
        letter(store, "j\x1b[2J", tenant="\x9b31m", error="\x1b]0;gotcha\x07")
        for arguments in (["dlq", "list"], ["dlq", "show", "77-0", "--payload"]):
            printed = run(store, *arguments).stdout
            assert not {"\x1b", "\x9b", "\x07"} & set(printed), arguments

    def test_requeued_jobs_start_over_with_the_same_payload(self, store: RedisServer) -> None:
        letter(store, "j1", "timeout")
        kept = letter(store, "j2", "poison")
        assert asked(store, "dlq", "requeue", "--reason", "timeout", "--dry-run")["requeued"] == 1
        assert jobs(store) == []
        assert asked(store, "dlq", "requeue", "--reason", "timeout")["requeued"] == 1
        assert jobs(store) == [{"id": "j1", "type": "audit", "tenant_id": "t1", "payload": ["j1"]}]
        assert [id.decode() for id, _ in store.client.xrange(DLQ)] == [kept]

    def test_everything_needs_to_be_asked_for(self, store: RedisServer) -> None:
        letter(store, "j")
        assert "--all" in run(store, "dlq", "requeue", code=2).stderr
        assert "--all" in run(store, "dlq", "purge", "--yes", code=2).stderr
        assert "--yes" in run(store, "dlq", "purge", "--all", code=2).stderr
        assert store.client.xlen(DLQ) == 1
        assert asked(store, "dlq", "purge", "--all", "--yes") == {
            "purged": 1, "gone": 0, "skipped": 0, "missing": [], "dry_run": False,
        }  # fmt: skip
        assert store.client.xlen(DLQ) == 0

    def test_a_letter_without_a_job_stays_and_is_named(self, store: RedisServer) -> None:
        id = store.client.xadd(
            DLQ, {"data": json.dumps({"task": None, "reason": "malformed", "raw": "Pw=="})}
        )
        result = run(store, "dlq", "requeue", id.decode(), code=1)
        assert id.decode() in result.stderr
        assert store.client.xlen(DLQ) == 1
        assert asked(store, "dlq", "requeue", "--all", "--dry-run")["skipped"] == 1
        assert "?" in run(store, "dlq", "show", id.decode(), "--payload").stdout

    def test_an_id_that_is_not_there_is_named_and_the_others_are_dealt_with(self, store: RedisServer) -> None:
        letter(store, "j1")
        letter(store, "j2")
        result = run(store, "dlq", "requeue", "j1", "nobody", code=1)
        assert "not found: nobody" in result.stderr
        assert [job["id"] for job in jobs(store)] == ["j1"]
        said = asked(store, "dlq", "purge", "--yes", "j2", "nobody", code=1)
        assert (said["purged"], said["missing"]) == (1, ["nobody"])
        run(store, "enqueue", "audit", "--id", "later", "--delay", "60")
        said = asked(store, "retry", "now", "later", "nobody", code=1)
        assert (said["hastened"], said["missing"]) == (1, ["nobody"])

    def test_a_purge_says_how_many_before_it_asks(self, store: RedisServer) -> None:
        for number in range(3):
            letter(store, f"j{number}", "poison" if number else "timeout")
        with Terminal([str(COMMAND), "dlq", "purge", "--reason", "poison"], store) as terminal:
            terminal.wait_for("Delete 2 dead letters for good?")
            assert store.client.xlen(DLQ) == 3
            terminal.press("y\n")
            assert terminal.wait() == 0
        assert store.client.xlen(DLQ) == 1

    def test_a_reason_that_there_is_not_is_refused(self, store: RedisServer) -> None:
        assert "'poison'" in run(store, "dlq", "list", "--reason", "poisn", code=2).stderr

    def test_the_rate_is_kept(self, store: RedisServer) -> None:
        for number in range(20):
            letter(store, f"j{number}")
        began = time.monotonic()
        assert asked(store, "dlq", "requeue", "--all", "--rate", "40")["requeued"] == 20
        assert time.monotonic() - began >= 19 / 40 - 4 / 40, "20 at 40 a second in lots of 4"

    def test_killed_half_way_nothing_is_lost_or_doubled(self, store: RedisServer) -> None:
        for number in range(400):
            letter(store, f"j{number}")
        arguments = [str(COMMAND), "dlq", "requeue", "--all", "--rate", "400"]
        environment = {**os.environ, "JOBWORKER_REDIS_URL": store.url}
        for least in (50, 150):
            one = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            eventually(lambda least=least: store.client.xlen(STREAM) >= least)  # type: ignore[misc]
            one.send_signal(signal.SIGKILL)
            one.communicate(timeout=COMMAND_S)
            assert store.client.xlen(STREAM) + store.client.xlen(DLQ) == 400
        assert 0 < store.client.xlen(DLQ) < 400, "it was killed half-way"
        run(store, "dlq", "requeue", "--all")
        assert sorted(job["id"] for job in jobs(store)) == sorted(f"j{number}" for number in range(400))

    def test_an_interrupted_one_says_how_far_it_came(self, store: RedisServer) -> None:
        for number in range(100):
            letter(store, f"j{number}")
        arguments = [str(COMMAND), "dlq", "requeue", "--all", "--rate", "50"]
        environment = {**os.environ, "JOBWORKER_REDIS_URL": store.url}
        one = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: store.client.xlen(STREAM) >= 10)
        one.send_signal(signal.SIGINT)
        _, said = one.communicate(timeout=COMMAND_S)
        assert one.returncode == 1
        assert b"stopped: %d were requeued" % store.client.xlen(STREAM) in said


class TestEnqueue:
    def test_lines_become_jobs_in_order(self, store: RedisServer, tmp_path: Path) -> None:
        file = tmp_path / "jobs.jsonl"
        file.write_text("".join(f'{{"payload": {n}, "id": "j{n}"}}\n' for n in range(2500)) + "\n")
        assert len(asked(store, "enqueue", "audit", "--lines", str(file), "--tenant", "t")["ids"]) == 2500
        found = jobs(store, "stream:audit:log")
        assert [job["payload"] for job in found] == list(range(2500))
        assert {job["tenant_id"] for job in found} == {"t"}

    def test_a_line_that_is_no_job_is_named_and_those_before_it_were_sent(self, store: RedisServer) -> None:
        good = '{"type": "audit", "payload": {}}\n'
        for bad in (
            '{"type": 5}',
            "no json",
            "[]",
            '{"kind": "x"}',
            '{"payload": 1}',
            '{"type":"a","id":"/"}',
        ):
            store.client.xtrim("stream:audit:log", maxlen=0)
            result = run(store, "enqueue", "--lines", "-", code=2, stdin=good + good + bad + "\n" + good)
            assert result.stderr.startswith("jobworker: line 3: "), bad
            assert store.client.xlen("stream:audit:log") == 2, bad

    def test_delayed_lines_wait(self, store: RedisServer) -> None:
        run(store, "enqueue", "audit", "--lines", "-", "--delay", "60", stdin="{}\n{}\n")
        assert store.client.zcard("retry:stream:audit:log") == 2

    def test_it_says_what_is_missing(self, store: RedisServer) -> None:
        assert "TYPE" in run(store, "enqueue", code=2).stderr
        assert "--lines" in run(store, "enqueue", "--lines", "-", "--count", "2", code=2).stderr
        assert "none.json" in run(store, "enqueue", "audit", "--payload", "@none.json", code=2).stderr


class TestStats:
    def test_where_no_service_answers_it_says_so(self, store: RedisServer) -> None:
        result = run(store, "stats", "--metrics-url", "http://127.0.0.1:1")
        assert "no service answers at http://127.0.0.1:1" in result.stderr
        assert "no service" not in result.stdout


class TestPauses:
    def test_they_are_listed_and_taken_back(self, store: RedisServer) -> None:
        run(store, "pause", "audit", "embedding_batch", "--note", "disk is full")
        found = asked(store, "pause")["paused"]
        assert [(one["type"], one["note"]) for one in found] == [
            ("audit", "disk is full"), ("embedding_batch", "disk is full"),
        ]  # fmt: skip
        assert "disk is full" in run(store, "pause").stdout
        assert asked(store, "resume", "audit") == {"resumed": {"audit": True}}
        run(store, "resume", "audit", code=1)
        assert [one["type"] for one in asked(store, "pause")["paused"]] == ["embedding_batch"]


class TestExplainWithoutAService:
    def test_queued_where_nobody_reads(self, store: RedisServer) -> None:
        ids = asked(store, "enqueue", "audit", "--count", "5")["ids"]
        (found,) = asked(store, "explain", ids[3])["found"]
        assert (found["state"], found["facts"]["ahead"]) == ("queued", 3)
        assert "no service reads" in found["why"]
        store.client.xgroup_destroy("stream:audit:log", "cg-archiver")
        assert "no group cg-archiver" in asked(store, "explain", ids[3])["found"][0]["why"]

    def test_what_a_lost_host_holds(self, store: RedisServer) -> None:
        (id,) = asked(store, "enqueue", "audit")["ids"]
        store.client.xreadgroup("cg-archiver", "gone/1", {"stream:audit:log": ">"})
        (found,) = asked(store, "explain", id)["found"]
        assert (found["state"], found["facts"]["consumer"]) == ("pending", "gone/1")
        entry = found["facts"]["entry_id"]
        store.client.xclaim("stream:audit:log", "cg-archiver", "gone/1", 0, [entry], idle=60_000)
        assert "longer than its lease" in asked(store, "explain", entry)["found"][0]["why"]
        month_ms = 30 * 24 * 3600 * 1000
        store.client.xclaim("stream:audit:log", "cg-archiver", "gone/1", 0, [entry], idle=month_ms)
        assert "gave it back when it stopped" in asked(store, "explain", entry)["found"][0]["why"]
        store.client.xack("stream:audit:log", "cg-archiver", entry)
        assert asked(store, "explain", entry)["found"][0]["state"] == "finished"

    def test_an_overdue_retry_has_nobody_to_move_it(self, store: RedisServer) -> None:
        (id,) = asked(store, "enqueue", "audit", "--delay", "0.01")["ids"]
        key = "retry:stream:audit:log"
        store.client.zadd(key, {store.client.zrange(key, 0, 0)[0]: 1.0})
        assert "overdue" in asked(store, "explain", id)["found"][0]["why"]

    def test_how_far_a_rebuild_is(self, store: RedisServer) -> None:
        stream, group = "stream:story:gen", "cg-gen-worker"
        payload = '{"collection": "c"}'
        ids = asked(store, "enqueue", "index_rebuild", "--payload", payload, "--count", "2")["ids"]
        store.client.xreadgroup(group, "gone/1", {stream: ">"})
        rebuilds = open_rebuilds(store.url)
        taken = rebuilds.begin("z_novel_c", f"{stream}/1-1", 60_000)
        assert not isinstance(taken, str)
        far = {"phase": "fill", "job": ids[0], "copied": "300", "total": "1200"}
        rebuilds.save("z_novel_c", taken.epoch, far, lease_ms=60_000)
        (found,) = asked(store, "explain", ids[0])["found"]
        assert "z_novel_c: fill, 300 of 1200 rows (25 %)" in found["why"]
        told = ("rebuilds", "phase", "rows_copied", "rows")
        assert [found["facts"][name] for name in told] == ["z_novel_c", "fill", 300, 1200]
        (other,) = asked(store, "explain", ids[1])["found"]
        assert "rebuilds" not in other["facts"]
        rebuilds.save("z_novel_c", taken.epoch, {"phase": "done"}, lease_ms=0)
        rebuilds.close()
        assert "rebuilds" not in asked(store, "explain", ids[0])["found"][0]["facts"]

    def test_it_says_when_it_gave_up_looking(self, store: RedisServer) -> None:
        asked(store, "enqueue", "audit", "--count", "50")
        said = asked(store, "explain", "nobody", code=1)
        assert (said["found"], said["complete"]) == ([], True)
        said = asked(store, "explain", "nobody", "--scan", "10", code=1)
        assert (said["complete"], said["given_up"]) == (False, ["stream:audit:log"])
        assert "--scan" in run(store, "explain", "nobody", "--scan", "10", code=1).stdout

    def test_a_requeued_job_is_found_in_both_places(self, store: RedisServer) -> None:
        letter(store, "twice")
        run(store, "enqueue", "audit", "--id", "twice", "--stream", STREAM)
        assert sorted(one["state"] for one in asked(store, "explain", "twice")["found"]) == ["dead", "queued"]

    def test_ids_that_other_producers_chose_are_found_however_they_are_written(
        self, store: RedisServer
    ) -> None:
        store.client.xadd(STREAM, {"data": '{"id": "\\u957f/\\u7bc7", "type": "audit"}'})
        assert asked(store, "explain", "长/篇")["found"][0]["state"] == "queued"


class TestDoctor:
    def test_each_thing_that_is_wrong_is_named_with_what_to_do(self, store: RedisServer) -> None:
        client, stream, group = store.client, STREAM, "cg-gen-worker"
        for number in range(10):
            client.xadd(stream, {"data": str(number)})
        client.xreadgroup(group, "gone/1", {stream: ">"}, count=3)
        client.xtrim(stream, maxlen=2, approximate=False)
        client.zadd(f"retry:{stream}", {"{}": 1})
        letter(store, "j")
        run(store, "pause", "audit", "--note", "disk full")
        silent = ["--metrics-url", "http://127.0.0.1:1"]
        client.config_set("maxmemory", 2**30)
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = findings(store, *silent, code=1)
            printed = run(store, "doctor", *silent, code=1)
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
        wrong = "\n".join(found["wrong"])
        for text in (
            "allkeys-lru", "no append-only file", "5 jobs or more were trimmed", "3 pending jobs are gone",
            "overdue", "no status",
        ):  # fmt: skip
            assert text in wrong, text
        assert any("1 dead letters" in line for line in found["note"])
        assert any("audit (disk full)" in line for line in found["note"])
        assert "→ CONFIG SET maxmemory-policy noeviction" in printed.stdout

    def test_a_store_that_is_not_there_is_a_finding(self) -> None:
        arguments = ["doctor", "--redis-url", "redis://:secret@127.0.0.1:1/0", "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert "secret" not in result.output
        assert "127.0.0.1:1" in result.output or "refused" in result.output

    def test_a_model_is_loaded_only_when_asked_for(self, store: RedisServer) -> None:
        found = findings(store, "--model", "dummy:8", code=1)
        assert any("dummy:8: 8 dimensions" in line for line in found["ok"])
        found = findings(store, "--model", "/nowhere", code=1)
        assert any(line.startswith("model: ") for line in found["wrong"])
        assert "model: " not in json.dumps(findings(store, code=1))
