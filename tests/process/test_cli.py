"""The verbs of ``jobworker`` on a real store, without a service."""

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
from jobworker.worker.cron.table import CronTable, digest, encode_table
from jobworker.worker.store.cron import StoredTable
from jobworker.worker.store.redis.operator import OperatorStore
from support.operator import COMMAND, COMMAND_S, Terminal, findings, run, run_json
from support.redis_servers import RedisServer
from support.service import STREAM, eventually

pytestmark = pytest.mark.process

DLQ = f"dlq:{STREAM}"


def delay(store: RedisServer, id: str, kind: str, stream: str, due_s: float = 4e9) -> None:
    """Put a delayed job where a service moves it."""
    store.client.zadd(f"retry:{stream}", {json.dumps({"id": id, "type": kind}): due_s})


def letter(store: RedisServer, id: str, reason: str = "exhausted", **more: Any) -> str:
    """Write a dead letter as the service does; its id."""
    tenant = more.pop("tenant", "t1")
    task = {"id": id, "type": "audit", "tenant_id": tenant, "retry_count": 3, "payload": [id]}
    fields = {
        "task": task, "error": "ValueError: no such chapter", "reason": reason, "original_id": "77-0",
        "retry_count": 3, "deaths": 0, "worker": "h/i/0", "failed_at": "2026-01-02T10:00:00Z", **more,
    }  # fmt: skip
    return str(store.client.xadd(DLQ, {"data": json.dumps(fields)}).decode())


def jobs(store: RedisServer, stream: str = STREAM) -> list[Any]:
    return [json.loads(fields[b"data"]) for _, fields in store.client.xrange(stream)]


class TestWeights:
    def test_weights_are_set_and_cleared_and_limits_stay(self, store: RedisServer) -> None:
        store.client.xgroup_create(STREAM, "cg-test", mkstream=True)
        run_json(store, "limit", "set", "audit", "--concurrency", "2")
        run_json(store, "weight", "set", "t1", "3")
        run_json(store, "weight", "set", "t2", "0.5")
        assert run_json(store, "weight", "list")["streams"][STREAM] == {"t1": 3.0, "t2": 0.5}
        assert "t1" in run(store, "weight", "list").stdout
        run(store, "weight", "set", "t1", "0", code=2)
        assert run_json(store, "weight", "clear", "t1")["cleared"] == {"t1": True}
        run(store, "weight", "clear", "t1", code=1)
        listed = run_json(store, "limit", "list")["streams"][STREAM]
        assert listed["weights"] == {"t2": 0.5}
        assert listed["now"] == [{"name": "audit/global", "running": 0, "waiting": 0, "keys": {}}]


