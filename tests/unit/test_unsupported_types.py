"""Types that only some workers support wait for these workers and delay no other type."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from jobworker.worker.ipc.channel import READY, Channel, JobFrame
from jobworker.worker.ipc.control import Attach, ControlSocket, Drain, SyncDone, WorkerExited
from jobworker.worker.ipc.inflight import SUCCEEDED
from jobworker.worker.keys import Source
from jobworker.worker.reader.reader import Reader
from jobworker.worker.settings import Settings
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore

SOURCE = Source("stream:s", "g")
KINDS = {"embed": "nowhere:Embed", "audit": "nowhere:Audit"}
EMBED, AUDIT = 1 << 0, 1 << 1
WITHIN_S = 20.0


class Hand:
    """A worker that runs nothing by itself: the test says when."""

    def __init__(self, refused: int) -> None:
        self.channel = Channel.create(Settings().max_payload)
        self.channel.batch_hint, self.channel.unsupported_types, self.channel.phase = 1, refused, READY
        self.ran: list[str] = []

    def work(self) -> None:
        """Run all that it was given."""
        for frame, tail in self.channel.jobs.frames():
            decoded = msgspec.msgpack.decode(frame, type=JobFrame)
            rows = range(decoded.first_row, decoded.first_row + len(decoded.jobs))
            self.ran += [msgspec.json.decode(data)["type"] for _, _, data in decoded.jobs]
            self.channel.table.taken = rows.stop
            self.channel.jobs.release(tail)
            self.channel.table.mark(rows, SUCCEEDED)
            self.channel.wake_reader()


class Shop:
    """A reader with workers, on a store in memory."""

    def __init__(self, *refused: int) -> None:
        self.hands = [Hand(kinds) for kinds in refused]
        self.server = MemoryServer()
        self.link, theirs = ControlSocket.pair()
        self.theirs = ControlSocket(theirs)
        settings = Settings(streams=(SOURCE,), handlers=KINDS)
        reader = Reader(MemoryStore(self.server, "host/one"), settings, self.theirs)
        self.reading = threading.Thread(target=reader.run, daemon=True)
        for slot in range(len(self.hands)):
            self.attach(slot)
        self.link.send(SyncDone())
        self.reading.start()

    def attach(self, slot: int, generation: int = 1) -> None:
        self.link.send(Attach(slot, generation), self.hands[slot].channel.fds)

    def add(self, kind: str, count: int) -> None:
        for number in range(count):
            job = {"id": f"{kind}-{number}", "type": kind}
            self.server.append(SOURCE.stream, msgspec.json.encode(job))

    def work_until(self, done: Callable[[], bool], *working: Hand) -> None:
        """Let these workers work until it is so."""
        give_up_at = time.monotonic() + WITHIN_S
        while not done():
            assert time.monotonic() < give_up_at, [len(hand.ran) for hand in self.hands]
            for hand in working:
                hand.work()
            time.sleep(0.001)  # for the reader's thread; a worker would wait for its wake-up

    def close(self) -> None:
        self.link.send(Drain())
        for slot in range(len(self.hands)):  # else it would wait for them
            self.link.send(WorkerExited(slot, 1, "exit 0", charge=False))
        self.reading.join(WITHIN_S)  # it ends by itself once drained, and closes what it was given
        assert not self.reading.is_alive()
        self.link.close()
        self.theirs.close()
        for hand in self.hands:
            hand.channel.close()


@pytest.fixture
def shop(request: Any) -> Iterator[Shop]:
    with contextlib.closing(Shop(*request.param)) as made:
        yield made


@pytest.mark.parametrize("shop", [(0, EMBED)], indirect=True)
def test_others_flow_past_jobs_that_wait_for_the_worker_that_holds_the_model(shop: Shop) -> None:
    holder, other = shop.hands
    # Far more than the holder is given at once, and all of them before the first of the others.
    shop.add("embed", 600)
    shop.add("audit", 300)
    shop.work_until(lambda: len(other.ran) == 300, other)
    assert set(other.ran) == {"audit"}
    assert holder.ran == []  # it has not come to work yet
    shop.work_until(lambda: len(holder.ran) == 600, holder)
    assert set(holder.ran) == {"embed"}


@pytest.mark.parametrize("shop", [(EMBED, EMBED)], indirect=True)
def test_jobs_that_no_worker_runs_wait_until_one_comes_that_does(shop: Shop) -> None:
    shop.add("embed", 20)
    shop.add("audit", 20)
    shop.work_until(lambda: sum(len(hand.ran) for hand in shop.hands) == 20, *shop.hands)
    assert not any("embed" in hand.ran for hand in shop.hands)
    holder = Hand(0)
    shop.hands.append(holder)
    shop.attach(2)
    shop.work_until(lambda: len(holder.ran) == 20, *shop.hands)
    assert shop.server.dead_letters(SOURCE.stream) == []


@pytest.mark.parametrize("shop", [(AUDIT, EMBED)], indirect=True)
def test_each_type_goes_to_the_worker_that_runs_it_in_its_order(shop: Shop) -> None:
    first, second = shop.hands
    for _ in range(40):
        shop.add("embed", 1)
        shop.add("audit", 2)
    shop.work_until(lambda: len(first.ran) == 40 and len(second.ran) == 80, first, second)
    assert (set(first.ran), set(second.ran)) == ({"embed"}, {"audit"})
