"""Results: which values are kept, and how workers report them."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from jobworker.worker import BatchHandler, Job, JobHandler, JobResult, PermanentError, Returned, job
from jobworker.worker.errors import JobCancelled
from jobworker.worker.new_job import NewJob, encode_job
from jobworker.worker.producer import Producer
from jobworker.worker.results import MAX_RESULT_BYTES, decode_result, encode_result, encode_value, is_kept
from jobworker.worker.settings import Settings
from jobworker.worker.testing import Harness


class Point(msgspec.Struct):
    x: int


@dataclasses.dataclass
class Pair:
    left: int
    right: str


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (None, b"null"), ({"a": [1, 2.5]}, b'{"a":[1,2.5]}'), ("ü", '"ü"'.encode()), (Point(1), b'{"x":1}'),
        ([Pair(1, "b")], b'[{"left":1,"right":"b"}]'), ({1}, b"[1]"), (b"\1", b'"AQ=="'),
        ({1: 2}, b'{"1":2}'),
        (datetime(2026, 1, 2, tzinfo=UTC), b'"2026-01-02T00:00:00Z"'), (float("nan"), b"null"),
    ],
)  # fmt: skip
def test_a_value_is_kept_as_json(value: object, data: bytes) -> None:
    assert encode_value(value) == data


@pytest.mark.parametrize("value", [object(), {"f": open}, "x" * MAX_RESULT_BYTES, "\ud800"])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"the result has"):
        encode_value(value)


def test_a_value_without_an_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="no JSON form"):
        encode_value(endless)


def test_a_record_is_read_back() -> None:
    record = encode_result("succeeded", "now", value=b'{"n":1}')
    assert decode_result(record) == JobResult("succeeded", {"n": 1})
    for damaged in (b"", b"[]", b"{}", b'{"state":1}'):
        with pytest.raises(ValueError, match=r"\w"):
            decode_result(damaged)


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [(None, False), ({}, False), ({"keep_result": "false"}, False), ({"keep_result": "true"}, True)],
)
def test_a_job_asks_by_its_metadata(metadata: dict[str, str] | None, kept: bool) -> None:
    assert is_kept(metadata) is kept


def test_the_producer_writes_what_asks_for_the_result() -> None:
    _, data = encode_job(NewJob("a", {}, metadata={"priority": "9"}, keep_result=True), 0.0)
    assert b'"metadata":{"priority":"9","keep_result":"true"}' in data
    _, data = encode_job(NewJob("a", {}), 0.0)
    assert b"metadata" not in data
    with pytest.raises(ValueError, match="keep_result is 'yes'"):
        encode_job(NewJob("a", {}, keep_result="yes"), 0.0)  # type: ignore[arg-type]


# -- handlers, in the harness


class Echo(JobHandler):
    def handle(self, job: Job) -> object:
        if job.payload == "fail":
            raise PermanentError("no")
        return job.payload


class Doubles(BatchHandler):
    max_batch = 8

    def handle_batch(self, jobs: Sequence[Job]) -> list[Returned | BaseException | None]:
        return [
            PermanentError("no") if job.payload < 0 else Returned(2 * job.payload) if job.payload else None
            for job in jobs
        ]


def test_what_a_handler_returns_is_the_result() -> None:
    with Harness({"echo": Echo}) as harness:
        asks, fails, asks_not = (
            harness.enqueue("echo", payload, keep_result=keep)
            for payload, keep in (({"a": 1}, True), ("fail", True), ("b", False))
        )
        assert harness.result(asks) == JobResult("succeeded", {"a": 1})
        assert harness.result(fails) == JobResult("dead", None, "PermanentError: no", "permanent")
        with pytest.raises(TimeoutError, match=asks_not):
            harness.result(asks_not)
        assert len(harness.completed) == 2
        assert harness.metric("z_novel_jobs_completed_total", "echo") == 2


def test_an_async_handler_and_a_function_return_results() -> None:
    @job("shout")
    async def shout(payload: Point) -> dict[str, int]:
        return {"x": payload.x}

    with Harness([shout]) as harness:
        id = harness.enqueue("shout", {"x": 3}, keep_result=True)
        assert harness.result(id).value == {"x": 3}


def test_a_batch_returns_a_result_for_each_job() -> None:
    with Harness({"double": Doubles}) as harness:
        ids = [harness.enqueue("double", number, keep_result=True) for number in (1, 0, -1, 4)]
        states = [(harness.result(id).state, harness.result(id).value) for id in ids]
        assert states == [("succeeded", 2), ("succeeded", None), ("dead", None), ("succeeded", 8)]


def test_a_batch_handler_alone_returns_the_value() -> None:
    class One(Doubles):
        max_batch = 1

    with Harness({"double": One}) as harness:
        assert harness.result(harness.enqueue("double", 5, keep_result=True)).value == 10


def test_a_result_that_cannot_be_kept_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(JobHandler):
        def handle(self, job: Job) -> object:
            return object()

    with Harness({"odd": Odd}) as harness:
        id = harness.enqueue("odd", None, keep_result=True)
        result = harness.result(id)
        assert (result.state, result.value) == ("succeeded", None)
        assert "no JSON form" in result.error
        assert "result.dropped" in caplog.text
        assert len(harness.completed) == 1


def test_a_result_expires_on_the_clock_of_the_harness() -> None:
    with Harness({"echo": Echo}, Settings(result_ttl_s=60.0, instance="t", host="t")) as harness:
        id = harness.enqueue("echo", 1, keep_result=True)
        harness.run()
        harness.advance(59.0)
        assert harness.result(id).value == 1
        harness.advance(2.0)
        with pytest.raises(TimeoutError):
            harness.result(id)


def test_the_wait_for_a_result_has_a_deadline() -> None:
    with Harness({"echo": Echo}) as harness:
        with pytest.raises(TimeoutError, match=r"no result after 0\.05 s"):
            harness.producer.result("none", 0.05)
        for bad in (-1, float("nan"), True, "1"):
            with pytest.raises(ValueError, match="a number of seconds"):
                harness.producer.result("none", bad)  # type: ignore[arg-type]


# -- cancellation, in the harness


def test_a_job_that_waits_is_cancelled_at_once() -> None:
    with Harness({"echo": Echo}) as harness:
        later = harness.enqueue("echo", 1, delay=60.0)
        assert harness.cancel(later) == "cancelled"
        harness.advance(120.0)
        assert (harness.batches, [letter.reason for letter in harness.dead]) == ([], ["cancelled"])
        assert harness.cancel(later) == "unknown"
        assert harness.cancel(harness.enqueue("echo", 2, delay=60.0), discard=True) == "cancelled"
        assert len(harness.dead) == 1


class Long(JobHandler):
    """Cancels itself in the middle, as an operator might."""

    def __init__(self) -> None:
        self.saw: list[bool] = []
        self.stops = True

    def handle(self, job: Job) -> object:
        self.saw.append(job.cancelled)
        assert HARNESS[0].cancel(job.id) == "requested"
        self.saw.append(job.cancelled)
        if self.stops:
            raise JobCancelled
        HARNESS[0].advance(9.0)
        HARNESS[0].advance(2.0)
        raise AssertionError("the worker was killed")


HARNESS: list[Harness] = []


@pytest.mark.parametrize("stops", [True, False])
def test_a_running_job_sees_that_it_was_cancelled(stops: bool) -> None:
    handler = Long()
    handler.stops = stops
    with Harness({"long": handler}) as harness:
        HARNESS[:] = [harness]
        id = harness.enqueue("long", None, keep_result=True)
        assert harness.result(id).state == "cancelled"
        assert handler.saw == [False, True]
        (letter,) = harness.dead
        assert (letter.reason, letter.deaths) == ("cancelled", 0)
        assert "JobCancelled" in letter.error
        assert harness.retrying == []
        harness.run()
        assert len(harness.batches) == 1


def test_an_async_handler_is_cancelled_where_it_awaits() -> None:
    import asyncio

    seen: list[str] = []

    class Waits(JobHandler):
        async def handle(self, job: Job) -> None:
            HARNESS[0].cancel(job.id)
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                seen.append(job.id)
                raise

    with Harness({"waits": Waits}) as harness:
        HARNESS[:] = [harness]
        id = harness.enqueue("waits", None)
        harness.run()
        assert seen == [id]
        assert [letter.reason for letter in harness.dead] == ["cancelled"]


def test_a_producer_cannot_cancel_or_ask_without_an_id() -> None:
    with Harness({"echo": Echo}) as harness:
        assert isinstance(harness.producer, Producer)
        for call in (harness.producer.cancel, lambda id: harness.producer.result(id, 0)):
            with pytest.raises(ValueError, match="a text that is not empty"):
                call("")
