"""The cron tables of a stream on Redis."""

from collections.abc import Sequence

from ... import keys
from ..cron import (
    FORGET_AFTER_S,
    WRONG_CLOCK_S,
    CronHash,
    StoredTable,
    Taken,
    TakenTick,
    TickJob,
    encode_pause,
    parse_cron_hash,
)
from ..ports import KeyFault
from .base import RedisStoreBase, checked, pairs
from .key_faults import type_faults
from .lua import script


class RedisCronStore(RedisStoreBase):
    """`CronStore` on Redis."""

    def cron_key(self, stream: str) -> str:
        """The key of the hash."""
        return keys.cron_key(stream, cluster=self._endpoint.cluster)

    def cron_publish(self, stream: str, service: str, digest: str, tables: Sequence[StoredTable]) -> bool:
        flat = [argument for table in tables for argument in table]
        limits = (FORGET_AFTER_S, WRONG_CLOCK_S)
        command = script("cron_publish", [self.cron_key(stream)], service, digest, *limits, *flat)
        return bool(self.one(stream, command))

    def cron_clock(self, stream: str) -> tuple[bytes, float]:
        version, now = map(
            checked, self.call(stream, [("HGET", self.cron_key(stream), "version"), ("TIME",)])
        )
        return version or b"", int(now[0]) + int(now[1]) / 1e6

    def cron_hash(self, stream: str) -> CronHash:
        return parse_cron_hash(pairs(self.one(stream, ("HGETALL", self.cron_key(stream)))))

    def cron_take(self, stream: str, version: bytes, tick: TickJob) -> TakenTick:
        both = [stream, self.cron_key(stream)]
        command = script("cron_take", both, version, tick.name, tick.tick_s, tick.job_id, tick.data)
        outcome, cursor_s = self.one(stream, command)
        return TakenTick(Taken(outcome), cursor_s)

    def cron_faults(self, stream: str) -> list[KeyFault]:
        """As `key_faults`, for the key of the cron tables. The stream's jobs do not need it."""
        key = self.cron_key(stream)
        reply = self.call(stream, [("TYPE", key)])[0]
        found = type_faults({key: "hash"}, {key: reply}, cluster=self._endpoint.cluster)
        return [fault._replace(blocks=False) for fault in found]

    def cron_pause(self, stream: str, name: str, note: str) -> None:
        seconds, microseconds = self.one(stream, ("TIME",))
        pause = encode_pause(int(seconds) + int(microseconds) / 1e6, note)
        self.one(stream, ("HSET", self.cron_key(stream), f"paused/{name}", pause))

    def cron_resume(self, stream: str, name: str) -> bool:
        return bool(self.one(stream, script("cron_resume", [self.cron_key(stream)], name)))
