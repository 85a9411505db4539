"""Commands and replies of the lanes in which jobs wait (see ``prelude_flow.lua`` for their keys)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ...flow import FlowConfig, Lane, LaneRules, Limit, read_flow_header, tenant_key, type_key
from ...keys import Source
from ..operator import LaneCounts
from ..ports import Backlog, Entry, TakenJobs, WaitingJob
from .base import SCRIPT_IDS, checked, is_no_stream, pairs
from .connection import Reply
from .lua import Argument, Command, script

#: Bytes of jobs that one call of take.lua returns.
TAKE_BYTES = 4 * 1024 * 1024
#: Jobs of lanes with changed limits that one call of take.lua returns, to be sorted again.
OUTDATED_IDS = 500

_limits = msgspec.json.Decoder(tuple[Limit, ...])


def slots_key(ready: str) -> str:
    """Hash: entry id -> the limit keys of which the job holds a slot."""
    return f"{ready}/slots"


def cancels_key(ready: str) -> str:
    """Hash: pending entry that was cancelled -> whether it becomes a dead letter (1 or 0)."""
    return f"{ready}/cancels"


def backlog_commands(source: Source, ready: str) -> list[Command]:
    """Commands that count waiting jobs."""
    return [
        ("XINFO", "GROUPS", source.stream),
        ("XLEN", source.stream),
        ("HGETALL", ready),
        ("HMGET", f"{ready}/config", "version", "cancels", "cancelled"),
        ("SMEMBERS", f"{ready}/asked"),
    ]


def backlog(source: Source, replies: Sequence[Reply]) -> Backlog:
    """Their result. If the server does not know the lag, it is the number of entries that are not pending."""
    groups, length, waiting, config, asked = replies
    lag = 0
    for facts in () if is_no_stream(groups) else map(pairs, checked(groups)):
        if facts[b"name"] == source.group.encode():
            known = facts.get(b"lag")
            lag = max(int(checked(length)) - facts[b"pending"], 0) if known is None else int(known)
    by_type = {
        field.removeprefix(b"type/").decode(errors="replace"): int(count)
        for field, count in pairs(checked(waiting)).items()
        if field.startswith(b"type/")
    }
    asked_types = frozenset(name.decode(errors="replace") for name in checked(asked))
    version, cancels, cancelled = (int(number or 0) for number in checked(config))
    in_series = sum(
        int(count) for field, count in pairs(checked(waiting)).items() if field.startswith(b"series/")
    )
    return Backlog(lag, by_type, version, asked_types, in_series, cancels, cancelled)


def config_commands(ready: str) -> list[Command]:
    """Commands that read limits and weights."""
    return [
        ("HMGET", f"{ready}/config", "version", "limits", "origin"),
        ("HGETALL", f"{ready}/weights"),
    ]


def flow_config(replies: Sequence[Reply]) -> FlowConfig:
    """Their result. Limits that another program has damaged count as none."""
    version, limits, origin = checked(replies[0])
    weights = pairs(checked(replies[1]))
    try:
        parsed = _limits.decode(limits or b"[]")
    except ValueError:
        parsed = ()
    return FlowConfig(
        int(version or 0),
        parsed,
        {tenant.decode(errors="replace"): float(weight) for tenant, weight in weights.items()},
        (origin or b"").decode(errors="replace"),
    )


def configure(ready: str, config: FlowConfig) -> Command:
    """Command that replaces limits and weights."""
    weights: list[Argument] = [part for one in config.weights.items() for part in one]
    limits = msgspec.json.encode(config.limits)
    return script("configure", [ready], config.version, config.origin, limits, *weights)


def sort_arguments(lanes: Mapping[bytes, Sequence[WaitingJob]]) -> Iterator[list[Argument]]:
    """Arguments of sort.lua in parts of at most 1,000 jobs."""
    part: list[Argument] = []
    room = SCRIPT_IDS
    for lane, jobs in lanes.items():
        done = 0
        while done < len(jobs):
            some = jobs[done : done + room]
            part += (lane, len(some))
            for job in some:
                part += job
            done += len(some)
            room -= len(some)
            if not room:
                yield part
                part, room = [], SCRIPT_IDS
    if part:
        yield part


def taken(reply: Sequence[Any], deaths_of: Callable[[bytes, bytes | None], int]) -> TakenJobs:
    """The result of take.lua."""
    waiting, due_ms, outdated = reply[:3]
    rows = zip(reply[3::3], reply[4::3], reply[5::3], strict=True)
    entries = [Entry(id, data, 1, deaths_of(id, deaths)) for id, data, deaths in rows]
    due_s = None if due_ms < 0 else due_ms / 1000
    return TakenJobs(entries[outdated:], entries[:outdated], waiting, due_s)


def counts_commands(ready: str) -> list[Command]:
    """Commands that count jobs in lanes."""
    return [
        ("HGETALL", ready),
        ("ZRANGE", f"{ready}/tenants", 0, 9, "REV", "WITHSCORES"),
        ("HGETALL", f"{ready}/running"),
    ]


def counts(replies: Sequence[Reply]) -> LaneCounts:
    """Their result."""
    fields, tenants, running = (pairs(checked(reply)) for reply in replies)
    by_priority = {
        int(field.removeprefix(b"priority/")): int(count)
        for field, count in fields.items()
        if field.startswith(b"priority/") and int(count) > 0
    }
    return LaneCounts(
        int(fields.get(b"n", 0)),
        dict(sorted(by_priority.items(), reverse=True)),
        {tenant.decode(errors="replace"): int(count) for tenant, count in tenants.items()},
        {key.decode(errors="replace"): int(count) for key, count in running.items()},
    )


def jobs_key(ready: str, lane: bytes) -> bytes:
    """List: the jobs of a lane."""
    return f"{ready}/jobs/".encode() + lane


def whereabouts(entry: Entry, config: FlowConfig) -> tuple[bytes, bytes]:
    """Name of the lane in which an entry would wait, and its item there. Raises ValueError for a malformed
    one."""
    data = entry.data or b""
    return LaneRules(config.limits).name_of(read_flow_header(data)), b"%s %d" % (entry.id, len(data))


def keys_of(name: bytes) -> list[str]:
    """The keys for which a lane may wait."""
    lane = Lane.decode(name)
    return [type_key(lane.type), tenant_key(lane.type, lane.tenant_id), *lane.limit_keys]
