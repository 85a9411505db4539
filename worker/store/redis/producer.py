"""The producer's side of the job store on Redis."""

from collections.abc import Iterable, Iterator

from ... import keys
from .base import SCRIPT_BYTES, SCRIPT_IDS, RedisStoreBase, checked
from .lua import script


class RedisProducerStore(RedisStoreBase):
    """`ProducerStore` on Redis."""

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """See `ProducerStore.add`. When it raises, some of the jobs may be in the stream."""
        added = 0
        for some in _chunks_by_size(jobs):
            for reply in self.call(stream, [("XADD", stream, "*", keys.DATA_FIELD, job) for job in some]):
                checked(reply)
                added += 1
        return added

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        """See `ProducerStore.schedule`."""
        self.one(stream, script("schedule", [self.retry_key(stream)], delay_s, job))


def _chunks_by_size(jobs: Iterable[bytes]) -> Iterator[list[bytes]]:
    some: list[bytes] = []
    size = 0
    for job in jobs:
        some.append(job)
        size += len(job)
        if len(some) >= SCRIPT_IDS or size >= SCRIPT_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some
