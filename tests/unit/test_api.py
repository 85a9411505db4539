"""The HTTP API: forms of OpenAI and text-embeddings-inference, limits, errors, tokens."""

import asyncio
import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder.base import DummyEncoder, Plan, Purpose, TextTooLong, Vectors
from support.api import DIM, HOST, GatedEncoder, World, in_world
from support.service import eventually

TOKEN, OTHER_TOKEN = "a-token-for-everything", "a-token-for-one-tenant"


def encoded(text: str, purpose: Purpose = "document") -> list[float]:
    return [float(number) for number in DummyEncoder(DIM).encode([text], purpose)[0]]


def test_openai_form() -> None:
    async def scenario(world: World) -> None:
        for path in ("/v1/embeddings", "/embeddings"):
            answer = await world.post(path, {"input": ["one", "two"], "model": "served-name"})
            body = answer.json()
            assert answer.status == 200
            assert [row["index"] for row in body["data"]] == [0, 1]
            assert body["data"][1]["embedding"] == pytest.approx(encoded("two"), abs=1e-6)
            assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
            assert (body["object"], body["model"]) == ("list", "served-name")
        one = (await world.post("/v1/embeddings", {"input": "one"})).json()
        assert [row["embedding"] for row in one["data"]] == [pytest.approx(encoded("one"), abs=1e-6)]

    in_world(scenario)


def test_null_counts_as_absent_where_a_field_is_optional() -> None:
    optional = dict.fromkeys(("model", "encoding_format", "dimensions", "input_type", "user"))

    async def scenario(world: World) -> None:
        asked = {"input": "a text with null"}
        answer = await world.post("/v1/embeddings", asked | optional)
        assert answer.json() == (await world.post("/v1/embeddings", asked)).json()
        tei = dict.fromkeys(("normalize", "truncate", "prompt_name", "dimensions"))
        assert (await world.post("/embed", {"inputs": "one"} | tei)).status == 200

    in_world(scenario)


def test_base64_holds_the_same_numbers() -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/v1/embeddings", {"input": "one", "encoding_format": "base64"})
        text = answer.json()["data"][0]["embedding"]
        numbers = np.frombuffer(base64.b64decode(text), "<f4")
        assert numbers == pytest.approx(encoded("one"), abs=1e-6)

    in_world(scenario)


def test_text_embeddings_inference_form() -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/embed", {"inputs": ["one"], "truncate": True, "normalize": True})
        assert answer.json() == [pytest.approx(encoded("one"), abs=1e-6)]
        refused = await world.post("/embed", {"inputs": []})
        assert refused.status == 400
        assert set(refused.json()) == {"error", "error_type"}
        assert refused.json()["error_type"] == "Validation"

    in_world(scenario)


def test_the_prompt_follows_the_input_type() -> None:
    class Prompted(DummyEncoder):
        def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
            return super().tokenize([purpose + text for text in texts], purpose)

    async def scenario(world: World) -> None:
        async def vector(path: str, body: dict[str, Any]) -> Any:
            found = (await world.post(path, body)).json()
            return found[0] if path == "/embed" else found["data"][0]["embedding"]

        query, document = encoded("queryone"), encoded("documentone")
        for form, expected in (
            ({}, document),
            ({"input_type": "document"}, document),
            ({"input_type": "query"}, query),
        ):
            found = await vector("/v1/embeddings", {"input": "one", **form})
            assert found == pytest.approx(expected, abs=1e-6)
        for form, expected in (({}, document), ({"prompt_name": "query"}, query)):
            assert await vector("/embed", {"inputs": "one", **form}) == pytest.approx(expected, abs=1e-6)

    in_world(scenario, encoder=Prompted(DIM))


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"not json", None, "JSON"),
        (b"\xff\xfe", None, "JSON"),
        (b'{"input": ' + b"[" * 50_000, None, "JSON"),
        ([], None, "object"),
        ({}, "input", "input"),
        ({"input": None}, "input", "string"),
        ({"input": 5}, "input", "string"),
        ({"input": []}, "input", "at least one"),
        ({"input": ["a", 1.5]}, "input", "input[1]"),
        ({"input": ["a", None]}, "input", "input[1]"),
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": "a", "model": 5}, "model", "str"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": "a", "input_type": "passage"}, "input_type", "passage"),
        ({"input": "a", "dimensions": 4}, "dimensions", "shortened"),
        ({"input": "a", "dimensions": -1}, "dimensions", "shortened"),
        ({"input": "a", "dimensions": "8"}, "dimensions", "int"),
    ],
)
def test_a_wrong_request_gets_400_in_openais_form(body: Any, param: str | None, says: str) -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/v1/embeddings", body)
        error = answer.json()["error"]
        assert answer.status == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert says in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)

    in_world(scenario)


