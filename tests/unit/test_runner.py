"""The worker's loop in one process: which jobs run, in which batches, and what the reader is told."""

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from jobworker.worker import Job, PermanentError, Unavailable, report_progress
from jobworker.worker.event_loop import EventLoop
from jobworker.worker.handler import BoundHandler
from jobworker.worker.health_check import HealthChecks
from jobworker.worker.ipc.channel import READY, STARTING, STOPPING, Channel, OutcomeFrame, clear_eventfd
from jobworker.worker.ipc.control import ControlSocket, Ready, Report
from jobworker.worker.ipc.inflight import FAILED, QUEUED, STARTED, SUCCEEDED
from jobworker.worker.outcome import Failure
from jobworker.worker.reader.admission import AdmittedJob
from jobworker.worker.reader.dispatch import WorkerHandle
from jobworker.worker.runner import Runner
from jobworker.worker.store.ports import Entry
from jobworker.worker.telemetry.current_job import current, current_log_fields
from support import programs

WITHIN_S = 20.0


class RunnerRig:
    """A worker with its channel, and what it is told and tells."""

    def __init__(self, linger_s: float = 0.0, **handlers: Any) -> None:
        self.channel = Channel.create(64 * 1024)
        self.channel.phase = READY
        self.handle = WorkerHandle(0, 0, self.channel, 0.0)
        self.supervisor, theirs = ControlSocket.pair()
        self.link = ControlSocket(theirs)
        self.kinds = list(handlers)
        self.loop = EventLoop()
        bound = {kind: BoundHandler(kind, handler, 60.0, self.loop) for kind, handler in handlers.items()}
        self.stop_after = 0
        self.runner = Runner(
            *(self.channel, self.link, bound, ["s0", "s1"]),
            linger_s=linger_s,
            mono_s=self.mono_s,
            wall_s=lambda: 1767348010.0,
        )
        self.dispatched = 0

    def mono_s(self) -> float:
        """The clock; once all is done it ends the loop, as a signal would between two jobs."""
        if self.stop_after and self.channel.finished >= self.stop_after:
            self.runner.stop = True
        return time.monotonic()

    def dispatch(self, *kinds: str, **more: Any) -> None:
        """Give it one job for each kind; their ids are 0, 1, 2, …"""
        arrivals = []
        for number, kind in enumerate(kinds, self.dispatched):
            body = msgspec.json.encode({"id": str(number), "type": kind, **more})
            entry = Entry(b"%d-0" % number, body)
            arrivals.append(AdmittedJob(number % 2, self.kinds.index(kind), entry, False))
        assert self.handle.dispatch(arrivals) == len(kinds)
        self.dispatched += len(kinds)

    def run(self) -> None:
        """Until every job has ended."""
        self.stop_after = self.dispatched
        self.runner.run()

    def states(self) -> list[int]:
        return [self.channel.table.state(row) for row in range(self.dispatched)]

    def failures(self) -> dict[int, Failure]:
        frames = [
            msgspec.msgpack.decode(view, type=OutcomeFrame) for view, _ in self.channel.outcomes.frames()
        ]
        return {frame.row: frame.failure for frame in frames}

    def errors(self) -> dict[int, Failure]:
        """The failures without their tracebacks."""
        return {row: msgspec.structs.replace(one, traceback="") for row, one in self.failures().items()}

    def reports(self) -> list[Report]:
        found = []
        while received := self.supervisor.receive():
            assert isinstance(received[0], Report | Ready)
            if isinstance(received[0], Report):
                found.append(received[0])
        return found

    def close(self) -> None:
        self.loop.close()
        self.channel.close()
        self.supervisor.close()
        self.link.close()


Make = Callable[..., RunnerRig]


@pytest.fixture
def make_rig() -> Iterator[Make]:
    made: list[RunnerRig] = []

    def make(linger_s: float = 0.0, **handlers: Any) -> RunnerRig:
        made.append(RunnerRig(linger_s, **handlers))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Single:
    """Notes what it is given; raises what the test says for an id."""

    def __init__(self, log: list[Any] | None = None, **raises: BaseException) -> None:
        self.log = [] if log is None else log
        self.raises = raises

    def handle(self, job: Job) -> None:
        self.log.append(job.id)
        if error := self.raises.get(f"id{job.id}"):
            raise error


