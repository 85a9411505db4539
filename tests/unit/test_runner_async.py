"""The worker's loop with async handlers: one loop that is kept, and failures that stay with their job."""

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jobworker.worker import Job, PermanentError
from jobworker.worker.health_check import HealthChecks
from jobworker.worker.ipc.inflight import FAILED, STARTED, SUCCEEDED
from jobworker.worker.outcome import Failure
from jobworker.worker.telemetry.current_job import current, current_log_fields
from support.runner_rig import WITHIN_S, Make, Single


class Async:
    """Runs what the test says, on the worker's loop."""

    def __init__(self, work: Callable[[Job], Any]) -> None:
        self.work = work

    async def handle(self, job: Job) -> None:
        await self.work(job)


def test_async_jobs_run_one_after_another_on_a_loop_that_is_kept(make_rig: Make) -> None:
    seen: list[Any] = []
    queue: asyncio.Queue[str] = asyncio.Queue()  # bound to the loop of its first use

    async def work(job: Job) -> None:
        seen.append((job.id, asyncio.get_running_loop(), current_log_fields()["job_id"]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get(), 0.001)
        await queue.put(job.id)
        assert await queue.get() == job.id

    worker = make_rig(t=Async(work), other=Single())
    worker.dispatch("t", "t", "other", "t")
    worker.run()
    assert worker.states() == [SUCCEEDED] * 4
    assert [(id, told) for id, _, told in seen] == [("0", "0"), ("1", "1"), ("3", "3")]
    assert len({loop for _, loop, _ in seen}) == 1
    assert current.jobs == ()


def test_an_async_failure_is_one_of_its_own_job(make_rig: Make) -> None:
    errors = [
        asyncio.CancelledError("from above"),
        ValueError("no"),
        PermanentError("never"),
        GeneratorExit(),
    ]

    async def work(job: Job) -> None:
        await asyncio.sleep(0)
        if int(job.id) < len(errors):
            raise errors[int(job.id)]
        if job.id == "4":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(60)
        if job.id == "5":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(60)

    worker = make_rig(t=Async(work))
    worker.dispatch(*"ttttttt")
    worker.run()
    assert worker.states() == [FAILED] * 6 + [SUCCEEDED]
    assert worker.errors() == {
        0: Failure("CancelledError: from above"),
        1: Failure("ValueError: no"),
        2: Failure("PermanentError: never", permanent=True),
        3: Failure("GeneratorExit: "),
        4: Failure("CancelledError: "),
        5: Failure("RuntimeError: Event loop stopped before Future completed."),
    }


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()])
def test_what_ends_the_worker_ends_it_from_a_coroutine_too(
    make_rig: Make, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(job: Job) -> None:
        raise error

    worker = make_rig(t=Async(work))
    worker.dispatch("t")
    with pytest.raises(type(error)):
        worker.run()
    assert worker.states() == [STARTED]
    worker.loop.close()
    assert caplog.records == []


def test_an_async_batch_answers_for_each_job(make_rig: Make) -> None:
    class AsyncBatch:
        max_batch = 3

        async def handle_batch(self, jobs: Sequence[Job]) -> Any:
            results = await asyncio.gather(*map(self.one, jobs), return_exceptions=True)
            return [one if isinstance(one, BaseException) else None for one in results]

        async def one(self, job: Job) -> None:
            await asyncio.sleep(0)
            if job.id == "1":
                raise ValueError(current_log_fields())

    worker = make_rig(t=AsyncBatch())
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, SUCCEEDED]
    assert worker.errors() == {1: Failure("ValueError: {'jobs': 3, 'task_type': 't'}")}


def test_a_coroutine_that_nothing_awaits_is_a_failure_for_good(make_rig: Make) -> None:
    async def work(job: Job) -> None:
        raise AssertionError("never awaited")

    single = Single()
    single.handle = lambda job: work(job)  # type: ignore[method-assign]
    worker = make_rig(t=single)
    worker.dispatch("t")
    worker.run()
    assert worker.states() == [FAILED]
    assert worker.failures()[0].permanent
    assert "handle returned coroutine" in worker.failures()[0].error


