"""Batches of jobs on Redis."""

from collections.abc import Mapping, Sequence
from typing import Any

from ... import keys
from ..batches import MAX_FINISHED, OPEN_S, PAGE, Added, DueBatch, StreamBatch, Sweep, parse_batch
from .base import Question, RedisStoreBase, checked, chunks_by_size, pairs
from .lua import script


class RedisBatchStore(RedisStoreBase):
    """`BatchProducerStore` and `BatchStore` on Redis."""

    def batch_key(self, stream: str, id: str) -> str:
        """The key of a batch's hash on a stream."""
        return keys.batch_key(stream, id, cluster=self._endpoint.cluster)

    def batches_key(self, stream: str, part: str) -> str:
        """The key of what is kept for all batches of a stream."""
        return keys.batches_key(stream, part, cluster=self._endpoint.cluster)

    # -- reading

    def batch_hash(self, stream: str, id: str) -> StreamBatch | None:
        fields = self.one(stream, ("HGETALL", self.batch_key(stream, id)))
        return parse_batch(pairs(fields)) if fields else None

    def batch_ids(self, stream: str, count: int) -> list[str]:
        parts = [self.batches_key(stream, part) for part in ("open", "finished")]
        replies = self.call(stream, [("ZREVRANGE", part, 0, count - 1) for part in parts])
        return [id.decode(errors="replace") for reply in replies for id in checked(reply)][:count]

    # -- producer

    def batch_open(self, stream: str, id: str, fields: Mapping[str, bytes]) -> bool:
        two_keys = [self.batch_key(stream, id), self.dead_key(stream)]
        flat: list[Any] = [part for field in fields.items() for part in field]
        return bool(self.one(stream, script("batch_open", two_keys, id, *flat)))

    def batch_add(
        self, stream: str, id: str, home: str, jobs: Sequence[bytes], total: int | None = None
    ) -> Added:
        two_keys = [stream, self.batch_key(stream, id)]
        sent = 0
        # Without jobs too: a shard counts jobs that are moved into it.
        for part in chunks_by_size(jobs, len) if jobs else [()]:
            expected = "" if total is None else total + sent
            added = Added(self.one(stream, script("batch_add", two_keys, home, OPEN_S, expected, *part)))
            if added is not Added.YES:
                return added
            sent += len(part)
        return Added.YES

    def batch_close(self, stream: str, id: str) -> bool:
        two_keys = [self.batch_key(stream, id), self.dead_key(stream)]
        return bool(self.one(stream, script("batch_close", two_keys, id)))

    # -- reaper

    def due_question(self, stream: str) -> Question:
        """What `batch_due` asks."""
        return Question("due", stream, [("HSCAN", self.batches_key(stream, "due"), 0, "COUNT", PAGE)])

    def batch_due(self, stream: str) -> list[DueBatch]:
        due = checked(self.answers(self.due_question(stream))[0])[1]
        return [DueBatch(id.decode(errors="replace"), mark) for id, mark in pairs(due).items()]

    def batch_seen(self, stream: str, due: DueBatch) -> None:
        self.one(stream, script("batch_seen", [self.batches_key(stream, "due")], due.id, due.mark))

    def batch_finish(self, stream: str, id: str, callback: bytes, error: str, keep_s: float) -> bool:
        all_keys = [stream, self.batch_key(stream, id), self.dead_key(stream)]
        command = script("batch_finish", all_keys, id, callback, error, max(1, round(keep_s)))
        return bool(self.one(stream, command))

    def batch_seal(self, stream: str, id: str, keep_s: float) -> None:
        key = self.batch_key(stream, id)
        now = self.one(stream, ("TIME",))[0]
        for reply in self.call(
            stream, [("HSET", key, "finished", now), ("EXPIRE", key, max(1, round(keep_s)))]
        ):
            checked(reply)

    def batch_sweep(self, stream: str, rank: int, keep_s: float) -> Sweep:
        arguments = (rank, PAGE, MAX_FINISHED, round(keep_s))
        open_, next_rank = self.one(stream, script("batch_sweep", [self.dead_key(stream)], *arguments))
        return Sweep(open_, next_rank)