class Batch:
    """Notes each batch; answers as the test says."""

    max_batch = 3

    def __init__(
        self, log: list[Any] | None = None, answer: Callable[[Sequence[Job]], Any] | None = None
    ) -> None:
        self.log = [] if log is None else log
        self.answer = answer or (lambda jobs: [None] * len(jobs))

    def handle_batch(self, jobs: Sequence[Job]) -> Any:
        self.log.append([job.id for job in jobs])
        return self.answer(jobs)


def test_a_malformed_payload_reaches_no_handler_and_stops_no_other_job(
    make_rig: Make,
) -> None:
    handler = Single()
    worker = make_rig(t=handler)
    worker.dispatch("t", "t", payload=msgspec.Raw(b'"\xff"'))
    worker.dispatch("t", payload="fine")
    worker.run()
    assert handler.log == ["2"]
    assert worker.states() == [FAILED, FAILED, SUCCEEDED]
    assert all(one.malformed and "utf-8" in one.error for one in worker.failures().values())


def test_jobs_run_in_their_order_over_several_frames(make_rig: Make) -> None:
    handler = Single()
    worker = make_rig(t=handler)
    for _ in range(5):
        worker.dispatch("t", "t", "t", "t")
    worker.run()
    assert handler.log == [str(i) for i in range(20)]
    assert worker.states() == [SUCCEEDED] * 20
    assert (worker.failures(), worker.channel.finished) == ({}, 20)


def test_a_handler_sees_the_whole_job(make_rig: Make) -> None:
    seen: list[Job] = []
    handler = Single()
    handler.handle = seen.append  # type: ignore[method-assign]
    worker = make_rig(t=handler)
    worker.dispatch(
        "t", "t", tenant_id="t1", payload={"a": [1]}, metadata=None, retry_count=2, created_at="x"
    )
    worker.run()
    assert seen[1] == Job("1", "t", "t1", "", {"a": [1]}, {}, "x", "s1", "1-0", 2)


def test_jobs_of_one_type_are_gathered_and_the_others_keep_their_places(
    make_rig: Make,
) -> None:
    log: list[Any] = []
    worker = make_rig(a=Batch(log), b=Single(log))
    worker.dispatch("a", "b", "a", "a", "a", "b", "a", "b")
    worker.run()
    assert log == [["0", "2", "3"], "1", ["4", "6"], "5", "7"]
    assert worker.states() == [SUCCEEDED] * 8


def test_a_batch_is_limited_in_bytes_as_its_handler_says_at_the_time(
    make_rig: Make,
) -> None:
    log: list[Any] = []
    handler = Batch(log)
    handler.max_batch_bytes = 1000  # type: ignore[attr-defined]

    def answer(jobs: Sequence[Job]) -> Any:
        handler.max_batch_bytes = 1500  # type: ignore[attr-defined]
        return [None] * len(jobs)

    handler.answer = answer
    worker = make_rig(a=handler, b=Single(log))
    worker.dispatch("a", "b", payload="x" * 400)
    worker.dispatch("a", "a", payload="x" * 400)
    worker.dispatch("a", payload="x" * 5000)
    worker.dispatch("a", "a", payload="x" * 400)
    worker.run()
    assert log == [["0", "2"], "1", ["3"], ["4"], ["5", "6"]]
    assert worker.states() == [SUCCEEDED] * 7


@pytest.mark.parametrize("kind", [Single, Batch])
def test_jobs_that_wait_for_what_is_away_go_back_untried_and_the_others_run(
    kind: Any, make_rig: Make
) -> None:
    log: list[Any] = []
    handler = Single(log, id0=Unavailable("away"))
    if kind is Batch:
        handler = Batch(log)
        handler.answer = lambda jobs: [Unavailable("away")] * len(jobs)
    worker = make_rig(a=handler, b=Single(log))
    worker.dispatch("a", "b", *["a"] * 7)
    worker.dispatch("a", "b")
    worker.stop_after = 3 if kind is Single else 5
    worker.runner.run()
    assert log == ["0", "1", "10"] if kind is Single else [["0", "2", "3"], "1", "10"]
    failures = worker.failures()
    assert worker.states() == [FAILED, SUCCEEDED, *[FAILED] * 8, SUCCEEDED]
    assert failures.keys() == {0, *range(2, 10)}
    assert all(failure.unavailable for failure in failures.values())


