"""Tracing hooks of reader, workers and handlers; no-ops until `install`.

This file imports no tracing library: with traces off, a hook costs one global lookup.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from ..envelope import Header, Job
from ..handler import BoundHandler
from .current_job import current

Attributes = Mapping[str, str | int | float]


class Tracing(Protocol):
    """A tracing backend that turns the hooks into spans."""

    def dispatched(self, stream: str, entry_id: str, data: bytes) -> None:
        """The job was dispatched to a worker: the end of its time in the queue."""

    def settled(
        self, what: str, envelope: Header, stream: str, entry_id: str, attributes: Attributes
    ) -> None:
        """An attempt failed; ``what`` is the decision that follows."""

    def watch(self, handler: BoundHandler) -> None:
        """Make a span for each job that the handler runs."""

    def span(self, name: str, jobs: Sequence[Job], attributes: Attributes) -> AbstractContextManager[object]:
        """A named part of running these jobs."""

    def request(
        self, name: str, headers: Mapping[str, str], facts: Attributes
    ) -> AbstractContextManager[object]:
        """An HTTP request, below the span that its headers name. ``facts`` are read at its end."""

    def part(self, name: str, attributes: Attributes) -> AbstractContextManager[object]:
        """A named part of the request that the calling task answers."""

    def close(self) -> None:
        """Send the remaining spans, within about two seconds."""


_tracing: Tracing | None = None
_NO_SPAN = nullcontext()


def install(tracing: Tracing | None) -> None:
    """Turn traces on in this process; None turns them off."""
    global _tracing
    _tracing = tracing


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the variables of OpenTelemetry request traces, by an exporter or an endpoint."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter != "none" and bool(exporter or any(environment.get(name) for name in endpoints))


def enabled() -> bool:
    """Whether traces are on in this process."""
    return _tracing is not None


def dispatched(stream: str, entry_id: bytes, data: bytes) -> None:
    """Record that the entry was dispatched to a worker."""
    if _tracing is not None:
        _tracing.dispatched(stream, entry_id.decode(), data)


def settled(
    what: str, envelope: Header, stream: str, entry_id: bytes, **attributes: str | int | float
) -> None:
    """Record a failed attempt; ``what`` is ``retry``, ``give up`` or ``worker died``."""
    if _tracing is not None:
        _tracing.settled(what, envelope, stream, entry_id.decode(), attributes)


def watch(handlers: Mapping[str, BoundHandler]) -> None:
    """Make a span for each job of these handlers. With traces off, the handlers stay unchanged."""
    if _tracing is not None:
        for handler in handlers.values():
            _tracing.watch(handler)


def span(
    name: str, jobs: Sequence[Job] | None = None, **attributes: str | int | float
) -> AbstractContextManager[object]:
    """Context manager for a named part of a handler, shown below each job in its producer's trace.

    Without ``jobs`` it belongs to all running jobs. Costs next to nothing with traces off.
    """
    if _tracing is None:
        return _NO_SPAN
    if jobs is None:
        running = current.jobs if isinstance(current.jobs, Sequence) else [current.jobs]
        jobs = [job for job in running if isinstance(job, Job)]
    return _tracing.span(name, jobs, attributes)


def request(name: str, headers: Mapping[str, str], facts: Attributes) -> AbstractContextManager[object]:
    """Context manager for an HTTP request; it ends below the caller's span, if ``headers`` name one.

    ``facts`` become attributes at its end. A ``http.response.status_code`` of 500 or more marks it as failed.
    """
    return _NO_SPAN if _tracing is None else _tracing.request(name, headers, facts)


def part(name: str, **attributes: str | int | float) -> AbstractContextManager[object]:
    """Context manager for a named part of the request that this task answers."""
    return _NO_SPAN if _tracing is None else _tracing.part(name, attributes)


def close() -> None:
    """Send the remaining spans before the process exits."""
    if _tracing is not None:
        _tracing.close()
