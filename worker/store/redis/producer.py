"""The producer's side of the job store on Redis."""

from collections.abc import Iterable

from ... import keys
from ..announcements import Announcement
from .base import announcements_in, checked, chunks_by_size
from .batches import RedisBatchStore
from .lua import script


class RedisProducerStore(RedisBatchStore):
    """`ProducerStore` on Redis."""

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """When it raises, some of the jobs may be in the stream."""
        added = 0
        for part in chunks_by_size(jobs, len):
            for reply in self.call(stream, [("XADD", stream, "*", keys.DATA_FIELD, job) for job in part]):
                checked(reply)
                added += 1
        return added

    def schedule(self, stream: str, job: bytes, delay_s: float) -> None:
        self.one(stream, script("schedule", [self.retry_key(stream)], delay_s, job))

    def announcements(self) -> list[Announcement]:
        return announcements_in(self.call(keys.SERVICES_KEY, [("HGETALL", keys.SERVICES_KEY)])[0])
