"""Traces: the spans of a job form one trace across processes, and with traces off nothing changes."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from jobworker.worker import ConfigurationError, Job, PermanentError, Producer, Settings
from jobworker.worker.envelope import read_envelope
from jobworker.worker.event_loop import EventLoop
from jobworker.worker.handler import BoundHandler
from jobworker.worker.store.memory.store import MemoryServer, MemoryStore
from jobworker.worker.telemetry import trace
from jobworker.worker.telemetry.current_job import current
from jobworker.worker.telemetry.log import set_secrets
from jobworker.worker.telemetry.otel import Spans, open_tracing
from jobworker.worker.telemetry.otel_context import derived_trace_id, stable_hash

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SENDER = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{SENDER}-01"}
STREAM, ENTRY = "stream:story:gen", "1767348000123-0"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Turns traces on; holds the spans that were sent."""
    memory = InMemorySpanExporter()
    trace.install(Spans(memory, Resource.create({})))
    yield memory
    trace.install(None)
    current.jobs = ()


def sent(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """All spans by name, after everything is sent."""
    trace.close()
    spans = exporter.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def parent_id(span: ReadableSpan) -> int | None:
    """Id of the parent span."""
    return span.parent.span_id if span.parent else None


def body(metadata: dict[str, str] | None, id: str = "j1") -> bytes:
    return msgspec.json.encode({"id": id, "type": "noop", "tenant_id": "t1", "metadata": metadata})


def job(metadata: dict[str, str] | None = None, id: str = "j1", entry_id: str = ENTRY, **more: Any) -> Job:
    fields = {"type": "noop", "tenant_id": "t1", "project_id": "p1", "payload": {"text": "private"},
              "metadata": metadata or {}, "created_at": "", "stream": STREAM, "retry_count": 0}  # fmt: skip
    return Job(id=id, entry_id=entry_id, **(fields | more))


def dispatch(metadata: dict[str, str] | None, id: str = "j1", entry_id: str = ENTRY) -> None:
    """Record a dispatch as the reader does."""
    trace.dispatched(STREAM, entry_id.encode(), body(metadata, id))


class Single:
    """A handler with spans of its own that can fail."""

    error: BaseException | None = None

    def handle(self, job: Job) -> None:
        current.jobs = job
        with trace.span("part", colour="red"), trace.span("inner"):
            if self.error:
                raise self.error


def watched(handler: object) -> BoundHandler:
    bound = BoundHandler("noop", handler, 60.0)
    trace.watch({"noop": bound})
    return bound


def test_the_spans_of_reader_and_worker_are_below_the_producers_span(exporter: InMemorySpanExporter) -> None:
    dispatch(TRACEPARENT)
    watched(Single()).handle(job(TRACEPARENT))
    spans = sent(exporter)
    assert set(spans) == {"queue noop", "process noop", "part", "inner"}
    queue, process, part = spans["queue noop"], spans["process noop"], spans["part"]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    chain = [int(SENDER, 16), *(span.context.span_id for span in (queue, process, part))]
    assert [parent_id(span) for span in (queue, process, part, spans["inner"])] == chain
    assert queue.start_time == 1767348000123 * 1_000_000, "when the entry was written"
    expected = {"messaging.destination.name": STREAM, "messaging.message.id": "j1",
            "jobworker.tenant_id": "t1", "jobworker.task_type": "noop"}  # fmt: skip
    for span in (queue, process):
        assert expected.items() <= dict(span.attributes or {}).items()
    assert (part.attributes or {})["jobworker.colour"] == "red"
    assert "private" not in "".join(span.to_json() for span in spans.values())


def test_the_spans_of_an_async_handler_are_below_its_job(exporter: InMemorySpanExporter) -> None:
    class Asynchronous:
        async def handle(self, job: Job) -> None:
            await asyncio.gather(self.part("left"), self.part("right"))

        async def part(self, name: str) -> None:
            with trace.span(name):
                await asyncio.sleep(0)
                with trace.span(f"inner {name}"):
                    await asyncio.sleep(0)

    loop = EventLoop()
    bound = BoundHandler("noop", Asynchronous(), 60.0, loop)
    trace.watch({"noop": bound})
    current.jobs = job(TRACEPARENT)
    bound.handle(current.jobs)
    loop.close()
    spans = sent(exporter)
    process = spans["process noop"].context.span_id
    for name in ("left", "right"):
        assert parent_id(spans[name]) == process
        assert parent_id(spans[f"inner {name}"]) == spans[name].context.span_id


@pytest.mark.parametrize(
    ("metadata", "trace_id"),
    [
        ({"trace_id": TRACE}, TRACE),
        ({"trace_id": TRACE.upper()}, TRACE),
        ({"trace_id": "4bf92f35-77b3-4da6-a3ce-929d0e0e4736"}, TRACE),
        ({"trace_id": "a3ce929d0e0e4736"}, "0" * 16 + "a3ce929d0e0e4736"),
        ({"trace_id": "chapter 7"}, f"{stable_hash('chapter 7', 16):032x}"),
        ({"trace_id": "0" * 32}, f"{stable_hash('0' * 32, 16):032x}"),
        ({"traceparent": "nonsense", "trace_id": TRACE}, TRACE),
        ({"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"}, f"{stable_hash('j1', 16):032x}"),
        (None, f"{stable_hash('j1', 16):032x}"),
    ],
)
def test_without_a_traceparent_the_trace_id_is_the_given_one_or_a_hash(
    exporter: InMemorySpanExporter, metadata: dict[str, str] | None, trace_id: str
) -> None:
    dispatch(metadata)
    watched(Single()).handle(job(metadata))
    spans = sent(exporter)
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace_id}
    assert spans["queue noop"].parent is None, "the trace has one root"
    assert parent_id(spans["process noop"]) == spans["queue noop"].context.span_id


