"""A job store without a service, for what operators ask of one; a module may have a `server` of its own."""

from collections.abc import Iterator

import pytest

from jobworker.worker.extension import extension
from support.redis_servers import RedisServer, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running("valkey", tmp_path_factory.mktemp("store")) as one:
        yield one


@pytest.fixture
def store(server: RedisServer) -> RedisServer:
    """Empty at first; the groups are there, as after a service's first start."""
    server.client.flushall()
    for stream, group in extension().streams:
        server.client.xgroup_create(stream, group, "0", mkstream=True)
    return server
