"""The running job: the log fields by which an operator finds it."""

from collections.abc import Iterator
from typing import Any

import pytest

from jobworker.worker import Job
from jobworker.worker.telemetry.current_job import current, current_log_fields, log_fields

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(autouse=True)
def no_job() -> Iterator[None]:
    yield
    current.jobs = ()


def a_job(id: str, **more: Any) -> Job:
    fields = {"type": "noop", "tenant_id": "t1", "project_id": "p1", "payload": None, "metadata": {},
              "created_at": "", "stream": "s", "entry_id": "1-1", "retry_count": 0}  # fmt: skip
    return Job(id=id, **(fields | more))


def test_a_job_has_its_ids_and_the_ids_of_its_request() -> None:
    metadata = {"request_id": "r1", "trace_id": "t-9", "priority": "5"}
    current.jobs = a_job("j1", metadata=metadata)
    assert current_log_fields() == {
        "job_id": "j1", "task_type": "noop", "tenant_id": "t1", "project_id": "p1",
        "request_id": "r1", "trace_id": "t-9",
    }  # fmt: skip


def test_a_batch_has_its_size_and_the_fields_that_its_jobs_share() -> None:
    current.jobs = [a_job("j1", project_id="p1"), a_job("j2", project_id="p2"), a_job("j3", tenant_id="t1")]
    assert current_log_fields() == {"jobs": 3, "task_type": "noop", "tenant_id": "t1"}


def test_a_batch_of_one_is_a_job() -> None:
    current.jobs = [a_job("j1")]
    assert current_log_fields() == log_fields(a_job("j1"))


def test_without_a_job_there_are_no_fields() -> None:
    assert current_log_fields() == {}


def test_the_trace_id_of_a_traceparent_is_used() -> None:
    metadata = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    assert log_fields(a_job("j", metadata=metadata))["trace_id"] == TRACE_ID


@pytest.mark.parametrize("traceparent", ["nonsense", "00-short-00f067aa0ba902b7-01", ""])
def test_a_malformed_traceparent_gives_no_trace_id(traceparent: str) -> None:
    assert "trace_id" not in log_fields(a_job("j", metadata={"traceparent": traceparent}))


def test_an_empty_field_is_left_out() -> None:
    assert "tenant_id" not in log_fields(a_job("j", tenant_id=""))