def test_a_worker_asks_for_as_many_as_it_takes_of_the_type_at_hand(
    make_rig: Make,
) -> None:
    asked: list[int] = []

    def look(jobs: Any) -> Any:
        asked.append(worker.channel.batch_hint)
        return [None] * len(jobs)

    single = Single()
    single.handle = lambda job: look([job])  # type: ignore[method-assign]
    worker = make_rig(single=single, batch=Batch(answer=look))
    worker.dispatch("single", "batch", "batch", "single")
    worker.run()
    assert asked == [1, Batch.max_batch, 1]


def test_company_that_comes_within_the_linger_goes_along(make_rig: Make) -> None:
    log: list[Any] = []
    worker = make_rig(20.0, a=Batch(log))
    worker.dispatch("a")
    later = threading.Timer(0.05, worker.dispatch, "aa")
    later.start()
    began = time.monotonic()
    worker.stop_after = 3
    worker.runner.run()
    later.join()
    assert log == [["0", "1", "2"]]
    assert time.monotonic() - began < 10, "a full batch does not wait"


@pytest.mark.parametrize(("linger_s", "least_s"), [(0.0, 0.0), (0.3, 0.3)])
def test_no_job_waits_for_company_longer_than_it_may(make_rig: Make, linger_s: float, least_s: float) -> None:
    log: list[Any] = []
    worker = make_rig(linger_s, a=Batch(log))
    worker.dispatch("a")
    began = time.monotonic()
    worker.run()
    assert log == [["0"]]
    assert least_s <= time.monotonic() - began < least_s + 1


def test_no_job_waits_where_another_type_is_next_or_one_job_goes_at_a_time(
    make_rig: Make,
) -> None:
    log: list[Any] = []
    worker = make_rig(20.0, a=Batch(log), b=Single(log))
    worker.dispatch("a", "b")
    began = time.monotonic()
    worker.run()
    assert log == [["0"], "1"]
    assert time.monotonic() - began < 10


def test_whoever_waits_for_company_ends_with_the_supervisor(make_rig: Make) -> None:
    worker = make_rig(20.0, a=Batch())
    worker.dispatch("a")
    worker.supervisor.close()
    began = time.monotonic()
    worker.runner.run()
    assert time.monotonic() - began < 10
    assert worker.states() == [QUEUED], "no job is begun any more"


def test_a_failure_says_why_and_fails_only_its_own_job(make_rig: Make) -> None:
    worker = make_rig(t=Single(id1=ValueError("no"), id3=PermanentError("never"), id4=MemoryError()))
    worker.dispatch(*"tttttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, SUCCEEDED, FAILED, FAILED, SUCCEEDED]
    assert worker.errors() == {
        1: Failure("ValueError: no"),
        3: Failure("PermanentError: never", permanent=True),
        4: Failure("MemoryError: "),
    }


def test_a_batch_answers_for_each_job(make_rig: Make) -> None:
    worker = make_rig(t=Batch(answer=lambda jobs: [None, ValueError("one"), PermanentError("two")]))
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, FAILED]
    assert worker.errors() == {
        1: Failure("ValueError: one"),
        2: Failure("PermanentError: two", permanent=True),
    }