def test_a_message_quotes_the_beginning_of_a_long_value() -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/v1/embeddings", {"input": "a", "encoding_format": "x" * 50_000})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "encoding_format")
        assert "`$.encoding_format`" in answer.json()["error"]["message"]
        foreign = await world.request("POST", "/v1/embeddings", {"input": "a"}, host="h" * 50_000)
        assert foreign.status == 421
        for one in (answer, foreign):
            assert len(one.body) < 1000

    in_world(scenario)


def test_dimensions_that_the_model_was_trained_for() -> None:
    async def scenario(world: World) -> None:
        world.models.shorter = (4,)
        for dimensions in (4, DIM):
            answer = await world.post("/v1/embeddings", {"input": "one", "dimensions": dimensions})
            vector = answer.json()["data"][0]["embedding"]
            assert len(vector) == dimensions
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        refused = await world.post("/v1/embeddings", {"input": "one", "dimensions": 5})
        assert "4, 8" in refused.json()["error"]["message"]

    in_world(scenario)


def test_another_model_is_refused_and_the_served_names_are_said() -> None:
    async def scenario(world: World) -> None:
        answer = await world.post("/v1/embeddings", {"input": "a", "model": "other"})
        assert answer.status == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "served-name" in answer.json()["error"]["message"]
        models = (await world.request("GET", "/v1/models")).json()
        assert [one["id"] for one in models["data"]][:2] == ["served-name", "dummy:8"]

    in_world(scenario)


def test_an_unknown_path_or_method_is_refused_in_openais_form() -> None:
    async def scenario(world: World) -> None:
        unknown = (
            ("GET", "/v1/embeddings", 405),
            ("POST", "/v1/chat", 404),
            ("POST", "/v1/embeddings/", 404),
        )
        for method, path, status in unknown:
            answer = await world.request(method, path, host="[")
            assert (answer.status, f"{method} {path}" in answer.json()["error"]["message"]) == (status, True)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    in_world(scenario)


def test_while_the_model_is_loaded_the_answer_is_503() -> None:
    async def scenario(world: World) -> None:
        assert (await world.request("GET", "/health")).status == 503
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/embed", {"inputs": "a"})):
            answer = await world.post(path, body)
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
        await world.models.load_own()
        assert (await world.request("GET", "/health")).status == 200
        assert (await world.post("/v1/embeddings", {"input": "a"})).status == 200

    in_world(scenario, loaded=False)


def test_too_many_texts_tokens_or_bytes_get_413() -> None:
    async def scenario(world: World) -> None:
        for body in ({"input": ["a"] * 2049}, {"input": "a" * 16_001}, {"input": "a" * 200_000}):
            assert (await world.post("/v1/embeddings", body)).status == 413
        announced = await world.post("/v1/embeddings", {"input": "a"}, **{"content-length": "999999999"})
        assert announced.status == 413
        assert (await world.post("/v1/embeddings", {"input": "a" * 16_000})).status == 200

    encoder = DummyEncoder(DIM)
    encoder._budget = 1000
    in_world(scenario, encoder=encoder)