def test_a_preset_id_is_used_for_one_span_only(exporter: InMemorySpanExporter) -> None:
    dispatch({"trace_id": TRACE}, "a", "1-1")
    dispatch(None, "b", "2-1")
    dispatch(TRACEPARENT, "c", "3-1")
    trace.close()
    spans = exporter.get_finished_spans()
    assert [f"{span.context.trace_id:032x}" for span in spans] == [
        TRACE,
        f"{derived_trace_id({}, 'b'):032x}",
        TRACE,
    ]
    assert len({span.context.span_id for span in spans}) == 3


@pytest.mark.parametrize("sampler", ["always_off", "parentbased_traceidratio"])
def test_reader_and_worker_agree_on_what_is_sampled(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    memory = InMemorySpanExporter()
    trace.install(Spans(memory, Resource.create({})))
    try:
        handler = watched(Single())
        for number in range(40):
            dispatch(None, f"job {number}", f"{number + 1}-1")
            handler.handle(job(None, f"job {number}", f"{number + 1}-1"))
        trace.close()
    finally:
        trace.install(None)
        current.jobs = ()
    by_trace: dict[int, set[str]] = {}
    for span in memory.get_finished_spans():
        by_trace.setdefault(span.context.trace_id, set()).add(span.name)
    assert all(names == {"queue noop", "process noop", "part", "inner"} for names in by_trace.values())
    assert len(by_trace) == 0 if sampler == "always_off" else 5 < len(by_trace) < 35


def test_a_failure_marks_its_spans_without_secrets(exporter: InMemorySpanExporter) -> None:
    set_secrets(["sk-0123456789"])
    handler = Single()
    handler.error = ConnectionError("redis://u:pw@h refused sk-0123456789")
    with pytest.raises(ConnectionError):
        watched(handler).handle(job(TRACEPARENT))
    set_secrets(())
    spans = sent(exporter)
    for name in ("process noop", "part"):
        assert spans[name].status.status_code is StatusCode.ERROR
        assert spans[name].status.description == "ConnectionError: redis://u:***@h refused ***"
        (event,) = spans[name].events
        assert (event.attributes or {})["exception.type"] == "ConnectionError"
    assert "0123456789" not in "".join(span.to_json() for span in spans.values())


def test_each_job_of_a_batch_has_its_own_spans_in_its_own_trace(exporter: InMemorySpanExporter) -> None:
    class Batch:
        def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
            with trace.span("embed", jobs[:2], texts=9):
                pass
            return [None, PermanentError("bad"), None]

    jobs = [job({"trace_id": f"{n:032x}"}, f"j{n}", f"{n}-1") for n in (1, 2, 3)]
    handle_batch = watched(Batch()).handle_batch
    assert handle_batch is not None
    handle_batch(jobs)
    trace.close()
    spans = exporter.get_finished_spans()
    names = {n: sorted(s.name for s in spans if s.context.trace_id == n) for n in (1, 2, 3)}
    assert names == {1: ["embed", "process noop"], 2: ["embed", "process noop"], 3: ["process noop"]}
    failed = [s.context.trace_id for s in spans if s.status.status_code is StatusCode.ERROR]
    assert failed == [2]
    assert {(s.attributes or {}).get("messaging.batch.message_count") for s in spans} == {3, None}


def test_a_batch_that_raises_marks_the_spans_of_all_its_jobs(exporter: InMemorySpanExporter) -> None:
    class Batch:
        def handle_batch(self, jobs: Sequence[Job]) -> list[BaseException | None]:
            raise OSError("disk")

    handle_batch = watched(Batch()).handle_batch
    assert handle_batch is not None
    with pytest.raises(OSError, match="disk"):
        handle_batch([job(None, "a", "1-1"), job(None, "b", "2-1")])
    trace.close()
    assert [s.status.status_code for s in exporter.get_finished_spans()] == [StatusCode.ERROR] * 2


def test_a_failed_attempt_has_a_span_although_its_worker_died(
    exporter: InMemorySpanExporter,
) -> None:
    envelope = read_envelope(body(TRACEPARENT))
    trace.settled("worker died", envelope, STREAM, ENTRY.encode(), error="SIGKILL", deaths=2)
    (span,) = sent(exporter).values()
    assert span.name == "worker died noop"
    assert (span.attributes or {})["jobworker.deaths"] == 2
    assert parent_id(span) == stable_hash(f"{STREAM} {ENTRY}", 8), "below the reader's span"
    assert span.status.status_code is StatusCode.ERROR


def test_the_python_producer_passes_its_span_on(exporter: InMemorySpanExporter) -> None:
    server = MemoryServer()
    producer = Producer(store=MemoryStore(server, "p"))
    provider = api.NonRecordingSpan(
        api.SpanContext(int(TRACE, 16), int(SENDER, 16), False, api.TraceFlags(1))
    )
    with api.use_span(provider):
        producer.enqueue("noop", 1, stream=STREAM, metadata={"request_id": "r"})
        producer.enqueue("noop", 1, stream=STREAM, metadata={"traceparent": "theirs"})
    producer.enqueue("noop", 1, stream=STREAM)
    entries = list(server.stream(STREAM).entries.values())
    metadata = [read_envelope(entry).metadata for entry in entries]
    assert metadata == [{"request_id": "r", **TRACEPARENT}, {"traceparent": "theirs"}, None]


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_the_standard_variables_turn_traces_on(environment: dict[str, str], on: bool) -> None:
    assert trace.wanted(environment) is on


@pytest.mark.parametrize(
    "environment", [{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, {"OTEL_TRACES_EXPORTER": "zipkin"}]
)
def test_an_unsupported_protocol_or_exporter_is_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(environment))):
        open_tracing("reader", Settings(), environment)


