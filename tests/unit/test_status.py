"""The line for `systemctl status`."""

from jobworker.worker.supervision.status import StatusLine, Totals


def totals(done: float, **flags: float) -> Totals:
    return {
        "z_novel_jobs_completed_total": [{"task_type": "a", "value": done}, {"task_type": "b", "value": 10}],
        "z_novel_retry_scheduled": [{"stream": "s", "value": 2}, {"stream": "t", "value": 1}],
        "z_novel_dlq_length": [{"stream": "s", "value": 4}],
        "z_novel_paused": [{"task_type": "a", "value": flags.get("paused", 0)}],
        "z_novel_circuit_open": [{"task_type": "b", "value": flags.get("opened", 0)}],
    }


def test_how_it_does_at_a_glance() -> None:
    headline = StatusLine(8)
    headline.render(totals(0), 100.0)
    assert not headline.due(101.0)
    assert headline.due(102.0)
    assert headline.render(totals(1248), 104.0) == "8 workers, 312 jobs/s, 3 retrying, 4 dead"
    assert headline.render(totals(1248), 106.0) == "8 workers, 0 jobs/s, 3 retrying, 4 dead"


def test_the_first_rate_is_none() -> None:
    assert StatusLine(1).render({}, 5.0) == "1 worker, 0 jobs/s, 0 retrying, 0 dead"


def test_what_waits_is_named() -> None:
    line = StatusLine(1).render(totals(0, paused=1, opened=1), 5.0)
    assert line.endswith("; a is paused; b waits for its dependency")
