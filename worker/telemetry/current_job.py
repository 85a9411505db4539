"""The job(s) that this process runs; used to tag log lines and spans."""

from collections.abc import Mapping, Sequence
from typing import Protocol

#: What a producer may put into ``metadata`` to find a job again.
_TOLD = ("request_id", "trace_id")


class JobLike(Protocol):
    """A job, as its handler or as the wire has it."""

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
    """``jobs``: one job, several that go together, or none. A worker does one thing at a time, and what its
    handlers start in threads of their own belongs to it, which is why this is no context variable."""

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        self.jobs: JobLike | Sequence[JobLike] = ()


current = CurrentJob()


def log_fields(job: JobLike) -> dict[str, str]:
    """The fields by which a job is found in logs, as far as it has them."""
    metadata = job.metadata or {}
    fields = {
        "job_id": job.id,
        "task_type": job.type,
        "tenant_id": job.tenant_id,
        "project_id": job.project_id,
        **{name: metadata[name] for name in _TOLD if name in metadata},
    }
    if "trace_id" not in fields and (trace_id := trace_id_of(metadata.get("traceparent", ""))):
        fields["trace_id"] = trace_id
    return {name: value for name, value in fields.items() if value}


def trace_id_of(traceparent: str) -> str:
    """The trace that a W3C ``traceparent`` names; empty where it is none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else ""


def current_log_fields() -> dict[str, object]:
    """What is being run: its story, or what the stories of all jobs have in common, and how many they are."""
    jobs = current.jobs
    if not isinstance(jobs, Sequence):
        return {**log_fields(jobs)}
    if len(jobs) <= 1:
        return {**log_fields(jobs[0])} if jobs else {}
    first, *others = map(log_fields, jobs)
    common = {name: value for name, value in first.items() if all(o.get(name) == value for o in others)}
    return {"jobs": len(jobs), **common}
