"""Language model client over real HTTP: requests, valid and invalid answers, retries and failures."""

import base64
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.llm import (
    MAX_ANSWER_BYTES,
    LanguageModel,
    open_model,
    parse_findings,
    retry_after_s,
)
from jobworker.handlers.summaries.secret_mask import SecretMask
from jobworker.handlers.summaries.sinks import EntityUpdate, Event, Findings, RelationChange
from jobworker.worker import ConfigurationError, PermanentError, Unavailable
from support.llm_stub import Reply, Stub, llm_stub, says

GOOD: dict[str, Any] = {
    "summary": "他在雪夜回家。",
    "entity_updates": [{"name": "他", "entity_type": "person", "description": "旅人"}],
    "new_events": [{"description": "回家", "participants": ["他"]}],
    "relation_changes": [{"source": "他", "target": "她", "relation": "重逢"}],
}


@contextmanager
def client(
    replies: Sequence[Reply], pauses: list[float] | None = None, **more: Any
) -> Iterator[tuple[Stub, LanguageModel]]:
    waited = pauses if pauses is not None else []
    with llm_stub(replies) as stub:
        model = LanguageModel(stub.url, "small", **({"timeout_s": 5.0, "sleep": waited.append} | more))
        try:
            yield stub, model
        finally:
            model.close()


def test_the_request_holds_the_chapter_and_the_answer_becomes_findings() -> None:
    with client([says(GOOD)], key="sk-secret", summary_chars=77) as (stub, model):
        findings = model.extract_findings("第七十七章")
    assert findings == Findings(
        "他在雪夜回家。",
        [EntityUpdate("他", "person", "旅人")],
        [Event("回家", ["他"])],
        [RelationChange("他", "她", "重逢")],
    )
    (request,) = stub.requests
    assert (request["model"], request["temperature"]) == ("small", 0)
    assert request["messages"][-1] == {"role": "user", "content": "第七十七章"}
    assert "at most 77 characters" in request["messages"][0]["content"]
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.headers[0]["authorization"] == "Bearer sk-secret"


def test_no_authorization_is_sent_without_a_key() -> None:
    with client([says(GOOD)]) as (stub, model):
        model.extract_findings("x")
    assert "authorization" not in stub.headers[0]


@pytest.mark.parametrize(
    "invalid",
    [
        says("Sure! Here is the summary."),
        says('{"summary": ""}'),
        says('{"summary": "  "}'),
        says({"summary": 7}),
        says({"summary": "x", "entity_updates": [{"description": "nameless"}]}),
        says({"summary": "x", "new_events": "none"}),
        says({"summary": "x", "entity_updates": [{"name": "n"}] * 201}),
        says(GOOD, finish_reason="length"),
        says(None, refusal="I cannot help with that"),
        says(None, finish_reason="content_filter"),
        says('["summary"]'),
        says("[" * 100_000),
    ],
    ids=range(12),
)
def test_an_invalid_answer_is_asked_for_once_more(invalid: Reply) -> None:
    with client([invalid, says(GOOD)]) as (stub, model):
        assert model.extract_findings("chapter").summary == GOOD["summary"]
        assert [message["role"] for message in stub.requests[1]["messages"]] == [
            "system", "user", "assistant", "user",
        ]  # fmt: skip
        assert model.counters == {"llm_requests": 2, "llm_retries": 0, "llm_repairs": 1}
    with client([invalid]) as (stub, model), pytest.raises(PermanentError, match="twice"):
        model.extract_findings("chapter")
    assert len(stub.requests) == 2


def test_a_markdown_fence_and_unknown_fields_are_accepted() -> None:
    findings = parse_findings('```json\n{"summary": "x", "mood": "grim"}\n```')
    assert findings == Findings("x")


PLAIN = '{"summary": "x"}'
DRAFT = '{"summary": "draft"}'


@pytest.mark.parametrize(
    "answer",
    [
        f"<think>First, the names.</think>{PLAIN}",
        f"<think>\nPerhaps {DRAFT}? No.\n</think>\n\n{PLAIN}",
        f"<think>\n{DRAFT}\n</think>\n```json\n{PLAIN}\n```",
        f"The template began the reasoning. {DRAFT}\n</think>\n{PLAIN}",
        f"<THINKING>{{ and }} and {{'a': 1}} and {{\"a\": </Thinking> {PLAIN}",
        f"<think>one</think><think>two {DRAFT}</think>{PLAIN}",
        f"Sure! Here is the JSON:\n\n{PLAIN}\n\nLet me know if you need more.",
        f"Here it is:\n```json\n{PLAIN}\n```\nThe lists {{}} are empty.",
        f"```\n{PLAIN}\n```",
        f"~~~json\n{PLAIN}\n~~~",
        f'Format {{"summary": string}}, for example {DRAFT}. Answer: {PLAIN}',
        f'He said "{{" and left. {PLAIN}',
        f"<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>{PLAIN}",
        f"\ufeff{PLAIN}<|im_end|>",
        "{" * 200 + PLAIN,
        "[" * 200_000 + PLAIN,
    ],
    ids=range(16),
)
def test_text_around_the_json_is_skipped(answer: str) -> None:
    assert parse_findings(answer) == Findings("x")
    with client([says(answer)]) as (stub, model):
        assert model.extract_findings("chapter") == Findings("x")
        assert len(stub.requests) == 1