def test_tasks_that_a_job_leaves_running_end_with_it_and_those_of_before_stay(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[Any] = []
    ticks: list[str] = []

    async def forever(name: str) -> None:
        try:
            while True:
                ticks.append(name)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            ended.append((name, current_log_fields()["job_id"]))
            raise

    kept: list[Any] = []

    async def open_client() -> None:
        kept.append(asyncio.create_task(forever("client")))

    async def work(job: Job) -> None:
        kept.append(asyncio.create_task(forever(job.id), name=f"left by {job.id}"))
        await asyncio.sleep(0)
        if job.id == "1":
            raise ValueError

    worker = make_rig(t=Async(work))
    worker.loop.run(open_client(), keep_tasks=True)
    worker.dispatch(*"tt")
    with caplog.at_level(logging.WARNING):
        worker.run()
    assert worker.states() == [SUCCEEDED, FAILED]
    assert ended == [("0", "0"), ("1", "1")]
    assert not kept[0].done()
    assert [record.getMessage() for record in caplog.records] == ["handler.tasks_cancelled"] * 2
    assert [(vars(one)["tasks"], vars(one)["names"]) for one in caplog.records] == [
        (1, f"left by {id}") for id in "01"
    ]


def test_a_context_variable_of_one_async_job_is_not_seen_by_the_next(
    make_rig: Make,
) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def work(job: Job) -> None:
        seen.append(variable.get())
        variable.set(job.id)

    worker = make_rig(t=Async(work))
    worker.dispatch(*"tt")
    variable.set("outside")
    worker.run()
    assert seen == ["outside", "outside"]


def test_a_cancellation_in_the_check_of_health_is_trouble_and_not_the_end(
    make_rig: Make,
) -> None:
    class Away(Single):
        async def healthy(self) -> None:
            raise asyncio.CancelledError("gone")

    worker = make_rig(t=Away())
    worker.dispatch("t")
    worker.runner._check_health()
    worker.run()
    assert worker.reports()[-1].trouble == "t: CancelledError: gone"


def test_a_hanging_async_check_of_health_is_cancelled(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.worker.handler.HEALTHY_WITHIN_S", 0.05)

    class Away(Async):
        async def healthy(self) -> None:
            await asyncio.sleep(WITHIN_S)

    done: list[str] = []

    async def work(job: Job) -> None:
        done.append(job.id)

    worker = make_rig(t=Away(work))
    worker.runner._check_health()
    worker.dispatch("t")
    worker.run()
    assert worker.reports()[-1].trouble == "t: TimeoutError: healthy() has not returned within 0.05 s"
    assert done == ["0"]


def test_an_async_check_of_health_that_blocks_stops_async_types_alone(make_rig: Make) -> None:
    answers, done, calls = threading.Event(), [], []

    class Blocking(Async):
        async def healthy(self) -> None:
            calls.append("healthy")
            answers.wait(WITHIN_S)

    async def work(job: Job) -> None:
        done.append(job.id)

    plain = Single()
    worker = make_rig(t=Blocking(work), a=Async(work), o=plain)
    worker.runner._health = HealthChecks(worker.runner._handlers.values(), within_s=0.05)
    try:
        for _ in range(2):
            worker.runner._check_health()
        worker.runner.report()
        assert worker.reports()[-1].trouble == "t: healthy() has not returned within 5 s"
        assert calls == ["healthy"], "no second call beside the first"
        worker.dispatch("t", "a", "o")
        while worker.states()[2] != SUCCEEDED:
            worker.runner.run_once(0.1)
        assert worker.states() == [FAILED, FAILED, SUCCEEDED]
        assert all(failure.unavailable for failure in worker.failures().values())
    finally:
        answers.set()
    for thread in threading.enumerate():
        if thread.name == "healthy":
            thread.join(WITHIN_S)
    worker.dispatch("t", "a")
    while worker.states()[-2:] != [SUCCEEDED, SUCCEEDED]:
        worker.runner.run_once(0.1)
    assert done == ["3", "4"]
    worker.runner._check_health()
    worker.runner.report()
    assert worker.reports()[-1].trouble is None
