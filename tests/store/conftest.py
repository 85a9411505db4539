"""Servers to test with: Redis and Valkey as long as the module, Milvus as long as the session."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.redis_fence import RedisFence
from support.job_worlds import MemoryWorld, RedisWorld, World
from support.milvus import start_lite, start_real, why_no_real_milvus
from support.redis_servers import RedisServer, running
from support.tools import REAL_MILVUS
from support.topologies import cluster


@pytest.fixture(scope="module", params=["redis7", "valkey"])
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    with running(request.param, tmp_path_factory.mktemp(request.param), appendfsync="always") as server:
        yield server


@pytest.fixture
def redis_world(redis_server: RedisServer) -> Iterator[RedisWorld]:
    world = RedisWorld(redis_server)
    yield world
    world.close()


@pytest.fixture(scope="module", params=["memory", "redis7", "valkey"])
def any_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer | None]:
    if request.param == "memory":
        yield None
        return
    with running(request.param, tmp_path_factory.mktemp(request.param), appendfsync="always") as server:
        yield server


@pytest.fixture
def world(any_server: RedisServer | None) -> Iterator[World]:
    world: World = MemoryWorld() if any_server is None else RedisWorld(any_server)
    yield world
    world.close()


@pytest.fixture(scope="module", params=["memory", "redis7", "valkey", "cluster"])
def any_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], World]]:
    """Makes worlds on any store, a Redis Cluster of one node among them."""
    if request.param == "memory":
        yield MemoryWorld
        return
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "cluster":
        with cluster(folder, masters=1) as nodes:
            yield lambda: RedisWorld(nodes.servers[0], cluster=True)
    else:
        with running(request.param, folder) as server:
            yield lambda: RedisWorld(server)


@pytest.fixture
def any_world(any_store: Callable[[], World]) -> Iterator[World]:
    world = any_store()
    yield world
    world.close()


@pytest.fixture
def fence(any_server: RedisServer | None) -> Iterator[Any]:
    if any_server is None:
        yield MemoryFence()
        return
    any_server.client.flushall()
    made = RedisFence(any_server.url)
    yield made
    made.close()


class MilvusServers:
    """Milvus servers by name, each started by the first test that asks for it."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._running: dict[str, tuple[str, contextlib.ExitStack]] = {}

    def uri(self, name: str) -> str:
        """The uri of "lite" or "milvus-2.3.5"; skips the test where that cannot run."""
        if name == REAL_MILVUS and (reason := why_no_real_milvus()):
            pytest.skip(reason)
        if name not in self._running:
            start, stack = {"lite": start_lite, REAL_MILVUS: start_real}[name], contextlib.ExitStack()
            self._running[name] = stack.enter_context(start(self._make_folder(name))), stack
        return self._running[name][0]

    def stop(self, name: str) -> None:
        if name in self._running:
            self._running.pop(name)[1].close()


_SERVERS = pytest.StashKey[MilvusServers]()


@pytest.fixture(scope="session")
def milvus(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """Gives the uri of "lite" or "milvus-2.3.5", or skips the test; the first to ask waits for the start."""
    servers = pytestconfig.stash[_SERVERS] = MilvusServers(tmp_path_factory.mktemp)
    yield servers.uri
    for name in ("lite", REAL_MILVUS):
        servers.stop(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """A real Milvus takes a quarter of a core while it has nothing to do, so it ends after its last test."""
    yield
    is_last = nextitem is None or REAL_MILVUS not in nextitem.nodeid
    if REAL_MILVUS in item.nodeid and is_last and _SERVERS in item.config.stash:
        item.config.stash[_SERVERS].stop(REAL_MILVUS)
