"""A service with few descriptors whose metrics port is held by clients that send no request."""

import os
import resource
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.service import Service, ending, handlers

pytestmark = pytest.mark.process

LIMIT, CLIENTS = 128, 300


def test_half_open_connections_keep_no_worker_from_starting(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ending(Service(tmp_path, handlers("Noop"), procs=1)) as one, ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, before[1]))
        try:
            one.launch()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        one.wait_until_ready()
        address = urlsplit(one.url)
        for _ in range(CLIENTS):
            client = socket.create_connection((str(address.hostname), int(address.port or 0)))
            stack.enter_context(client)
            time.sleep(0.005)  # acceptance by the server sends no event, and a full queue delays by a second
        for _ in range(3):
            worker = one.roles()["worker 0"]
            os.kill(worker, signal.SIGKILL)
            one.wait_for_successor("worker 0", worker)
            one.wait_for_end(one.enqueue("noop"))
        assert one.get("/healthz")[0] == 200
        assert one.logged("child.spawn_failed") == []
        assert one.terminate() == 0
        one.assert_nothing_left()
