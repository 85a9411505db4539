"""Redis in trouble: the service reports it, waits without spinning, and continues soon after its end."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from support.redis_servers import RedisServer, free_port, require
from support.service import GROUP, STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process

#: Three seconds are promised for a machine that has the time; this one may be running other suites.
CONSUMING_WITHIN_S = 20.0
#: A silent server is given up 5 s after it should have answered, which may be 4 s after it fell silent.
NOTICED_WITHIN_S = 40.0
#: How long the processor time is watched, and the share of a core that no process may use for waiting.
WATCHED_S, MOST_CPU = 1.0, 0.2
#: Commands that take 5 s to load with a delay of 0.25 ms each; the server polls after each 1,024.
COMMANDS, LOAD_DELAY_US = 20_000, 250
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    options = ["--busy-reply-threshold", "100", "--key-load-delay", str(LOAD_DELAY_US)]
    folder = tmp_path_factory.mktemp("redis")
    server = RedisServer(require("valkey"), folder, appendfsync="always", options=options).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def one(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("one")
    with service(
        folder, handlers("Noop", "Flaky"), redis_url=server.url, retry_initial=0.5, retry_jitter=0
    ) as it:
        yield it


@contextlib.contextmanager
def away(server: RedisServer) -> Iterator[None]:
    server.kill()
    yield
    server.start()


@contextlib.contextmanager
def silent(server: RedisServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    yield
    os.kill(server.pid, signal.SIGCONT)


@contextlib.contextmanager
def loading(server: RedisServer) -> Iterator[None]:
    with server.client.pipeline(transaction=False) as pipe:
        for _ in range(COMMANDS):
            pipe.rpush("filler", 0)
        pipe.execute()
    server.kill()
    server.launch()
    yield
    server.wait_until_loaded()
    server.client.delete("filler")
    server.client.bgrewriteaof()


@contextlib.contextmanager
def unable_to_save(server: RedisServer) -> Iterator[None]:
    """Snapshots that fail make the server refuse writes with MISCONF."""
    (server.folder / "dump.rdb").mkdir()
    server.client.config_set("save", "3600 1")
    server.client.bgsave()
    eventually(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err")
    yield
    server.client.config_set("save", "")
    (server.folder / "dump.rdb").rmdir()


@contextlib.contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """A script of another client that does not end, until it is killed."""
    with redis.Redis(port=server.port, socket_timeout=NOTICED_WITHIN_S) as other:
        connection = other.connection_pool.make_connection()
        connection.connect()
        connection.send_command("EVAL", "while true do end", 0)
        yield
        server.client.execute_command("SCRIPT", "KILL")
        with pytest.raises(redis.ResponseError):  # its end, some moments after the word for it
            connection.read_response()
        connection.disconnect()


@contextlib.contextmanager
def read_only(server: RedisServer) -> Iterator[None]:
    """A replica of a host that is not there keeps its data and refuses writes."""
    server.client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    yield
    server.client.execute_command("REPLICAOF", "NO", "ONE")


@contextlib.contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """What is read and acknowledged takes no memory: only the retry that becomes due is refused."""
    server.client.xadd(STREAM, {"data": '{"id": "retried", "type": "flaky", "payload": {"times": 1}}'})
    eventually(lambda: server.client.zcard(f"retry:{STREAM}") == 1)
    server.client.config_set("maxmemory", "1")
    yield
    server.client.config_set("maxmemory", "0")


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def busiest(one: Service) -> dict[str, float]:
    """The share of a core that each role but the workers uses, watched for a while."""
    pids = {role: pid for role, pid in started(one).items() if not role.startswith("worker")}
    before, began_s = {role: cpu_s(pid) for role, pid in pids.items()}, time.monotonic()
    time.sleep(WATCHED_S)  # a share is taken over a length of time
    used = {role: cpu_s(pid) - before[role] for role, pid in pids.items()}
    return {role: spent_s / (time.monotonic() - began_s) for role, spent_s in used.items()}


def started(one: Service) -> dict[str, int]:
    """Process ids of those that have work to do."""
    return {role: pid for role, pid in one.roles().items() if role != "forkserver"}


def assert_consuming(one: Service, stream: str = STREAM) -> None:
    """A job that is sent now is run soon."""
    sent_s = time.monotonic()
    ran = one.wait_for_end(one.enqueue("noop", stream=stream))
    assert ran.mono_s - sent_s < CONSUMING_WITHIN_S


@pytest.mark.parametrize("trouble", [away, silent, loading, unable_to_save, busy, read_only, full])
def test_the_service_says_so_waits_quietly_and_goes_on_soon(
    trouble: Callable[[RedisServer], contextlib.AbstractContextManager[None]],
    server: RedisServer,
    one: Service,
) -> None:
    one.wait_until_ready()
    roles = started(one)
    with trouble(server):
        eventually(lambda: one.get("/readyz")[0] == 503, NOTICED_WITHIN_S, "noticed")
        reasons = one.get("/readyz")[1]
        assert "reader: " in reasons or "reaper: " in reasons
        assert one.get("/healthz")[0] == 200, "no restart mends a store"
        used = busiest(one)
        assert max(used.values()) < MOST_CPU, used
    assert_consuming(one)
    one.wait_until_ready()
    one.wait_until_drained()
    assert started(one) == roles, "no process was restarted for it"
    assert one.dead_letters() == []


def test_lost_connections_and_scripts_go_unnoticed(server: RedisServer, one: Service) -> None:
    for command in (("SCRIPT", "FLUSH"), ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")):
        server.client.execute_command(*command)
        assert_consuming(one)
    server.client.execute_command("SCRIPT", "FLUSH")
    flaky = one.enqueue("flaky", {"times": 1})
    one.wait_for_end(flaky)
    one.wait_until_ready()


@pytest.mark.parametrize("command", [("XGROUP", "DESTROY", STREAM, GROUP), ("DEL", STREAM), ("FLUSHALL",)])
def test_what_is_deleted_under_it_is_made_anew_with_an_alarm(
    command: tuple[str, ...], server: RedisServer, one: Service
) -> None:
    one.wait_until_ready()
    before = len(one.logged("store.unavailable"))
    server.client.execute_command(*command)
    assert_consuming(one)
    assert one.logged("fence.recreated", stream=STREAM) + one.logged("group.recreated", stream=STREAM)
    one.wait_until_drained()
    one.wait_until_ready()
    assert len(one.logged("store.unavailable")) == before


MEMORY, AUDIT = "stream:memory:update", "stream:audit:log"
LAST_ID = "18446744073709551615-18446744073709551615"
BREAK: dict[str, Callable[[redis.Redis, str], object]] = {
    "a string": lambda client, key: client.set(key, "a string"),
    "a full stream": lambda client, key: client.xadd(key, {"data": "x"}, id=LAST_ID),
}


@pytest.mark.parametrize(
    ("stream", "prefix", "how", "other"),
    [
        # A stream that is refused again within a minute waits longer: each has its turn.
        (STREAM, "", "a string", MEMORY),
        (MEMORY, "fence:", "a string", AUDIT),
        (AUDIT, "deaths:", "a string", STREAM),
        (STREAM, "retry:", "a string", MEMORY),
        (MEMORY, "dlq:", "a string", AUDIT),
        (AUDIT, "dlq:", "a full stream", STREAM),
    ],
)
def test_one_broken_key_stops_one_stream_and_is_named(
    server: RedisServer, one: Service, stream: str, prefix: str, how: str, other: str
) -> None:
    client, key = server.client, prefix + stream
    assert_consuming(one, stream)
    children = started(one)
    if client.exists(key):
        client.rename(key, f"{key} aside")
    BREAK[how](client, key)
    if prefix:
        one.add_raw({"data": b"not a job"}, stream)
        one.enqueue("flaky", {"times": 1}, stream=stream)
    others = [one.enqueue("noop", stream=other) for _ in range(3)]
    for job_id in others:
        one.wait_for_end(job_id)
    eventually(lambda: one.metric("z_novel_stream_isolated", stream=stream, role="reader"))
    assert one.is_ready()
    assert f"RENAME {key} " in one.get("/readyz")[1]
    (record, *_) = [line for line in one.logged("stream.isolated") if f"RENAME {key} " in line["hint"]]
    assert record["stream"] == stream
    late = one.enqueue("noop", stream=other)
    one.wait_for_end(late)
    client.rename(key, f"{key}:damaged")
    if client.exists(f"{key} aside"):
        client.rename(f"{key} aside", key)
    eventually(lambda: not one.metric("z_novel_stream_isolated", stream=stream, role="reader"))
    assert_consuming(one, stream)
    assert started(one) == children, "no process ended"


def test_a_damaged_epoch_ends_no_process(server: RedisServer, one: Service) -> None:
    one.wait_until_ready()
    children = started(one)
    key = f"fence:{STREAM}"
    before = len(one.logged("fence.recreated", stream=STREAM))
    for value in ("abc", "nan", "9" * 40):
        for consumer in client_names(server, key):
            server.client.hset(key, consumer, value)
        assert_consuming(one)
    assert len(one.logged("fence.recreated", stream=STREAM)) > before
    one.wait_until_ready()
    assert started(one) == children


def client_names(server: RedisServer, key: str) -> list[bytes]:
    """The consumers that have an epoch."""
    return [name for name in server.client.hkeys(key) if not name.startswith(b"/holder/")]