class TestDeadLetters:
    def test_nothing_is_older_than_the_clock(self, store: RedisServer) -> None:
        letter(store, "j1")
        for age in ("999999999w", "1e300"):
            assert run_json(store, "dlq", "list", "--older-than", age)["dead_letters"] == []
            assert len(run_json(store, "dlq", "list", "--newer-than", age)["dead_letters"]) == 1

    def test_they_are_listed_newest_first_and_filtered(self, store: RedisServer) -> None:
        for number in range(5):
            letter(store, f"j{number}", "poison" if number % 2 else "timeout", tenant=f"t{number}")
        found = run_json(store, "dlq", "list")
        assert [one["job_id"] for one in found["dead_letters"]] == ["j4", "j3", "j2", "j1", "j0"]
        assert not found["more"]
        found = run_json(store, "dlq", "list", "--reason", "poison", "--limit", "1")
        assert ([one["job_id"] for one in found["dead_letters"]], found["more"]) == (["j3"], True)
        assert len(run_json(store, "dlq", "list", "--newer-than", "1h")["dead_letters"]) == 5
        assert run_json(store, "dlq", "list", "--older-than", "1h")["dead_letters"] == []
        assert len(run_json(store, "dlq", "list", "--tenant", "t1", "--tenant", "t2")["dead_letters"]) == 2
        assert "ValueError: no such chapter" in run(store, "dlq", "list", "j3").stdout

    def test_a_payload_is_shown_only_on_request(self, store: RedisServer) -> None:
        id = letter(store, "j", payload_marker="x")
        assert "task" not in run_json(store, "dlq", "show", id)["dead_letters"][0]
        assert run_json(store, "dlq", "show", "j", "--payload")["dead_letters"][0]["task"]["payload"] == ["j"]
        assert '"payload"' not in run(store, "dlq", "show", id).stdout
        assert '"payload"' in run(store, "dlq", "show", "77-0", "--payload").stdout
        run(store, "dlq", "show", "missing", code=1)

    def test_control_characters_of_a_tenant_do_not_reach_the_terminal(self, store: RedisServer) -> None:
        letter(store, "j\x1b[2J", tenant="\x9b31m", error="\x1b]0;gotcha\x07")
        for arguments in (["dlq", "list"], ["dlq", "show", "77-0", "--payload"]):
            printed = run(store, *arguments).stdout
            assert not {"\x1b", "\x9b", "\x07"} & set(printed), arguments

    def test_requeued_jobs_keep_their_payload_and_lose_their_counters(self, store: RedisServer) -> None:
        letter(store, "j1", "timeout")
        kept = letter(store, "j2", "poison")
        assert run_json(store, "dlq", "requeue", "--reason", "timeout", "--dry-run")["requeued"] == 1
        assert jobs(store) == []
        assert run_json(store, "dlq", "requeue", "--reason", "timeout")["requeued"] == 1
        assert jobs(store) == [{"id": "j1", "type": "audit", "tenant_id": "t1", "payload": ["j1"]}]
        assert [id.decode() for id, _ in store.client.xrange(DLQ)] == [kept]

    def test_without_a_filter_all_must_be_given(self, store: RedisServer) -> None:
        letter(store, "j")
        assert "--all" in run(store, "dlq", "requeue", code=2).stderr
        assert "--all" in run(store, "dlq", "purge", "--yes", code=2).stderr
        assert "--yes" in run(store, "dlq", "purge", "--all", code=2).stderr
        assert store.client.xlen(DLQ) == 1
        assert run_json(store, "dlq", "purge", "--all", "--yes") == {
            "purged": 1, "gone": 0, "skipped": 0, "missing": [], "dry_run": False, "refused": [],
        }  # fmt: skip
        assert store.client.xlen(DLQ) == 0

    def test_a_letter_without_a_job_is_skipped_and_named(self, store: RedisServer) -> None:
        id = store.client.xadd(
            DLQ, {"data": json.dumps({"task": None, "reason": "malformed", "raw": "Pw=="})}
        )
        result = run(store, "dlq", "requeue", id.decode(), code=1)
        assert id.decode() in result.stderr
        assert store.client.xlen(DLQ) == 1
        assert run_json(store, "dlq", "requeue", "--all", "--dry-run")["skipped"] == 1
        assert "?" in run(store, "dlq", "show", id.decode(), "--payload").stdout

    def test_a_missing_id_is_named_and_the_others_are_processed(self, store: RedisServer) -> None:
        letter(store, "j1")
        letter(store, "j2")
        result = run(store, "dlq", "requeue", "j1", "missing", code=1)
        assert "not found: missing" in result.stderr
        assert [job["id"] for job in jobs(store)] == ["j1"]
        answer = run_json(store, "dlq", "purge", "--yes", "j2", "missing", code=1)
        assert (answer["purged"], answer["missing"]) == (1, ["missing"])
        delay(store, "later", "audit", "stream:audit:log")
        answer = run_json(store, "retry", "now", "later", "missing", code=1)
        assert (answer["hastened"], answer["missing"]) == (1, ["missing"])

    def test_a_purge_asks_with_the_number_of_letters(self, store: RedisServer) -> None:
        for number in range(3):
            letter(store, f"j{number}", "poison" if number else "timeout")
        with Terminal([str(COMMAND), "dlq", "purge", "--reason", "poison"], store) as terminal:
            terminal.wait_for("Delete 2 dead letters permanently?")
            assert store.client.xlen(DLQ) == 3
            terminal.press("y\n")
            assert terminal.wait() == 0
        assert store.client.xlen(DLQ) == 1

    def test_an_unknown_reason_is_refused(self, store: RedisServer) -> None:
        assert "'poison'" in run(store, "dlq", "list", "--reason", "poisn", code=2).stderr

    def test_the_rate_is_not_exceeded(self, store: RedisServer) -> None:
        for number in range(20):
            letter(store, f"j{number}")
        began = time.monotonic()
        assert run_json(store, "dlq", "requeue", "--all", "--rate", "40")["requeued"] == 20
        assert time.monotonic() - began >= 19 / 40 - 4 / 40, "20 at 40 a second in batches of 4"

    def test_a_killed_requeue_neither_loses_nor_duplicates_a_job(self, store: RedisServer) -> None:
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
        assert 0 < store.client.xlen(DLQ) < 400, "it was killed before its end"
        run(store, "dlq", "requeue", "--all")
        assert sorted(job["id"] for job in jobs(store)) == sorted(f"j{number}" for number in range(400))

    def test_an_interrupted_requeue_reports_how_many_it_sent(self, store: RedisServer) -> None:
        for number in range(100):
            letter(store, f"j{number}")
        arguments = [str(COMMAND), "dlq", "requeue", "--all", "--rate", "50"]
        environment = {**os.environ, "JOBWORKER_REDIS_URL": store.url}
        one = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: store.client.xlen(STREAM) >= 10)
        one.send_signal(signal.SIGINT)
        _, stderr = one.communicate(timeout=COMMAND_S)
        assert one.returncode == 1
        assert b"stopped: %d were requeued" % store.client.xlen(STREAM) in stderr


