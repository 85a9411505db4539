"""Traces over real processes: a producer's trace continues through reader, worker, model and store."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.api import ApiClient
from support.collector import Collector, collecting
from support.service import Service, eventually, handlers, service

pytestmark = pytest.mark.process

TRACE, SENDER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = "collector-key-7766"
KINDS = handlers("Noop", "Flaky", "Die", "Batch") | {"embedding_batch": "support.embedding:Forgetful"}


def environment(url: str) -> dict[str, str]:
    """What an operator sets to have traces; sent often, so that tests need not wait."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={KEY}",
        "OTEL_SERVICE_NAME": "novels",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Collector]]:
    """A service that sends its traces here."""
    with (
        collecting() as (collector, url),
        service(tmp_path_factory.mktemp("traced"), KINDS, environment=environment(url), procs=1,
                retry_initial=0.05, max_retries=2, serve_addr="127.0.0.1:0", model="dummy:8") as one,
    ):  # fmt: skip
        yield one, collector


def test_a_producers_trace_goes_on_through_reader_worker_model_and_store(
    traced: tuple[Service, Collector],
) -> None:
    one, collector = traced
    id = one.enqueue(
        "embedding_batch", {"ids": ["a"], "texts": ["It was a dark night."]}, tenant_id="t1", project_id="p1",
        metadata={"traceparent": f"00-{TRACE}-{SENDER}-01", "request_id": "r1"},
    )  # fmt: skip
    names = {"queue embedding_batch", "process embedding_batch", "embed", "upsert"}
    spans = eventually(lambda: collector.of(TRACE).keys() >= names and collector.of(TRACE), saying=one.log)
    queue, process = spans["queue embedding_batch"], spans["process embedding_batch"]
    assert queue.parent_id == SENDER
    assert process.parent_id == queue.span_id
    assert {spans["embed"].parent_id, spans["upsert"].parent_id} == {process.span_id}
    assert spans["upsert"].attributes["jobworker.rows"] == 1
    told = {"messaging.message.id": id, "jobworker.tenant_id": "t1", "jobworker.request_id": "r1"}
    assert told.items() <= process.attributes.items()
    roles = {span.name: span.resource["jobworker.role"] for span in spans.values()}
    assert roles == {"queue embedding_batch": "reader"} | dict.fromkeys(names - {queue.name}, "worker 0")
    assert {span.resource["service.name"] for span in spans.values()} == {"novels"}
    assert {headers["api-key"] for headers in collector.headers} == {KEY}
    assert b"dark night" not in collector.raw
    assert KEY not in one.log_text


def test_a_request_of_the_api_continues_the_trace_of_its_caller(traced: tuple[Service, Collector]) -> None:
    one, collector = traced
    trace_id = "22" * 16
    answer = ApiClient(one).post(
        "/v1/embeddings", {"input": "a private text"}, traceparent=f"00-{trace_id}-{SENDER}-01"
    )
    assert answer.status == 200
    spans = eventually(lambda: collector.of(trace_id), saying=one.log)
    request = spans["POST /v1/embeddings"]
    assert request.parent_id == SENDER
    assert spans["embed"].parent_id == request.span_id
    assert request.attributes["http.response.status_code"] == 200
    assert request.resource["jobworker.role"] == "api"
    assert b"a private text" not in collector.raw


def test_all_tries_of_a_job_are_in_the_trace_that_its_producer_names(
    traced: tuple[Service, Collector],
) -> None:
    one, collector = traced
    trace_id = "11" * 16
    one.wait_for_end(one.enqueue("flaky", {"times": 1}, metadata={"trace_id": trace_id}))

    def tries() -> list[bool]:
        mine = [span for span in collector.spans if span.trace_id == trace_id]
        return [span.failed for span in mine if span.name == "process flaky"]

    def queues() -> set[str]:
        mine = [span for span in collector.spans if span.trace_id == trace_id]
        return {span.span_id for span in mine if span.name == "queue flaky"}

    # The reader and the worker send on their own, so that neither is surely the last.
    eventually(lambda: tries() == [True, False])
    eventually(lambda: len(queues()) == 2)
    retry = eventually(lambda: collector.of(trace_id).get("retry flaky"))
    assert retry.attributes["jobworker.error"].startswith("ConnectionError")


def test_a_job_that_kills_its_worker_leaves_word_in_its_trace(traced: tuple[Service, Collector]) -> None:
    one, collector = traced
    trace_id = "22" * 16
    id = one.enqueue("die", {"how": "SIGKILL"}, metadata={"trace_id": trace_id})
    assert one.dead_letter(id)["reason"] == "poison"
    died = eventually(lambda: collector.of(trace_id).get("worker died die"))
    assert died.attributes["jobworker.error"] == "SIGKILL"
    assert died.resource["jobworker.role"] == "reader"


def test_what_a_worker_has_not_sent_yet_is_sent_when_it_stops(tmp_path: Path) -> None:
    with collecting() as (collector, url):
        slow = environment(url) | {"OTEL_BSP_SCHEDULE_DELAY": "60000"}
        with service(tmp_path, handlers("Noop"), environment=slow, procs=1) as one:
            one.wait_for_end(one.enqueue("noop"))
            assert one.terminate() == 0
        assert {span.name for span in collector.spans} == {"queue noop", "process noop"}


def test_a_collector_that_is_down_costs_no_job_and_no_time_at_the_end(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with service(tmp_path, handlers("Noop"), environment=environment(nowhere), procs=1) as one:
        one.enqueue_many({"type": "noop"} for _ in range(2000))
        one.wait_until_drained()
        assert one.terminate(within_s=20.0) == 0


def test_a_protocol_that_is_not_spoken_is_said_and_jobs_run_all_the_same(tmp_path: Path) -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with service(tmp_path, handlers("Noop"), environment=asked, procs=1) as one:
        one.wait_for_end(one.enqueue("noop"))
        said = [event["error"] for event in one.logged("traces.disabled")]
        assert said
        assert all("http/protobuf only" in line for line in said)
