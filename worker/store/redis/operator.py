"""The store that operators' tools use: dead letters, retries, pauses, and where a job is."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
from redis.exceptions import ResponseError

from ...envelope import batch_of
from ...errors import ConfigurationError
from ...flow import FlowConfig
from ...keys import PAUSED_KEY, SERVICES_KEY, Source, base_stream
from ..announcements import Announcement
from ..operator import (
    START,
    Consumer,
    FoundStreams,
    GroupState,
    LaneCounts,
    LanePlace,
    Lease,
    Pause,
    Rivals,
    Scheduled,
    order_of,
)
from ..ports import Entry
from . import lanes
from .base import (
    announcements_in,
    checked,
    chunks,
    chunks_by_size,
    death_count,
    is_no_group,
    is_no_stream,
    pairs,
)
from .batches import RedisBatchStore
from .blocking_read import data_of
from .cancel import RedisCancelStore
from .conditions import rivals
from .connection import Reply
from .cron import RedisCronStore
from .key_scan import find_streams
from .lua import Command, script

#: Fields of the fence hash that name the service of a consumer (see prelude_name.lua).
_HOLDER = b"/holder/"


class OperatorStore(RedisCronStore, RedisBatchStore, RedisCancelStore):
    """The streams, retries, dead letters and pauses of a deployment.

    It takes no consumer's name, so it may run beside any service. Every call raises `StoreUnavailable` when
    the server does not answer or refuses for now. `url` may contain a password.
    """

    def wall_now_s(self, stream: str) -> float:
        """The store's clock, unix seconds."""
        seconds, microseconds = self.one(stream, ("TIME",))
        return int(seconds) + int(microseconds) / 1e6

    # -- dead letters

    def dead_count(self, stream: str) -> int:
        """Number of dead letters of the stream."""
        return int(self.one(stream, ("XLEN", self.dead_key(stream))))

    def dead_after(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """A page of dead letters, oldest first, after an id (`START`: from the first)."""
        return self._page(stream, ("XRANGE", self.dead_key(stream), b"(" + after, "+", "COUNT", count))

    def dead_before(self, stream: str, before: bytes, count: int) -> list[Entry]:
        """A page of dead letters, newest first, before an id (`START`: from the last)."""
        end = "+" if before == START else b"(" + before
        return self._page(stream, ("XREVRANGE", self.dead_key(stream), end, "-", "COUNT", count))

    def requeue(self, stream: str, jobs: Sequence[tuple[bytes, bytes]], to: str = "") -> list[bool]:
        """Move dead letters into their stream, or ``to`` another: ``(letter's id, job)``, each in one atomic
        step.

        False for a letter that was gone already; its job is not added then. Raises `ConfigurationError` for
        another stream of a Redis Cluster: it is in another slot.
        """
        if to and self._endpoint.cluster:
            raise ConfigurationError("a Redis Cluster cannot move a job to another stream in one step")
        moved: list[bool] = []
        for part in chunks_by_size(jobs, lambda pair: len(pair[1])):
            replies = self.call(stream, [self._requeue(stream, id, job, to) for id, job in part])
            moved += [bool(checked(reply)) for reply in replies]
        return moved

    def _requeue(self, stream: str, id: bytes, job: bytes, to: str) -> Command:
        batch = "" if to else batch_of(job)  # its counts are those of one stream: it stays dead there
        of_batch = [self.batch_key(stream, batch)] if batch else []
        return script("requeue", [to or stream, self.dead_key(stream), *of_batch], id, job)

    def purge(self, stream: str, ids: Sequence[bytes]) -> int:
        """Delete dead letters; returns how many still existed."""
        commands: list[Command] = [("XDEL", self.dead_key(stream), *part) for part in chunks(ids)]
        return sum(int(checked(reply)) for reply in (self.call(stream, commands) if commands else ()))

    # -- retries

    def retries(self, stream: str, start: int, count: int) -> list[Scheduled]:
        """A page of scheduled retries, soonest first, from a rank on."""
        command = ("ZRANGE", self.retry_key(stream), start, start + count - 1, "WITHSCORES")
        flat = self.one(stream, command)
        return [Scheduled(float(due), job) for job, due in zip(flat[::2], flat[1::2], strict=True)]

    def retry_now(self, stream: str, jobs: Sequence[bytes]) -> int:
        """Make scheduled retries due now, by their bytes; returns how many were due later."""
        now = f"{self.wall_now_s(stream):.6f}"
        commands = [("ZADD", self.retry_key(stream), "XX", "LT", "CH", now, job) for job in jobs]
        return sum(int(checked(reply)) for reply in (self.call(stream, commands) if commands else ()))

    # -- pauses

    def pause(self, job_type: str, note: str) -> None:
        """Stop every reader of the deployment from dispatching jobs of a type, until `resume`."""
        # A terminal may pass bytes that are no UTF-8.
        readable = note.encode("utf-8", "replace").decode()
        pause = orjson.dumps({"since": self.wall_now_s(PAUSED_KEY), "note": readable})
        self.one(PAUSED_KEY, ("HSET", PAUSED_KEY, job_type, pause))

    def resume(self, job_type: str) -> bool:
        """End a pause; False where the type was not paused."""
        return bool(self.one(PAUSED_KEY, ("HDEL", PAUSED_KEY, job_type)))

    def pauses(self) -> list[Pause]:
        """The paused types, by name."""
        return sorted(_pause(*item) for item in pairs(self.one(PAUSED_KEY, ("HGETALL", PAUSED_KEY))).items())

    # -- lanes

    def flow_config(self, stream: str) -> FlowConfig:
        """Limits and weights of a stream."""
        return lanes.flow_config(self.call(stream, lanes.config_commands(self.ready_key(stream))))

    def configure(self, stream: str, config: FlowConfig) -> bool:
        """Replace limits and weights; False, without effect, if ``config.version`` is no longer current."""
        return self.one(stream, lanes.configure(self.ready_key(stream), config)) is not None

    def lane_counts(self, stream: str) -> LaneCounts:
        """Count the jobs that wait in lanes."""
        ready = self.ready_key(stream)
        replies = self.call(stream, lanes.counts_commands(ready))
        return lanes.counts(replies, lanes.parked_jobs(ready, replies, partial(self.call, stream)))

    def lane_place(self, stream: str, entry: Entry) -> LanePlace | None:
        """The place of an entry in its lane; None where it waits in none."""
        ready = self.ready_key(stream)
        name, job = lanes.whereabouts(entry, self.flow_config(stream))
        rank = self.one(stream, ("LPOS", lanes.jobs_key(ready, name), job))
        if rank is None:
            return self._outdated_place(stream, name, job)
        keys = lanes.keys_of(name)
        scores = self.call(stream, [("ZSCORE", f"{ready}/parked/{key}", name) for key in keys])
        blocked = [key for key, score in zip(keys, scores, strict=True) if checked(score) is not None]
        return LanePlace(int(rank), next(iter(blocked), None))

    def _outdated_place(self, stream: str, name: bytes, job: bytes) -> LanePlace | None:
        """The place in a lane of former limits, which readers have not sorted again yet."""
        ready = self.ready_key(stream)
        outdated = lanes.siblings(name, self.one(stream, ("SMEMBERS", f"{ready}/old")))
        commands = [("LPOS", lanes.jobs_key(ready, one), job) for one in outdated]
        ranks = map(checked, self.call(stream, commands) if commands else ())
        return next((LanePlace(int(rank), None, True) for rank in ranks if rank is not None), None)

    def is_moving(self, stream: str, entry_id: bytes) -> bool:
        """Whether an entry was taken for the move into a shard, and that is not done."""
        moved, taken = self.one(stream, ("HMGET", self.shards_key(stream), "moved", "taken"))
        return bool(moved and taken) and order_of(moved) < order_of(entry_id) <= order_of(taken)

    def rivals(self, stream: str, entry: Entry) -> Rivals:
        """The jobs that run instead of an entry's. Raises `MalformedJob` for an entry that is no job."""
        return rivals(lambda command: self.one(stream, command), self.ready_key(stream), entry)

    # -- services and streams

    def announcements(self) -> list[Announcement]:
        """What the services of the deployment handle; empty if unknown."""
        return announcements_in(self.call(SERVICES_KEY, [("HGETALL", SERVICES_KEY)])[0])

    def find_streams(self) -> FoundStreams:
        """Every stream of the store, whether a service reads it or not. The scan is bounded."""
        return find_streams(
            self.one_key_a_server(), lambda key, command: self.call(key, [command])[0], base_stream
        )

    # -- where a job is

    def cancel_is_asked(self, stream: str, id: bytes) -> bool:
        """Whether a pending entry was cancelled, and the service that has it was asked to end it."""
        return bool(self.one(stream, ("HEXISTS", lanes.cancels_key(self.ready_key(stream)), id)))

    def exists(self, stream: str) -> bool:
        """Whether the store has the stream's key."""
        return bool(self.one(stream, ("EXISTS", stream)))

    def group(self, source: Source) -> GroupState | None:
        """The state of a group; None where it or its stream does not exist."""
        groups, consumers, fence, now = self.call(
            source.stream,
            [
                ("XINFO", "GROUPS", source.stream),
                ("XINFO", "CONSUMERS", *source),
                ("HGETALL", self.fence_key(source.stream)),
                ("TIME",),
            ],
        )
        if is_no_group(consumers) or is_no_stream(groups) or is_no_stream(consumers):
            return None
        for facts in map(pairs, checked(groups)):
            if facts[b"name"] == source.group.encode():
                renewed_s_ago = _renewed_s_ago(fence, checked(now))
                readers = [_consumer(pairs(flat), renewed_s_ago) for flat in checked(consumers)]
                return GroupState(facts[b"last-delivered-id"], facts[b"pending"], readers)
        return None

    def entry(self, stream: str, id: bytes) -> Entry | None:
        """One entry with the worker deaths recorded for it; None where the stream has no such id."""
        rows, deaths = self.call(stream, [("XRANGE", stream, id, id), ("HGET", self.deaths_key(stream), id)])
        found = checked(rows)
        return Entry(id, data_of(found[0][1]), deaths=death_count(checked(deaths)) or 0) if found else None

    def entries(self, stream: str, after: bytes, count: int) -> list[Entry]:
        """A page of the stream, finished or not, oldest first."""
        return self._page(stream, ("XRANGE", stream, b"(" + after, "+", "COUNT", count))

    def lease(self, source: Source, id: bytes) -> Lease | None:
        """The lease of an entry; None where it is not pending."""
        return next(iter(self._leases(source, id, id, 1)), None)

    def leases(self, source: Source, after: bytes, count: int) -> list[Lease]:
        """A page of pending entries, oldest first."""
        return self._leases(source, b"(" + after, b"+", count)

    def _leases(self, source: Source, first: bytes, last: bytes, count: int) -> list[Lease]:
        reply = self.call(source.stream, [("XPENDING", *source, first, last, count)])[0]
        if is_no_group(reply):
            return []
        rows = checked(reply)
        return [
            Lease(id, name.decode(errors="replace"), idle / 1000, tries) for id, name, idle, tries in rows
        ]

    def _page(self, stream: str, command: Command) -> list[Entry]:
        return [Entry(id, data_of(fields)) for id, fields in self.one(stream, command)]


def _consumer(facts: dict[bytes, Any], renewed_s_ago: Mapping[bytes, float]) -> Consumer:
    """The heartbeat of its service counts too: for Redis 7.0 a consumer whose reads find nothing is idle."""
    name = facts[b"name"]
    idle_s = min(facts[b"idle"] / 1000, renewed_s_ago.get(name, math.inf))
    return Consumer(name.decode(errors="replace"), facts[b"pending"], idle_s)


def _renewed_s_ago(fence: Reply, now: Sequence[bytes]) -> dict[bytes, float]:
    """Seconds since the services renewed their consumers' names; any program can write to the hash."""
    wall_now_s = int(now[0]) + int(now[1]) / 1e6
    ages: dict[bytes, float] = {}
    for field, value in ({} if isinstance(fence, ResponseError) else pairs(fence)).items():
        if field.startswith(_HOLDER):
            with suppress(ValueError, KeyError, TypeError):
                age_s = wall_now_s - _finite(float(orjson.loads(value)["renewed"]) / 1000)
                ages[field.removeprefix(_HOLDER)] = max(0.0, age_s)
    return ages


def _finite(value: Any) -> float:
    """The value as a number; raises ValueError for one that is no time."""
    number = float(value)
    if not 0.0 <= number < 1e12:
        raise ValueError(number)
    return number


def _pause(job_type: bytes, value: bytes) -> Pause:
    """Any value pauses the type, also one that was written with another tool."""
    try:
        pause = orjson.loads(value)
        return Pause(job_type.decode(), _finite(pause["since"]), str(pause.get("note", "")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Pause(job_type.decode(errors="replace"), 0.0, value.decode(errors="replace"))
