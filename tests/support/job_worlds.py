"""One face for the job store in memory and on real servers, for the suite that both must pass."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

from jobworker.worker import keys
from jobworker.worker.keys import NO_HOLDER, Holder
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore
from jobworker.worker.store.ports import ProducerStore, ReaderStore, ReaperStore, Settlement
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from jobworker.worker.store.redis.reaper import RedisReaperStore
from support.redis_servers import RedisServer


def settle(store: ReaderStore, settlements: Sequence[Settlement]) -> set[bytes]:
    """Settle entries; returns the ids that were not the reader's any more. Raises the store's refusal."""
    results = store.settle(settlements)
    for result in results:
        if result.error:
            raise result.error
    return {id for result in results for id in result.refused}


def schedule(client: Any, stream: str, job: bytes, delay_s: float) -> None:
    """Put a job into the retry ZSET; an equal one that waits already is kept."""
    seconds, microseconds = client.time()
    while not client.zadd(keys.retry_key(stream), {job: seconds + microseconds / 1e6 + delay_s}, nx=True):
        job += b" "


class World(Protocol):
    """A store that is empty at first, and what an outsider can do to it."""

    def reader(self, consumer: str, holder: Holder = NO_HOLDER) -> ReaderStore: ...
    def reaper(self) -> ReaperStore: ...
    def producer(self) -> ProducerStore: ...
    def pass_time(self, seconds: float) -> None: ...
    def schedule(self, stream: str, job: bytes, delay_s: float) -> None: ...
    def dead_letters(self, stream: str) -> list[bytes]: ...
    def waiting(self, stream: str) -> list[bytes]: ...
    def length(self, stream: str) -> int: ...
    def add_without_data(self, stream: str) -> None: ...
    def delete_entry(self, stream: str, id: bytes) -> None: ...
    def delete_stream(self, stream: str) -> None: ...
    def pause(self, kind: str) -> None: ...
    def break_key(self, key: str) -> None: ...
    def repair_key(self, key: str) -> None: ...
    def close(self) -> None: ...


class MemoryWorld:
    """The twin in memory; its time passes only when told to."""

    def __init__(self) -> None:
        self._wall_s = 1_767_345_600.0
        self._server = MemoryServer(lambda: self._wall_s)
        self._stores: list[MemoryStore] = []

    def _store(self, consumer: str = "", holder: Holder = NO_HOLDER) -> MemoryStore:
        self._stores.append(MemoryStore(self._server, consumer, holder))
        return self._stores[-1]

    def reader(self, consumer: str, holder: Holder = NO_HOLDER) -> ReaderStore:
        return self._store(consumer, holder)

    def reaper(self) -> ReaperStore:
        return self._store()

    def producer(self) -> ProducerStore:
        return self._store()

    def pass_time(self, seconds: float) -> None:
        self._wall_s += seconds

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        self._server.schedule(stream, job, delay_s)

    def dead_letters(self, stream: str) -> list[bytes]:
        return self._server.dead_letters(stream)

    def waiting(self, stream: str) -> list[bytes]:
        return self._server.waiting(stream)

    def length(self, stream: str) -> int:
        return len(self._server.entries(stream))

    def add_without_data(self, stream: str) -> None:
        self._server.append(stream, None)

    def delete_entry(self, stream: str, id: bytes) -> None:
        self._server.delete_entry(stream, id)

    def delete_stream(self, stream: str) -> None:
        self._server.delete_stream(stream)

    def pause(self, kind: str) -> None:
        self._server.paused.add(kind)

    def break_key(self, key: str) -> None:
        self._server.broken.add(key)

    def repair_key(self, key: str) -> None:
        self._server.broken.discard(key)

    def close(self) -> None:
        for store in self._stores:
            store.close()


class RedisWorld:
    """A real server, emptied first; it may be a cluster of one node."""

    def __init__(self, server: RedisServer, *, cluster: bool = False) -> None:
        self.server = server
        self._cluster = cluster
        self._url = f"redis+cluster://127.0.0.1:{server.port}" if cluster else server.url
        self._client = server.client
        self._client.flushall()
        self._stores: list[RedisReaderStore | RedisReaperStore | RedisProducerStore] = []

    def reader(self, consumer: str, holder: Holder = NO_HOLDER) -> RedisReaderStore:
        store = RedisReaderStore(self._url, consumer, holder=holder)
        self._stores.append(store)
        return store

    def reaper(self) -> ReaperStore:
        store = RedisReaperStore(self._url)
        self._stores.append(store)
        return store

    def producer(self) -> ProducerStore:
        store = RedisProducerStore(self._url)
        self._stores.append(store)
        return store

    def pass_time(self, seconds: float) -> None:
        time.sleep(seconds)  # idle times and due times are by the server's own clock

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        schedule(self._client, stream, job, delay_s)

    def dead_letters(self, stream: str) -> list[bytes]:
        key = keys.dead_letter_key(stream, cluster=self._cluster)
        return [fields[b"data"] for _, fields in self._client.xrange(key)]

    def waiting(self, stream: str) -> list[bytes]:
        return list(self._client.zrange(keys.retry_key(stream, cluster=self._cluster), 0, -1))

    def length(self, stream: str) -> int:
        return int(self._client.xlen(stream))

    def add_without_data(self, stream: str) -> None:
        self._client.xadd(stream, {"other": "field"})

    def delete_entry(self, stream: str, id: bytes) -> None:
        self._client.xdel(stream, id)

    def delete_stream(self, stream: str) -> None:
        self._client.delete(stream)

    def pause(self, kind: str) -> None:
        self._client.hset(keys.PAUSED_KEY, kind, "{}")

    def break_key(self, key: str) -> None:
        if self._client.exists(key):
            self._client.rename(key, f"aside {key}")
        self._client.set(key, "a string")

    def repair_key(self, key: str) -> None:
        self._client.delete(key)
        if self._client.exists(f"aside {key}"):
            self._client.rename(f"aside {key}", key)

    def close(self) -> None:
        for store in self._stores:
            store.close()
