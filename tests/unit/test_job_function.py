"""Decorated functions as handlers: payloads are validated once, before the function runs."""

import asyncio
import dataclasses
import datetime
import decimal
import json
import threading
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest

from jobworker.worker import ConfigurationError, Job, PermanentError, Settings, job
from jobworker.worker.functions.job_function import FunctionHandler
from jobworker.worker.handler import BoundHandler, load_handlers
from jobworker.worker.testing import Harness


class Text(msgspec.Struct):
    text: str
    times: int = 1


@dataclasses.dataclass
class TextData:
    text: str
    times: int = 1


class TextModel(pydantic.BaseModel):
    text: str
    times: int = 1


@pydantic.dataclasses.dataclass
class TextPydanticData:
    text: str
    times: int = 1


class TextDict(TypedDict):
    text: str


class Nested(msgspec.Struct):
    texts: list[Text]


#: What the functions below were called with.
calls: list[Any] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


@job("struct")
def of_struct(payload: Text) -> None:
    calls.append(payload)


@job("dataclass")
def of_dataclass(payload: TextData) -> None:
    calls.append(payload)


@job("model")
def of_model(payload: TextModel) -> None:
    calls.append(payload)


@job("pydantic-dataclass")
async def of_pydantic_dataclass(payload: TextPydanticData) -> None:
    await asyncio.sleep(0)
    calls.append(payload)


@job("typeddict")
async def of_typeddict(payload: TextDict) -> None:
    await asyncio.sleep(0)
    calls.append(payload)


@job("dict")
def of_dict(payload: dict[str, object]) -> None:
    calls.append(payload)


@job("models")
def of_models(payload: list[TextModel]) -> None:
    calls.append(payload)


@job("both")
def of_both(payload: Text, job: Job) -> None:
    assert job.payload is payload
    calls.append((payload.text, job.id))


@job("async-both")
async def of_both_async(payload: Text, job: Job) -> None:
    await asyncio.sleep(0)
    calls.append((payload.text, job.id))


@job("job")
def of_job(job: Job) -> None:
    calls.append((job.payload, job.id))


GOOD: list[tuple[Callable[..., Any], object, object]] = [
    (of_struct, {"text": "a", "more": [1]}, Text("a")),
    (of_dataclass, {"text": "a"}, TextData("a")),
    (of_model, {"text": "a"}, TextModel(text="a")),
    (of_pydantic_dataclass, {"text": "a"}, TextPydanticData("a")),
    (of_typeddict, {"text": "a"}, {"text": "a"}),
    (of_dict, {"text": {"b": [1.5, None]}}, {"text": {"b": [1.5, None]}}),
    (of_models, [{"text": "a"}], [TextModel(text="a")]),
    (of_both, {"text": "a"}, ("a", "job-1")),
    (of_both_async, {"text": "a"}, ("a", "job-1")),
    (of_job, {"text": "a"}, ({"text": "a"}, "job-1")),
]


