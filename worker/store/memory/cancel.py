"""Cancellation of jobs and their results in memory: the same decisions as the script ``cancel``."""

from collections.abc import Sequence

from ...envelope import batch_of
from ..ports import CancelReply, CancelRequest, Entry
from .server import MemoryServer, order


class MemoryCancelStore:
    """`CancelStore` over a `MemoryServer`, and results."""

    _server: MemoryServer

    def stream_page(self, stream: str, after: bytes, count: int) -> list[Entry]:
        with self._server.lock:
            entries = self._server.stream(stream).entries
            page = sorted((id for id in entries if order(id) > order(after)), key=order)[:count]
            return [Entry(id, entries[id]) for id in page]

    def last_id(self, stream: str) -> bytes:
        return b"%d-%d" % self._server.stream(stream).last_id

    def retry_page(self, stream: str, start: int, count: int) -> list[bytes]:
        with self._server.lock:
            return self._server.waiting(stream)[start : start + count]

    def cancel(
        self, stream: str, requests: Sequence[CancelRequest], *, result_ttl_s: float, dry_run: bool = False
    ) -> list[CancelReply]:
        with self._server.lock:
            return [self._cancel(stream, one, result_ttl_s, dry_run) for one in requests]

    def _cancel(self, name: str, request: CancelRequest, ttl_s: float, dry_run: bool) -> CancelReply:
        stream, id = self._server.stream(name), request.entry_id
        if not id:
            found = next((one for one in stream.retries if one[2] == request.data), None)
            if found is None:
                return CancelReply.GONE
            if not dry_run:
                stream.retries.remove(found)
                self._record(name, request, ttl_s)
            return CancelReply.UNSCHEDULED
        if id not in stream.entries:
            return CancelReply.GONE
        if any(id in group.leases for group in stream.groups.values()):
            if not dry_run:
                stream.cancels[id] = bool(request.letter)
                stream.cancel_requests += 1
            return CancelReply.ASKED
        is_unread = not stream.groups or any(
            order(id) > group.last_delivered for group in stream.groups.values()
        )
        if not is_unread and id not in stream.lanes.ids():
            moving = order(stream.forwarding.moved) < order(id) <= order(stream.forwarding.taken)
            return CancelReply.MOVING if moving else CancelReply.GONE
        if not dry_run:
            self._record(name, request, ttl_s)
            stream.lanes.remove(id)
            del stream.entries[id]
            stream.deaths.pop(id, None)
        return CancelReply.REMOVED

    def _record(self, name: str, request: CancelRequest, ttl_s: float) -> None:
        stream = self._server.stream(name)
        stream.cancelled += 1
        if batch := batch_of(request.data):
            stream.batches.count(batch, "dead", 1)
        if request.unique:
            stream.conditions.free_name(request.unique, request.first_id)
        if request.letter:
            stream.dead.append(request.letter)
        if request.result:
            self._server.keep_result(name, request.job_id, request.result, ttl_s)

    def result(self, stream: str, job_id: str) -> bytes | None:
        with self._server.lock:
            expires_s, record = self._server.stream(stream).results.get(job_id, (0.0, b""))
            return record if expires_s > self._server.wall_now_s() else None
