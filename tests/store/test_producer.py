"""What a producer writes to the stream, and what it refuses."""

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from jobworker.worker.envelope import MAX_NESTING, read_envelope, read_header
from jobworker.worker.errors import ConfigurationError, StoreUnavailable
from jobworker.worker.host.endpoints import read_endpoints, store_url
from jobworker.worker.keys import Source
from jobworker.worker.new_job import NewJob
from jobworker.worker.producer import Producer, UnknownDestination
from jobworker.worker.store.announcements import encode
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


@pytest.mark.parametrize("prefix", ["retry", "dlq", "deaths", "fence", "ready", "cron"])
def test_a_key_of_the_service_is_no_stream(bench: Bench, prefix: str) -> None:
    for name in (f"{prefix}:jobs:mail", f"{prefix}:{{jobs:mail}}"):
        with pytest.raises(ValueError, match="send the job to stream 'jobs:mail'"):
            bench.producer.enqueue("audit", {}, stream=name)
        with pytest.raises(ValueError, match="send the job to stream 'jobs:mail'"):
            bench.producer.enqueue_many([{"type": "audit", "delay": 5}], stream=name)
        assert not bench.raw(name)
    with pytest.raises(ValueError, match="send the job to a stream that a service reads"):
        bench.producer.enqueue("audit", {}, stream="jobworker:paused")


def test_many_jobs_keep_their_order(bench: Bench) -> None:
    jobs = ({"type": "audit" if i % 3 else "noop", "payload": i} for i in range(2500))
    assert len(bench.producer.enqueue_many(jobs)) == 2500
    assert [job["payload"] for job in bench.jobs()] == [i for i in range(2500) if i % 3 == 0]
    assert [job["payload"] for job in bench.jobs("stream:audit:log")] == [i for i in range(2500) if i % 3]


def test_times_are_sent_in_the_metadata(bench: Bench) -> None:
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    for times in (
        {"delay": 30},
        {"run_at": noon, "expires_at": noon.timestamp() + 0.5},
        {"run_at": "2026-01-02T13:00:00+01:00", "metadata": {"priority": "9"}},
        {"delay": 0, "metadata": {"expires_at": "1767348000"}},
    ):
        bench.producer.enqueue("noop", {}, **times)
    assert [job.get("metadata") for job in bench.jobs()] == [
        {"not_before": "2026-01-02T10:00:30.123Z"},
        {"not_before": "2026-01-02T12:00:00+00:00", "expires_at": "1767355200.500000"},
        {"priority": "9", "not_before": "2026-01-02T13:00:00+01:00"},
        {"expires_at": "1767348000"},
    ]


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


class _Text(str):
    pass


class _Struct(msgspec.Struct):
    value: Any


@dataclass
class _Data:
    _private: Any
    value: Any


@pytest.mark.parametrize(
    ("payload", "sent"),
    [
        ([2**64, -(10**30), None], b"[18446744073709551616,-1000000000000000000000000000000,null]"),
        ({1: "a", 1.5: None}, b'{"1":"a","1.5":null}'),
        ([_Text("a"), None], b'["a",null]'),
        (_Struct([None]), b'{"value":[null]}'),
        (_Data(1, {2}), b'{"_private":1,"value":[2]}'),
        ([b"ab", (1, 2)], b'["YWI=",[1,2]]'),
        (datetime(2026, 1, 2, tzinfo=UTC), b'"2026-01-02T00:00:00Z"'),
        (
            msgspec.Raw(b' {"n": 1234567890123456789.50, "o": null} '),
            b'{"n": 1234567890123456789.50, "o": null}',
        ),
        ({"a": msgspec.Raw(b"1e5")}, b'{"a":1e5}'),
        (orjson.Fragment(b"[1.0]"), b"[1.0]"),
        (nested(300), b"[" * 301 + b"]" * 301),
        (nested(MAX_NESTING - 2), b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1)),
    ],
    ids=lambda value: repr(value).partition(" object at")[0][:30],
)
def test_a_payload_is_sent_as_json(bench: Bench, payload: Any, sent: bytes) -> None:
    bench.producer.enqueue("noop", payload)
    assert bytes(read_header(bench.raw()[0]).payload).strip() == sent
    assert read_envelope(bench.raw()[0]).id