class TestEnqueue:
    def test_lines_become_jobs_in_order(self, store: RedisServer, tmp_path: Path) -> None:
        file = tmp_path / "jobs.jsonl"
        file.write_text("".join(f'{{"payload": {n}, "id": "j{n}"}}\n' for n in range(2500)) + "\n")
        assert len(run_json(store, "enqueue", "audit", "--lines", str(file), "--tenant", "t")["ids"]) == 2500
        found = jobs(store, "stream:audit:log")
        assert [job["payload"] for job in found] == list(range(2500))
        assert {job["tenant_id"] for job in found} == {"t"}

    def test_an_invalid_line_is_named_and_the_lines_before_it_were_sent(self, store: RedisServer) -> None:
        good = '{"type": "audit", "payload": {}}\n'
        for bad in (
            '{"type": 5}',
            "no json",
            "[]",
            '{"kind": "x"}',
            '{"payload": 1}',
            '{"type":"a","tenant_id":"/"}',
        ):
            store.client.xtrim("stream:audit:log", maxlen=0)
            result = run(store, "enqueue", "--lines", "-", code=2, stdin=good + good + bad + "\n" + good)
            assert result.stderr.startswith("jobworker: line 3: "), bad
            assert store.client.xlen("stream:audit:log") == 2, bad

    def test_a_stop_says_which_lines_are_stored_and_how_to_send_the_others(
        self, store: RedisServer, tmp_path: Path
    ) -> None:
        file = tmp_path / "my jobs.jsonl"
        file.write_text('{"id": "a"}\n{"id": "b"}\nno json\n{"id": "c"}\n')
        result = run(store, "enqueue", "audit", "--lines", str(file), "--tenant", "t", code=2)
        assert "lines 1 to 2 are stored; send the others: " in result.stderr
        file.write_text(file.read_text().replace("no json", '{"id": "x"}'))
        command = result.stderr.partition("send the others: ")[2].strip()
        path = f"{COMMAND.parent}:{os.environ['PATH']}"
        environment = {**os.environ, "JOBWORKER_REDIS_URL": store.url, "PATH": path}
        subprocess.run(command, shell=True, check=True, env=environment, timeout=COMMAND_S)
        assert [job["id"] for job in jobs(store, "stream:audit:log")] == ["a", "b", "x", "c"]
        assert {job["tenant_id"] for job in jobs(store, "stream:audit:log")} == {"t"}

    def test_a_store_that_fails_in_between_says_what_is_known(
        self, store: RedisServer, tmp_path: Path
    ) -> None:
        file = tmp_path / "jobs.jsonl"
        file.write_text("{}\n" * 1500)
        store.client.delete("stream:audit:log")
        store.client.set("stream:audit:log", "not a stream")
        result = run(store, "enqueue", "audit", "--lines", str(file), code=5)
        assert "no line before is stored; send the others: tail -n +1 " in result.stderr
        assert "some of the lines 1 to 1000 may be stored too" in result.stderr

    def test_delayed_lines_are_scheduled(self, store: RedisServer) -> None:
        run(store, "enqueue", "audit", "--lines", "-", "--delay", "60", stdin="{}\n{}\n")
        assert all("not_before" in job["metadata"] for job in jobs(store, "stream:audit:log"))
        assert len(jobs(store, "stream:audit:log")) == 2

    def test_the_error_names_the_missing_argument(self, store: RedisServer) -> None:
        assert "TYPE" in run(store, "enqueue", code=2).stderr
        assert "--lines" in run(store, "enqueue", "--lines", "-", "--count", "2", code=2).stderr
        assert "none.json" in run(store, "enqueue", "audit", "--payload", "@none.json", code=2).stderr


