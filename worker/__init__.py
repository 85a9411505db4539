"""What a handler's author and a producer in Python use; everything else is the service's own."""

from .devices import NO_MODEL, place_of, visible_gpus
from .envelope import Job
from .errors import ConfigurationError, Fenced, PermanentError, StoreUnavailable, Unavailable
from .fence import Admission, Fence, Intent, Rebuilds, Taken
from .handler import Handler
from .opening import open_fence, open_rebuilds, open_records
from .producer import NewJob, Producer
from .records import Put, Record, RecordKey, Records
from .settings import Settings
from .trace import span

__all__ = [
    "NO_MODEL",
    "Admission",
    "ConfigurationError",
    "Fence",
    "Fenced",
    "Handler",
    "Intent",
    "Job",
    "NewJob",
    "PermanentError",
    "Producer",
    "Put",
    "Rebuilds",
    "Record",
    "RecordKey",
    "Records",
    "Settings",
    "StoreUnavailable",
    "Taken",
    "Unavailable",
    "open_fence",
    "open_rebuilds",
    "open_records",
    "place_of",
    "span",
    "visible_gpus",
]
