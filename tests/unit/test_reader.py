"""The reader in one process: how much it reads, and when."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from jobworker.worker.ipc.channel import READY, Channel
from jobworker.worker.ipc.control import Attach, ControlSocket, Drain, SyncDone, WorkerExited
from jobworker.worker.keys import Source
from jobworker.worker.reader.reader import Reader
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import Entry

SOURCE = Source("stream", "group")
#: Twice this is what a worker that has shown no pace yet may be given: more than some reads bring.
APPETITE = 1500


class Watched(MemoryStore):
    """Notes reads: ``+`` for one that was begun, the number of entries for one that was finished."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server, "host/one")
        self.seen: list[str | int] = []

    def begin_read(self, source: Source, count: int, block_ms: int) -> int:
        self.seen.append("+")
        return super().begin_read(source, count, block_ms)

    def finish_read(self, source: Source) -> list[Entry]:
        entries = super().finish_read(source)
        self.seen.append(len(entries))
        return entries


@pytest.fixture
def server() -> MemoryServer:
    server = MemoryServer(blocking=False)
    for number in range(10_000):
        server.append(SOURCE.stream, msgspec.json.encode({"id": str(number), "type": "noop"}))
    return server


@contextlib.contextmanager
def reading(store: MemoryStore) -> Iterator[Reader]:
    """A reader with one worker that takes what it is given and finishes nothing."""
    ours, sock = ControlSocket.pair()
    settings = Settings(streams=(SOURCE,), handlers={"noop": "nowhere:Noop"})
    with closing(ours), closing(ControlSocket(sock)) as theirs, closing(Channel.create(1024)) as channel:
        channel.batch_hint, channel.phase = APPETITE, READY
        ours.send(Attach(0, 1), channel.fds)
        ours.send(SyncDone())
        now_s = time.monotonic()
        # The clock stands still: on a slow machine, the backlog would be sorted meanwhile.
        reader = Reader(store, settings, theirs, mono_s=lambda: now_s)
        yield reader
        ours.send(WorkerExited(0, 1, "end of test", False))
        ours.send(Drain())
        reader.run()


def test_no_more_is_read_than_workers_have_room_for(server: MemoryServer) -> None:
    with closing(MemoryStore(server, "host/one")) as store, reading(store) as reader:
        for _ in range(60):
            reader.run_once(0.0)
        assert store.depths(SOURCE).pending == 2 * APPETITE


def test_the_next_read_is_begun_before_the_jobs_of_a_large_one_are_gone_through(server: MemoryServer) -> None:
    with closing(Watched(server)) as store, reading(store) as reader:
        order: list[str] = []
        admit = reader._intake._admit
        reader._intake._admit = lambda *args, **more: (
            order.append("".join(map(str, store.seen[-2:]))),
            admit(*args, **more),
        )[1]  # type: ignore[method-assign]
        for _ in range(60):
            reader.run_once(0.0)
        assert "8" in order[0], "a small one: nothing is known of the jobs' sizes yet"
        assert "1000+" in order