class TestStats:
    def test_a_service_that_does_not_answer_is_reported(self, store: RedisServer) -> None:
        result = run(store, "stats", "--metrics-url", "http://127.0.0.1:1")
        assert "no service answers at http://127.0.0.1:1" in result.stderr
        assert "no service" not in result.stdout


class TestPauses:
    def test_they_are_listed_and_resumed(self, store: RedisServer) -> None:
        run(store, "pause", "audit", "embedding_batch", "--note", "disk is full")
        found = run_json(store, "pause")["paused"]
        assert [(one["type"], one["note"]) for one in found] == [
            ("audit", "disk is full"), ("embedding_batch", "disk is full"),
        ]  # fmt: skip
        assert "disk is full" in run(store, "pause").stdout
        assert run_json(store, "resume", "audit") == {"resumed": {"audit": True}}
        told = run(store, "resume", "audit", "nosuch", code=1).stderr
        assert "nosuch was not paused, so nothing changed; paused are: embedding_batch" in told
        assert [one["type"] for one in run_json(store, "pause")["paused"]] == ["embedding_batch"]


class TestExplainWithoutAService:
    def test_a_stream_without_reader_is_the_reason(self, store: RedisServer) -> None:
        ids = run_json(store, "enqueue", "audit", "--count", "5")["ids"]
        (found,) = run_json(store, "explain", ids[3])["found"]
        assert (found["state"], found["facts"]["ahead"]) == ("queued", 3)
        assert "no service reads" in found["why"]
        store.client.xgroup_destroy("stream:audit:log", "cg-archiver")
        assert "no group cg-archiver" in run_json(store, "explain", ids[3])["found"][0]["why"]

    def test_the_lease_of_a_lost_host_is_explained(self, store: RedisServer) -> None:
        (id,) = run_json(store, "enqueue", "audit")["ids"]
        store.client.xreadgroup("cg-archiver", "gone/1", {"stream:audit:log": ">"})
        (found,) = run_json(store, "explain", id)["found"]
        assert (found["state"], found["facts"]["consumer"]) == ("pending", "gone/1")
        entry = found["facts"]["entry_id"]
        store.client.xclaim("stream:audit:log", "cg-archiver", "gone/1", 0, [entry], idle=60_000)
        assert "the lease has expired" in run_json(store, "explain", entry)["found"][0]["why"]
        month_ms = 30 * 24 * 3600 * 1000
        store.client.xclaim("stream:audit:log", "cg-archiver", "gone/1", 0, [entry], idle=month_ms)
        assert "released it when it stopped" in run_json(store, "explain", entry)["found"][0]["why"]
        store.client.xack("stream:audit:log", "cg-archiver", entry)
        assert run_json(store, "explain", entry)["found"][0]["state"] == "finished"

    def test_an_overdue_retry_is_reported(self, store: RedisServer) -> None:
        delay(store, "late", "audit", "stream:audit:log", due_s=1.0)
        assert "overdue" in run_json(store, "explain", "late")["found"][0]["why"]

    def test_the_progress_of_a_rebuild_is_given(self, store: RedisServer) -> None:
        stream, group = "stream:story:gen", "cg-gen-worker"
        payload = '{"collection": "c"}'
        ids = run_json(store, "enqueue", "index_rebuild", "--payload", payload, "--count", "2")["ids"]
        store.client.xreadgroup(group, "gone/1", {stream: ">"})
        rebuilds = open_rebuilds(store.url)
        lock = rebuilds.begin("z_novel_c", f"{stream}/1-1", 60_000)
        assert not isinstance(lock, str)
        progress = {"phase": "fill", "job": ids[0], "copied": "300", "total": "1200"}
        rebuilds.save("z_novel_c", lock.epoch, progress, lease_ms=60_000)
        (found,) = run_json(store, "explain", ids[0])["found"]
        assert "z_novel_c: fill, 300 of 1200 rows (25 %)" in found["why"]
        names = ("rebuilds", "phase", "rows_copied", "rows")
        assert [found["facts"][name] for name in names] == ["z_novel_c", "fill", 300, 1200]
        (other,) = run_json(store, "explain", ids[1])["found"]
        assert "rebuilds" not in other["facts"]
        rebuilds.save("z_novel_c", lock.epoch, {"phase": "done"}, lease_ms=0)
        rebuilds.close()
        assert "rebuilds" not in run_json(store, "explain", ids[0])["found"][0]["facts"]

    def test_a_search_cut_by_the_scan_limit_says_so(self, store: RedisServer) -> None:
        run_json(store, "enqueue", "audit", "--count", "50")
        answer = run_json(store, "explain", "missing", code=1)
        assert (answer["found"], answer["complete"]) == ([], True)
        answer = run_json(store, "explain", "missing", "--scan", "10", code=1)
        assert (answer["complete"], answer["given_up"]) == (False, ["stream:audit:log"])
        assert "--scan" in run(store, "explain", "missing", "--scan", "10", code=1).stdout

    def test_a_requeued_job_is_found_in_both_places(self, store: RedisServer) -> None:
        letter(store, "twice")
        run(store, "enqueue", "audit", "--id", "twice", "--stream", STREAM)
        assert sorted(one["state"] for one in run_json(store, "explain", "twice")["found"]) == [
            "dead",
            "queued",
        ]

    def test_ids_with_escapes_in_json_are_found(self, store: RedisServer) -> None:
        store.client.xadd(STREAM, {"data": '{"id": "\\u957f/\\u7bc7", "type": "audit"}'})
        assert run_json(store, "explain", "长/篇")["found"][0]["state"] == "queued"