def test_an_outcome_that_is_no_exception_fails_its_own_job_for_good(
    make_rig: Make,
) -> None:
    worker = make_rig(t=Batch(answer=lambda jobs: [None, True, ValueError]))
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, FAILED]
    says = "PermanentError: handle_batch returned {} as this job's outcome: return None or an exception"
    assert worker.errors() == {
        1: Failure(says.format("bool"), permanent=True),
        2: Failure(says.format("type"), permanent=True),
    }


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "says", "permanent"),
    [
        (lambda jobs: [None] * (len(jobs) - 1), "2 outcomes for 3 jobs", True),
        (lambda jobs: [None] * (len(jobs) + 1), "4 outcomes for 3 jobs", True),
        (lambda jobs: [], "0 outcomes for 3 jobs", True),
        (lambda jobs: None, "handle_batch returned NoneType: return a list", True),
        (lambda jobs: dict.fromkeys(range(3)), "handle_batch returned dict: return a list", True),
        (lambda jobs: {1, 2, None}, "handle_batch returned set: return a list", True),
        (lambda jobs: "abc", "handle_batch returned str: return a list", True),
        (lambda jobs: 3, "handle_batch returned int: return a list", True),
        (lambda jobs: _raise(ConnectionError("away")), "ConnectionError: away", False),
        (lambda jobs: _raise(PermanentError("bad batch")), "PermanentError: bad batch", True),
    ],
)
def test_a_batch_that_fails_as_a_whole_fails_every_job(
    make_rig: Make, answer: Callable[[Sequence[Job]], Any], says: str, permanent: bool
) -> None:
    """None may be taken for done: which of them were is not known."""
    worker = make_rig(t=Batch(answer=answer))
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [FAILED] * 3
    failures = worker.failures()
    assert sorted(failures) == [0, 1, 2]
    assert all(says in failure.error and failure.permanent == permanent for failure in failures.values())


def test_stopping_finishes_the_job_under_way_and_begins_no_other(make_rig: Make) -> None:
    worker = make_rig(t=Single())

    def stop_at_two(job: Job) -> None:
        worker.runner.stop = job.id == "2"

    worker.runner._handlers["t"].handle = stop_at_two
    worker.dispatch(*"tttttt")
    worker.runner.run()
    assert worker.states() == [SUCCEEDED] * 3 + [QUEUED] * 3
    assert worker.channel.phase == STOPPING
    assert clear_eventfd(worker.channel.fds[2]), "the reader was not woken"
    assert [held.row for held in worker.handle.table.unsettled()] == list(range(6))


def test_a_stop_that_the_supervisor_requests_needs_no_signal(make_rig: Make) -> None:
    """A handler may ignore or block SIGTERM."""
    worker = make_rig(t=Single())

    def stop_at_two(job: Job) -> None:
        if job.id == "2":
            worker.handle.channel.request_stop()

    worker.runner._handlers["t"].handle = stop_at_two
    worker.dispatch(*"tttttt")
    worker.runner.run()
    assert worker.states() == [SUCCEEDED] * 3 + [QUEUED] * 3
    assert worker.channel.phase == STOPPING


def test_the_limit_stands_while_a_job_runs_and_only_then(make_rig: Make) -> None:
    seen: list[tuple[float, int]] = []

    class Watching:
        timeout = 7.0

        def handle(self, job: Job) -> None:
            left_s = worker.channel.mono_deadline_s - time.monotonic()
            seen.append((left_s, worker.channel.table.state(int(job.id))))
            if job.id == "2":
                raise ValueError

    worker = make_rig(t=Watching())
    worker.dispatch("t")
    worker.dispatch("t", timeout=500)
    worker.dispatch("t", timeout=0.5)
    worker.run()
    for (left_s, state), limit_s in zip(seen, (7.0, 500.0, 0.5), strict=True):
        assert limit_s - 5 < left_s <= limit_s
        assert state == STARTED
    assert (worker.channel.mono_deadline_s, worker.channel.mono_since_s) == (0.0, 0.0)


def test_a_batch_has_the_time_of_all_its_jobs(make_rig: Make) -> None:
    seen: list[float] = []
    worker = make_rig(
        t=Batch(answer=lambda jobs: [seen.append(worker.channel.mono_deadline_s - time.monotonic())] * 3)
    )
    worker.dispatch("t", "t", timeout=100)
    worker.dispatch("t")
    worker.run()
    assert 250 < seen[0] <= 260
    assert worker.channel.mono_deadline_s == 0.0


