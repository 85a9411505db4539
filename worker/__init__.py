"""What a handler's author and a producer in Python use; everything else is the service's own."""

from .devices import NO_DEVICE, device_for_slot, device_names, visible_gpus
from .envelope import Job
from .errors import (
    ConfigurationError,
    Fenced,
    JobCancelled,
    PermanentError,
    RateLimited,
    StoreUnavailable,
    Unavailable,
)
from .functions.job_function import job
from .handler import BatchHandler, Handler, JobHandler
from .new_job import NewJob
from .producer import Producer, UnknownDestination
from .producer_batch import BatchChanged, BatchCounts, BatchFinished, OpenBatch
from .results import CancelOutcome, JobResult, Returned
from .settings import Settings
from .telemetry.current_job import report_progress
from .telemetry.trace import span

__all__ = [
    "NO_DEVICE",
    "BatchChanged",
    "BatchCounts",
    "BatchFinished",
    "BatchHandler",
    "CancelOutcome",
    "ConfigurationError",
    "Fenced",
    "Handler",
    "Job",
    "JobCancelled",
    "JobHandler",
    "JobResult",
    "NewJob",
    "OpenBatch",
    "PermanentError",
    "Producer",
    "RateLimited",
    "Returned",
    "Settings",
    "StoreUnavailable",
    "Unavailable",
    "UnknownDestination",
    "device_for_slot",
    "device_names",
    "job",
    "report_progress",
    "span",
    "visible_gpus",
]
