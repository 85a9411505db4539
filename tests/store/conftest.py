"""Job stores to test: the one in memory, and real servers that live as long as the module."""

from collections.abc import Iterator

import pytest

from support.job_worlds import MemoryWorld, RedisWorld, World
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