@pytest.mark.parametrize(("limit_s", "most_s"), [(30, 100), (150, 150), (500, 260)])
def test_a_batch_has_the_limit_of_its_handler(make_rig: Make, limit_s: float, most_s: float) -> None:
    seen: list[float] = []
    handler = Batch(answer=lambda jobs: [seen.append(worker.channel.mono_deadline_s - time.monotonic())] * 3)
    handler.batch_timeout = limit_s  # type: ignore[attr-defined]
    worker = make_rig(t=handler)
    worker.dispatch("t", "t", timeout=100)
    worker.dispatch("t")
    worker.run()
    assert most_s - 5 < seen[0] <= most_s


def test_an_idle_worker_is_woken_by_a_job_and_ends_with_its_supervisor(
    make_rig: Make,
) -> None:
    ran = threading.Event()
    handler = Single()
    handler.handle = lambda job: ran.set()  # type: ignore[method-assign]
    worker = make_rig(t=handler)
    thread = threading.Thread(target=worker.runner.run)
    thread.start()
    try:
        worker.dispatch("t")
        assert ran.wait(WITHIN_S)
    finally:
        worker.supervisor.close()
        thread.join(WITHIN_S)
    assert not thread.is_alive(), "a worker without a supervisor must end"
    assert worker.states() == [SUCCEEDED]


