"""The reaper's side of the job store on Redis."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from redis.exceptions import ResponseError

from ...errors import StoreRefused
from ...keys import SERVICES_KEY, Source
from ..announcements import encode
from ..ports import Depths, Promotion
from . import lanes
from .base import (
    SCRIPT_BYTES,
    SCRIPT_IDS,
    Question,
    announcements_in,
    checked,
    is_no_group,
    is_no_stream,
    pairs,
)
from .connection import Reply
from .cron import RedisCronStore
from .forwarding import RedisForwardStore
from .lua import script

log = logging.getLogger("jobworker.reaper")

#: Entries that one call of trim.lua deletes; some ms of the server's time.
_TRIM_ENTRIES = 10_000
#: Calls per trim: a long backlog is deleted over several cycles of the reaper.
_TRIM_CALLS = 20


class RedisReaperStore(RedisCronStore, RedisForwardStore):
    """`ReaperStore` on Redis."""

    _warned_not_announced = False

    def ask_due(self, streams: Iterable[str], limit: int) -> None:
        pairs_of = ((self._promotion(stream, limit), self.due_question(stream)) for stream in streams)
        self.ask_ahead(itertools.chain.from_iterable(pairs_of))

    def _promotion(self, stream: str, limit: int) -> Question:
        command = script("promote", [stream, self.retry_key(stream)], limit, SCRIPT_BYTES)
        return Question("promote", stream, [command])

    def promote(self, stream: str, limit: int) -> Promotion:
        """After 8 MiB of jobs it stops early, with ``next_due_s`` 0."""
        moved, next_due_s = checked(self.answers(self._promotion(stream, limit))[0])
        return Promotion(moved, None if next_due_s is None else float(next_due_s))

    def trim(self, stream: str) -> int:
        """A long backlog takes several calls."""
        all_keys = [stream, self.ready_key(stream), self.shards_key(stream)]
        total = 0
        for _ in range(_TRIM_CALLS):
            deleted = self.one(stream, script("trim", all_keys, _TRIM_ENTRIES))
            total += deleted
            if deleted < _TRIM_ENTRIES // 2:
                break
        return total

    def remove_idle_consumers(self, source: Source, keep: str, idle_ms: int) -> int:
        two_keys = [source.stream, self.fence_key(source.stream)]
        command = script("remove_consumers", two_keys, source.group, keep, idle_ms)
        reply = self.call(source.stream, [command])[0]
        return 0 if is_no_group(reply) else int(checked(reply))

    def announce(
        self, service: str, types: Iterable[str], sources: Iterable[Source], shards: int = 0
    ) -> None:
        """A refusal is logged once: only warnings of producers depend on it."""
        now_s = _wall_s(self.one(SERVICES_KEY, ("TIME",)))
        record = encode(types, sources, now_s, shards)
        stored, found = self.call(
            SERVICES_KEY, [("HSET", SERVICES_KEY, service, record), ("HGETALL", SERVICES_KEY)]
        )
        if isinstance(stored, ResponseError) and not self._warned_not_announced:
            self._warned_not_announced = True
            log.warning("service.not_announced", extra={"key": SERVICES_KEY, "error": str(stored)})
        outdated = [one.service for one in announcements_in(found) if one.is_outdated(now_s)]
        if outdated:
            self.call(SERVICES_KEY, [("HDEL", SERVICES_KEY, *outdated)])

    def forget_keys(self, stream: str) -> int:
        return int(self.one(stream, script("forget_keys", [self.ready_key(stream)])))

    def mend_slots(self, source: Source) -> int:
        command = script("mend_slots", [source.stream, self.ready_key(source.stream)], source.group)
        return int(self.one(source.stream, command))

    def mend_batches(self, source: Source, cursor: bytes) -> tuple[bytes, int]:
        two_keys = [source.stream, self.ready_key(source.stream)]
        next_cursor, gone = self.one(source.stream, script("batch_mend", two_keys, cursor, SCRIPT_IDS))
        return next_cursor, gone

    def depths(self, source: Source) -> Depths:
        """If the server does not know the lag, the lag is the number of entries
        that are not pending: never too low. A retry or dead-letter key of another type counts as empty."""
        stream = source.stream
        ready = self.ready_key(stream)
        groups, length, retrying, dead, now, waiting, oldest = self.call(
            stream,
            [
                ("XINFO", "GROUPS", stream),
                ("XLEN", stream),
                ("ZCARD", self.retry_key(stream)),
                ("XLEN", self.dead_key(stream)),
                ("TIME",),
                ("HGET", ready, "n"),
                ("ZRANGE", f"{ready}/heads", 0, 0, "WITHSCORES"),
            ],
        )
        group = _group_named(source.group, groups)
        pending = group.get(b"pending", 0)
        last = group.get(b"last-delivered-id", b"0-0")
        lag = group.get(b"lag")
        first = [] if lag == 0 else self.one(stream, ("XRANGE", stream, b"(" + last, "+", "COUNT", 1))
        if lag is None:
            lag = max(checked(length) - pending, 0) if first else 0
        in_lanes = 0 if isinstance(waiting, ResponseError) else int(waiting or 0)
        arrived = [first[0][0]] if first else []
        if in_lanes and not isinstance(oldest, ResponseError) and oldest:
            arrived.append(b"%d-0" % float(oldest[1]))
        return Depths(
            queued=lag + in_lanes,
            pending=pending,
            retrying=_length(retrying),
            dead=_length(dead),
            oldest_age_s=max((_age_s(id, checked(now)) for id in arrived), default=0.0),
            lag=lag,
            waiting=in_lanes,
            other_groups=_names_of_others(source.group, groups),
            tenant_ages_s=self._tenant_ages(stream, checked(now)) if in_lanes else {},
        )

    def _tenant_ages(self, stream: str, now: Sequence[bytes]) -> dict[str, float]:
        try:
            arrived = lanes.oldest_by_tenant(self.ready_key(stream), partial(self.one, stream))
        except (StoreRefused, ValueError):  # another program has damaged a key
            return {}
        return {tenant: max(0.0, _wall_s(now) - wall_s) for tenant, wall_s in arrived.items()}


def _length(reply: Reply) -> int:
    """The length of a derived key; 0 where it cannot be counted."""
    try:
        return int(checked(reply))
    except StoreRefused:
        return 0


def _group_named(group: str, reply: Reply) -> dict[bytes, Any]:
    """The XINFO fields of one group; empty where it or its stream is missing."""
    if is_no_stream(reply):
        return {}
    for facts in map(pairs, checked(reply)):
        if facts[b"name"] == group.encode():
            return facts
    return {}


def _names_of_others(group: str, reply: Reply) -> tuple[str, ...]:
    if is_no_stream(reply):
        return ()
    names = (facts[b"name"].decode(errors="replace") for facts in map(pairs, checked(reply)))
    return tuple(name for name in names if name != group)


def _age_s(id: bytes, now: Sequence[bytes]) -> float:
    """Age of an entry by the server's clock; `now` is the reply of TIME."""
    return max(0.0, _wall_s(now) - int(id.split(b"-")[0]) / 1000)


def _wall_s(now: Sequence[bytes]) -> float:
    """Unix seconds of a reply of TIME: seconds, microseconds."""
    return int(now[0]) + int(now[1]) / 1e6