def test_with_traces_off_no_library_is_imported_and_no_handler_changes() -> None:
    code = """if True:
        import sys
        from jobworker.worker import boot, producer, runner
        from jobworker.worker.reader import reader, settlement as settler
        from jobworker.worker.telemetry import trace
        from jobworker.worker.handler import BoundHandler
        class One:
            def handle(self, job): pass
        bound = BoundHandler("x", One(), 1.0)
        before = bound.handle
        trace.watch({"x": bound})
        assert bound.handle == before
        assert trace.span("a") is trace.span("b"), "nothing is made"
        print(*[name for name in sys.modules if "opentelemetry" in name])"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_request_of_the_api_continues_the_trace_of_its_caller(exporter: InMemorySpanExporter) -> None:
    """Also while another request is answered."""

    async def ask(name: str, headers: dict[str, str], status: int) -> None:
        facts: dict[str, Any] = {"http.route": name}
        with trace.request(f"POST {name}", headers, facts):
            await asyncio.sleep(0)
            with trace.part(f"embed {name}", texts=2):
                await asyncio.sleep(0)
            facts |= {"http.response.status_code": status, "tokens": 7, "error": "a fault"}

    async def both() -> None:
        await asyncio.gather(ask("/a", TRACEPARENT, 200), ask("/b", {}, 503))

    asyncio.run(both())
    spans = sent(exporter)
    first, second = spans["POST /a"], spans["POST /b"]
    assert first.context is not None
    assert f"{first.context.trace_id:032x}" == TRACE
    assert parent_id(first) == int(SENDER, 16)
    assert parent_id(spans["embed /a"]) == first.context.span_id
    assert (parent_id(second), second.status.status_code) == (None, StatusCode.ERROR)
    assert second.context is not None
    assert parent_id(spans["embed /b"]) == second.context.span_id
    assert first.status.status_code is StatusCode.UNSET
    assert first.attributes is not None
    assert first.attributes["http.response.status_code"] == 200
    assert first.attributes["jobworker.tokens"] == 7
