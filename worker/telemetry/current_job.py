"""The job(s) that this process runs; used to tag log lines and spans."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

#: Metadata of a producer that log lines repeat, so that its request is found in the log.
_METADATA_FIELDS = ("request_id", "trace_id")


class JobLike(Protocol):
    """A job, as a handler receives it or as the stream holds it."""

    @property
    def id(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def tenant_id(self) -> str: ...
    @property
    def project_id(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str] | None: ...


class CurrentJob:
    """Holder of the running job: ``jobs`` is one job, a batch, or empty.

    ``extend_deadline`` moves its deadline; None outside a worker.

    This is no context variable: a worker runs one job or batch at a time, and threads that its handler starts
    belong to it.
    """

    __slots__ = ("extend_deadline", "jobs")

    def __init__(self) -> None:
        self.jobs: JobLike | Sequence[JobLike] = ()
        self.extend_deadline: Callable[[], None] | None = None


current = CurrentJob()


def report_progress() -> None:
    """Report that the running job or batch has done a part of its work: its timeout starts again.

    The deadline moves until ``max_timeout`` of the handler is over. It does not move for a handler without
    one, or if the job has a timeout of its own. Outside a worker nothing happens. Report work that is done,
    never that a thread is alive: a hung job must run into its timeout.
    """
    if current.extend_deadline is not None:
        current.extend_deadline()


def log_fields(job: JobLike) -> dict[str, str]:
    """Log fields that identify a job; empty ones are left out."""
    metadata = job.metadata or {}
    fields = {
        "job_id": job.id,
        "task_type": job.type,
        "tenant_id": job.tenant_id,
        "project_id": job.project_id,
        **{name: metadata[name] for name in _METADATA_FIELDS if name in metadata},
    }
    if "trace_id" not in fields and (trace_id := traceparent_trace_id(metadata.get("traceparent", ""))):
        fields["trace_id"] = trace_id
    return {name: value for name, value in fields.items() if value}


def traceparent_trace_id(traceparent: str) -> str:
    """Trace id in a W3C ``traceparent``; empty if the header is malformed."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


def current_log_fields() -> dict[str, object]:
    """Log fields of the running job. For a batch: those that all jobs share, and their number as ``jobs``."""
    jobs = current.jobs
    if not isinstance(jobs, Sequence):
        return {**log_fields(jobs)}
    if len(jobs) <= 1:
        return {**log_fields(jobs[0])} if jobs else {}
    first, *others = map(log_fields, jobs)
    common = {name: value for name, value in first.items() if all(o.get(name) == value for o in others)}
    return {"jobs": len(jobs), **common}