@pytest.mark.parametrize(
    "job",
    [
        {"payload": float("nan")},
        {"payload": {"x": [None, float("-inf")]}},
        {"payload": {1: [None, float("nan")]}},
        {"payload": [None, 10**30, float("nan")]},
        {"payload": _Struct([None, float("nan")])},
        {"payload": _Struct(msgspec.Raw(b"NaN"))},
        {"payload": msgspec.Raw(b'{"a": NaN}')},
        {"payload": msgspec.Raw(b"[1] ]")},
        {"payload": [msgspec.Raw(b'"\\ud800"')]},
        {"payload": msgspec.Raw(b'"\xff"')},
        {"payload": orjson.Fragment(b"[NaN]")},
        {"payload": [object(), None]},
        {"payload": object()},
        {"payload": {"text": "\ud800"}},
        {"payload": nested(100_000)},
        {"payload": nested(MAX_NESTING - 1)},
        {"payload": orjson.Fragment(b"[" * MAX_NESTING + b"]" * MAX_NESTING)},
        {"payload": "x" * (8 * 1024 * 1024)},
        {"id": ""},
        {"id": "x" * 513},
        {"id": 7},
        {"id": "\ud800"},
        {"type": "\ud800"},
        {"type": ["noop"]},
        {"stream": 7},
        {"stream": b"bytes"},
        {"stream": ["a", "b"]},
        {"stream": "\ud800"},
        {"stream": "s" * 513},
        {"metadata": [1]},
        {"metadata": [["a", "b"]]},
        {"metadata": "text"},
        {"metadata": {1: "v"}},
        {"metadata": {"k": "\ud800"}},
        {"metadata": 0},
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
        {"timeout": 10**400},
        {"delay": 10**400},
        {"delay": float("nan")},
        {"delay": ""},
        {"delay": []},
        {7: 1, "x": 2},
        {"timeout": True},
        {"delay": -1},
        {"delay": "5"},
        {"run_at": "tomorrow"},
        {"run_at": "2026-01-02T10:00:00"},
        {"run_at": datetime(2026, 1, 2)},
        {"run_at": 1767348000, "delay": 5},
        {"expires_at": -1},
        {"expires_at": True},
        {"metadata": {"not_before": "soon"}},
        {"type": ""},
        {"type": None},
        {"typo": 1},
    ],
    ids=lambda job: str(next(iter(job))),
)
def test_jobs_that_the_service_would_reject_are_refused(bench: Bench, job: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        bench.producer.enqueue_many([{"type": "noop", **job}])
    assert bench.raw() == []


@pytest.mark.parametrize("job", [7, None, "noop", b"{}", ["noop"], {}, {"payload": 1}], ids=repr)
def test_what_is_no_job_is_refused(bench: Bench, job: Any) -> None:
    with pytest.raises(ValueError, match="a job "):
        bench.producer.enqueue_many([job])
    with pytest.raises(ValueError, match="stream is 7"):
        bench.producer.enqueue_many([NewJob("noop")], stream=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("id", ["with space", "x" * 512, "订单-7", "-x", "a/b?c=d", "\n"], ids=repr)
def test_ids_that_the_service_accepts_are_sent(bench: Bench, id: str) -> None:
    assert bench.producer.enqueue("noop", {}, id=id) == id
    assert read_envelope(bench.raw()[0]).id == id


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
        assert [json.loads(fields[b"data"])["id"] for _, fields in entries[1:-1]] == ids
        assert "not_before" in json.loads(entries[-1][1][b"data"])["metadata"]


#: Parent and child enqueue by the same producer, each waiting for the other before every job.
FORK = """
import os, sys
from jobworker.worker import Producer

producer = Producer(sys.argv[1])
producer.enqueue("noop", {}, id="before")
to_child, to_parent = os.pipe(), os.pipe()
child = os.fork()
name, here, there = ("child", to_child, to_parent) if child == 0 else ("parent", to_parent, to_child)
for number in range(20):
    if number or child == 0:
        os.read(here[0], 1)
    producer.enqueue("noop", {}, id=f"{name}-{number}")
    os.write(there[1], b".")
if child == 0:
    sys.exit()
producer.enqueue("noop", {}, id="after")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class TestShared:
    """One producer of several threads, processes or signal handlers."""

    def test_by_threads(self, tmp_path: Path) -> None:
        errors: list[BaseException] = []
        together = threading.Barrier(8)

        def work(name: str) -> None:
            try:
                together.wait(30)
                for number in range(100):
                    producer.enqueue("noop", {}, id=f"{name}-{number}")
            except BaseException as error:
                errors.append(error)

        with running("valkey", tmp_path) as server, Producer(server.url) as producer:
            threads = [threading.Thread(target=work, args=(name,)) for name in "abcdefgh"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            stored = [
                json.loads(fields[b"data"])["id"] for _, fields in server.client.xrange("stream:story:gen")
            ]
        assert errors == []
        assert sorted(stored) == sorted(f"{name}-{number}" for name in "abcdefgh" for number in range(100))
        assert [id for id in stored if id[0] == "a"] == [f"a-{number}" for number in range(100)]

    def test_across_a_fork(self, tmp_path: Path) -> None:
        with running("valkey", tmp_path) as server:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", FORK, server.url],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            assert server.client.xlen("stream:story:gen") == 42

    def test_an_interrupted_call_leaves_no_reply_to_the_next(self, tmp_path: Path) -> None:
        class Interrupted(BaseException):
            """As a time limit by a signal raises it."""

        with running("valkey", tmp_path) as server, Producer(server.url) as producer:
            producer.enqueue("noop", {})
            with producer._stores.borrow() as store:
                connection: Any = store._connection("stream:story:gen")  # type: ignore[attr-defined]
                receive = connection._connection.read_response

                def interrupt(**_: Any) -> None:
                    connection._connection.read_response = receive
                    raise Interrupted

                connection._connection.read_response = interrupt
            with pytest.raises(Interrupted):
                producer.enqueue("noop", {}, id="interrupted")
            assert producer.enqueue("noop", {}, id="next") == "next"
            assert len(producer.enqueue_many(NewJob("noop") for _ in range(3))) == 3
            assert server.client.xlen("stream:story:gen") == 6


class TestWithoutUrl:
    """Which store `Producer()` uses."""

    def test_that_of_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JOBWORKER_DATA_DIR", str(tmp_path))
        with running("valkey", tmp_path) as server:
            monkeypatch.setenv("JOBWORKER_REDIS_URL", server.url)
            with Producer() as producer:
                producer.enqueue("noop", {})
            assert server.client.xlen("stream:story:gen") == 1

    def test_that_of_the_service_in_the_data_directory_also_after_its_port_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("JOBWORKER_REDIS_URL", raising=False)
        monkeypatch.delenv("JOBWORKER_DATA_DIR", raising=False)
        monkeypatch.chdir(tmp_path)
        folder = tmp_path / "jobworker-data"
        folder.mkdir()
        with running("valkey", tmp_path) as server:
            write(folder, {"redis_url": f"redis://127.0.0.1:{free_port()}/0", "pid": 7})
            with Producer() as producer:
                with pytest.raises(StoreUnavailable):
                    producer.enqueue("noop", {})
                write(folder, {"redis_url": server.url, "pid": 8})
                producer.enqueue("noop", {})
            assert server.client.xlen("stream:story:gen") == 1

    def test_without_any_the_error_names_the_ways(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="JOBWORKER_REDIS_URL is not set and no service has run"):
            store_url({"JOBWORKER_DATA_DIR": str(tmp_path / "nowhere")})
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_another_users_service_is_used_only_if_its_folder_was_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "jobworker-data"
        folder.mkdir()
        write(folder, {"redis_url": "redis://theirs"})
        os.chown(folder / "endpoints.json", 65534, 65534)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError, match="another user"):
            store_url({})
        assert store_url({"JOBWORKER_DATA_DIR": str(folder)}) == "redis://theirs"

    @pytest.mark.parametrize("content", ["", "[]", "nonsense", '{"redis_url": 7}', "[" * 60_000])
    def test_a_damaged_file_counts_as_none(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "endpoints.json").write_text(content)
        (tmp_path / "endpoints.json").chmod(0o600)
        with pytest.raises(ConfigurationError, match="no job store"):
            store_url({"JOBWORKER_DATA_DIR": str(tmp_path)})

    def test_a_file_that_others_could_have_written_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "endpoints.json"
        write(tmp_path, {"redis_url": "redis://elsewhere"})
        file.chmod(0o666)
        with pytest.raises(ConfigurationError, match="another user"):
            read_endpoints(str(tmp_path))
        file.rename(tmp_path / "target")
        file.symlink_to(tmp_path / "target")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_endpoints(str(tmp_path))
        file.unlink()
        os.mkfifo(file, 0o600)
        with pytest.raises(ConfigurationError, match="another user"):
            read_endpoints(str(tmp_path))


def write(folder: Path, endpoints: dict[str, Any]) -> None:
    (folder / "endpoints.json").write_text(json.dumps(endpoints))
    (folder / "endpoints.json").chmod(0o600)


@pytest.mark.parametrize("variable", ["JOBWORKER_REDIS_URL", "JOBWORKER_DATA_DIR"])
def test_an_empty_variable_selects_no_other_store(variable: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{variable} is set and empty"):
        store_url({variable: ""})


class TestOwnTypes:
    """Streams of types that are not built in."""

    def announce(self, bench: Bench, service: str, *streams: str, type: str = "wc") -> None:
        MemoryStore(bench.server).announce(service, [type], [Source(stream, "g") for stream in streams])

    def test_a_registered_service_names_the_stream(self, bench: Bench) -> None:
        self.announce(bench, "host/blue", "stream:audit:log", type="audit")
        self.announce(bench, "host/green", "jobs:z", "jobs:a")
        looks = count_looks(bench.producer)
        bench.producer.enqueue_many([NewJob("wc"), NewJob("audit")])
        bench.producer.enqueue("wc", {})
        assert len(bench.jobs("jobs:z")) == 2, "the first stream of its table"
        assert len(bench.jobs("stream:audit:log")) == 1, "built-in types stay on theirs"
        assert len(looks) == 2, "one for each pair of type and stream"

    def test_the_default_stream_is_preferred_if_a_service_of_the_type_reads_it(self, bench: Bench) -> None:
        self.announce(bench, "host/a", "jobs:a")
        self.announce(bench, "host/b", "jobs:b", "stream:story:gen")
        bench.producer.enqueue("wc", {})
        assert len(bench.jobs()) == 1

    def test_a_running_service_is_preferred(self, bench: Bench) -> None:
        self.announce(bench, "host/a", "jobs:old")
        bench.server.services[b"host/a"] = encode(["wc"], [Source("jobs:old", "g")], WALL_S - 3600)
        self.announce(bench, "host/b", "jobs:new")
        bench.producer.enqueue("wc", {})
        assert len(bench.jobs("jobs:new")) == 1

    def test_without_a_service_the_one_stream_of_the_environment_is_used(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for value, stream in [("jobs:wc=workers", "jobs:wc"), ("a=b c=d", "stream:story:gen")]:
            monkeypatch.setenv("JOBWORKER_STREAM", value)
            monkeypatch.setattr("jobworker.worker.producer._redis", lambda _: MemoryStore(bench.server))
            with Producer("redis://unused") as producer:
                producer.enqueue("wc", {})
                assert producer.guessed == ({"wc"} if stream == "stream:story:gen" else set())
            assert len(bench.jobs(stream)) == 1

    def test_a_failed_look_sends_nothing(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: MemoryStore) -> list[Any]:
            raise StoreUnavailable("loading")

        monkeypatch.setattr(MemoryStore, "announcements", fail)
        with pytest.raises(StoreUnavailable):
            bench.producer.enqueue("wc", {})
        assert bench.jobs() == []


class TestUnknownDestinations:
    """Warnings of types and streams that no service of the deployment handles."""

    def announce(self, bench: Bench) -> None:
        MemoryStore(bench.server).announce(
            "host/blue", ["embedding_batch", "shout"], [Source("stream:story:gen", "cg")]
        )

    def test_a_misspelt_type_is_sent_with_one_warning(self, bench: Bench) -> None:
        self.announce(bench)
        with pytest.warns(
            UnknownDestination, match="runs the type 'embeding_batch': did you mean 'emb"
        ) as told:
            bench.producer.enqueue("embeding_batch", {})
        bench.producer.enqueue_many([NewJob("embeding_batch")] * 3)
        assert [warning.filename for warning in told] == [__file__]
        assert len(bench.jobs()) == 4

    def test_a_misspelt_stream_too_also_for_a_delayed_job(self, bench: Bench) -> None:
        self.announce(bench)
        with pytest.warns(
            UnknownDestination, match="reads the stream 'stream:story:gne': did you mean"
        ) as told:
            bench.producer.enqueue_many([{"type": "shout", "delay": 5}], stream="stream:story:gne")
        assert [warning.filename for warning in told] == [__file__]

    def test_as_an_error_it_keeps_the_job_back(self, bench: Bench) -> None:
        self.announce(bench)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownDestination)
            with pytest.raises(UnknownDestination, match="known are embedding_batch, shout"):
                bench.producer.enqueue_many([NewJob("shout"), NewJob("zzz")])
        assert [job["type"] for job in bench.jobs()] == ["shout"]

    def test_known_names_cost_one_look_for_each_pair(self, bench: Bench) -> None:
        self.announce(bench)
        looks = count_looks(bench.producer)
        for _ in range(5):
            bench.producer.enqueue_many([NewJob("shout"), NewJob("embedding_batch")])
        assert len(looks) == 2

    def test_before_the_first_service_there_is_no_warning_and_one_look(self, bench: Bench) -> None:
        looks = count_looks(bench.producer)
        for number in range(5):
            bench.producer.enqueue(f"type-{number}", {})
        assert len(looks) == 1


def count_looks(producer: Producer) -> list[None]:
    looks: list[None] = []
    with producer._stores.borrow() as store:
        look = store.announcements
        store.announcements = lambda: looks.append(None) or look()  # type: ignore[func-returns-value, method-assign]
    return looks