@pytest.mark.parametrize(
    "answer", [f"<think>{DRAFT}</think> I cannot do that.", f"{DRAFT}</think>", f"<think>{DRAFT}</think>{{}}"]
)
def test_a_draft_in_the_reasoning_is_no_answer(answer: str) -> None:
    assert isinstance(parse_findings(answer), str)


@pytest.mark.parametrize("text", ["</think>", "<think>", "{", "}", '{"summary": "y"}', "```"])
def test_a_summary_may_hold_what_looks_like_markup(text: str) -> None:
    answer = msgspec.json.encode({"summary": f"a {text} b"}).decode()
    for around in ("{}", "<think>no</think>{}", "Here: {}", "```json\n{}\n```"):
        assert parse_findings(around.replace("{}", answer)) == Findings(f"a {text} b")


def test_an_answer_in_parts_is_put_together() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
        {"type": "text", "text": PLAIN},
    ]
    body = msgspec.json.encode({"choices": [{"message": {"content": parts}}]})
    with client([Reply(body=body)]) as (_, model):
        assert model.extract_findings("chapter") == Findings("x")


KEY = "sk-proj/Ab+9_Zy-8xW7vU6t"


@pytest.mark.parametrize(
    "echo",
    [
        KEY, KEY.upper(), KEY[:12], KEY[-9:], KEY.replace("/", "\\/"), "sk-proj%2FAb%2B9_Zy-8xW7vU6t",
        base64.b64encode(KEY.encode()).decode(), f"{KEY[:9]}...{KEY[-8:]}",
        "x" * 190 + KEY, "x" * 4090 + KEY, KEY * 1000,
    ],
    ids=range(11),
)  # fmt: skip
@pytest.mark.parametrize(
    "reply",
    [
        lambda echo: Reply(401, f'{{"error": "Incorrect API key provided: {echo}."}}'.encode()),
        lambda echo: Reply(400, echo.encode()),
        lambda echo: Reply(503, f"Bearer {echo}".encode()),
        lambda echo: says(f"Your key is {echo}"),
        lambda echo: says(f'{{"summary": 7, "key": "{echo}"}}'),
        lambda echo: says(None, refusal=f"not for {echo}"),
        lambda echo: Reply(200, echo.encode()),
        lambda echo: Reply(302, b"", {"Location": f"http://x/?{echo}"}),
    ],
    ids=["401", "400", "503", "prose", "invalid", "refusal", "no completion", "redirect"],
)
def test_a_key_that_the_endpoint_repeats_is_in_no_error(
    reply: Callable[[str], Reply], echo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="jobworker")
    with client([reply(echo)], key=KEY) as (_, model), pytest.raises((Unavailable, PermanentError)) as raised:
        model.extract_findings("chapter")
    told = "".join(traceback.format_exception(raised.value)).split("Error: ", 1)[-1]
    told += str(raised.value) + "".join(str(vars(record)) for record in caplog.records)
    for part in (KEY, base64.b64encode(KEY.encode()).decode()):
        for at in range(len(part) - 7):
            assert part[at : at + 8].lower() not in told.lower()


@pytest.mark.parametrize("ascii", [True, False])
def test_a_key_is_masked_in_json_with_letters_escaped_or_not(ascii: bool) -> None:
    text = json.dumps(['p"ä-wö'], ensure_ascii=ascii)
    assert SecretMask(['p"ä-wö']).mask(text) == '["***"]'


def test_a_password_in_the_url_is_in_no_error() -> None:
    with llm_stub([Reply(401, b"Basic dXNlcjpwYXNzLXdvcmQtOQ== pass-word-9 token-in-query")]) as stub:
        url = stub.url.replace("http://", "http://user:pass-word-9@") + "?token=token-in-query"
        model = LanguageModel(url, "small", sleep=lambda _: None)
        with pytest.raises(Unavailable) as raised:
            model.extract_findings("x")
        model.close()
    assert "HTTP 401: '*** *** ***'" in str(raised.value).replace("Basic ", "")


