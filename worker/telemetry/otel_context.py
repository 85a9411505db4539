"""Trace context in a job's metadata: W3C ``traceparent`` and ``tracestate``, or a plain ``trace_id``."""

import re
from collections.abc import Mapping
from hashlib import blake2b

from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_HEX = re.compile("[0-9a-f]{16}|[0-9a-f]{32}")


def sent_by(metadata: Mapping[str, str]) -> SpanContext | None:
    """Span context of the producer; None if the metadata have none."""
    context = get_current_span(_propagator.extract(metadata, context=Context())).get_span_context()
    return context if context.is_valid else None


def derived_trace_id(metadata: Mapping[str, str], job_id: str) -> int:
    """Trace id of a job without a ``traceparent``.

    A ``trace_id`` of 16 or 32 hexadecimal digits (dashes aside) is used as it is. Any other is hashed, and
    without one the job id is hashed. The result is always the same, so all attempts of a job share a trace.
    """
    given = metadata.get("trace_id", "")
    plain = given.replace("-", "").lower()
    if _HEX.fullmatch(plain) and int(plain, 16):
        return int(plain, 16)
    return stable_hash(given or job_id, 16)


def stable_hash(text: str, size_bytes: int) -> int:
    """Hash of the text as a number of that size. Never 0, which is the invalid id of OpenTelemetry."""
    return int.from_bytes(blake2b(text.encode(), digest_size=size_bytes).digest(), "big") or 1


def with_traceparent(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """The metadata with the caller's current span, if there is one and they do not name one already."""
    carrier = dict(metadata or {})
    if "traceparent" not in carrier:
        _propagator.inject(carrier)
    return carrier or (None if metadata is None else {})
