"""The harness for handler tests: every outcome of a job that one process can produce."""

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal
from inspect import signature
from typing import Any

import pytest

from jobworker.worker import (
    Job,
    PermanentError,
    Producer,
    RateLimited,
    Settings,
    Unavailable,
    report_progress,
)
from jobworker.worker.telemetry.current_job import current_log_fields
from jobworker.worker.testing import Harness, RetryPolicy


class Listed:
    """Notes the payloads that it was given; what a test puts into ``raises`` is raised for that payload."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.raises: dict[Any, BaseException] = {}

    def handle(self, job: Job) -> None:
        self.seen.append(job.payload)
        if error := self.raises.get(job.payload):
            raise error


class Batched:
    """Notes the payloads of each batch; a payload that is an exception is that job's outcome."""

    max_batch = 4

    def __init__(self) -> None:
        self.outcome: Callable[[Job], BaseException | None] = lambda job: None

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        return [self.outcome(job) for job in jobs]


class Napping:
    """Gives way to the loop."""

    async def handle(self, job: Job) -> None:
        await asyncio.sleep(0)


@pytest.fixture
def harness() -> Iterator[Callable[..., Harness]]:
    with ExitStack() as stack:
        yield lambda *args, **handlers: stack.enter_context(Harness(handlers, *args))


def reasons(harness: Harness) -> list[tuple[str, str]]:
    return [(letter.job_id, letter.reason) for letter in harness.dead]


def payloads(batches: list[list[Job]]) -> list[list[Any]]:
    return [[job.payload for job in batch] for batch in batches]


def test_a_job_that_returns_is_completed(harness: Callable[..., Harness]) -> None:
    one = harness(note=(note := Listed()))
    id = one.enqueue("note", "one", tenant_id="t1", metadata={"request_id": "r"})
    assert one.unfinished == 1
    assert note.seen == []
    one.run()
    assert note.seen == ["one"]
    (job,) = one.completed
    assert (job.id, job.tenant_id, job.metadata) == (id, "t1", {"request_id": "r"})
    assert (one.unfinished, one.retrying, one.dead) == (0, [], [])
    assert one.metric("z_novel_jobs_completed_total", "note") == 1


def test_enqueue_is_called_as_the_producers() -> None:
    with Harness({"note": Listed}) as one:
        assert signature(one.enqueue) == signature(Producer.enqueue.__get__(one.producer))
        with pytest.raises(ValueError, match="tenant_id"):
            one.enqueue("note", None, tenant_id="no blanks here")


def test_what_raises_is_tried_again_after_two_and_four_and_eight_seconds(
    harness: Callable[..., Harness],
) -> None:
    one = harness(note=(note := Listed()))
    note.raises["x"] = ConnectionError("refused")
    one.enqueue("note", "x", id="job-1")
    one.run()
    waits = []
    while one.retrying:
        (waiting,) = one.retrying
        waits.append((waiting.job.retry_count, waiting.due_in_s))
        one.advance(waiting.due_in_s - 0.001)
        assert one.retrying, "moved before its time"
        one.advance(0.001)
    assert waits == [(1, 2.0), (2, 4.0), (3, 8.0)]
    assert len(note.seen) == 4
    (letter,) = one.dead
    assert (letter.job_id, letter.reason, letter.error) == ("job-1", "exhausted", "ConnectionError: refused")
    assert (letter.retry_count, letter.type) == (3, "note")
    assert [str(raised.error) for raised in one.raised] == ["refused"] * 4
    assert one.raised[0].error.__traceback__ is not None
    assert one.metric("z_novel_jobs_retried_total", "note") == 3


def test_a_retry_that_works_completes_the_job(harness: Callable[..., Harness]) -> None:
    one = harness(note=(note := Listed()))
    note.raises["x"] = ConnectionError()
    one.enqueue("note", "x")
    one.run()
    note.raises.clear()
    one.advance(60)
    assert [job.retry_count for job in one.completed] == [1]


def test_a_long_time_passes_step_by_step(harness: Callable[..., Harness]) -> None:
    started: list[float] = []

    class Failing:
        def handle(self, job: Job) -> None:
            started.append(one.wall_now_s())
            raise ConnectionError

    one = harness(failing=Failing)
    one.enqueue("failing", "x")
    one.advance(86_400)
    assert [round(at - started[0], 3) for at in started] == [0, 2, 6, 14]


