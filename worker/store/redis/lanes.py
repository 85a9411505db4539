"""Commands and replies of the lanes in which jobs wait (see ``prelude_flow.lua`` for their keys)."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ...flow import FlowConfig, Lane, LaneRules, Limit, read_flow_header, tenant_key, type_key
from ...keys import Source
from ..operator import LaneCounts
from ..ports import LARGEST_TENANTS, Backlog, Entry, TakenJobs, WaitingJob
from .base import SCRIPT_IDS, checked, is_no_stream, pairs
from .connection import Reply
from .lua import Argument, Command, script

#: Bytes of jobs that one call of take.lua returns.
TAKE_BYTES = 4 * 1024 * 1024
#: Jobs of lanes with changed limits that one call of take.lua returns, to be sorted again.
OUTDATED_IDS = 500
#: Lanes that are looked at to find the oldest job of each large tenant, and those of one page.
_MAX_HEADS, _HEADS_PAGE = 10_000, 1000
#: Keys of limits whose waiting jobs are counted.
_MAX_PARKED_KEYS = 1000

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
    ids: list[bytes] = []
    for lane, jobs in lanes.items():
        done = 0
        while done < len(jobs):
            some = jobs[done : done + SCRIPT_IDS - len(ids)]
            done += len(some)
            part += (
                lane,
                msgspec.msgpack.encode([field for id, cost in some for field in (id.decode(), str(cost))]),
            )
            ids += [id for id, _ in some]
            if len(ids) == SCRIPT_IDS:
                yield [min(ids), max(ids), len(ids), *part]
                part, ids = [], []
    if part:
        yield [min(ids), max(ids), len(ids), *part]


def taken(reply: Sequence[Any], deaths_of: Callable[[bytes, bytes | None], int]) -> TakenJobs:
    """The result of take.lua."""
    waiting, due_ms, outdated, limited = reply[:4]
    rows = zip(reply[4::3], reply[5::3], reply[6::3], strict=True)
    new = tuple.__new__  # a named tuple's own constructor takes four times as long, once per job
    entries = [
        new(Entry, (id, data, 1, 0 if deaths is None else deaths_of(id, deaths))) for id, data, deaths in rows
    ]
    due_s = None if due_ms < 0 else due_ms / 1000
    by_type = {name.decode(errors="replace"): count for name, count in pairs(limited).items()}
    return TakenJobs(entries[outdated:], entries[:outdated], waiting, due_s, by_type)


def oldest_by_tenant(ready: str, one: Callable[[Command], Any]) -> dict[str, float]:
    """Arrival (unix seconds) of the oldest job in lanes of each of the tenants with the most jobs there.

    ``one`` sends a command. Lanes are looked at from the oldest on, at most 10,000. A tenant whose lanes are
    all younger gets the arrival of the last one.
    """
    largest = one(("ZRANGE", f"{ready}/tenants", 0, LARGEST_TENANTS - 1, "REV"))
    found: dict[str, float] = {}
    missing = {tenant.decode(errors="replace") for tenant in largest}
    arrived_s = None
    for start in range(0, _MAX_HEADS, _HEADS_PAGE):
        if not missing:
            break
        heads = one(("ZRANGE", f"{ready}/heads", start, start + _HEADS_PAGE - 1, "WITHSCORES"))
        for name, arrived_ms in zip(heads[::2], heads[1::2], strict=True):
            tenant, arrived_s = Lane.decode(name).tenant_id, float(arrived_ms) / 1000
            if tenant in missing:
                found[tenant] = arrived_s
                missing.remove(tenant)
        if len(heads) < 2 * _HEADS_PAGE:
            break
    return found | ({} if arrived_s is None else dict.fromkeys(missing, arrived_s))


def counts_commands(ready: str) -> list[Command]:
    """Commands that count jobs in lanes."""
    return [
        ("HGETALL", ready),
        ("ZRANGE", f"{ready}/tenants", 0, LARGEST_TENANTS - 1, "REV", "WITHSCORES"),
        ("HGETALL", f"{ready}/running"),
        ("ZRANGE", f"{ready}/timers", 0, _MAX_PARKED_KEYS - 1),
    ]


def parked_jobs(
    ready: str, replies: Sequence[Reply], call: Callable[[Sequence[Command]], Sequence[Reply]]
) -> dict[str, int]:
    """Jobs that wait for a key: a key at its limit has running jobs or a timer. ``replies`` are those of
    `counts_commands`, ``call`` sends commands. At most some thousand lanes are counted."""
    keys = sorted({*pairs(checked(replies[2])), *checked(replies[3])})[:_MAX_PARKED_KEYS]
    lanes_key = f"{ready}/parked/".encode()
    found = call([("ZRANGE", lanes_key + key, 0, _MAX_PARKED_KEYS - 1) for key in keys]) if keys else ()
    parked = [(key, lane) for key, lanes in zip(keys, found, strict=True) for lane in checked(lanes)]
    parked = parked[:_MAX_HEADS]
    lengths = call([("LLEN", jobs_key(ready, lane)) for _, lane in parked]) if parked else ()
    numbers: Counter[str] = Counter()
    for (key, _), length in zip(parked, lengths, strict=True):
        numbers[key.decode(errors="replace")] += int(checked(length))
    return dict(numbers)


def counts(replies: Sequence[Reply], parked: dict[str, int]) -> LaneCounts:
    """Their result."""
    fields, tenants, running = (pairs(checked(reply)) for reply in replies[:3])
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
        parked,
    )


def jobs_key(ready: str, lane: bytes) -> bytes:
    """List: the jobs of a lane."""
    return f"{ready}/jobs/".encode() + lane


def whereabouts(entry: Entry, config: FlowConfig) -> tuple[bytes, bytes]:
    """Name of the lane in which an entry would wait, and its item there. Raises ValueError for a malformed
    one."""
    data = entry.data or b""
    return LaneRules(config.limits).name_of(read_flow_header(data)), b"%s %d" % (entry.id, len(data))


def siblings(name: bytes, others: Iterable[bytes]) -> list[bytes]:
    """The lanes of the same type, priority and tenant, whatever their limits are."""
    own = Lane.decode(name)._replace(limit_keys=())
    return [other for other in others if Lane.decode(other)._replace(limit_keys=()) == own]


def keys_of(name: bytes) -> list[str]:
    """The keys for which a lane may wait."""
    lane = Lane.decode(name)
    return [type_key(lane.type), tenant_key(lane.type, lane.tenant_id), *lane.limit_keys]
