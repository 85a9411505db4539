"""What a handler's author and a producer in Python use; everything else is the service's own."""

from .envelope import Job
from .errors import ConfigurationError, PermanentError, Unavailable
from .handler import Handler
from .producer import NewJob, Producer
from .settings import Settings

__all__ = [
    "ConfigurationError",
    "Handler",
    "Job",
    "NewJob",
    "PermanentError",
    "Producer",
    "Settings",
    "Unavailable",
]
