"""OpenTelemetry spans for the jobs of this process, sent to the collector that its variables name.

A job belongs to the trace of its producer. Below the producer's span is ``queue``: the reader makes it when
it dispatches the job. Below that is ``process``, which the worker makes, and below that the handler's spans.
Reader and worker exchange no span context: the span id of ``queue`` is a hash of the entry id.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from opentelemetry import context as contexts
from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from ..envelope import Header, Job, read_header
from ..errors import ConfigurationError
from ..handler import BoundHandler
from ..results import Outcome
from ..settings import Settings
from .log import redacted
from .otel_context import derived_trace_id, sent_by, stable_hash
from .trace import Attributes

#: Time to send the remaining spans when the process exits. A collector that is down must not delay a drain.
_CLOSE_TIMEOUT_S = 2.0

#: The least HTTP status that is an error of the server.
_SERVER_ERROR = 500

_Batch = Callable[[Sequence[Job]], Sequence[Outcome]]


class _Ids(RandomIdGenerator):
    """Random ids, except for a next span whose ids were set."""

    def __init__(self) -> None:
        self.next_trace_id = 0
        self.next_span_id = 0

    def generate_trace_id(self) -> int:
        """Protocol of `IdGenerator`."""
        preset, self.next_trace_id = self.next_trace_id, 0
        return preset or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """Protocol of `IdGenerator`."""
        preset, self.next_span_id = self.next_span_id, 0
        return preset or super().generate_span_id()


class Spans:
    """`Tracing` by OpenTelemetry. Its environment variables set sampling and limits."""

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        self._ids = _Ids()
        self.provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("jobworker")
        self._running: dict[tuple[str, str], Span] = {}

    # -- reader

    def dispatched(self, stream: str, entry_id: str, data: bytes) -> None:
        """Make the ``queue`` span. It starts when the entry was written, by the clock of the job store."""
        job = read_header(data)
        now_ns = time.time_ns()
        written_ns = int(entry_id.partition("-")[0]) * 1_000_000
        sender = sent_by(job.metadata or {})
        self._ids.next_span_id = _queue_span_id(stream, entry_id)
        if sender is None:
            self._ids.next_trace_id = derived_trace_id(job.metadata or {}, job.id)
        span = self._tracer.start_span(
            f"queue {job.type}", _below(sender), SpanKind.CONSUMER, _job_attributes(job, stream, entry_id),
            start_time=min(written_ns, now_ns),
        )  # fmt: skip
        self._ids.next_span_id = self._ids.next_trace_id = 0  # an unsampled span does not use them up
        span.end(now_ns)

    def settled(
        self, what: str, envelope: Header, stream: str, entry_id: str, attributes: Attributes
    ) -> None:
        """Make a span of no duration: the worker's own span may have been lost with the worker."""
        all_attributes = {**_job_attributes(envelope, stream, entry_id), **_redacted_values(attributes)}
        parent = _below(self._queue(envelope, stream, entry_id))
        span = self._tracer.start_span(f"{what} {envelope.type}", parent, SpanKind.INTERNAL, all_attributes)
        span.set_status(Status(StatusCode.ERROR, redacted(str(attributes.get("error", "")))))
        span.end()

    # -- worker

    def watch(self, handler: BoundHandler) -> None:
        """Wrap the handler's methods in ``process`` spans."""
        handler.handle = partial(self._handle, handler.handle)
        if handler.handle_batch is not None:
            handler.handle_batch = partial(self._handle_batch, handler.handle_batch)

    def _handle(self, handle: Callable[[Job], object], job: Job) -> object:
        with self._process([job]) as (span,):
            token = contexts.attach(api.set_span_in_context(span))
            try:
                return handle(job)
            finally:
                contexts.detach(token)

    def _handle_batch(self, handle: _Batch, jobs: Sequence[Job]) -> Sequence[Outcome]:
        with self._process(jobs) as spans:
            outcomes = handle(jobs)
            for span, outcome in zip(spans, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    _fail(span, outcome)
            return outcomes

    @contextmanager
    def _process(self, jobs: Sequence[Job]) -> Iterator[list[Span]]:
        spans = [self._start(job, len(jobs)) for job in jobs]
        keys = [(job.stream, job.entry_id) for job in jobs]
        self._running |= zip(keys, spans, strict=True)
        try:
            with _ending(spans):
                yield spans
        finally:
            for key in keys:
                self._running.pop(key, None)

    def _start(self, job: Job, batch_size: int) -> Span:
        attributes = _job_attributes(job, job.stream, job.entry_id)
        if batch_size > 1:
            attributes["messaging.batch.message_count"] = batch_size
        queue = self._queue(job, job.stream, job.entry_id)
        return self._tracer.start_span(f"process {job.type}", _below(queue), SpanKind.CONSUMER, attributes)

    @contextmanager
    def span(self, name: str, jobs: Sequence[Job], attributes: Attributes) -> Iterator[None]:
        """Make a span below each job.

        For a single job it is also the current span, so that spans of instrumented libraries nest below it.
        """
        parents = [span for job in jobs if (span := self._running.get((job.stream, job.entry_id)))]
        values = _redacted_values(attributes)
        spans = [self._tracer.start_span(name, _within(span), attributes=values) for span in parents]
        token = contexts.attach(api.set_span_in_context(spans[0])) if len(spans) == 1 else None
        try:
            with _ending(spans):
                yield
        finally:
            if token is not None:
                contexts.detach(token)

    # -- api

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str], facts: Attributes) -> Iterator[None]:
        """Make the span of an HTTP request below the caller's. It is the current span of the task."""
        span = self._tracer.start_span(name, _below(sent_by(headers)), SpanKind.SERVER)
        token = contexts.attach(api.set_span_in_context(span))
        try:
            with _ending([span]):
                yield
                span.set_attributes(_plain_values(facts))
                if int(facts.get("http.response.status_code", 0)) >= _SERVER_ERROR:
                    span.set_status(Status(StatusCode.ERROR, redacted(str(facts.get("error", "")))))
        finally:
            contexts.detach(token)

    @contextmanager
    def part(self, name: str, attributes: Attributes) -> Iterator[None]:
        """Make a span below the current one of the task."""
        span = self._tracer.start_span(name, attributes=_redacted_values(attributes))
        with _ending([span]):
            yield

    def _queue(self, job: Job | Header, stream: str, entry_id: str) -> SpanContext:
        """Context of the reader's ``queue`` span for this entry, derived from the entry id."""
        sender = sent_by(job.metadata or {})
        span_id = _queue_span_id(stream, entry_id)
        if sender is not None:
            return SpanContext(sender.trace_id, span_id, True, sender.trace_flags, sender.trace_state)
        trace_id = derived_trace_id(job.metadata or {}, job.id)
        sampled = self.provider.sampler.should_sample(Context(), trace_id, f"queue {job.type}")
        recorded = sampled.decision is Decision.RECORD_AND_SAMPLE
        flags = TraceFlags.SAMPLED if recorded else TraceFlags.DEFAULT
        return SpanContext(trace_id, span_id, True, TraceFlags(flags), sampled.trace_state)

    def close(self) -> None:
        """Send the remaining spans, within `_CLOSE_TIMEOUT_S`."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)


def open_tracing(role: str, settings: Settings, environment: Mapping[str, str]) -> Spans:
    """Open the exporter to the collector that the environment names.

    In a worker the provider becomes the global one, so that libraries of handlers can use it. Raises
    ImportError without the exporter's package, ConfigurationError for an unsupported protocol or exporter.
    """
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environment.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigurationError(f"{name}={environment[name]}: traces are sent by http/protobuf only")
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() not in ("otlp", ""):
        raise ConfigurationError("OTEL_TRACES_EXPORTER: only otlp, or none")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    spans = Spans(OTLPSpanExporter(), _resource(role, settings, environment))
    if role.startswith("worker") and isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        api.set_tracer_provider(spans.provider)
    return spans


def _resource(role: str, settings: Settings, environment: Mapping[str, str]) -> Resource:
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    ours = {"service.instance.id": f"{settings.host}/{settings.instance}", "jobworker.role": role}
    return Resource.create(ours if named else {"service.name": "jobworker", **ours})


def _queue_span_id(stream: str, entry_id: str) -> int:
    return stable_hash(f"{stream} {entry_id}", 8)


def _below(parent: SpanContext | None) -> Context:
    """Context below ``parent``, independent of the caller's current span."""
    return Context() if parent is None else api.set_span_in_context(api.NonRecordingSpan(parent), Context())


