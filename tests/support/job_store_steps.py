"""Steps that tests of the job store share: sources, jobs that are given, what is pending."""

import select
import time
from collections.abc import Callable

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.keys import Source
from jobworker.worker.store.ports import Entry, ReaderStore
from support.job_worlds import World

S = Source("stream:test", "cg-test")
OTHER = Source("stream:other", "cg-other")
UNKNOWN = b"1-1"
#: How long a test waits for what should come at once.
SOON_S = 20.0


def read(store: ReaderStore, count: int = 100, source: Source = S) -> list[Entry]:
    store.begin_read(source, count, 0)
    return store.finish_read(source)


def given(
    world: World, *jobs: bytes, consumer: str = "a", source: Source = S
) -> tuple[ReaderStore, list[bytes]]:
    """A reader that was delivered the jobs, and their ids."""
    store = world.reader(consumer)
    store.acquire([source])
    world.producer().add(source.stream, jobs)
    return store, [entry.id for entry in read(store, source=source)]


def pending(store: ReaderStore, source: Source = S) -> list[bytes]:
    return [entry.id for entry in store.own_pending(source, b"0-0", 1000)]


def readable(fd: int, limit_s: float) -> bool:
    return bool(select.select([fd], [], [], limit_s)[0])


def retry_until_available(act: Callable[[], object]) -> None:
    """Repeat `act` while the store is unavailable, as a caller would."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            act()
            return
        except StoreUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # the caller's backoff
