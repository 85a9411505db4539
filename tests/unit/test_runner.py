"""The worker's loop in one process: which jobs run, how they fail, and what the reader is told."""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import msgspec
import pytest

from jobworker.worker import Job, PermanentError, Unavailable, report_progress
from jobworker.worker.health_check import HealthChecks
from jobworker.worker.ipc.channel import READY, STARTING, STOPPING, OutcomeFrame, clear_eventfd
from jobworker.worker.ipc.control import Ready
from jobworker.worker.ipc.inflight import FAILED, QUEUED, RETURNED, STARTED, SUCCEEDED, InFlight
from jobworker.worker.outcome import Failure
from jobworker.worker.runner import Runner
from support import programs
from support.runner_rig import WITHIN_S, Batch, Make, Single


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


def test_an_outcome_that_is_no_exception_fails_its_own_job_for_good(
    make_rig: Make,
) -> None:
    worker = make_rig(t=Batch(answer=lambda jobs: [None, True, ValueError]))
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, FAILED]
    says = (
        "PermanentError: handle_batch returned {} as this job's outcome: return None, "
        "Returned(value) or an exception"
    )
    assert worker.errors() == {
        1: Failure(says.format("bool"), permanent=True),
        2: Failure(says.format("type"), permanent=True),
    }


def _raise(error: BaseException) -> Any:
    raise error


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


@pytest.mark.parametrize("name", ["run_succeeding", "run_failing", "run_keeping"])
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
    while worker.states()[-1] != SUCCEEDED:
        worker.runner.run_once(0.1)
    worker.runner.report()
    assert hanging.log == ["4"]
    assert worker.reports()[-1].trouble is None


def test_an_exit_in_the_check_of_health_ends_the_worker(make_rig: Make) -> None:
    handler = Single()
    handler.healthy = lambda: sys.exit(3)  # type: ignore[attr-defined]
    worker = make_rig(t=handler)
    with pytest.raises(SystemExit):
        worker.runner._check_health()


#: The functions between the choice of a job and the call of its handler.
_STARTING = {one.__code__ for one in (Runner._run_one, Runner._run_batch, Runner._begin, InFlight.begin)}


def act_at(number: int, act: Callable[[], object], call: Callable[[], object]) -> bool:
    """Call, and act before that instruction of the functions that start a job; False if there are fewer."""
    left = number

    def inside(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if event == "opcode":
            if left == 0:
                act()
            left -= 1
        return inside

    def entered(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code not in _STARTING:
            return None
        frame.f_trace_opcodes = True
        return inside

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return left < 0


@pytest.mark.parametrize("kind", [Single, Batch])
def test_a_worker_that_is_stopped_at_any_instruction_while_its_job_is_taken_back_agrees_with_the_reader(
    kind: Any, make_rig: Make
) -> None:
    """While it is stopped, the reader asks for the job, waits, and takes it if it is not started."""
    outcomes = set()
    for number in itertools.count():
        handler = kind()
        worker = make_rig(t=handler)
        worker.dispatch("t")
        table, taken = worker.channel.table, list[int]()

        def ask_and_take(table: InFlight = table, taken: list[int] = taken) -> None:
            table.ask_back([0])
            taken += table.take_back([0])

        acted = act_at(number, ask_and_take, lambda worker=worker: worker.runner.run_once(0.0))  # type: ignore[misc]
        came_back = table.state(0) == RETURNED and not taken
        assert [bool(handler.log), bool(taken), came_back].count(True) == 1, number
        outcomes.add((bool(handler.log), bool(taken), came_back))
        if not acted:
            break
    assert outcomes == {(True, False, False), (False, True, False), (False, False, True)}