def test_settings_change_how_often_and_how_long(harness: Callable[..., Harness]) -> None:
    settings = Settings(retry=RetryPolicy(max_retries=1, initial_s=10, multiplier=1, jitter=0))
    one = harness(settings, note=(note := Listed()))
    note.raises["x"] = ConnectionError()
    one.enqueue("note", "x")
    one.run()
    assert [waiting.due_in_s for waiting in one.retrying] == [10]
    one.advance(10)
    assert [letter.reason for letter in one.dead] == ["exhausted"]


def test_a_permanent_error_is_not_tried_again(harness: Callable[..., Harness]) -> None:
    one = harness(note=(note := Listed()))
    note.raises["x"] = PermanentError("no such chapter")
    one.enqueue("note", "x", id="job-1")
    one.run()
    assert reasons(one) == [("job-1", "permanent")]
    assert note.seen == ["x"]


def test_a_delayed_job_waits_for_its_time(harness: Callable[..., Harness]) -> None:
    one = harness(note=(note := Listed()))
    one.enqueue("note", "later", delay=30)
    one.advance(29.9)
    assert note.seen == []
    assert [round(waiting.due_in_s, 6) for waiting in one.retrying] == [0.1]
    one.advance(0.1)
    assert note.seen == ["later"]


def test_a_job_that_runs_past_its_limit_is_killed_there(harness: Callable[..., Harness]) -> None:
    class Slow:
        timeout = 5.0

        def handle(self, job: Job) -> None:
            for _ in range(job.payload):
                one.advance(1)

    one = harness(Settings(retry=RetryPolicy(max_retries=1, jitter=0)), slow=Slow)
    one.enqueue("slow", 5, id="in-time")
    one.enqueue("slow", 6, id="late")
    one.enqueue("slow", 6, id="has-more", timeout=60)
    one.advance(60)
    assert {job.id for job in one.completed} == {"in-time", "has-more"}
    assert reasons(one) == [("late", "timeout")]
    assert one.dead[0].retry_count == 1


def test_a_job_that_ends_its_worker_three_times_is_poison(harness: Callable[..., Harness]) -> None:
    made = []

    class Mortal(Listed):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            self.raises["die"] = SystemExit(7)

    one = harness(mortal=Mortal)
    one.enqueue("mortal", "die", id="job-1")
    one.enqueue("mortal", "innocent", id="job-2")
    one.run()
    assert reasons(one) == [("job-1", "poison")]
    (letter,) = one.dead
    assert (letter.deaths, letter.error) == (3, "WorkerDied: exit 7")
    assert [job.id for job in one.completed] == ["job-2"]
    assert len(made) == 4, "a worker of its own after each death"


def test_the_innocent_of_a_batch_that_died_finish_alone(harness: Callable[..., Harness]) -> None:
    def outcome(job: Job) -> None:
        if job.payload == 1:
            raise SystemExit

    batched = Batched()
    batched.outcome = outcome
    one = harness(batched=batched)
    for number in range(3):
        one.enqueue("batched", number, id=f"job-{number}")
    one.run()
    assert payloads(one.batches)[0] == [0, 1, 2]
    assert all(len(batch) == 1 for batch in one.batches[1:])
    assert {job.id for job in one.completed} == {"job-0", "job-2"}
    assert reasons(one) == [("job-1", "poison")]


def test_what_is_no_job_is_refused_unseen(harness: Callable[..., Harness]) -> None:
    one = harness(Settings(max_payload=2000), note=(note := Listed()))
    one.send(b"{")
    one.send(None)
    one.send(b'{"id": "a", "type": 5}')
    one.send(b'{"id": "b", "type": "unheard"}')
    one.send(b'{"id": "c", "type": "note", "payload": "%s"}' % (b"x" * 2000))
    one.run()
    found = [letter.reason for letter in one.dead]
    assert sorted(found) == ["malformed", "malformed", "malformed", "oversized", "unknown_type"]
    assert note.seen == []


def test_a_type_whose_store_does_not_answer_is_paused_and_uses_no_retry_up(
    harness: Callable[..., Harness],
) -> None:
    one = harness(note=(note := Listed()), other=Listed)
    note.raises = dict.fromkeys("abc", Unavailable("the store"))
    for payload in "abc":
        one.enqueue("note", payload)
    one.enqueue("other", "meanwhile", stream="stream:audit:log")
    one.advance(300)
    assert [job.type for job in one.completed] == ["other"]
    assert (one.unfinished, one.retrying, one.dead) == (3, [], [])
    assert one.metric("z_novel_circuit_open", "note") == 1
    note.raises.clear()
    one.advance(30)
    assert sorted(job.payload for job in one.completed if job.type == "note") == ["a", "b", "c"]
    assert {job.retry_count for job in one.completed} == {0}