async def until_running(encoder: GatedEncoder) -> None:
    assert await asyncio.to_thread(encoder.running.wait, 10)


def test_requests_that_wait_for_a_pass_go_together_in_the_next() -> None:
    encoder = GatedEncoder()

    async def scenario(world: World) -> None:
        first = asyncio.create_task(world.post("/v1/embeddings", {"input": "first"}))
        await until_running(encoder)
        others = [
            asyncio.create_task(world.post("/v1/embeddings", {"input": f"text {n}"})) for n in range(10)
        ]
        while world.models.waiting_tokens() < 11 * 5:
            await asyncio.sleep(0)
        encoder.gate.set()
        answers = await asyncio.gather(first, *others)
        assert {answer.status for answer in answers} == {200}
        assert encoder.passes == [1, 10]
        assert world.batches == [1, 10]
        for number, answer in enumerate(answers[1:]):
            vector = answer.json()["data"][0]["embedding"]
            assert vector == pytest.approx(encoded(f"text {number}"), abs=1e-6)

    in_world(scenario, encoder=encoder)


def test_a_large_request_takes_turns_with_small_ones() -> None:
    encoder = GatedEncoder(budget=100)

    async def scenario(world: World) -> None:
        large = asyncio.create_task(world.post("/v1/embeddings", {"input": ["x" * 60] * 6}))
        await until_running(encoder)
        small = asyncio.create_task(world.post("/v1/embeddings", {"input": "small"}))
        while world.models.waiting_tokens() < 365:
            await asyncio.sleep(0)
        encoder.gate.set()
        assert (await small).status == 200
        assert len(encoder.passes) < 6
        vectors = [row["embedding"] for row in (await large).json()["data"]]
        assert vectors == [pytest.approx(encoded("x" * 60), abs=1e-6)] * 6

    in_world(scenario, encoder=encoder)


def test_a_full_queue_gets_429_with_retry_after() -> None:
    encoder = GatedEncoder(budget=10)

    async def scenario(world: World) -> None:
        waiting = [asyncio.create_task(world.post("/v1/embeddings", {"input": "x" * 40})) for _ in range(4)]
        while world.models.waiting_tokens() < 160:
            await asyncio.sleep(0)
        answer = await world.post("/v1/embeddings", {"input": "one more"})
        assert answer.status == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert answer.json()["error"]["type"] == "rate_limit_error"
        tei = await world.post("/embed", {"inputs": "one more"})
        assert (tei.status, tei.json()["error_type"]) == (429, "Overloaded")
        encoder.gate.set()
        assert {one.status for one in await asyncio.gather(*waiting)} == {200}
        assert world.models.waiting_tokens() == 0

    in_world(scenario, encoder=encoder)


def test_a_request_has_a_deadline_and_its_text_is_not_computed_after_it() -> None:
    encoder = GatedEncoder()

    async def scenario(world: World) -> None:
        first = asyncio.create_task(world.post("/v1/embeddings", {"input": "first"}))
        await until_running(encoder)
        answers = await asyncio.gather(first, world.post("/v1/embeddings", {"input": "second"}))
        assert [answer.status for answer in answers] == [503, 503]
        assert "retry-after" in answers[0].headers
        assert world.models.waiting_tokens() == 0
        encoder.gate.set()
        assert (await world.post("/v1/embeddings", {"input": "third"})).status == 200
        assert encoder.passes == [1, 1]

    in_world(scenario, encoder=encoder, deadline_s=0.3)


