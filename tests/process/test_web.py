"""``jobworker web`` over HTTP: its pages, its access control and its actions."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from jobworker.worker.cron.table import CronTable, digest, encode_table
from jobworker.worker.flow import FlowConfig, Lane, Limit
from jobworker.worker.http.server import MAX_CONNECTIONS
from jobworker.worker.keys import SERVICES_KEY, Source
from jobworker.worker.shards import shard_names
from jobworker.worker.store.cron import StoredTable
from jobworker.worker.store.ports import WaitingJob
from jobworker.worker.store.redis.operator import OperatorStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.operator import COMMAND_S, run
from support.redis_servers import RedisServer
from support.service import GROUP, STREAM, eventually
from support.web import TOKEN, Page, page, start

pytestmark = pytest.mark.process

DLQ = f"dlq:{STREAM}"
AUDIT = "stream:audit:log"


@pytest.fixture(scope="module")
def open_page(server: RedisServer) -> Iterator[Page]:
    """Without a token: read-only."""
    with page(server) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(server: RedisServer) -> Iterator[Page]:
    """With a token, actions allowed, payloads shown; the visitor is logged in."""
    with page(server, "--allow-actions", "--show-payloads", token=TOKEN) as one:
        assert one.log_in().status == 303
        yield one


def test_an_unfinished_request_is_closed_and_does_not_block_others(open_page: Page) -> None:
    address = urlsplit(open_page.url)
    host, port = str(address.hostname), int(str(address.port))
    heads = [
        b"",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\na",
    ]
    with contextlib.ExitStack() as opened:
        slow = []
        for head in heads:
            peer = opened.enter_context(socket.create_connection((host, port), COMMAND_S))
            peer.sendall(head)
            slow.append(peer)
        assert open_page.get("/healthz").status == 200
        for peer in slow:
            with contextlib.suppress(ConnectionResetError):
                while peer.recv(4096):
                    pass


def test_connections_beyond_the_limit_are_closed(server: RedisServer) -> None:
    with page(server) as one, contextlib.ExitStack() as opened:
        address = urlsplit(one.url)
        host, port = str(address.hostname), int(str(address.port))
        peers = [
            opened.enter_context(socket.create_connection((host, port), COMMAND_S))
            for _ in range(MAX_CONNECTIONS + 1)
        ]
        with contextlib.suppress(ConnectionResetError):
            assert peers[0].recv(1) == b""


def test_term_ends_the_page_while_a_service_does_not_answer(server: RedisServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        more = [word for _ in range(8) for word in ("--metrics-url", url)]
        with page(server, *more) as one:
            address = urlsplit(one.url)
            with socket.create_connection((str(address.hostname), int(str(address.port)))) as peer:
                peer.sendall(b"GET /job?id=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
                silent.accept()[0].close()
                one.popen.terminate()
                assert one.popen.wait(10) == 0


def letter(store: RedisServer, id: str, reason: str = "exhausted", dlq: str = DLQ, **more: Any) -> str:
    """Write a dead letter as the service does; its cursor as the page writes it."""
    task = {"id": id, "type": more.pop("type", "audit"), "tenant_id": more.pop("tenant", "t1"),
            "retry_count": 3, "payload": {"text": f"a tenant's words in {id}"}}  # fmt: skip
    entry = more.pop("entry", "*")
    fields = {"task": task, "error": "ValueError: no such chapter", "reason": reason, "original_id": "77-0",
              "retry_count": 3, "deaths": 0, "worker": "h/i/0", "failed_at": "2026-01-02T10:00:00Z",
              **more}  # fmt: skip
    id_of_letter = store.client.xadd(dlq, {"data": json.dumps(fields)}, id=entry).decode()
    return f"{dlq.removeprefix('dlq:')} {id_of_letter}"


def listed(body: str) -> list[str]:
    """Ids of the jobs on a page, from top to bottom."""
    return re.findall(r'<a class="id" href="/job\?id=([^"]+)"', body)


def finish(one: Page, address: str) -> str:
    """Wait for the end of a task; its page."""
    eventually(lambda: re.search("note (good|bad)", one.get(address).body), COMMAND_S)
    return one.get(address).body


class TestPages:
    @pytest.mark.parametrize("path", ["/", "/queues", "/workers", "/retries", "/dead", "/job", "/job?id=x"])
    def test_every_page_has_security_headers_and_no_inline_script(
        self, open_page: Page, store: RedisServer, path: str
    ) -> None:
        letter(store, "j")
        answer = open_page.get(path)
        assert answer.status == (404 if path == "/job?id=x" else 200)
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=|<style", answer.body)
        assert not re.search(r'(src|href)="(https?:)?//', answer.body), "nothing is loaded from another host"

    def test_all_files_are_served_by_the_page_itself(self, open_page: Page, store: RedisServer) -> None:
        for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', open_page.get("/").body):
            assert open_page.get(path).status == 200, path
        assert open_page.get("/static/vendor/uPlot.LICENSE").status == 200
        assert open_page.get("/static/../access.py").status == 404

    def test_the_overview_counts_waiting_jobs(self, open_page: Page, store: RedisServer) -> None:
        for number in range(3):
            store.client.xadd(STREAM, {"data": json.dumps({"id": f"q{number}", "type": "audit"})})
        letter(store, "j9")

        def shown() -> bool:
            body = open_page.get("/").body
            return bool(re.search(r"Queued</span><strong>3<", body)) and "j9" in listed(body)

        eventually(shown)
        assert open_page.get("/healthz").body == "ok\n"

    def test_sorted_jobs_and_limits_are_shown(self, open_page: Page, store: RedisServer) -> None:
        operator, reader = OperatorStore(store.url), RedisReaderStore(store.url, "host/blue")
        source = Source(STREAM, GROUP)
        reader.acquire([source])
        limit = Limit("audit/tenant", "audit", "tenant", concurrency=1)
        assert operator.configure(STREAM, FlowConfig(limits=(limit,)))
        for _ in range(3):
            store.client.xadd(STREAM, {"data": json.dumps({"type": "audit", "tenant_id": "<b>"})})
        reader.begin_read(source, 10, 0)
        jobs = [WaitingJob(entry.id, 10) for entry in reader.finish_read(source)]
        reader.sort(source, 1, {Lane("audit", 7, "<b>", ("audit/tenant=<b>",)).encode(): jobs})
        assert len(reader.take(source, ["audit"], 10).entries) == 1
        for one in (operator, reader):
            one.close()

        def body() -> str:
            text = open_page.get("/queues").body
            return text if "<h2>Limits</h2>" in text else ""

        shown = eventually(body)
        assert "2 of priority 7" in shown
        assert re.search(r'<code>&lt;b&gt;</code></td><td class="n" data-label="Waiting">2<', shown)
        assert re.search(r'data-label="Running">1</td><td class="n" data-label="Waiting">2<', shown)

    def test_cron_tables_are_shown_with_their_next_tick(self, open_page: Page, store: RedisServer) -> None:
        tables = [
            CronTable(name, "@hourly", "audit", STREAM, timezone="Europe/Berlin") for name in ("on", "off")
        ]
        stored = [StoredTable(table.name, table.rule, encode_table(table)) for table in tables]
        cron = OperatorStore(store.url)
        cron.cron_publish(STREAM, "host/blue", digest(tables), stored)
        cron.cron_pause(STREAM, "off", "<b>import</b>")
        cron.close()

        def body() -> str:
            text = open_page.get("/queues").body
            return text if "<h2>Cron</h2>" in text else ""

        shown = eventually(body)
        assert "<code>@hourly</code> Europe/Berlin" in shown
        assert re.search(r'data-label="Next in">\d+ (s|min)<', shown)
        assert "&lt;b&gt;import&lt;/b&gt;" in shown

    def test_the_history_sends_only_new_samples(self, open_page: Page, store: RedisServer) -> None:
        def history(after: int) -> Any:
            return json.loads(open_page.get(f"/history.json?after={after}").body)

        eventually(lambda: history(0)["last"] >= 3)
        whole = history(0)
        assert whole["whole"]
        assert {len(whole[name]) for name in ("wall_s", "queued", "done", "dead")} == {whole["last"]}
        assert whole["done"][-1] is None, "no service answers with a rate"
        eventually(lambda: history(0)["last"] > whole["last"])
        fresh = history(whole["last"])
        assert not fresh["whole"]
        assert len(fresh["wall_s"]) == fresh["last"] - whole["last"]
        assert history(10**9)["whole"], "a number from before a restart gets all samples"

    def test_dead_letters_are_paged_each_once_newest_first(self, open_page: Page, store: RedisServer) -> None:
        """Ids are unique within a stream only: two streams may have the same id at the border of a page."""
        sent = []
        for number in range(60):
            for dlq in (DLQ, f"dlq:{AUDIT}"):
                letter(store, f"{dlq[-3:]}{number}", dlq=dlq, entry=f"{1000 + number}-0")
                sent.append(f"{dlq[-3:]}{number}")
        found, path = [], "/dead"
        for _ in range(3):
            body = open_page.get(path).body
            found += listed(body)
            link = re.search(r'href="(/dead\?[^"]*after=[^"]+)"', body)
            path = link[1].replace("&amp;", "&") if link else ""
        assert path == ""
        assert len(found) == 120
        assert sorted(found) == sorted(sent)
        assert [id[3:] for id in found] == [str(n) for n in range(59, -1, -1) for _ in range(2)]

    def test_dead_letters_are_filtered(self, open_page: Page, store: RedisServer) -> None:
        letter(store, "a", "poison", tenant="t7", error="MemoryError: all of it")
        letter(store, "b", "timeout", type="embedding_batch")
        letter(store, "c", entry="1000-0", dlq=f"dlq:{AUDIT}")
        for query, ids in {
            "": ["b", "a", "c"], "reason=poison": ["a"], "type=embedding_batch": ["b"], "tenant=t7": ["a"],
            "error=Memory": ["a"], "newer=1h": ["b", "a"], "older=1h": ["c"], "newer=1h&tenant=t1": ["b"],
            f"stream={AUDIT}": ["c"], "reason=oversized": [],
        }.items():  # fmt: skip
            assert listed(open_page.get(f"/dead?{query}").body) == ids, query
        answer = open_page.get("/dead?newer=soon")
        assert (answer.status, "is not a duration" in answer.body) == (400, True)
        assert open_page.get("/dead?after=nonsense").status == 400
        assert open_page.get(f"/dead/letter?at={quote(STREAM)}+1-1").status == 404

    def test_a_letter_is_shown_without_its_payload_unless_allowed(
        self, open_page: Page, guarded: Page, store: RedisServer
    ) -> None:
        at = letter(store, "j", "poison", deaths=3, details={"stack": 'File "x.py"\n  line 2'})
        for path in (f"/dead/letter?at={quote(at)}", "/job?id=j"):
            body = open_page.get(path).body
            for text in (
                "ValueError: no such chapter",
                "poison",
                "h/i/0",
                "77-0",
                "File &#34;x.py&#34;\n  line 2",
            ):
                assert text in body, (path, text)
            assert "words in j" not in body
            assert "words in j" in guarded.get(path).body
        store.client.xadd(
            STREAM, {"data": json.dumps({"id": "q", "type": "audit", "payload": "secret text"})}
        )
        assert "secret text" not in open_page.get("/job?id=q").body
        assert "secret text" in guarded.get("/job?id=q").body

    def test_text_of_a_tenant_is_escaped_everywhere(self, guarded: Page, store: RedisServer) -> None:
        evil = "<script>alert(1)</script>\x1b\u202e\"'"
        at = letter(
            store, evil, evil, tenant=evil, type=evil, error=evil, worker=evil, details={"stack": evil}
        )
        store.client.hset("jobworker:paused", evil, json.dumps({"since": 1, "note": evil}))
        store.client.zadd(f"retry:{STREAM}", {json.dumps({"id": evil, "type": evil, "tenant_id": evil}): 1})
        paths = (
            "/",
            "/queues",
            "/retries",
            "/dead",
            f"/dead/letter?at={quote(at)}",
            f"/job?id={quote(evil)}",
        )
        eventually(lambda: "alert(1)" in guarded.get("/").body)
        for path in paths:
            body = guarded.get(path).body
            assert "alert(1)" in body, path
            assert not {"<script>alert", "\x1b", "\u202e"} & {
                part for part in ("<script>alert", "\x1b", "\u202e") if part in body
            }

    def test_a_job_is_explained(self, open_page: Page, store: RedisServer) -> None:
        for number in range(3):
            store.client.xadd(AUDIT, {"data": json.dumps({"id": f"q{number}", "type": "audit"})})
        body = open_page.get("/job?id=q2").body
        assert "no service reads this stream" in body
        assert "2 queued ahead of it" in body
        retry = json.dumps({"id": "r", "type": "audit", "retry_count": 2})
        store.client.zadd(f"retry:{AUDIT}", {retry: 4e9})
        assert "the next try is in" in open_page.get("/job?id=r").body
        assert listed(open_page.get("/retries").body) == ["r"]
        assert listed(open_page.get("/retries?type=none").body) == []
        answer = open_page.get("/job?id=missing")
        assert (answer.status, "Not found" in answer.body) == (404, True)

    def test_a_store_that_does_not_answer_is_reported_without_its_password(self) -> None:
        popen = start("redis://:secret@127.0.0.1:1/0", "--listen=127.0.0.1:0")
        assert popen.stdout is not None
        try:
            one = Page(popen.stdout.readline().split()[1], popen)
            for path, status in {"/": 200, "/dead": 503, "/queues": 503, "/healthz": 503}.items():
                answer = one.get(path)
                assert (answer.status, "does not answer" in answer.body) == (status, True), path
                assert "secret" not in answer.body
        finally:
            popen.kill()
            output = popen.communicate(timeout=COMMAND_S)
        assert "secret" not in output[0] + output[1]


class TestAccess:
    @pytest.mark.parametrize(
        ("options", "token", "message"),
        [
            (["--listen", "0.0.0.0:0"], "", "needs a token"),
            (["--listen", "[::]:0"], "", "needs a token"),
            (["--listen", "127.0.0.1:0", "--allow-actions"], "", "needs a token"),
            (["--listen", "127.0.0.1:0"], "short", "too short"),
            (["--listen", "127.0.0.1:0", "--token-file", "/nonexistent"], "", "cannot read the token"),
            (["--listen", "9465"], "", "--listen '9465': say HOST:PORT"),
            (["--listen", "127.0.0.1:0", "--stream", "nonsense"], "", "NAME=GROUP"),
        ],
    )
    def test_an_unprotected_address_is_refused(
        self, server: RedisServer, options: list[str], token: str, message: str
    ) -> None:
        popen = start(server.url, *options, token=token)
        _, stderr = popen.communicate(timeout=COMMAND_S)
        assert (popen.returncode, message in stderr) == (2, True), stderr

    def test_a_foreign_host_name_is_refused(self, open_page: Page) -> None:
        assert open_page.get("/", Host="evil.example:9465").status == 421
        assert open_page.get("/", Host="127.0.0.1.evil.example").status == 421
        assert open_page.get("/", Host="localhost:9465").status == 200

    def test_without_the_token_no_page_is_shown(self, guarded: Page, store: RedisServer) -> None:
        stranger = Page(guarded.url, guarded.popen)
        answer = stranger.get("/dead?reason=poison&type=a")
        assert answer.status == 303
        assert answer.headers["location"] == "/login?next=%2Fdead%3Freason%3Dpoison%26type%3Da"
        assert stranger.get("/history.json", Accept="*/*").status == 401
        assert stranger.get("/healthz").status == 200
        stranger.cookie = "jobworker_session=guess"
        assert stranger.get("/dead").status == 303
        assert stranger.log_in("a token that is not the right one").status == 403
        assert stranger.cookie == "jobworker_session=guess"

    def test_the_cookie_is_restricted_and_ends_with_the_session(self, guarded: Page) -> None:
        visitor = Page(guarded.url, guarded.popen)
        answer = visitor.post("/login", {"token": TOKEN, "next": "//evil.example/"})
        assert answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        visitor.log_in()
        assert visitor.get("/dead").status == 200
        assert visitor.act("/logout", {}).status == 303
        assert visitor.get("/dead").status == 303, "the session has ended, even with the old cookie"

    def test_the_token_is_in_no_command_line_and_no_log(self, server: RedisServer) -> None:
        with page(server, token=TOKEN) as one:
            one.log_in("not the token, but also long")
            one.log_in()
            assert TOKEN not in Path(f"/proc/{one.popen.pid}/cmdline").read_text()
            one.popen.terminate()
            output = "".join(one.popen.communicate(timeout=COMMAND_S))
        assert "web.login_refused" in output
        assert TOKEN not in output
        assert "but also long" not in output

    def test_guessing_tokens_is_throttled(self, server: RedisServer) -> None:
        with page(server, token=TOKEN) as one:
            assert [one.log_in("x" * 20).status for _ in range(11)] == [403] * 10 + [429]
            assert one.log_in().status == 429


class TestActions:
    def test_a_read_only_page_changes_nothing(
        self, server: RedisServer, open_page: Page, store: RedisServer
    ) -> None:
        at = letter(store, "j")
        form = {"operation": "purge", "at": at, "csrf": ""}
        assert open_page.post("/dead/do", form).status == 403
        assert "Delete" not in open_page.get("/dead").body
        with page(server, token=TOKEN) as one:
            one.log_in()
            assert one.act("/dead/do", form | {"csrf": one.csrf}).status == 403
            assert '<button name="operation"' not in one.get("/dead").body
        assert store.client.xlen(DLQ) == 1

    def test_a_form_of_another_site_changes_nothing(self, guarded: Page, store: RedisServer) -> None:
        at = letter(store, "j")
        form = {"operation": "purge", "at": at, "asked_at": "4000000000"}
        csrf = {"csrf": guarded.csrf}
        for refused in (
            guarded.post("/dead/do", form),
            guarded.post("/dead/do", form | {"csrf": "guess"}),
            guarded.post("/dead/do", form | csrf, Origin="http://evil.example"),
            guarded.post("/dead/do", form | csrf, Origin="null"),
            guarded.request(
                "POST", "/dead/do", "operation=purge", Content_Type="application/x-www-form-urlencoded"
            ),
            guarded.request(
                "POST", "/dead/do", "{}", Content_Type="application/json", Sec_Fetch_Site="cross-site"
            ),
            Page(guarded.url, guarded.popen).post("/dead/do", form | csrf),
        ):
            assert refused.status in (401, 403)
        assert guarded.post("/dead/do", form | csrf, Content_Type="text/plain").status == 415
        assert guarded.get("/dead/do").status == 405
        assert store.client.xlen(DLQ) == 1

    def test_selected_letters_are_requeued_after_confirmation(
        self, guarded: Page, store: RedisServer
    ) -> None:
        places = [letter(store, f"j{number}") for number in range(3)]
        form = {"operation": "requeue", "which": "selected", "at": places[1:]}
        answer = guarded.act("/dead/confirm", form)
        assert "Requeue 2 dead letters?" in answer.body
        assert store.client.xlen(DLQ) == 3
        asked_at = re.search(r'name="asked_at" value="([^"]+)"', answer.body)
        assert asked_at is not None
        answer = guarded.act("/dead/do", {**form, "asked_at": asked_at[1], "back": "/dead"})
        assert answer.status == 303
        assert "2 requeued" in finish(guarded, answer.headers["location"])
        sent = [json.loads(fields[b"data"]) for _, fields in store.client.xrange(STREAM)]
        assert [job["id"] for job in sent] == ["j1", "j2"]
        assert all("retry_count" not in job and job["payload"] for job in sent)
        assert listed(guarded.get("/dead").body) == ["j0"]
        again = guarded.act("/dead/do", {**form, "asked_at": asked_at[1]})
        assert "0 requeued" in finish(guarded, again.headers["location"])
        assert store.client.xlen(STREAM) == 2
        assert guarded.act("/dead/confirm", {"operation": "requeue", "which": "selected"}).status == 400
        assert guarded.act("/dead/confirm", {"operation": "burn", "at": places}).status == 400

    def test_a_form_without_a_selection_changes_nothing(self, guarded: Page, store: RedisServer) -> None:
        letter(store, "j")
        form = {"operation": "purge", "asked_at": "4000000000"}
        for unclear in (
            {},
            {"which": "selected"},
            {"at": "stream:other 1-0"},
            {"which": "all", "asked_at": ""},
        ):
            assert guarded.act("/dead/do", {**form, **unclear}).status == 400, unclear
        answer = guarded.act("/dead/do", {**form, "which": "all", "stream": "stream:other"})
        assert (answer.status, store.client.xlen(DLQ)) == (400, 1)

    def test_all_matching_letters_are_deleted_but_no_later_ones(
        self, guarded: Page, store: RedisServer
    ) -> None:
        for number in range(250):
            letter(store, f"j{number}", "poison" if number % 2 else "timeout")
        answer = guarded.act("/dead/confirm", {"operation": "purge", "which": "all", "reason": "poison"})
        assert "Delete 125 dead letters permanently?" in answer.body
        assert "reason poison" in answer.body
        asked_at = re.search(r'name="asked_at" value="([^"]+)"', answer.body)
        assert asked_at is not None
        letter(store, "since", "poison", entry=f"{int(float(asked_at[1]) * 1000) + 1}-0")
        all_of_them = {"operation": "purge", "which": "all", "reason": "poison", "asked_at": asked_at[1]}
        done = guarded.act("/dead/do", all_of_them)
        assert "125 deleted" in finish(guarded, done.headers["location"])
        left = [json.loads(fields[b"data"]) for _, fields in store.client.xrange(DLQ)]
        assert len(left) == 126
        assert [one["task"]["id"] for one in left if one["reason"] == "poison"] == ["since"]

    def test_retries_are_made_due_and_types_paused(self, guarded: Page, store: RedisServer) -> None:
        key = f"retry:{STREAM}"
        jobs = [json.dumps({"id": f"r{number}", "type": "audit"}) for number in range(3)]
        store.client.zadd(key, dict.fromkeys(jobs, 4e9))
        answer = guarded.act("/retries/now", {"id": "r1", "back": "/retries"})
        assert "1 due now" in finish(guarded, answer.headers["location"])
        assert [member for member, due in store.client.zrange(key, 0, -1, withscores=True) if due < 4e9] == [
            jobs[1].encode()
        ]
        answer = guarded.act("/retries/now", {"type": "audit"})
        assert "2 due now" in finish(guarded, answer.headers["location"])
        assert guarded.act("/types/pause", {"type": "audit", "note": "disk full"}).status == 303
        assert json.loads(store.client.hget("jobworker:paused", "audit"))["note"] == "disk full"
        eventually(lambda: "disk full" in guarded.get("/queues").body)
        assert guarded.act("/types/resume", {"type": "audit"}).status == 303
        assert store.client.hlen("jobworker:paused") == 0
        answer = guarded.act("/types/resume", {"type": "nosuch"})
        assert (answer.status, "is not paused, so nothing changed" in answer.body) == (404, True)

    def test_a_job_is_cancelled(self, guarded: Page, store: RedisServer) -> None:
        entry = store.client.xadd(STREAM, {"data": '{"id": "c1", "type": "audit"}'}).decode()
        page = guarded.get("/job?id=c1").body
        assert 'name="id" value="c1"' in page
        assert ">Cancel<" in page
        answer = guarded.act("/job/cancel", {"id": entry, "stream": STREAM, "back": "/job?id=c1"})
        assert "it is a dead letter now" in finish(guarded, answer.headers["location"])
        assert store.client.xlen(STREAM) == 0
        (fields,) = [fields for _, fields in store.client.xrange(DLQ)]
        assert json.loads(fields[b"data"])["reason"] == "cancelled"
        assert guarded.act("/job/cancel", {"id": "", "stream": STREAM}).status == 400
        answer = guarded.act("/job/cancel", {"id": "c1", "stream": STREAM})
        assert "was not found any more" in finish(guarded, answer.headers["location"])

    def test_a_job_that_is_moved_into_a_shard_meanwhile_is_cancelled_there(
        self, guarded: Page, store: RedisServer
    ) -> None:
        source, (shard,) = Source(STREAM, GROUP), shard_names(STREAM, 1)
        with contextlib.closing(RedisReaperStore(store.url)) as mover:
            mover.announce("h/i", ["audit"], [source, Source(shard, GROUP)], shards=1)
            store.client.xadd(STREAM, {"data": '{"id": "c1", "type": "audit"}'})
            part = mover.forward_take(source, "h/i", 60.0, 1, 10)
            assert part is not None
            assert "on its way into its shard" in guarded.get("/job?id=c1").body
            answer = guarded.act("/job/cancel", {"id": "c1", "stream": STREAM, "back": "/job?id=c1"})
            mover.forward_add(shard, STREAM, part.entries)
            mover.forward_done(STREAM, [one.id for one in part.entries])
        store.client.delete(SERVICES_KEY)  # else other tests see the streams of this service only
        assert "it is a dead letter now" in finish(guarded, answer.headers["location"])
        assert (store.client.xlen(shard), store.client.xlen(f"dlq:{shard}")) == (0, 1)
        store.client.delete(SERVICES_KEY)  # other tests look at the built-in streams


def test_the_page_loads_neither_torch_nor_a_vector_client() -> None:
    heavy = {"torch", "sentence_transformers", "pymilvus", "numpy", "milvus_lite"}
    code = f"import sys, jobworker.worker.web.serve; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_without_its_libraries_the_error_names_the_extra(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for module in ("web.serve", "http.server"):
        monkeypatch.delitem(sys.modules, f"jobworker.worker.{module}", raising=False)
    assert "pip install '.[web]'" in run(server, "web", "--listen", "127.0.0.1:0", code=2).stderr


@pytest.mark.parametrize("number", ["1", "x", "9" * 5000], ids=("unused", "text", "long"))
def test_an_unknown_task_is_not_found(open_page: Page, number: str) -> None:
    answer = open_page.get(f"/dead/progress/{number}")
    assert (answer.status, "content-security-policy" in {name.lower() for name in answer.headers}) == (
        404,
        True,
    )


@pytest.mark.parametrize("address", ["/retries?offset=", "/history.json?after=", "/job?id=x&scan="])
def test_a_number_of_many_digits_breaks_no_page(open_page: Page, address: str) -> None:
    assert open_page.get(address + "9" * 5000).status in (200, 404)


@pytest.mark.parametrize("path", ["/", "/queues", "/retries", "/dead", "/job?id=j1", "/types", "/workers"])
def test_a_broken_key_hides_its_own_part_of_a_page_only(
    open_page: Page, store: RedisServer, path: str
) -> None:
    fields = {"task": {"id": "j1", "type": "audit"}, "reason": "poison", "error": "broken disk"}
    store.client.xadd(DLQ, {"data": json.dumps(fields)})
    store.client.zadd(f"retry:{STREAM}", {json.dumps({"id": "r1", "type": "audit"}): 4e9})
    broken = [AUDIT, f"dlq:{AUDIT}", f"retry:{AUDIT}", f"cron:{AUDIT}"]
    for key in broken:
        store.client.set(key, "a string")
    named = {"/queues": [AUDIT], "/retries": [f"retry:{AUDIT}"], "/dead": [f"dlq:{AUDIT}"],
             "/job?id=j1": broken[:3]}  # fmt: skip
    shown = {"/retries": "r1", "/dead": "broken disk", "/job?id=j1": "broken disk"}
    try:
        answer = open_page.get(path)
    finally:
        store.client.delete(*broken)
    assert answer.status == 200, answer.body
    for key in named.get(path, []):
        assert f"RENAME {key} {key}:damaged" in answer.body
    assert shown.get(path, "") in answer.body


def test_the_letter_of_a_broken_key_names_the_repair(open_page: Page, store: RedisServer) -> None:
    store.client.set(DLQ, "a string")
    try:
        answer = open_page.get(f"/dead/letter?at={quote(STREAM)}%201-0")
    finally:
        store.client.delete(DLQ)
    assert (answer.status, f"RENAME {DLQ} {DLQ}:damaged" in answer.body) == (503, True), answer.body
