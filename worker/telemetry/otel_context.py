"""How a trace travels in a job's metadata: W3C ``traceparent`` and ``tracestate``, or a bare ``trace_id``."""

import re
from collections.abc import Mapping
from hashlib import blake2b

from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_HEX = re.compile("[0-9a-f]{16}|[0-9a-f]{32}")


def sent_by(metadata: Mapping[str, str]) -> SpanContext | None:
    """The producer's span, where the metadata name one."""
    context = get_current_span(_propagator.extract(metadata, context=Context())).get_span_context()
    return context if context.is_valid else None


def trace_id_of(metadata: Mapping[str, str], job_id: str) -> int:
    """The trace of a job without a ``traceparent``.

    A ``trace_id`` of 16 or 32 hexadecimal digits (dashes aside) is taken as it is. Any other, and a job's own
    id where there is none, is turned into one, the same each time: every try of a job is in one trace.
    """
    given = metadata.get("trace_id", "")
    plain = given.replace("-", "").lower()
    if _HEX.fullmatch(plain) and int(plain, 16):
        return int(plain, 16)
    return number_of(given or job_id, 16)


def number_of(text: str, size_bytes: int) -> int:
    """A number of that size derived from the text; never 0, which means none."""
    return int.from_bytes(blake2b(text.encode(), digest_size=size_bytes).digest(), "big") or 1


def carried(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """The metadata with the span that the caller is in, if it is in one and names none itself."""
    carrier = dict(metadata or {})
    if "traceparent" not in carrier:
        _propagator.inject(carrier)
    return carrier or (None if metadata is None else {})
