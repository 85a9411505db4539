"""Tracing hooks of reader, workers and handlers; no-ops until traces are on.

No tracing library is imported here, so that it costs a look at one name where traces are off.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ..envelope import Envelope, Job
from ..handler import BoundHandler
from .current_job import current

Attributes = Mapping[str, str | int | float]


class Tracing(Protocol):
    """What makes spans of it."""

    def dispatched(self, stream: str, entry_id: str, data: bytes) -> None:
        """A worker was given the job; until now it has waited."""

    def settled(
        self, what: str, envelope: Envelope, stream: str, entry_id: str, attributes: Attributes
    ) -> None:
        """A try came to nothing, and this was decided."""

    def watch(self, handler: BoundHandler) -> None:
        """From now on a span for each job that the handler runs."""

    def span(self, name: str, jobs: Sequence[Job], attributes: Attributes) -> AbstractContextManager[object]:
        """A part of running these jobs."""

    def close(self) -> None:
        """Send what is left; takes a moment at most."""


_tracing: Tracing | None = None
_NOTHING = nullcontext()


def install(tracing: Tracing | None) -> None:
    """Turn traces on in this process, or off."""
    global _tracing
    _tracing = tracing


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables ask for traces: by naming an exporter or where it sends to."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter != "none" and bool(exporter or any(environment.get(name) for name in endpoints))


def enabled() -> bool:
    """Whether spans are made in this process."""
    return _tracing is not None


def dispatched(stream: str, entry_id: bytes, data: bytes) -> None:
    """The entry was given to a worker."""
    if _tracing is not None:
        _tracing.dispatched(stream, entry_id.decode(), data)


def settled(
    what: str, envelope: Envelope, stream: str, entry_id: bytes, **attributes: str | int | float
) -> None:
    """A try of the job came to nothing: ``retry``, ``give up`` or ``worker died``."""
    if _tracing is not None:
        _tracing.settled(what, envelope, stream, entry_id.decode(), attributes)


def watch(handlers: Mapping[str, BoundHandler]) -> None:
    """A span for each job of these handlers; where traces are off, they stay as they are."""
    if _tracing is not None:
        for handler in handlers.values():
            _tracing.watch(handler)


def span(
    name: str, jobs: Sequence[Job] | None = None, **attributes: str | int | float
) -> AbstractContextManager[object]:
    """A named part of what a handler does, shown below each of the jobs in the traces of their producers.

    Without ``jobs`` it belongs to all that are being run. Costs next to nothing where traces are off.
    """
    if _tracing is None:
        return _NOTHING
    if jobs is None:
        running = current.jobs if isinstance(current.jobs, Sequence) else [current.jobs]
        jobs = [job for job in running if isinstance(job, Job)]
    return _tracing.span(name, jobs, attributes)


def close() -> None:
    """Send what is left before the process ends."""
    if _tracing is not None:
        _tracing.close()