@pytest.mark.parametrize("key", ["sk-two\nlines-of-key", "sk-schl\u00fcssel"])
def test_a_bad_key_in_the_environment_is_a_configuration_error(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBWORKER_LLM_KEY", key)
    with pytest.raises(ConfigurationError, match="JOBWORKER_LLM_KEY: must hold one line") as raised:
        open_model(HandlerSettings(llm_url="http://x/v1", llm_model="m"))
    assert "sk-" not in str(raised.value)


def test_temporary_failures_are_retried_after_retry_after_or_backoff() -> None:
    pauses: list[float] = []
    replies = [
        Reply(429, b"slow down", {"Retry-After": "7"}), Reply(503), Reply(500, b"oops"), says(GOOD),
    ]  # fmt: skip
    with client(replies, pauses) as (_, model):
        assert model.extract_findings("x").summary == GOOD["summary"]
        assert model.counters["llm_retries"] == 3
    assert pauses == [7.0, 2.0, 4.0]


def test_a_lasting_failure_is_unavailable() -> None:
    pauses: list[float] = []
    with client([Reply(502, b"bad gateway")], pauses) as (stub, model):
        with pytest.raises(Unavailable, match="HTTP 502: 'bad gateway'"):
            model.extract_findings("x")
        assert len(stub.requests) == 4
    assert pauses == [1.0, 2.0, 4.0]


def test_a_long_retry_after_is_unavailable_at_once() -> None:
    pauses: list[float] = []
    with client([Reply(429, b"", {"Retry-After": "3600"})], pauses) as (stub, model):
        with pytest.raises(Unavailable):
            model.extract_findings("x")
        assert (len(stub.requests), pauses) == (1, [])


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((status, Unavailable) for status in (302, 401, 403, 404)),
        (400, PermanentError),
        (413, PermanentError),
    ],
)
def test_a_rejected_request_is_not_retried(status: int, error: type[Exception]) -> None:
    with client([Reply(status, b"no")]) as (stub, model):
        with pytest.raises(error, match=f"HTTP {status}"):
            model.extract_findings("x")
        assert len(stub.requests) == 1


def test_a_refused_connection_is_unavailable() -> None:
    model = LanguageModel("http://127.0.0.1:1/v1", "m", timeout_s=5, sleep=lambda _: None)
    with pytest.raises(Unavailable, match="ConnectError"):
        model.extract_findings("x")
    model.close()


def test_a_dripping_answer_ends_at_the_timeout() -> None:
    slow = client([Reply(200, b"{", drip_s=0.02)], timeout_s=0.3)
    with slow as (_, model), pytest.raises(Unavailable, match="TimeoutError: no complete answer within"):
        model.extract_findings("x")


def test_an_oversized_answer_is_a_permanent_error() -> None:
    with client([Reply(200, b"x" * (MAX_ANSWER_BYTES + 1))]) as (_, model), pytest.raises(PermanentError):
        model.extract_findings("x")


def test_a_response_that_is_no_chat_completion_is_unavailable() -> None:
    for body in (b"<html>", b'{"choices": []}', b"{}"):
        with (
            client([Reply(200, body)]) as (_, model),
            pytest.raises(Unavailable, match="not an OpenAI chat completion"),
        ):
            model.extract_findings("x")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("0.5", 0.5), ("Fri, 02 Jan 2026 00:01:00 GMT", 60.0), ("soon", None), ("-1", None),
     ("Thu, 01 Jan 2026 00:00:00 GMT", 0.0), ("", None), ("9" * 400, None)],
)  # fmt: skip
def test_retry_after(text: str, seconds: float | None) -> None:
    assert retry_after_s({"retry-after": text}, datetime(2026, 1, 2, tzinfo=UTC)) == seconds


def test_the_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    monkeypatch.setenv("JOBWORKER_LLM_KEY", "sk-environment")
    for path, key in ((str(file), "sk-file"), ("", "sk-environment")):
        with llm_stub([says(GOOD)]) as stub:
            settings = HandlerSettings(llm_url=stub.url, llm_model="m", llm_key_file=path)
            model = open_model(settings)
            model.extract_findings("x")
            model.close()
        assert stub.headers[0]["authorization"] == f"Bearer {key}"
    assert "sk-" not in str(settings.public())


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff"])
def test_a_bad_key_file_is_a_configuration_error(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="--llm-key-file"):
        open_model(HandlerSettings(llm_url="http://x/v1", llm_model="m", llm_key_file=str(file)))
