"""Status line for `systemctl status`, and the hand-over of /status to HTTP threads."""

import select
import threading
from typing import Any

import pytest

from jobworker.worker.supervision import status
from jobworker.worker.supervision.signals import SignalQueue
from jobworker.worker.supervision.status import StatusLine, StatusMailbox, Totals


def totals(completed: float, **flags: float) -> Totals:
    return {
        "z_novel_jobs_completed_total": [
            {"task_type": "a", "value": completed},
            {"task_type": "b", "value": 10},
        ],
        "z_novel_retry_scheduled": [{"stream": "s", "value": 2}, {"stream": "t", "value": 1}],
        "z_novel_dlq_length": [{"stream": "s", "value": 4}],
        "z_novel_paused": [{"task_type": "a", "value": flags.get("paused", 0)}],
        "z_novel_circuit_open": [{"task_type": "b", "value": flags.get("opened", 0)}],
        "z_novel_crash_circuits_open": [{"task_type": "c", "value": flags.get("crashes", 0)}],
    }


def test_the_line_shows_the_rate_since_the_last_line_and_the_backlog() -> None:
    line = StatusLine(8)
    line.render(totals(0), 100.0)
    assert not line.due(101.0)
    assert line.due(102.0)
    assert line.render(totals(1248), 104.0) == "8 workers, 312 jobs/s, 3 retrying, 4 dead"
    assert line.render(totals(1248), 106.0) == "8 workers, 0 jobs/s, 3 retrying, 4 dead"


def test_the_first_rate_is_zero() -> None:
    assert StatusLine(1).render({}, 5.0) == "1 worker, 0 jobs/s, 0 retrying, 0 dead"


def test_paused_types_and_open_circuits_are_named() -> None:
    line = StatusLine(1).render(totals(0, paused=1, opened=1, crashes=2), 5.0)
    assert line.endswith("; a is paused; b waits for its dependency; c kills workers and is slowed down")


def test_an_http_thread_gets_a_status_that_the_loop_makes_for_it() -> None:
    mailbox = StatusMailbox()
    answers: list[dict[str, Any] | None] = []
    client = threading.Thread(target=lambda: answers.append(mailbox.request()))
    client.start()
    made = 0

    def make_status() -> dict[str, Any]:
        nonlocal made
        made += 1
        return {"made": made}

    while client.is_alive():  # as the supervisor's loop does, which runs ten times a second
        mailbox.answer(make_status)
        client.join(0.01)
    assert answers == [{"made": 1}]
    mailbox.answer(make_status)
    assert made == 1, "without a request the loop makes no status"


def test_a_loop_that_does_not_answer_in_time_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_ANSWER_TIMEOUT_S", 0.01)
    assert StatusMailbox().request() is None


def test_a_request_wakes_the_loop() -> None:
    mailbox = StatusMailbox()
    with SignalQueue() as queue:
        mailbox.wake = queue.wake
        client = threading.Thread(target=mailbox.request)
        client.start()
        assert select.select([queue], [], [], 5.0)[0]
        assert queue.take() == []
        mailbox.answer(dict)
        client.join(5.0)
    assert not client.is_alive()
