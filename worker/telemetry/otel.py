"""Spans for the jobs of this process, sent by OpenTelemetry to a collector; its variables say where and how.

A job's trace is that of its producer. Below the producer's span comes ``queue``, made by the reader when a
worker is given the job; below that ``process``, made by the worker, and below that what the handler does.
Reader and worker never speak of spans to each other: the id of ``queue`` follows from the entry's.
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

from ..envelope import Envelope, Job, reread_envelope
from ..errors import ConfigurationError
from ..handler import BoundHandler
from ..settings import Settings
from .log import redacted
from .otel_context import number_of, sent_by, trace_id_of
from .trace import Attributes

#: What is left may take so long to send when a process ends; a collector that is down delays no drain.
_CLOSE_WITHIN_S = 2.0

_Batch = Callable[[Sequence[Job]], Sequence[BaseException | None]]


class _Ids(RandomIdGenerator):
    """Random ids, but for a next span whose ids were chosen."""

    def __init__(self) -> None:
        self.next_trace_id = 0
        self.next_span_id = 0

    def generate_trace_id(self) -> int:
        """See `IdGenerator`."""
        chosen, self.next_trace_id = self.next_trace_id, 0
        return chosen or super().generate_trace_id()

    def generate_span_id(self) -> int:
        """See `IdGenerator`."""
        chosen, self.next_span_id = self.next_span_id, 0
        return chosen or super().generate_span_id()


class Spans:
    """`Tracing` by OpenTelemetry. Sampling and limits are those of its environment variables."""

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        self._ids = _Ids()
        self.provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("jobworker")
        self._running: dict[tuple[str, str], Span] = {}

    # -- the reader's

    def dispatched(self, stream: str, entry_id: str, data: bytes) -> None:
        """See `Tracing`. The span begins when the entry was written, by the job store's clock."""
        job = reread_envelope(data)
        now_ns = time.time_ns()
        written_ns = int(entry_id.partition("-")[0]) * 1_000_000
        sender = sent_by(job.metadata or {})
        self._ids.next_span_id = _queue_span_id(stream, entry_id)
        if sender is None:
            self._ids.next_trace_id = trace_id_of(job.metadata or {}, job.id)
        span = self._tracer.start_span(
            f"queue {job.type}", _below(sender), SpanKind.CONSUMER, _told(job, stream, entry_id),
            start_time=min(written_ns, now_ns),
        )  # fmt: skip
        self._ids.next_span_id = self._ids.next_trace_id = 0  # where it is not sampled they may be left over
        span.end(now_ns)

    def settled(
        self, what: str, envelope: Envelope, stream: str, entry_id: str, attributes: Attributes
    ) -> None:
        """See `Tracing`. A span without length: that of the worker may have died with it."""
        told = {**_told(envelope, stream, entry_id), **_clean(attributes)}
        parent = _below(self._queue(envelope, stream, entry_id))
        span = self._tracer.start_span(f"{what} {envelope.type}", parent, SpanKind.INTERNAL, told)
        span.set_status(Status(StatusCode.ERROR, redacted(str(attributes.get("error", "")))))
        span.end()

    # -- the worker's

    def watch(self, handler: BoundHandler) -> None:
        """See `Tracing`."""
        handler.handle = partial(self._handle, handler.handle)
        if handler.handle_batch is not None:
            handler.handle_batch = partial(self._handle_batch, handler.handle_batch)

    def _handle(self, handle: Callable[[Job], object], job: Job) -> None:
        with self._process([job]) as (span,):
            token = contexts.attach(api.set_span_in_context(span))
            try:
                handle(job)
            finally:
                contexts.detach(token)

    def _handle_batch(self, handle: _Batch, jobs: Sequence[Job]) -> Sequence[BaseException | None]:
        with self._process(jobs) as spans:
            outcomes = handle(jobs)
            for span, outcome in zip(spans, outcomes, strict=True):
                if outcome is not None:
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

    def _start(self, job: Job, together: int) -> Span:
        told = _told(job, job.stream, job.entry_id)
        if together > 1:
            told["messaging.batch.message_count"] = together
        queue = self._queue(job, job.stream, job.entry_id)
        return self._tracer.start_span(f"process {job.type}", _below(queue), SpanKind.CONSUMER, told)

    @contextmanager
    def span(self, name: str, jobs: Sequence[Job], attributes: Attributes) -> Iterator[None]:
        """See `Tracing`. Of a single job it is the current one too, for what instrumented libraries add."""
        above = [span for job in jobs if (span := self._running.get((job.stream, job.entry_id)))]
        told = _clean(attributes)
        spans = [self._tracer.start_span(name, _within(span), attributes=told) for span in above]
        token = contexts.attach(api.set_span_in_context(spans[0])) if len(spans) == 1 else None
        try:
            with _ending(spans):
                yield
        finally:
            if token is not None:
                contexts.detach(token)

    def _queue(self, job: Job | Envelope, stream: str, entry_id: str) -> SpanContext:
        """The reader's span for this entry, which this process has never seen."""
        sender = sent_by(job.metadata or {})
        span_id = _queue_span_id(stream, entry_id)
        if sender is not None:
            return SpanContext(sender.trace_id, span_id, True, sender.trace_flags, sender.trace_state)
        trace_id = trace_id_of(job.metadata or {}, job.id)
        sampled = self.provider.sampler.should_sample(Context(), trace_id, f"queue {job.type}")
        recorded = sampled.decision is Decision.RECORD_AND_SAMPLE
        flags = TraceFlags.SAMPLED if recorded else TraceFlags.DEFAULT
        return SpanContext(trace_id, span_id, True, TraceFlags(flags), sampled.trace_state)

    def close(self) -> None:
        """See `Tracing`."""
        closing = threading.Thread(target=self.provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_WITHIN_S)


def open_tracing(role: str, settings: Settings, environment: Mapping[str, str]) -> Spans:
    """Spans to the collector that the environment names; a worker's libraries may use the same provider.

    Raises ImportError without the exporter's package, ConfigurationError for a protocol that it does not
    speak.
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
    return number_of(f"{stream} {entry_id}", 8)


def _below(parent: SpanContext | None) -> Context:
    """A context of its own, whatever the caller is in."""
    return Context() if parent is None else api.set_span_in_context(api.NonRecordingSpan(parent), Context())


def _within(process: Span) -> Context:
    """What runs around the caller, where that belongs to the same trace: spans nest then."""
    here = api.get_current_span().get_span_context()
    same = here.trace_id == process.get_span_context().trace_id
    return contexts.get_current() if same else api.set_span_in_context(process, Context())


def _told(job: Job | Envelope, stream: str, entry_id: str) -> dict[str, str | int | float]:
    """Which job it is; nothing of what is in it."""
    told: dict[str, str | int | float] = {
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
            told[f"jobworker.{name}"] = value
    return told


def _clean(attributes: Attributes) -> dict[str, str | int | float]:
    return {
        f"jobworker.{name}": redacted(value) if isinstance(value, str) else value
        for name, value in attributes.items()
    }


@contextmanager
def _ending(spans: Sequence[Span]) -> Iterator[None]:
    """End them all on the way out, with the error where there is one."""
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
    """Without a stack: its lines may hold what must not be seen."""
    said = redacted(str(error))
    span.add_event("exception", {"exception.type": type(error).__name__, "exception.message": said})
    span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {said}"))