def test_a_worker_that_says_it_is_ready_is_given_jobs_already(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_rig(a=Single())
    worker.channel.phase = STARTING
    said: list[Any] = []

    def send(message: Any) -> bool:
        said.append((message, worker.channel.phase))
        worker.runner.stop = True
        return True

    monkeypatch.setattr(worker.link, "send", send)
    worker.runner.run()
    assert said[0] == (Ready(), READY)


def test_what_is_reported(make_rig: Make) -> None:
    """Durations and waits by type, sizes of batches, the handlers' own counters as differences."""
    handler = Batch()
    handler.counters = {"embedded_tokens": 5}  # type: ignore[attr-defined]
    worker = make_rig(a=handler, same=handler)
    worker.dispatch("a", "a", "a", created_at="2026-01-02T10:00:07.123456789Z")
    worker.dispatch("a", created_at="yesterday")
    worker.dispatch("a", created_at="0001-01-01T00:00:00")
    worker.run()
    reports = worker.reports()
    counts = [count for report in reports for count in report.counts]
    assert sum(by for name, _, by in counts if name == "z_novel_embedded_tokens_total") == 5
    values: dict[str, tuple[int, float]] = {}
    for name, labels, buckets, total in (h for report in reports for h in report.histograms):
        count, before = values.get(name, (0, 0.0))
        values[name] = (count + sum(buckets), before + total)
        assert labels == (() if name == "z_novel_batch_jobs" else ("a",))
    assert values["z_novel_job_duration_seconds"][0] == 5
    assert values["z_novel_batch_jobs"] == (2, 5.0)
    waits, wait_s = values["z_novel_job_wait_seconds"]
    assert waits == 3, "what is no time is left out"
    assert 3 * 2.8 < wait_s <= 3 * 2.9


def test_trouble_of_any_length_is_reported(make_rig: Make) -> None:
    handler = Single()
    handler.healthy = lambda: _raise(ConnectionError("字" * 10**6))  # type: ignore[attr-defined]
    worker = make_rig(t=handler)
    worker.dispatch("t")
    worker.runner._check_health()
    worker.run()
    trouble = worker.reports()[-1].trouble
    assert trouble is not None
    assert trouble.startswith("t: ConnectionError: 字字")


def test_many_failures_wait_for_the_reader_to_make_room(make_rig: Make) -> None:
    """More failures than the ring of outcomes takes: none is lost and none is said twice."""
    worker = make_rig(t=Single(**{f"id{i}": ValueError("字" * 4000) for i in range(400)}))
    worker.dispatch(*["t"] * 400)
    thread = threading.Thread(target=worker.run)
    thread.start()
    rows: list[int] = []
    give_up_at = time.monotonic() + WITHIN_S
    while len(rows) < 400 and time.monotonic() < give_up_at:
        for view, tail in worker.channel.outcomes.frames():
            rows.append(msgspec.msgpack.decode(view, type=OutcomeFrame).row)
            worker.channel.outcomes.release(tail)
        os.sched_yield()
    worker.runner.stop = True
    thread.join(WITHIN_S)
    assert rows == list(range(400))


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


def test_a_handler_that_exits_leaves_no_noise_behind() -> None:
    code = """if True:
        import asyncio
        from jobworker.worker.event_loop import EventLoop
        kept = []
        async def setup():
            kept.append(asyncio.create_task(asyncio.sleep(60)))
        async def work():
            await asyncio.sleep(0)
            raise SystemExit(7)
        loop = EventLoop()
        loop.run(setup(), keep_tasks=True)
        loop.run(work())"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


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


class Hanging(Single):
    """Its check of health hangs until the test says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.answers = 0, threading.Event()

    def healthy(self) -> None:
        self.calls += 1
        self.answers.wait(WITHIN_S)


def test_a_hanging_check_of_health_stops_its_own_type_alone(make_rig: Make) -> None:
    hanging, other = Hanging(), Single()
    worker = make_rig(t=hanging, same=hanging, o=other)
    worker.runner._health = HealthChecks(worker.runner._handlers.values(), within_s=0.05)
    for _ in range(3):
        worker.runner._check_health()
    worker.runner.report()
    assert worker.reports()[-1].trouble == "t: healthy() has not returned within 5 s"
    assert hanging.calls == 1, "no second call beside the first"
    worker.dispatch("t", "o", "same", "t")
    while worker.states()[1] != SUCCEEDED or QUEUED in worker.states():
        worker.runner.run_once(0.1)
    assert worker.states() == [FAILED, SUCCEEDED, FAILED, FAILED]
    assert all(failure.unavailable for failure in worker.failures().values())
    assert hanging.log == []

    hanging.answers.set()
    for thread in threading.enumerate():
        if thread.name == "healthy":
            thread.join(WITHIN_S)
    worker.runner._check_health()
    worker.dispatch("t")
    worker.runner.run_once(0.1)
    worker.runner.report()
    assert hanging.log == ["4"]
    assert worker.reports()[-1].trouble is None


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


def test_an_exit_in_the_check_of_health_ends_the_worker(make_rig: Make) -> None:
    handler = Single()
    handler.healthy = lambda: _raise(SystemExit(3))  # type: ignore[attr-defined]
    worker = make_rig(t=handler)
    with pytest.raises(SystemExit):
        worker.runner._check_health()


@pytest.mark.parametrize("name", ["run_succeeding", "run_failing"])
def test_killed_at_any_instruction(name: str) -> None:
    assert int(programs.run("kill_scenarios", name)) > 100


def test_a_job_past_its_first_timeout_is_given_no_further_jobs_to_wait_behind_it(
    make_rig: Make,
) -> None:
    hints = []

    class Long:
        timeout, max_timeout = 0.02, 60.0
        max_batch = 4

        def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
            report_progress()
            hints.append(one.channel.batch_hint)
            started = time.monotonic()
            while time.monotonic() - started < 0.1:
                pass  # the runner's clock is the real one
            report_progress()
            hints.append(one.channel.batch_hint)
            return [None] * len(jobs)

    one = make_rig(long=Long())
    one.dispatch("long")
    one.run()
    assert hints == [4, 0]
    assert one.channel.mono_deadline_s == 0
    assert one.channel.batch_hint == 4, "without it, the reader would give it no job any more"


@pytest.mark.parametrize(("timeout", "limit_s"), [(0.001, 0.1), (90, 90.0), (1e300, 86_400.0)])
def test_the_timeout_of_a_job_has_a_least_and_a_largest_value(
    make_rig: Make, timeout: float, limit_s: float
) -> None:
    class Limit:
        def handle(self, job: Job) -> None:
            channel = worker.channel
            limits.append(channel.mono_deadline_s - channel.mono_since_s)

    limits: list[float] = []
    worker = make_rig(t=Limit())
    worker.dispatch("t", timeout=timeout)
    worker.run()
    assert limits == [pytest.approx(limit_s)]
