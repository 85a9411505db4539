"""The producer's side of the job store on Redis."""

import secrets
import time
from collections.abc import Iterable

from ... import keys
from ...errors import StoreUnavailable
from ..announcements import Announcement
from .base import announcements_in, checked, chunks_by_size
from .batches import RedisBatchStore
from .cancel import RedisCancelStore
from .connection import Reply
from .key_faults import was_redirected

#: Jobs of one call that may be sent again: the server keeps the last 100 ids of a producer, for 100 s, unless
#: its configuration says otherwise.
_RESENT_JOBS = 100
#: Pause before a job is sent again whose slot moves to another node (seconds).
_MOVE_PAUSE_S = 0.05


class RedisProducerStore(RedisBatchStore, RedisCancelStore):
    """`ProducerStore` on Redis.

    From Redis 8.6 a few jobs are sent a second time if the answer is lost: the server knows those it has.
    """

    _producer_id = ""
    _sent = 0

    def add(self, stream: str, jobs: Iterable[bytes]) -> int:
        """When it raises, some of the jobs may be in the stream."""
        added = 0
        for part in chunks_by_size(jobs, len):
            for reply in self._add_part(stream, part):
                checked(reply)
                added += 1
        return added

    def _add_part(self, stream: str, jobs: list[bytes]) -> list[Reply]:
        """Add jobs; those whose slot moves are sent until it has moved, within the timeout."""
        replies = self._send(stream, jobs)
        give_up_s = time.monotonic() + self._timeout_s
        while (left := [at for at, reply in enumerate(replies) if was_redirected(reply)]) and (
            time.monotonic() < give_up_s
        ):
            time.sleep(_MOVE_PAUSE_S)  # a cluster sends no event
            for at, reply in zip(left, self._send(stream, [jobs[at] for at in left]), strict=True):
                replies[at] = reply
        return replies

    def _send(self, stream: str, jobs: list[bytes]) -> list[Reply]:
        if len(jobs) > _RESENT_JOBS or not self.features(stream).idempotent_add:
            return self.call(stream, [("XADD", stream, "*", keys.DATA_FIELD, job) for job in jobs])
        self._producer_id = self._producer_id or secrets.token_hex(8)
        first, self._sent = self._sent, self._sent + len(jobs)
        commands = [
            ("XADD", stream, "IDMP", self._producer_id, number, "*", keys.DATA_FIELD, job)
            for number, job in enumerate(jobs, first)
        ]
        try:
            return self.call(stream, commands)
        except StoreUnavailable:
            if not self.features(stream).idempotent_add:
                raise
            return self.call(stream, commands)

    def result(self, stream: str, job_id: str) -> bytes | None:
        found = self.one(stream, ("GET", self.result_key(stream, job_id)))
        return None if found is None else bytes(found)

    def announcements(self) -> list[Announcement]:
        return announcements_in(self.call(keys.SERVICES_KEY, [("HGETALL", keys.SERVICES_KEY)])[0])
