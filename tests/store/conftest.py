"""Servers to test with: Redis and Valkey as long as the module, Milvus as long as the session."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.redis_fence import RedisFence
from support.job_worlds import MemoryWorld, RedisWorld, World
from support.milvus import start_lite, start_real, why_no_real_milvus
from support.redis_servers import RedisServer, running


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


@pytest.fixture
def fence(any_server: RedisServer | None) -> Iterator[Any]:
    if any_server is None:
        yield MemoryFence()
        return
    any_server.client.flushall()
    made = RedisFence(any_server.url)
    yield made
    made.close()


@pytest.fixture(scope="session")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Gives the uri of "lite" or "milvus-2.3.5", or skips the test; the first to ask waits for the start."""
    starts = {"lite": start_lite, "milvus-2.3.5": start_real}
    with contextlib.ExitStack() as servers:

        @functools.cache
        def uri(backend: str) -> str:
            if backend == "milvus-2.3.5" and (reason := why_no_real_milvus()):
                pytest.skip(reason)
            return servers.enter_context(starts[backend](tmp_path_factory.mktemp(backend)))

        yield uri