def _within(process: Span) -> Context:
    """The caller's context if it belongs to the same trace, so that spans nest; otherwise ``process``."""
    current = api.get_current_span().get_span_context()
    same = current.trace_id == process.get_span_context().trace_id
    return contexts.get_current() if same else api.set_span_in_context(process, Context())


def _job_attributes(job: Job | Header, stream: str, entry_id: str) -> dict[str, str | int | float]:
    """Attributes that identify the job. The payload is never among them."""
    attributes: dict[str, str | int | float] = {
        "messaging.system": "redis",
        "messaging.destination.name": stream,
        "messaging.message.id": job.id,
        "jobworker.entry_id": entry_id,
        "jobworker.task_type": job.type,
        "jobworker.tenant_id": job.tenant_id,
        "jobworker.project_id": job.project_id,
        "jobworker.retry_count": job.retry_count,
    }
    for name in ("request_id", "trace_id"):
        if value := (job.metadata or {}).get(name):
            attributes[f"jobworker.{name}"] = value
    return attributes


def _plain_values(facts: Attributes) -> dict[str, str | int | float]:
    """Names of OpenTelemetry's own as they are, all others behind the prefix of this project."""
    own = {name: value for name, value in facts.items() if name.startswith("http.")}
    return {**own, **_redacted_values({name: facts[name] for name in facts if name not in own})}


def _redacted_values(attributes: Attributes) -> dict[str, str | int | float]:
    return {
        f"jobworker.{name}": redacted(value) if isinstance(value, str) else value
        for name, value in attributes.items()
    }


@contextmanager
def _ending(spans: Sequence[Span]) -> Iterator[None]:
    """End all spans on exit; an exception marks them as failed."""
    try:
        yield
    except BaseException as error:
        for span in spans:
            _fail(span, error)
        raise
    finally:
        for span in spans:
            span.end()


def _fail(span: Span, error: BaseException) -> None:
    """Mark the span as failed, without a stack trace: its lines may hold private data."""
    message = redacted(str(error))
    span.add_event("exception", {"exception.type": type(error).__name__, "exception.message": message})
    span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {message}"))
