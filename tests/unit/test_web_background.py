"""Background tasks of the page: progress, outcome, errors and their limit."""

import threading

import pytest

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.web.background import BackgroundTask, BackgroundTasks, TooManyTasks

#: How long a thread may take, on a busy machine.
ENDED_WITHIN_S = 30.0


def test_a_task_reports_progress_and_outcome() -> None:
    def run(task: BackgroundTask) -> str:
        task.total = 3
        task.add_scanned(2)
        task.add_scanned(1)
        return "3 requeued"

    tasks = BackgroundTasks()
    task = tasks.start("Requeue", "/dead", run)
    assert task.ended.wait(ENDED_WITHIN_S)
    assert (task.scanned, task.total, task.outcome, task.error) == (3, 3, "3 requeued", "")
    assert tasks.get(task.number) is task
    assert tasks.get(99) is None


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (StoreUnavailable("the store did not answer"), "the store did not answer"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_task_that_fails_ends_with_an_error(error: Exception, shown: str) -> None:
    def run(task: BackgroundTask) -> str:
        raise error

    task = BackgroundTasks().start("Requeue", "/dead", run)
    assert task.ended.wait(ENDED_WITHIN_S)
    assert (task.outcome, task.error) == ("", shown)


def test_a_fifth_task_is_refused_until_one_has_ended() -> None:
    gate = threading.Event()

    def run(task: BackgroundTask) -> str:
        gate.wait(ENDED_WITHIN_S)
        return "done"

    tasks = BackgroundTasks()
    running = [tasks.start("Requeue", "/dead", run) for _ in range(4)]
    with pytest.raises(TooManyTasks):
        tasks.start("Requeue", "/dead", run)
    gate.set()
    assert all(task.ended.wait(ENDED_WITHIN_S) for task in running)
    last = tasks.start("Requeue", "/dead", run)
    assert last.ended.wait(ENDED_WITHIN_S)