def test_a_text_that_breaks_the_model_fails_alone() -> None:
    class Breakable(GatedEncoder):
        def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
            if any(ord("!") in window for window in windows):
                raise RuntimeError("a device error")
            return super()._embed(windows, purpose)

    encoder = Breakable()

    async def scenario(world: World) -> None:
        first = asyncio.create_task(world.post("/v1/embeddings", {"input": "first"}))
        await until_running(encoder)
        texts = ["good", "bad!", "fine"]
        others = [asyncio.create_task(world.post("/v1/embeddings", {"input": text})) for text in texts]
        while world.models.waiting_tokens() < 5 + 12:
            await asyncio.sleep(0)
        encoder.gate.set()
        assert [one.status for one in await asyncio.gather(first, *others)] == [200, 200, 500, 200]

    in_world(scenario, encoder=encoder)


def test_a_text_beyond_the_window_is_refused_where_the_service_refuses_it() -> None:
    class Strict(DummyEncoder):
        def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
            raise TextTooLong([0], 9000, 8192)

    async def scenario(world: World) -> None:
        answer = await world.post("/v1/embeddings", {"input": "a"})
        assert answer.status == 400
        assert "9000" in answer.json()["error"]["message"]

    in_world(scenario, encoder=Strict(DIM))


def token_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_is_needed_where_there_is_a_file(tmp_path: Path) -> None:
    path = token_file(tmp_path, f"# clients\n{TOKEN}\n\nt001 {OTHER_TOKEN}\n")

    async def scenario(world: World) -> None:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            answer = await world.post("/v1/embeddings", {"input": "a"}, **header)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        for token in (TOKEN, OTHER_TOKEN):
            header = {"authorization": f"Bearer {token}"}
            # With tokens, any name of the host will do.
            answer = await world.post("/v1/embeddings", {"input": "a"}, host="embed.example", **header)
            assert answer.status == 200
        assert (await world.request("GET", "/health")).status == 200

    in_world(scenario, token_file=path)


def test_without_tokens_a_foreign_host_name_is_refused() -> None:
    async def scenario(world: World) -> None:
        for host, status in ((HOST, 200), ("localhost", 200), ("[::1]:1", 200), ("evil.example", 421)):
            assert (await world.post("/v1/embeddings", {"input": "a"}, host=host)).status == status

    in_world(scenario)


def test_a_changed_token_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.handlers.api.access.RELOAD_EVERY_S", 0.0)
    path = token_file(tmp_path, TOKEN)

    async def scenario(world: World) -> None:
        async def status(token: str) -> int:
            header = {"authorization": f"Bearer {token}"}
            return (await world.post("/v1/embeddings", {"input": "a"}, **header)).status

        path.write_text(f"t1 {OTHER_TOKEN}\n")
        assert (await status(TOKEN), await status(OTHER_TOKEN)) == (401, 200)
        path.chmod(0o644)
        path.write_text(f"{TOKEN}\n")
        assert (await status(TOKEN), await status(OTHER_TOKEN)) == (401, 200)
        path.chmod(0o600)
        assert (await status(TOKEN), await status(OTHER_TOKEN)) == (200, 401)
        path.write_text("short")
        assert await status(TOKEN) == 200
        os.unlink(path)
        assert await status(TOKEN) == 200

    in_world(scenario, token_file=path)


def test_each_request_is_counted() -> None:
    async def scenario(world: World) -> None:
        await world.post("/v1/embeddings", {"input": "a"})
        await world.post("/v1/embeddings", {"input": []})
        counts = {(name, labels): by for name, labels, by in world.link.metrics.take().counts}
        assert counts["z_novel_api_requests_total", ("/v1/embeddings", "200")] == 1
        assert counts["z_novel_api_requests_total", ("/v1/embeddings", "400")] == 1

    in_world(scenario)


def test_a_hung_pass_is_seen() -> None:
    encoder = GatedEncoder()

    async def scenario(world: World) -> None:
        task = asyncio.create_task(world.post("/v1/embeddings", {"input": "a"}))
        await until_running(encoder)
        eventually(lambda: world.models.longest_pass_s() > 0)
        encoder.gate.set()
        assert (await task).status == 200
        assert world.models.longest_pass_s() == 0

    in_world(scenario, encoder=encoder)