def test_batches_are_what_the_handler_is_given_at_once(harness: Callable[..., Harness]) -> None:
    batched = Batched()
    batched.outcome = lambda job: ValueError("five") if job.payload == 5 else None
    one = harness(batched=batched)
    for number in range(10):
        one.enqueue("batched", number)
    one.run()
    assert payloads(one.batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [waiting.job.payload for waiting in one.retrying] == [5]
    assert [raised.job.payload for raised in one.raised] == [5]
    assert len(one.completed) == 9


def test_too_few_outcomes_fail_the_batch_for_good(harness: Callable[..., Harness]) -> None:
    class Forgetful:
        def handle_batch(self, jobs: Sequence[Job]) -> list[None]:
            return [None]

    one = harness(forgetful=Forgetful)
    one.enqueue("forgetful", 1)
    one.enqueue("forgetful", 2)
    one.run()
    assert [letter.reason for letter in one.dead] == ["permanent", "permanent"]


def test_jobs_that_a_handler_enqueues_are_run_too(harness: Callable[..., Harness]) -> None:
    class Chain:
        def handle(self, job: Job) -> None:
            if job.payload:
                one.enqueue("chain", job.payload - 1)

    one = harness(chain=Chain)
    one.enqueue("chain", 3)
    one.run()
    assert [job.payload for job in one.completed] == [3, 2, 1, 0]


def test_setup_is_given_the_settings_and_its_errors_pass(harness: Callable[..., Harness]) -> None:
    class Licensed(Listed):
        def setup(self, settings: Settings) -> None:
            if settings.tenant_free:  # type: ignore[attr-defined]
                raise AssertionError

    with pytest.raises(AttributeError, match="tenant_free"):
        harness(licensed=Licensed)


def test_a_handlers_own_counters_are_metrics(harness: Callable[..., Harness]) -> None:
    class Counting(Listed):
        def __init__(self) -> None:
            super().__init__()
            self.counters = {"words": 0}

        def handle(self, job: Job) -> None:
            self.counters["words"] += len(job.payload.split())

    one = harness(counting=Counting)
    one.enqueue("counting", "three words here")
    one.run()
    assert one.metric("z_novel_words_total") == 3
    assert one.metric("z_novel_words_total") == 3, "asking does not count"


@pytest.mark.parametrize(("name", "labels", "said"), [
    ("words", (), "did you mean z_novel_words_total"),
    ("z_novel_wrods_total", (), "did you mean z_novel_words_total"),
    ("pages", (), "declares a counter"),
    ("z_novel_words_total", ("counting",), "0 labels"),
    ("z_novel_jobs_completed_total", (), "1 labels .task_type."),
    ("z_novel_jobs_completed_total", ("couting",), "no task_type 'couting'"),
    ("z_novel_dlq_length", ("no:such:stream",), "no stream"),
    ("z_novel_job_duration_seconds", ("counting",), "is a histogram"),
])  # fmt: skip
def test_a_metric_that_does_not_exist_is_no_zero(
    harness: Callable[..., Harness], name: str, labels: tuple[str, ...], said: str
) -> None:
    class Counting(Listed):
        def setup(self, settings: Settings) -> None:
            self.counters = {"words": 0}

    one = harness(counting=Counting)
    assert one.metric("z_novel_words_total") == 0.0
    assert one.metric("z_novel_jobs_dead_total", "counting", "exhausted") == 0.0
    with pytest.raises(ValueError, match=said):
        one.metric(name, *labels)


def test_lines_that_a_test_logs_after_a_timeout_belong_to_no_job(harness: Callable[..., Harness]) -> None:
    class Slow(Listed):
        timeout = 5.0

        def handle(self, job: Job) -> None:
            one.advance(6.0)

    one = harness(slow=Slow)
    one.enqueue("slow", 1)
    one.run()
    assert len(one.retrying) == 1
    assert current_log_fields() == {}


def test_other_streams_are_read_too(harness: Callable[..., Harness]) -> None:
    one = harness(note=(note := Listed()))
    one.enqueue("note", "a", stream="stream:audit:log")
    one.run()
    assert note.seen == ["a"]
    assert one.completed[0].stream == "stream:audit:log"


def test_async_handlers_run_by_the_services_code(harness: Callable[..., Harness]) -> None:
    class Asynchronous:
        async def setup(self, settings: Settings) -> None:
            self.lock = asyncio.Lock()

        async def handle(self, job: Job) -> None:
            async with self.lock:
                await asyncio.sleep(0)
            if job.payload == "fails":
                raise ConnectionError("away")
            if job.payload == "cancelled":
                raise asyncio.CancelledError

    one = harness(asynchronous=Asynchronous)
    for payload in ("works", "fails", "cancelled"):
        one.enqueue("asynchronous", payload)
    one.run()
    assert [job.payload for job in one.completed] == ["works"]
    assert {waiting.job.payload for waiting in one.retrying} == {"fails", "cancelled"}
    assert [type(raised.error) for raised in one.raised] == [ConnectionError, asyncio.CancelledError]


def test_an_async_job_that_runs_past_its_limit_is_killed_there(harness: Callable[..., Harness]) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()

    class Slow:
        timeout = 5.0

        async def handle(self, job: Job) -> None:
            loops.add(asyncio.get_running_loop())
            for _ in range(job.payload):
                await asyncio.sleep(0)
                one.advance(1)

    one = harness(Settings(retry=RetryPolicy(max_retries=1, jitter=0)), slow=Slow)
    one.enqueue("slow", 5, id="in-time")
    one.enqueue("slow", 6, id="late")
    one.advance(60)
    assert [job.id for job in one.completed] == ["in-time"]
    assert reasons(one) == [("late", "timeout")]
    assert len(loops) == 2, "one loop for each worker"


def test_a_coroutine_that_a_plain_function_returns_is_not_taken_for_done(
    harness: Callable[..., Harness],
) -> None:
    async def work(job: Job) -> None:
        raise AssertionError("never awaited")

    class Forgetful:
        def handle(self, job: Job) -> object:
            return work(job)

    one = harness(forgetful=Forgetful)
    one.enqueue("forgetful", 1)
    one.run()
    assert one.completed == []
    (letter,) = one.dead
    assert letter.reason == "permanent"
    assert "handle returned coroutine" in letter.error
    assert [type(raised.error) for raised in one.raised] == [PermanentError]


def test_a_harness_says_why_it_cannot_run_async_handlers_inside_a_running_loop() -> None:
    class Asynchronous:
        async def handle(self, job: Job) -> None:
            """Never reached."""

    async def test() -> None:
        with Harness({"asynchronous": Asynchronous}) as one:
            one.enqueue("asynchronous", 1)
            one.run()
            assert "cannot run inside a running event loop" in str(one.raised[0].error)
            assert one.completed == []

    asyncio.run(test())


def test_hundreds_of_jobs_and_harnesses_leave_nothing_open() -> None:
    gc.collect()  # descriptors that other tests left to the collector
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Harness({"note": Listed, "nap": Napping}) as one:
            for number in range(15):
                one.enqueue("note", number)
                one.enqueue("nap", number)
            one.run()
            assert len(one.completed) == 30
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_is_imported_without_client_libraries_and_without_torch() -> None:
    heavy = {"torch", "numpy", "pymilvus", "redis", "prometheus_client", "click", "sentence_transformers"}
    code = f"import sys, jobworker.worker.testing; print(*sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


def test_a_handler_may_get_numbers_with_every_digit(harness: Callable[..., Harness]) -> None:
    class Exact:
        exact_numbers = True

        def handle(self, job: Job) -> None:
            got.append(job.payload)

    class Usual(Exact):
        exact_numbers = False

    got: list[object] = []
    world = harness(exact=Exact, usual=Usual)
    for kind, number in (("exact", "1.10"), ("usual", "1.10"), ("exact", "7"), ("exact", "1e-" + "9" * 30)):
        world.send(f'{{"id": "a", "type": "{kind}", "timeout": 1.5, "payload": {number}}}'.encode())
    world.run()
    assert [(type(one), str(one)) for one in got] == [
        (Decimal, "1.10"), (float, "1.1"), (int, "7"), (float, "0.0"),
    ]  # fmt: skip


class Steps:
    """Runs for as many steps of 50 s as the payload says, and reports each; -1 is a step that never ends."""

    timeout = 60.0
    max_timeout = 300.0
    harness: Harness

    def handle(self, job: Job) -> None:
        for step in job.payload:
            self.harness.advance(50 if step else 61)
            report_progress()


class Unbounded(Steps):
    """Reports progress without a bound, so that its timeout stays."""

    max_timeout = 0.0


class StepsOfBatches(Steps):
    """The same in batches."""

    handle = None  # type: ignore[assignment]
    max_batch = 4
    batch_timeout = 60.0

    def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
        for job in jobs:
            super().handle(job)
        return [None] * len(jobs)


@pytest.mark.parametrize("kind", [Steps, StepsOfBatches])
@pytest.mark.parametrize(
    ("steps", "more", "ends"),
    [
        ([1] * 5, {}, True),
        ([1] * 7, {}, False),  # past max_timeout
        ([1, 0], {}, False),  # a step that takes longer than the timeout
        ([1, 1], {"timeout": 70}, False),  # the producer's own timeout
    ],
)
def test_progress_starts_the_timeout_again_up_to_its_bound(
    harness: Callable[..., Harness], kind: type[Steps], steps: list[int], more: dict[str, Any], ends: bool
) -> None:
    one = harness(Settings(retry=RetryPolicy(max_retries=0)), steps=kind)
    kind.harness = one
    one.enqueue("steps", steps, **more)
    one.run()
    assert (len(one.completed) == 1) is ends
    assert [reason for _, reason in reasons(one)] == ([] if ends else ["timeout"])


def test_progress_moves_no_timeout_of_a_handler_without_a_bound(harness: Callable[..., Harness]) -> None:
    one = harness(Settings(retry=RetryPolicy(max_retries=0)), steps=StepsOfBatches, unbounded=Unbounded)
    Steps.harness = StepsOfBatches.harness = one
    one.enqueue("steps", [1, 1])
    one.enqueue("unbounded", [1, 1])
    one.run()
    assert [job.type for job in one.completed] == ["steps"]
    assert [reason for _, reason in reasons(one)] == ["timeout"]


def test_progress_outside_a_worker_does_nothing() -> None:
    program = "from jobworker.worker import report_progress; report_progress()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class Locked:
    """Handler of jobs that wait for each other once."""

    def __init__(self) -> None:
        self.tries: list[str] = []

    def handle(self, job: Job) -> None:
        self.tries.append(job.id)
        if self.tries.count(job.id) == 1 and job.id == "1":
            raise RateLimited(30.0, key="job")
        if self.tries.count(job.id) == 2:
            raise ValueError("fails")


def test_a_job_may_wait_alone_and_uses_no_retry() -> None:
    handler = Locked()
    with Harness({"a": handler}, Settings(retry=RetryPolicy(max_retries=1, initial_s=1.0))) as harness:
        harness.enqueue("a", {}, tenant_id="one", id="1")
        harness.run()
        harness.enqueue("a", {}, tenant_id="one", id="2")
        harness.advance(29.0)
        assert handler.tries == ["1", "2"], "no other job waits"
        assert len(harness.retrying) == 1
        harness.advance(2.0)
        harness.advance(5.0)
        assert handler.tries == ["1", "2", "1", "1"], "the only retry is left for a failure"
        assert sorted(job.id for job in harness.completed) == ["1", "2"]
        assert harness.dead == []
        assert harness.metric("z_novel_jobs_limited_total", "a") == 1


class Limited:
    """Handler whose dependency takes one job, then asks the rest to wait."""

    def __init__(self) -> None:
        self.tries: list[str] = []

    def handle(self, job: Job) -> None:
        self.tries.append(job.id)
        if job.tenant_id == "busy" and len(self.tries) == 1:
            raise RateLimited(30.0)


def test_a_rate_limited_job_waits_with_its_tenant_and_uses_no_retry() -> None:
    handler = Limited()
    with Harness({"a": handler}) as harness:
        harness.enqueue("a", {}, tenant_id="busy", id="1")
        harness.run()
        harness.enqueue("a", {}, tenant_id="busy", id="2")
        harness.enqueue("a", {}, tenant_id="other", id="3")
        harness.run()
        assert [job.id for job in harness.completed] == ["3"]
        harness.advance(29.0)
        assert handler.tries == ["1", "3"]
        assert (harness.retrying, harness.dead) == ([], [])
        harness.advance(2.0)
        assert [job.id for job in harness.completed] == ["3", "1", "2"]
        assert harness.metric("z_novel_jobs_limited_total", "a") == 1