@pytest.mark.parametrize(
    ("function", "payload", "called"), GOOD, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_function_gets_the_payload_as_its_annotation_says(
    function: Callable[..., Any], payload: object, called: object
) -> None:
    with Harness([function]) as harness:
        harness.enqueue(FunctionHandler(function).type, payload, id="job-1")
        harness.run()
        assert calls == [called]
        assert [one.payload for one in harness.completed] == [payload]


BAD: list[tuple[Callable[..., Any], object, str]] = [
    (of_struct, {"text": 5}, "Expected `str`, got `int` - at `$.payload.text`"),
    (of_struct, {}, "Object missing required field `text` - at `$.payload`"),
    (of_struct, None, "Expected `object`, got `null` - at `$.payload`"),
    (of_struct, {"text": "a", "times": "7"}, "Expected `int`, got `str` - at `$.payload.times`"),
    (of_dataclass, {"text": 5}, "Expected `str`, got `int` - at `$.payload.text`"),
    (of_model, {"text": 5, "times": []}, "Input should be a valid string - at `$.payload.text`; "
                                         "Input should be a valid integer - at `$.payload.times`"),
    (of_pydantic_dataclass, {}, "Field required - at `$.payload.text`"),
    (of_typeddict, {"text": 5}, "Expected `str`, got `int` - at `$.payload.text`"),
    (of_dict, "a", "Expected `object`, got `str` - at `$.payload`"),
    (of_models, [{"text": "a"}, {}], "Field required - at `$.payload[1].text`"),
    (of_both, {"text": 5}, "Expected `str`, got `int` - at `$.payload.text`"),
    (of_both_async, {"text": 5}, "Expected `str`, got `int` - at `$.payload.text`"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "payload", "said"), BAD)
def test_a_bad_payload_is_malformed_with_the_path_of_the_field_and_unseen(
    function: Callable[..., Any], payload: object, said: str
) -> None:
    with Harness([function]) as harness:
        harness.enqueue(FunctionHandler(function).type, payload)
        harness.run()
        (letter,) = harness.dead
        assert (letter.reason, letter.error) == ("malformed", f"MalformedPayload: {said}")
        assert letter.task is not None, "a later release may run it: it can be requeued"
        assert json.loads(letter.task)["payload"] == payload
        assert (calls, harness.raised, harness.batches, harness.unfinished) == ([], [], [], 0)


def test_nesting_and_many_errors_of_a_payload_are_bounded() -> None:
    deep = b"[" * 5000 + b"]" * 5000

    @job("items")
    def of_items(payload: list[TextModel]) -> None:
        calls.append(payload)

    with Harness([of_dict, of_items]) as harness:
        harness.send(b'{"id": "deep", "type": "dict", "payload": {"a": %b}}' % deep)
        harness.enqueue("items", [{}] * 1000)
        harness.run()
        nested, many = sorted(letter.error for letter in harness.dead)
        assert nested.endswith("nested too deeply")
        assert many.endswith("at `$.payload[4].text`; and 995 more")
        assert not calls


def test_a_handler_class_beside_functions_gets_its_payload_as_before() -> None:
    class Plain:
        exact_numbers = True

        def handle(self, job: Job) -> None:
            calls.append(job.payload)

    with Harness({"struct": of_struct, "plain": Plain, "renamed": of_both}) as harness:
        harness.send(b'{"id": "1", "type": "plain", "payload": {"a": 1.50}}')
        harness.send(b'{"id": "2", "type": "plain", "payload": "\\ud800"}')
        harness.enqueue("renamed", {"text": "b"}, id="3")
        harness.enqueue("struct", {"text": "c"})
        harness.run()
        assert calls == [{"a": decimal.Decimal("1.50")}, ("b", "3"), Text("c")]
        assert [(one.reason, one.error.partition(":")[0]) for one in harness.dead] == [
            ("malformed", "MalformedJob")
        ]


def test_a_validator_that_fails_for_another_reason_is_a_failed_try() -> None:
    @dataclasses.dataclass
    class Looked:
        name: str

        def __post_init__(self) -> None:
            if self.name == "gone":
                raise ConnectionError("no directory")
            if self.name == "bad":
                raise ValueError("no such name")

    @job("looked")
    def of_looked(payload: Looked) -> None:
        calls.append(payload)

    with Harness([of_looked]) as harness:
        for name in ("gone", "bad"):
            harness.enqueue("looked", {"name": name}, id=name)
        harness.run()
        assert [(one.job.id, str(one.error)) for one in harness.raised] == [("gone", "no directory")]
        assert [(one.reason, one.error) for one in harness.dead] == [
            ("malformed", "MalformedPayload: no such name - at `$.payload`")
        ]


def test_a_decorated_function_stays_a_plain_function() -> None:
    of_struct(Text("a"))
    assert calls == [Text("a")]
    assert of_struct.__name__ == "of_struct"
    asyncio.run(of_typeddict({"text": "b"}))
    assert calls[1:] == [{"text": "b"}]


@job("many", max_batch=4)
def of_many(payloads: list[Text]) -> list[BaseException | None]:
    calls.append([one.text for one in payloads])
    return [PermanentError("no") if one.text == "no" else None for one in payloads]


@job("many-async", max_batch=4)
async def of_many_async(payloads: list[TextModel], jobs: list[Job]) -> list[None]:
    await asyncio.sleep(0)
    calls.append([(one.text, job.id) for one, job in zip(payloads, jobs, strict=True)])
    return [None] * len(payloads)


@job("many-jobs", max_batch=4)
def of_many_jobs(jobs: Sequence[Job]) -> list[None]:
    calls.append([job.payload for job in jobs])
    return [None] * len(jobs)


def test_a_list_parameter_and_max_batch_make_a_batch_handler() -> None:
    with Harness([of_many]) as harness:
        for number, text in enumerate(["a", 5, "no", "b", "c"]):
            harness.enqueue("many", {"text": text}, id=str(number))
        harness.run()
        assert calls == [["a", "no", "b"], ["c"]]
        assert [[one.id for one in batch] for batch in harness.batches] == [["0", "2", "3"], ["4"]]
        assert sorted(one.id for one in harness.completed) == ["0", "3", "4"]
        assert {one.job_id: one.reason for one in harness.dead} == {"1": "malformed", "2": "permanent"}
        assert [one.job.id for one in harness.raised] == ["2"]


def test_batches_of_async_functions_and_of_jobs() -> None:
    with Harness([of_many_async, of_many_jobs]) as harness:
        for number in range(2):
            harness.enqueue("many-async", {"text": "a"}, id=str(number))
            harness.enqueue("many-jobs", {"text": number})
        harness.run()
        assert sorted(calls, key=str) == [[("a", "0"), ("a", "1")], [{"text": 0}, {"text": 1}]]
        assert len(harness.completed) == 4


def test_a_batch_function_that_raises_fails_the_jobs_it_was_given_only() -> None:
    @job("raising", max_batch=8)
    def raising(payloads: list[Text]) -> list[None]:
        raise PermanentError("all of them")

    with Harness([raising]) as harness:
        for text in ("a", 5):
            harness.enqueue("raising", {"text": text}, id=str(text))
        harness.run()
        assert {one.job_id: one.reason for one in harness.dead} == {"a": "permanent", "5": "malformed"}


def test_an_answer_of_a_batch_function_that_is_no_list_names_the_function() -> None:
    @job("answer", max_batch=8)
    def answer(payloads: list[Text]) -> None:
        calls.append(len(payloads))

    with Harness([answer]) as harness:
        harness.enqueue("answer", {"text": "a"})
        harness.run()
        (letter,) = harness.dead
        assert "answer returned NoneType: return a list with one outcome a job" in letter.error


def test_a_list_without_max_batch_is_the_payload_of_one_job() -> None:
    @job("one")
    def one(payload: list[int]) -> None:
        calls.append(payload)

    @job("single", max_batch=32)
    def single(payload: Text) -> None:
        calls.append(payload.text)

    with Harness([one, single]) as harness:
        harness.enqueue("one", [1, 2])
        harness.enqueue("single", {"text": "a"})
        harness.run()
        assert calls == [[1, 2], "a"]


def test_the_options_are_the_members_of_a_handler_class() -> None:
    ready: list[Settings] = []
    totals = {"words": 1.0}

    def healthy() -> None:
        raise ConnectionError("down")

    @job(
        "full", timeout=7, max_timeout=70.0, max_batch=9, max_batch_bytes=1e6, batch_timeout=50, alone=True,
        needs_device=False, exact_numbers=True, counters=totals, setup=ready.append, healthy=healthy,
    )  # fmt: skip
    def full(payloads: list[dict[str, Any]]) -> list[None]:
        calls.extend(payloads)
        return [None] * len(payloads)

    @job("other", setup=ready.append)
    def other(job: Job) -> None:
        calls.append(job)

    bound = BoundHandler("full", FunctionHandler(full), 300.0)
    assert (bound.timeout_s, bound.max_timeout_s, bound.max_batch, bound.max_batch_bytes) == (7, 70, 9, 1e6)
    assert (bound.batch_timeout_s, bound.alone, bound.exact_numbers, bound.counters) == (
        50,
        True,
        True,
        totals,
    )
    assert bound.healthy is not None
    with pytest.raises(ConnectionError):
        bound.healthy()
    with Harness([full]) as harness:
        harness.send(b'{"id": "1", "type": "full", "payload": {"a": 0.10}}')
        harness.run()
        assert calls == [{"a": decimal.Decimal("0.10")}]
        assert len(ready) == 1


def test_functions_that_share_a_setup_run_it_once() -> None:
    ready: list[str] = []

    def connect(settings: Settings) -> None:
        ready.append(settings.instance)

    @job("first", setup=connect)
    def first(payload: Text) -> None: ...

    @job("second", setup=connect)
    def second(payload: Text) -> None: ...

    with Harness([first, second]):
        assert len(ready) == 1


def test_exact_digits_of_annotated_decimals_and_dates_need_no_option() -> None:
    class Price(msgspec.Struct):
        price: decimal.Decimal
        day: datetime.date

    @job("price")
    def of_price(payload: Price) -> None:
        calls.append((payload.price, payload.day))

    with Harness([of_price]) as harness:
        harness.send(
            b'{"id": "1", "type": "price", "payload": {"price": 0.12345678901234567890, "day": "2026-01-02"}}'
        )
        harness.run()
        assert calls == [(decimal.Decimal("0.12345678901234567890"), datetime.date(2026, 1, 2))]


def test_a_further_parameter_with_a_default_is_left_to_unit_tests() -> None:
    @job("extra")
    def extra(payload: Text, job: Job | None = None, *, loud: bool = False) -> None:
        calls.append((payload.text, job and job.id, loud))

    extra(Text("x"), loud=True)
    with Harness([extra]) as harness:
        harness.enqueue("extra", {"text": "y"}, id="1")
        harness.run()
    assert calls == [("x", None, True), ("y", "1", False)]


def _wrong_functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    def unannotated(payload):  # type: ignore[no-untyped-def]
        ...

    def nothing() -> None: ...
    def three(payload: Text, job: Job, more: int) -> None: ...
    def swapped(job: Job, payload: Text) -> None: ...
    def no_job(payload: Text, job: int) -> None: ...
    def keyword(payload: Text, *, loud: bool) -> None: ...
    def stars(*payloads: Text) -> None: ...
    def yields(payload: Text) -> Any:
        yield payload

    def lock(payload: threading.Event) -> None: ...
    def inner(payload: dict[str, threading.Event]) -> None: ...
    def missing(payload: "NoSuchType") -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def batch(payloads: list[Text], job: Job) -> list[None]: ...
    def bare(payloads: list) -> list[None]: ...  # type: ignore[type-arg]
    def seconds(payload: Text) -> None: ...

    return {
        "parameter payload has no annotation": (unannotated, {}),
        "(payload), (payload, job) or (job), not 0": (nothing, {}),
        "(payload), (payload, job) or (job), not 3": (three, {}),
        "the payload comes first": (swapped, {}),
        "the second parameter is annotated as Job": (no_job, {}),
        "loud needs a default": (keyword, {}),
        "or (job), not 0 parameters": (stars, {}),
        "contains `yield`": (yields, {}),
        "payload: Event is no type of JSON": (lock, {}),
        "Event is no type of JSON": (inner, {}),
        "name 'NoSuchType' is not defined": (missing, {}),
        "the second parameter is list[Job]": (batch, {"max_batch": 8}),
        "say what is in the list": (bare, {"max_batch": 8}),
        "timeout is '60': give a number of seconds above 0": (seconds, {"timeout": "60"}),
    }


@pytest.mark.parametrize("said", _wrong_functions())
def test_a_wrong_signature_is_a_configuration_error_with_the_name_of_the_function(said: str) -> None:
    function, options = _wrong_functions()[said]
    with pytest.raises(ConfigurationError) as raised:
        BoundHandler("wrong", FunctionHandler(job("wrong", **options)(function)), 300.0)
    assert said in str(raised.value)
    assert "wrong" in str(raised.value)


def test_what_the_decorator_refuses_at_once() -> None:
    with pytest.raises(ConfigurationError, match="write @job"):
        job(of_struct)  # type: ignore[arg-type]
    for name in ("", "a\nb", " a", "x" * 513, 5):
        with pytest.raises(ConfigurationError, match="printable characters"):
            job(typing.cast(str, name))
    with pytest.raises(ConfigurationError, match="job_type"):
        job("a")(Text)
    with pytest.raises(ConfigurationError, match="has a type: struct"):
        job("again")(of_struct)


def test_a_target_of_handler_may_be_a_decorated_function() -> None:
    bound = load_handlers(Settings(handlers={"shout": f"{__name__}:of_struct"}))
    assert bound["shout"].validates
