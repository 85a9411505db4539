"""What a reader is told and what its store answers may be there in the same instant, in either order."""

import contextlib

from jobworker.worker.ipc.channel import READY, Channel
from jobworker.worker.ipc.control import Attach, ControlSocket, Drain, SyncDone, WorkerExited
from jobworker.worker.keys import Source
from jobworker.worker.reader.reader import Reader
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore

SOURCE = Source("stream:s", "g")


def test_a_drain_that_is_heard_before_the_answer_to_a_read_ends_the_read() -> None:
    ours, sock = ControlSocket.pair()
    server = MemoryServer()
    settings = Settings(streams=(SOURCE,), handlers={"noop": "nowhere:Noop"})
    channel = Channel.create(settings.max_payload)
    channel.batch_hint, channel.phase = 1, READY
    with (
        contextlib.closing(ours),
        contextlib.closing(ControlSocket(sock)) as theirs,
        contextlib.closing(channel),
    ):
        reader = Reader(MemoryStore(server, "host/one"), settings, theirs)
        ours.send(Attach(0, 1), channel.fds)
        ours.send(SyncDone())
        for _ in range(2):  # the first turn is briefed, the second connects and begins to read
            reader.run_once(sleep_s=0.25)
        assert reader._store.is_reading(SOURCE)
        # Descriptors are reported in the order in which they became readable.
        ours.send(Drain())
        server.append(SOURCE.stream, b'{"id": "a", "type": "noop"}')
        reader._wait(1.0)
        assert not reader._store.is_reading(SOURCE)
        ours.send(WorkerExited(0, 1, "exit 0", charge=False))
        reader.run()  # ends by itself once drained, and closes what it was given
