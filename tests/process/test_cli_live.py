"""The verbs of ``jobworker`` beside a running service: pauses, running jobs, the live page."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobworker.worker.cli import main
from jobworker.worker.extension import extension
from support.operator import COMMAND, Terminal, findings, run, run_json
from support.redis_servers import running
from support.service import STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    toys = handlers("Noop", "Gate", "Flaky", "Permanent")
    options = {"retry_initial": 60, "retry_max": 600, "max_retries": 2, "instance": "blue"}
    with service(tmp_path_factory.mktemp("live"), toys, **options) as one:
        yield one


class TestBesideAService:
    def test_a_paused_type_waits_and_other_types_of_its_stream_continue(self, live: Service) -> None:
        run(live, "pause", "noop")
        eventually(lambda: live.metric("z_novel_paused", task_type="noop") == 1, 2.0)
        paused = live.enqueue_many([{"type": "noop"}] * 200)
        live.open_gate("open")
        live.wait_for_end(live.enqueue("gate", {"gate": "open"}))
        assert not [event for event in live.events("start") if event.id in paused]
        pid = live.kill_role("reader")
        live.wait_for_successor("reader", pid)
        live.wait_for_end(live.enqueue("gate", {"gate": "open"}))
        assert not [event for event in live.events("start") if event.id in paused], (
            "a new reader follows the pause too"
        )
        run(live, "resume", "noop")
        live.wait_until_drained()
        assert sorted(event.id for event in live.events("end") if event.id in paused) == sorted(paused)

    def test_the_status_page_names_the_running_jobs(self, live: Service) -> None:
        id = live.enqueue("gate", {"gate": "status"})
        live.wait_for_start(id)
        status = json.loads(live.get("/status")[1])
        busy = [child["running"] for child in status["children"] if child.get("running")]
        (job,) = busy[0]["jobs"]
        assert (len(busy), busy[0]["count"], job["stream"], job["type"]) == (1, 1, STREAM, "gate")
        assert (
            json.loads(live.client.xrange(STREAM, job["entry_id"], job["entry_id"])[0][1][b"data"])["id"]
            == id
        )
        assert 0 <= busy[0]["for_s"] < 60 < busy[0]["limit_in_s"]
        assert [child["role"] for child in status["children"]] == ["reader", "reaper", "worker", "worker"]
        assert all(child["rss_mib"] > 5 and child["pid"] in live.everyone() for child in status["children"])
        assert (status["ready"], status["instance"]) == (True, "blue")
        assert live.redis_url.rpartition("@")[2] in status["store"]
        assert "***" in status["store"], "the password is hidden"
        live.open_gate("status")
        live.wait_for_end(id)

        def idle() -> bool:
            children = json.loads(live.get("/status")[1])["children"]
            return not any(child.get("running") for child in children)

        eventually(idle)

        def restarts() -> list[int]:
            return [child["restarts"] for child in json.loads(live.get("/status")[1])["children"]]

        before = restarts()
        live.wait_for_successor("worker 0", live.kill_role("worker 0"))
        assert [now - then for now, then in zip(restarts(), before, strict=True)] == [0, 0, 1, 0]

    def test_explain_follows_a_job_through_its_states(self, live: Service) -> None:
        at = ["--metrics-url", live.url]
        run(live, "pause", "permanent")
        eventually(lambda: live.metric("z_novel_paused", task_type="permanent") == 1)
        gates = [live.enqueue("gate", {"gate": "explain"}) for _ in range(2)]
        for gate in gates:
            live.wait_for_start(gate)
        (found,) = run_json(live, "explain", gates[0], *at)["found"]
        assert (found["state"], found["type"], found["stream"]) == ("running", "gate", STREAM)
        assert found["facts"]["worker"].endswith(("blue/0", "blue/1"))
        assert "has run it for" in run(live, "explain", found["facts"]["entry_id"], *at).stdout
        waiting = live.enqueue("permanent")
        eventually(lambda: run_json(live, "explain", waiting, *at)["found"][0]["state"] == "pending")
        assert "paused" in run_json(live, "explain", waiting, *at)["found"][0]["why"]
        failing = live.enqueue("flaky", {"times": 9})
        live.open_gate("explain")
        eventually(lambda: run_json(live, "explain", failing, *at)["found"][0]["state"] == "retrying")
        (found,) = run_json(live, "explain", failing, *at)["found"]
        assert 60 < found["facts"]["due_in_s"] < 200
        assert found["facts"]["retry_count"] == 1
        assert found["facts"]["last_error"] == f"ConnectionError: try 0 of {failing}"
        assert [one["job_id"] for one in run_json(live, "retry", "list")["retries"]] == [failing]
        run(live, "retry", "now", "missing", code=1)
        assert run_json(live, "retry", "now", failing) == {"hastened": 1, "missing": [], "dry_run": False}
        live.wait_for_start(failing, 2)
        run(live, "resume", "permanent")
        live.dead_letter(waiting)
        (found,) = run_json(live, "explain", waiting, *at)["found"]
        assert (found["state"], found["facts"]["reason"]) == ("dead", "permanent")
        shown = run(live, "explain", waiting, *at).stdout
        assert f"dlq requeue {found['facts']['letter']}" in shown
        assert 'raise PermanentError("no such chapter")' in shown
        run(live, "retry", "now", "--all")
        live.wait_for_start(failing, 3)
        live.dead_letter(failing)


class TestPause:
    def test_a_type_that_no_service_runs_is_named(self, live: Service) -> None:
        refused = run(live, "pause", "noop", "nop", "--metrics-url", live.url, code=2)
        assert "flaky, gate, noop, permanent" in refused.stderr
        assert "--force" in refused.stderr
        assert run_json(live, "pause")["paused"] == [], "the right one is not paused either"
        result = run(live, "pause", "nop", "--force", "--metrics-url", live.url)
        assert "noop" in result.stderr
        answer = run_json(live, "pause", "noop", "--metrics-url", live.url)
        assert (answer["unknown"], answer["waiting"]) == ([], [])
        (consumer,) = answer["following"]
        assert consumer.endswith("/blue")
        assert live.metric("z_novel_paused", task_type="noop") == 1, "it is in effect when the command ends"
        run(live, "resume", "nop", "noop")
        assert "within 1 s" in run(live, "pause", "noop").stderr, "services on other hosts"
        run(live, "resume", "noop")


class TestEnqueue:
    def test_a_misspelt_type_and_stream_are_named_and_the_job_is_sent(self, live: Service) -> None:
        done = run(live, "enqueue", "shoot", "--stream", "stream:audit:lgo", "--id", "lost")
        assert (done.exit_code, done.stdout) == (0, "lost\n")
        assert "no service of this deployment runs the type 'shoot': " in done.stderr
        assert "'stream:audit:lgo': did you mean 'stream:audit:log'?" in done.stderr
        try:
            why = run(live, "explain", "lost").stdout
            assert "no service reads this stream: did you mean 'stream:audit:log'?" in why
            wrong = findings(live, "--metrics-url", live.url, code=1)["wrong"]
            assert wrong == [
                "stream:audit:lgo: no running service reads this stream; 1 jobs wait",
                "stream:audit:lgo: 1 waiting jobs have the type 'shoot', which no running service handles",
            ]
        finally:
            live.client.delete("stream:audit:lgo")

    def test_a_delayed_job_of_a_misspelt_type_is_found_before_it_is_due(self, live: Service) -> None:
        live.client.zadd("retry:stream:story:gen", {'{"id": "later", "type": "nop"}': 4e9})
        try:
            assert "no service handles type nop: did you mean 'noop'?" in run(live, "explain", "later").stdout
            (wrong,) = findings(live, "--metrics-url", live.url, code=1)["wrong"]
            assert "have the type 'nop'" in wrong
        finally:
            live.client.delete("retry:stream:story:gen")

    def test_streams_and_keys_of_other_programs_are_no_problem(self, live: Service) -> None:
        client = live.client
        client.xadd("theirs", {"text": "no job"})
        client.xadd("read", {"data": '{"id": "1", "type": "x"}'})
        client.xgroup_create("read", "their-group", id="0")
        client.xreadgroup("their-group", "reader", {"read": ">"})
        client.xack("read", "their-group", *[id for id, _ in client.xrange("read")])
        client.zadd("retry:plain", {"no job": 1})
        client.set("plain", "text")
        client.xadd(b"\xff", {"data": "x"})
        try:
            assert findings(live, "--metrics-url", live.url, code=0)["wrong"] == []
            assert "was not found" in run(live, "explain", "nowhere", code=1).stdout
        finally:
            client.delete("theirs", "read", "retry:plain", "plain", b"\xff")


class TestStreamOption:
    @pytest.mark.parametrize("verb", [["dlq", "list"], ["retry", "list"]], ids=" ".join)
    def test_a_misspelt_stream_is_noted_beside_the_empty_answer(self, live: Service, verb: list[str]) -> None:
        told = run(live, *verb, "--stream", "stream:audit:lgo").stderr
        assert "there is no stream 'stream:audit:lgo': did you mean 'stream:audit:log'?" in told
        assert "no service" not in run(live, *verb, "--stream", "stream:audit:log").stderr


class TestDoctor:
    def test_a_healthy_service_has_no_wrong_finding(self, live: Service) -> None:
        found = findings(live, "--metrics-url", live.url, code=0)
        assert any("ready, 2 workers" in line for line in found["ok"])
        assert any("appendfsync everysec" in line for line in found["note"])


class TestTop:
    def test_one_snapshot_shows_what_every_worker_runs(self, live: Service) -> None:
        id = live.enqueue("gate", {"gate": "top"})
        live.wait_for_start(id)
        snapshot = run_json(live, "top", "--metrics-url", live.url)
        running = [
            child["running"]["jobs"][0]["type"]
            for child in snapshot["services"][0]["children"]
            if child.get("running")
        ]
        assert running == ["gate"]
        assert snapshot["rates"]["noop"] == {"done": 0, "failed": 0, "retried": 0, "dead": 0}
        assert f"gate {id}" in run(live, "top", "--once", "--metrics-url", live.url).stdout
        live.open_gate("top")
        live.wait_for_end(id)

    def test_it_refreshes_on_a_terminal_and_q_quits(self, live: Service) -> None:
        with Terminal([str(COMMAND), "top", "--interval", "0.2"], live) as terminal:
            terminal.wait_for("blue/1", "stream:story:gen", "q quit")
            id = live.enqueue("gate", {"gate": "tty"})
            terminal.wait_for(id)
            live.open_gate("tty")
            terminal.press("p")
            terminal.wait_for("FROZEN")
            terminal.press("p")
            terminal.press("\x1b[B")
            terminal.press("q")
            assert terminal.wait() == 0

    @pytest.mark.parametrize("kind", ["vt100", "xterm-newer-than-this-host"])
    def test_terminals_without_colours_and_unknown_ones(self, live: Service, kind: str) -> None:
        with Terminal([str(COMMAND), "top"], live, TERM=kind, LC_ALL="xx_XX.UTF-8") as terminal:
            terminal.wait_for("blue/1", "q quit")
            terminal.press("q")
            assert terminal.wait() == 0

    def test_it_survives_a_store_that_stops_answering(self, tmp_path: Path) -> None:
        command = [str(COMMAND), "top", "--interval", "0.2"]
        with running("valkey", tmp_path) as store, Terminal(command, store) as terminal:
            terminal.wait_for("stream:audit:log")
            os.kill(store.pid, signal.SIGSTOP)
            try:
                terminal.wait_for("did not answer")
                terminal.press("q")
                assert terminal.wait() == 0
            finally:
                os.kill(store.pid, signal.SIGCONT)


class TestStats:
    def test_streams_workers_and_rates(self, live: Service) -> None:
        snapshot = run_json(live, "stats", "--metrics-url", live.url)
        assert [row["stream"] for row in snapshot["streams"]] == [
            source.stream for source in extension().streams
        ]
        assert snapshot["rates"] is None
        printed = run(live, "stats", "--watch", "0.2", "--metrics-url", live.url).stdout
        assert "2 workers: 2 idle" in printed
        assert "DONE/s" in printed

    def test_a_store_that_does_not_answer_is_exit_code_5(self) -> None:
        assert CliRunner().invoke(main, ["stats", "--redis-url", "redis://127.0.0.1:1/0"]).exit_code == 5
