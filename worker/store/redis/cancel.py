"""Cancellation of jobs on Redis, for producers and operators."""

from collections.abc import Sequence

from ...envelope import batch_of
from ..ports import CancelReply, CancelRequest, Entry
from . import lanes
from .base import RedisStoreBase, checked, chunks_by_size, is_no_stream
from .blocking_read import data_of
from .lua import Command, script

#: How long the request to end a pending job is remembered after the last one: longer than any job runs.
_REMEMBERED_S = 2 * 24 * 3600


class RedisCancelStore(RedisStoreBase):
    """`CancelStore` on Redis."""

    def stream_page(self, stream: str, after: bytes, count: int) -> list[Entry]:
        rows = self.one(stream, ("XRANGE", stream, b"(" + after, "+", "COUNT", count))
        return [Entry(id, data_of(fields)) for id, fields in rows]

    def last_id(self, stream: str) -> bytes:
        reply = self.call(stream, [script("last_id", [stream])])[0]
        return b"0-0" if is_no_stream(reply) else bytes(checked(reply))

    def retry_page(self, stream: str, start: int, count: int) -> list[bytes]:
        return list(self.one(stream, ("ZRANGE", self.retry_key(stream), start, start + count - 1)))

    def cancel(
        self, stream: str, requests: Sequence[CancelRequest], *, result_ttl_s: float, dry_run: bool = False
    ) -> list[CancelReply]:
        ready = self.ready_key(stream)
        config = lanes.flow_config(self.call(stream, lanes.config_commands(ready)))
        keys = [stream, self.retry_key(stream), self.dead_key(stream), self.deaths_key(stream),
                self.shards_key(stream), ready]  # fmt: skip
        ttl_ms = max(1, round(result_ttl_s * 1000))

        def command(request: CancelRequest) -> Command:
            where = request.data
            if request.entry_id:
                where, _ = lanes.whereabouts(Entry(request.entry_id, request.data), config)
            result_key = self.result_key(stream, request.job_id) if request.result else ""
            last = (ttl_ms, _REMEMBERED_S, int(dry_run), batch_of(request.data), request.unique,
                    request.first_id)  # fmt: skip
            return script("cancel", keys, request.entry_id, where, request.letter, result_key,
                          request.result, *last)  # fmt: skip

        replies: list[CancelReply] = []
        for part in chunks_by_size(requests, lambda one: len(one.data) + len(one.letter)):
            replies += [
                CancelReply(checked(reply)) for reply in self.call(stream, [command(one) for one in part])
            ]
        return replies
