"""The producer's side of the job store on Redis."""

from collections.abc import Iterable

from ... import keys
from ..announcements import Announcement
from .base import announcements_in, checked, chunks_by_size
from .batches import RedisBatchStore
from .cancel import RedisCancelStore


class RedisProducerStore(RedisBatchStore, RedisCancelStore):
    """`ProducerStore` on Redis."""

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """When it raises, some of the jobs may be in the stream."""
        added = 0
        for part in chunks_by_size(jobs, len):
            for reply in self.call(stream, [("XADD", stream, "*", keys.DATA_FIELD, job) for job in part]):
                checked(reply)
                added += 1
        return added

    def result(self, stream: str, job_id: str) -> bytes | None:
        found = self.one(stream, ("GET", self.result_key(stream, job_id)))
        return None if found is None else bytes(found)

    def announcements(self) -> list[Announcement]:
        return announcements_in(self.call(keys.SERVICES_KEY, [("HGETALL", keys.SERVICES_KEY)])[0])
