"""What a handler's author and a producer in Python use; everything else is the service's own.

A name is imported when it is first used: the supervisor needs none, and the modules would take 0.8 MiB of its
memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

#: The module of each name.
_MODULES = {
    name: module
    for module, names in {
        ".devices": "NO_DEVICE device_for_slot device_names visible_gpus",
        ".envelope": "Job",
        ".errors": "ConfigurationError Fenced JobCancelled PermanentError RateLimited "
        "StoreUnavailable Unavailable",
        ".functions.job_function": "job",
        ".handler": "BatchHandler Handler JobHandler",
        ".new_job": "NewJob",
        ".producer": "Producer UnknownDestination",
        ".producer_batch": "BatchChanged BatchCounts BatchFinished OpenBatch",
        ".results": "CancelOutcome JobResult Returned",
        ".settings": "Settings",
        ".telemetry.current_job": "report_progress",
        ".telemetry.trace": "span",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    """Import a public name. Raises AttributeError for any other."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
