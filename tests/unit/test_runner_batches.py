"""The worker's loop with batches: what is gathered, for how long, and how a batch fails."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jobworker.worker import Job, PermanentError
from jobworker.worker.ipc.inflight import FAILED, QUEUED, SUCCEEDED
from jobworker.worker.outcome import Failure
from support.runner_rig import Batch, Make, Single


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
    assert least_s <= time.monotonic() - began < least_s + 10


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


def test_a_batch_answers_for_each_job(make_rig: Make) -> None:
    worker = make_rig(t=Batch(answer=lambda jobs: [None, ValueError("one"), PermanentError("two")]))
    worker.dispatch(*"ttt")
    worker.run()
    assert worker.states() == [SUCCEEDED, FAILED, FAILED]
    assert worker.errors() == {
        1: Failure("ValueError: one"),
        2: Failure("PermanentError: two", permanent=True),
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