class TestDoctor:
    def test_a_broken_key_hides_nothing_else(self, store: RedisServer) -> None:
        client, silent = store.client, ["--metrics-url", "http://127.0.0.1:1"]
        client.xadd(STREAM, {"data": "{}"})
        broken = ("stream:memory:update", "retry:stream:audit:log", "jobworker:paused")
        for key in broken:
            client.delete(key)
            client.set(key, "a string")
        try:
            found = findings(store, *silent, code=1)
            printed = run(store, "doctor", *silent, code=1)
            stats = run(store, "stats", *silent)
            enqueue = run(store, "enqueue", "noop", "--stream", broken[0], code=5)
        finally:
            client.delete(*broken)
        for key in broken:
            assert any(f"key {key} is a string" in line for line in found["wrong"])
            assert f"→ RENAME {key} {key}:damaged" in printed.stdout
        assert "jobworker doctor names the key" in enqueue.stderr
        assert STREAM in stats.stdout
        assert "stream:audit:log" in stats.stdout
        assert "stream stream:memory:update: key stream:memory:update is a string" in stats.stderr

    def test_each_problem_is_named_with_its_remedy(self, store: RedisServer) -> None:
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

    def test_a_store_that_does_not_answer_is_a_finding(self) -> None:
        arguments = ["doctor", "--redis-url", "redis://:secret@127.0.0.1:1/0", "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert "secret" not in result.output
        assert "127.0.0.1:1" in result.output or "refused" in result.output

    def test_a_model_is_loaded_only_on_request(self, store: RedisServer) -> None:
        found = findings(store, "--model", "dummy:8", code=1)
        assert any("dummy:8: 8 dimensions" in line for line in found["ok"])
        found = findings(store, "--model", "/nowhere", code=1)
        assert any(line.startswith("model: ") for line in found["wrong"])
        assert "model: " not in json.dumps(findings(store, code=1))


class TestBrokenKeys:
    """A key of another type hides its own stream only."""

    @pytest.fixture
    def broken(self, store: RedisServer) -> RedisServer:
        letter(store, "j1")
        delay(store, "later", "embedding_batch", "stream:story:gen")
        for key in ("dlq:stream:audit:log", "retry:stream:audit:log", "stream:memory:update"):
            store.client.set(key, "no stream")
        return store

    @pytest.mark.parametrize("verb", [["list"], ["show", "j1"]], ids=" ".join)
    def test_dead_letters_of_the_others_are_shown(self, broken: RedisServer, verb: list[str]) -> None:
        answer = run_json(broken, "dlq", *verb, code=1)
        assert [one["job_id"] for one in answer["dead_letters"]] == ["j1"]
        (refused,) = answer["refused"]
        assert refused.startswith("dead letters of stream:audit:log: ")
        told = run(broken, "dlq", *verb, code=1)
        assert "j1" in told.stdout
        assert "key dlq:stream:audit:log is a string, not a stream" in told.stderr
        assert "repair it by RENAME dlq:stream:audit:log dlq:stream:audit:log:damaged" in told.stderr

    def test_bulk_operations_process_the_others(self, broken: RedisServer) -> None:
        answer = run_json(broken, "dlq", "requeue", "--all", code=1)
        assert (answer["requeued"], len(answer["refused"])) == (1, 1)
        letter(broken, "j2")
        assert run_json(broken, "dlq", "purge", "--all", "--yes", code=1)["purged"] == 1

    def test_retries_of_the_others_are_shown_and_made_due(self, broken: RedisServer) -> None:
        answer = run_json(broken, "retry", "list", code=1)
        assert [one["job_id"] for one in answer["retries"]] == ["later"]
        assert answer["refused"][0].startswith("retries of stream:audit:log: ")
        assert run_json(broken, "retry", "now", "--all", code=1)["hastened"] == 1

    def test_a_job_in_another_stream_is_found(self, broken: RedisServer) -> None:
        answer = run_json(broken, "explain", "j1", code=1)
        assert [one["state"] for one in answer["found"]] == ["dead"]
        assert (answer["complete"], len(answer["refused"])) == (False, 3)
        told = run(broken, "explain", "nowhere", code=1)
        assert told.stderr.count("repair it by RENAME") == 3

    def test_cron_tables_of_the_others_are_listed_and_paused(self, broken: RedisServer) -> None:
        store = OperatorStore(broken.url)
        table = CronTable("nightly", "0 3 * * *", "audit", STREAM)
        stored = StoredTable(table.name, table.rule, encode_table(table))
        store.cron_publish(STREAM, "host/a", digest([table]), [stored])
        store.close()
        broken.client.set("cron:stream:audit:log", "no hash")
        answer = run_json(broken, "cron", "list", code=1)
        assert [one["name"] for one in answer["cron"]] == ["nightly"]
        (refused,) = answer["refused"]
        assert "RENAME cron:stream:audit:log cron:stream:audit:log:damaged" in refused
        told = run(broken, "cron", "list", code=1)
        assert ("nightly" in told.stdout, "RENAME cron:" in told.stderr) == (True, True)
        assert run_json(broken, "cron", "pause", "nightly")["paused"] == ["nightly"]
        assert run_json(broken, "cron", "resume", "nightly", code=1)["resumed"] == {"nightly": True}
        assert "RENAME cron:" in run(broken, "cron", "run", "other", code=2).stderr
