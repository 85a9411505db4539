"""What a producer writes to the stream, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker.worker.envelope import read_envelope
from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.producer import NewJob, Producer
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from support.redis_servers import free_port, running

WALL_S = 1_767_348_000.123


class Bench:
    """A producer over a store in memory, and a look at what it wrote."""

    def __init__(self) -> None:
        self.server = MemoryServer(lambda: WALL_S)
        self.producer = Producer(store=MemoryStore(self.server), wall_now_s=lambda: WALL_S)

    def raw(self, stream: str = "stream:story:gen") -> list[bytes]:
        return [data for data in self.server.entries(stream).values() if data is not None]

    def jobs(self, stream: str = "stream:story:gen") -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.raw(stream)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    with made.producer:
        yield made


def test_the_json_of_a_job(bench: Bench) -> None:
    id = bench.producer.enqueue(
        "embedding_batch",
        {"ids": ["a"], "texts": ["第一章 <b>"]},
        tenant_id="t001",
        project_id="p123",
        id="job-1",
        metadata={"priority": "5"},
        timeout=120,
    )
    assert id == "job-1"
    assert bench.raw() == [
        '{"id":"job-1","type":"embedding_batch","tenant_id":"t001","project_id":"p123",'
        '"payload":{"ids":["a"],"texts":["第一章 <b>"]},"metadata":{"priority":"5"},'
        '"created_at":"2026-01-02T10:00:00.123Z","timeout":120}'.encode()
    ]


def test_ids_are_made_where_none_is_given(bench: Bench) -> None:
    ids = bench.producer.enqueue_many([NewJob("noop") for _ in range(50)])
    assert len(set(ids)) == 50
    assert [job["id"] for job in bench.jobs()] == ids


@pytest.mark.parametrize(
    ("type", "stream"),
    [
        ("embedding_batch", "stream:story:gen"),
        ("index_rebuild", "stream:story:gen"),
        ("memory_update", "stream:memory:update"),
        ("summary_write_back", "stream:memory:update"),
        ("audit", "stream:audit:log"),
        ("a_type_of_ours", "stream:story:gen"),
    ],
)
def test_a_type_is_routed_to_its_stream(bench: Bench, type: str, stream: str) -> None:
    bench.producer.enqueue(type, {})
    assert [job["type"] for job in bench.jobs(stream)] == [type]


def test_a_named_stream_overrides_the_route(bench: Bench) -> None:
    bench.producer.enqueue("audit", {}, stream="stream:mine")
    bench.producer.enqueue_many([{"type": "audit"}, NewJob("audit", stream="s:2")], stream="stream:mine")
    assert len(bench.jobs("stream:mine")) == 2
    assert len(bench.jobs("s:2")) == 1


def test_many_jobs_keep_their_order(bench: Bench) -> None:
    jobs = ({"type": "audit" if i % 3 else "noop", "payload": i} for i in range(2500))
    assert len(bench.producer.enqueue_many(jobs)) == 2500
    assert [job["payload"] for job in bench.jobs()] == [i for i in range(2500) if i % 3 == 0]
    assert [job["payload"] for job in bench.jobs("stream:audit:log")] == [i for i in range(2500) if i % 3]


def test_a_delayed_job_waits(bench: Bench) -> None:
    bench.producer.enqueue("noop", {}, delay=30, id="later")
    assert bench.jobs() == []
    (job,) = bench.server.waiting("stream:story:gen")
    assert read_envelope(job).id == "later"


@pytest.mark.parametrize(
    "payload",
    [None, 0, "text", [], {"deep": [[[[[1]]]]]}, {"n": None, "f": 1e300, "big": 2**63}, {"\u2028": "\x00"}],
)
def test_any_json_value_is_a_payload(bench: Bench, payload: Any) -> None:
    bench.producer.enqueue("noop", payload)
    assert read_envelope(bench.raw()[0]).payload == payload


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    "job",
    [
        {"payload": float("nan")},
        {"payload": {"x": [None, float("-inf")]}},
        {"payload": object()},
        {"payload": {"text": "\ud800"}},
        {"payload": nested(100_000)},
        {"payload": "x" * (8 * 1024 * 1024)},
        {"id": ""},
        {"id": "with space"},
        {"id": "x" * 65},
        {"id": 7},
        {"tenant_id": "a/b"},
        {"project_id": "编号"},
        {"tenant_id": None},
        {"metadata": {"priority": 5}},
        {"type": "t" * 513},
        {"metadata": {"k" * 513: "v"}},
        {"metadata": {"baggage": "v" * 16385}},
        {"metadata": {str(number): "" for number in range(129)}},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": True},
        {"delay": -1},
        {"delay": "5"},
        {"type": ""},
        {"type": None},
        {"typo": 1},
    ],
    ids=lambda job: next(iter(job)),
)
def test_jobs_that_the_service_would_reject_are_refused(bench: Bench, job: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        bench.producer.enqueue_many([{"type": "noop", **job}])
    assert bench.raw() == []


def test_jobs_before_a_refused_one_are_enqueued(bench: Bench) -> None:
    with pytest.raises(ValueError, match="payload"):
        bench.producer.enqueue_many([NewJob("noop", 1), NewJob("noop", object()), NewJob("noop", 3)])
    assert [job["payload"] for job in bench.jobs()] == [1]


def test_without_a_server_enqueue_raises() -> None:
    with Producer(f"redis://127.0.0.1:{free_port()}/0") as producer, pytest.raises(StoreUnavailable):
        producer.enqueue("noop", {})


@pytest.mark.parametrize("kind", ["redis7", "valkey"])
def test_on_a_real_server(kind: str, tmp_path: Path) -> None:
    with running(kind, tmp_path) as server, Producer(server.url) as producer:
        server.client.xadd("stream:story:gen", {"data": "older"})
        ids = producer.enqueue_many(NewJob("noop", i) for i in range(3000))
        producer.enqueue("noop", "late", delay=0.5)
        entries = server.client.xrange("stream:story:gen")
        assert [json.loads(fields[b"data"])["id"] for _, fields in entries[1:]] == ids
        assert server.client.zcard("retry:stream:story:gen") == 1
