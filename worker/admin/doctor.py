"""Diagnosis of a deployment: findings and remedies, derived from facts that `doctor_facts` reads.

No function here does input or output.
"""

import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from ..extension import extension
from ..keys import OTHER_GROUP, Source
from ..store.facts import ServerFacts, StreamFacts
from ..store.operator import Consumer, Pause
from ..store.ports import KeyFault
from .cron import CronHashes, cron_entries, differing_hosts, late_entries
from .doctor_facts import HostFacts
from .find_job import OVERDUE_S, SILENT_S
from .finding import Finding
from .status_client import Service

#: Due times and waiting times are computed from two clocks. A greater difference makes them visibly wrong.
_MAX_SKEW_S = 2.0
#: A store that answers more slowly is far away or overloaded, and every settlement waits for it.
_MAX_ROUND_TRIP_S = 0.05
#: Share of maxmemory above which little time is left to react.
_MAX_MEMORY_SHARE = 0.8
#: A consumer that was idle for longer has died: twice the default lease.
_DEAD_CONSUMER_S = 60.0
#: More idle consumers without entries mean that the service gets a new name at each start.
_MAX_DEAD_CONSUMERS = 50
#: More undelivered entries of another group are memory that cannot be trimmed.
_MAX_LAG_OF_OTHERS = 10_000
#: Open files: each worker takes a few and its channel three, besides connections. Enough for 100 workers.
_MIN_OPEN_FILES = 1024


def server_findings(name: str, facts: ServerFacts) -> Iterator[Finding]:
    """Version, latency, role, clock, memory and persistence of one server."""
    info = facts.info
    if not info:
        yield Finding(
            "note", name, "this user may not run INFO, so most checks are skipped", "allow it +info"
        )
    product = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    mode = info.get("redis_mode") or info.get("server_mode", "")
    yield Finding(
        "ok", name, f"{product} {version} {mode}, answers in {facts.round_trip_s * 1000:.1f} ms".strip()
    )
    if facts.newer_commands:
        yield Finding("ok", name, f"newer commands are used: {', '.join(facts.newer_commands)}")
    if facts.round_trip_s > _MAX_ROUND_TRIP_S:
        yield Finding("wrong", name, "slow to answer", "run the service near its store; look at SLOWLOG GET")
    if info.get("role") == "slave":
        yield Finding("wrong", name, "is a replica: it takes no writes", "give the url of the master")
    if abs(facts.skew_s) > _MAX_SKEW_S:
        says = f"its clock is {abs(facts.skew_s):.1f} s {'ahead of' if facts.skew_s > 0 else 'behind'} ours"
        yield Finding("wrong", "clock", says, "run NTP on both hosts (chronyc tracking)")
    else:
        yield Finding("ok", "clock", f"{abs(facts.skew_s):.2f} s apart from the store's")
    yield from _memory(info)
    yield from _persistence(info, facts.config)


def _memory(info: dict[str, str]) -> Iterator[Finding]:
    policy, limit = info.get("maxmemory_policy"), int(info.get("maxmemory", 0) or 0)
    if policy is not None and policy != "noeviction":
        level = "wrong" if limit else "note"
        says = f"maxmemory-policy is {policy}: the store deletes jobs when its memory is full"
        yield Finding(level, "eviction", says, "CONFIG SET maxmemory-policy noeviction, and in its file")
    elif policy is not None:
        yield Finding("ok", "eviction", "noeviction")
    if int(info.get("evicted_keys", 0) or 0):
        yield Finding("wrong", "eviction", f"{info['evicted_keys']} keys were evicted since its start",
                      "jobs may be lost: compare with what producers sent")  # fmt: skip
    used = int(info.get("used_memory", 0) or 0)
    if limit and used > _MAX_MEMORY_SHARE * limit:
        says = f"{used >> 20} of {limit >> 20} MiB are in use"
        yield Finding("wrong", "memory", says, "raise maxmemory; find the backlog with jobworker stats")


def _persistence(info: dict[str, str], config: dict[str, str]) -> Iterator[Finding]:
    if "aof_enabled" not in info:
        return
    if info["aof_enabled"] != "1":
        yield Finding("wrong", "persistence", "no append-only file: a restart of the store loses jobs",
                      "CONFIG SET appendonly yes, and in its file")  # fmt: skip
        return
    fsync = config.get("appendfsync", "unknown")
    by_fsync = {
        "always": Finding("ok", "persistence", "appendfsync always: no acknowledged job is lost"),
        "everysec": Finding("note", "persistence", "appendfsync everysec: a power cut may lose one second",
                            "set appendfsync always if that is too much"),
        "no": Finding("wrong", "persistence", "appendfsync no: a power cut may lose half a minute",
                      "CONFIG SET appendfsync everysec or always, and in its file"),
    }  # fmt: skip
    unknown = Finding("note", "persistence", "append-only file; appendfsync is not known")
    yield by_fsync.get(fsync, unknown)
    for field in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(field, "ok") != "ok":
            yield Finding(
                "wrong",
                "persistence",
                f"{field} is {info[field]}",
                "free space on the disk of the store; --data-dir is that of the embedded one",
            )


def stream_findings(facts: StreamFacts) -> Iterator[Finding]:
    """Readers, lost jobs, other groups, overdue retries and dead letters of one stream."""
    stream, group = facts.source
    yield from fault_findings(stream, facts.faults)
    if any(fault.key == stream and fault.blocks for fault in facts.faults):
        return
    if group not in facts.lags:
        level = "wrong" if facts.length else "note"
        what = f"{facts.length} entries wait and there is" if facts.length else "there is"
        yield Finding(level, stream, f"{what} no group {group}: no service has read it yet",
                      _start(facts.source))  # fmt: skip
        return
    lag, pending = facts.lags[group], facts.pendings[group]
    yield from _readers(facts.source, lag or pending or 0, facts.consumers)
    yield from _lost_jobs(stream, facts, lag)
    yield from _other_groups(facts)
    if facts.overdue_s > OVERDUE_S:
        yield Finding("wrong", stream, f"the oldest retry is {facts.overdue_s:.0f} s overdue",
                      "run a service that has this stream in its --stream table")  # fmt: skip
    if facts.dead:
        yield Finding("note", stream, f"{facts.dead} dead letters",
                      f"jobworker dlq list --stream {shlex.quote(stream)}")  # fmt: skip


def fault_findings(subject: str, faults: Sequence[KeyFault]) -> Iterator[Finding]:
    """Keys that the store refuses."""
    for fault in faults:
        says = f"key {fault.key} {fault.problem}"
        if fault.blocks:
            says += ": the stream is isolated, its jobs wait" if subject != "paused" else ""
        yield Finding("wrong", subject, says, fault.repair)


def _start(source: Source) -> str:
    """How to start a service that reads a stream."""
    if source in extension().streams:
        return "start jobworker-supervise; give it --stream if the names differ"
    option = f"--stream {shlex.quote('='.join(source))}"
    return f"start its service: jobworker-supervise with {option}, and --handler for the types of its jobs"


def _readers(source: Source, waiting: int, consumers: Sequence[Consumer]) -> Iterator[Finding]:
    stream = source.stream
    reading = [consumer for consumer in consumers if consumer.idle_s <= SILENT_S]
    if reading:
        yield Finding("ok", stream, f"read by {', '.join(consumer.name for consumer in reading[:4])}")
    else:
        level = "wrong" if waiting else "note"
        silence = f" for {min(c.idle_s for c in consumers):.0f} s" if consumers else ""
        yield Finding(level, stream, f"no service reads it{silence}; {waiting} jobs wait",
                      _start(source))  # fmt: skip
    for consumer in consumers:
        if consumer.pending and consumer.idle_s > _DEAD_CONSUMER_S:
            says = (
                f"{consumer.name} has leased {consumer.pending} jobs and is idle for {consumer.idle_s:.0f} s"
            )
            yield Finding("wrong", stream, says, "start a service: it claims them when their lease expires")
    dead = sum(not consumer.pending and consumer.idle_s > _DEAD_CONSUMER_S for consumer in consumers)
    if dead > _MAX_DEAD_CONSUMERS:
        yield Finding("wrong", stream, f"{dead} consumer names of services that are gone",
                      "keep --instance the same across restarts; a running service removes them")  # fmt: skip


def _lost_jobs(stream: str, facts: StreamFacts, lag: int | None) -> Iterator[Finding]:
    do = "no MAXLEN, MINID or XTRIM in producers: the service trims finished entries"
    if lag is not None and lag > facts.length:
        says = f"{lag - facts.length} jobs or more were trimmed before they were delivered"
        yield Finding("wrong", stream, says, do)
    if facts.missing:
        yield Finding("wrong", stream, f"{facts.missing} pending jobs are gone from the stream", do)


def _other_groups(facts: StreamFacts) -> Iterator[Finding]:
    for name in facts.lags.keys() - {facts.source.group}:
        lag = facts.lags[name]
        behind = (facts.length if lag is None else lag) + facts.pendings[name]
        level = "wrong" if behind > _MAX_LAG_OF_OTHERS else "note"
        says = f"group {name}, not ours, is {behind} entries behind: they cannot be trimmed"
        yield Finding(
            level, facts.source.stream, says if behind else f"has a second group, {name}", OTHER_GROUP
        )


def pause_findings(pauses: Sequence[Pause], types: Container[str] = ()) -> Iterator[Finding]:
    """The types that an operator paused. ``types``: those that services handle; empty if unknown."""
    for pause in pauses:
        note = f" ({pause.note})" if pause.note else ""
        unknown = ", which no service handles: another type may have been meant"
        says = f"type {pause.job_type}{note}{unknown if types and pause.job_type not in types else ''}"
        yield Finding("note", "paused", says, f"jobworker resume {shlex.quote(pause.job_type)}")


def cron_findings(found: CronHashes, faults: Sequence[KeyFault] = ()) -> Iterator[Finding]:
    """Cron tables: late and paused ones, and services with other tables in their file."""
    yield from fault_findings("cron", faults)
    entries = cron_entries(found)
    if entries:
        names = ", ".join(entry.table.name for entry in entries[:8])
        yield Finding("ok", "cron", f"{len(entries)} active: {names}")
    for text in late_entries(entries):
        yield Finding("wrong", "cron", text, "start a service that reads its stream")
    for entry in entries:
        if entry.pause:
            note = f" ({entry.pause.note})" if entry.pause.note else ""
            says = f"{entry.table.name} is paused{note}"
            yield Finding("note", "cron", says, f"jobworker cron resume {entry.table.name}")
    for stream, service, has_none in differing_hosts(found):
        says = f"{service} has other tables for {stream} in its file than the active ones"
        if has_none:
            says = f"{service} has no tables for {stream} in its file; those of another service are active"
        do = "give every host the same [[cron]] tables and send HUP; the last change wins"
        yield Finding("note" if has_none else "wrong", "cron", says, do)


def service_findings(services: Sequence[Service], default_metrics: bool, version: str) -> Iterator[Finding]:
    """Whether each service answers and is ready, and its version. `default_metrics`: the operator gave no
    url, so a missing answer may be normal."""
    for service in services:
        if not service.status:
            do = "give --metrics-url of each service" if default_metrics else "is it running?"
            level = "note" if default_metrics else "wrong"
            yield Finding(level, service.url, f"no status: {service.error}", do)
            continue
        status = service.status
        if status.get("ready"):
            yield Finding("ok", service.consumer, f"ready, {len(service.workers())} workers")
        for reason in service.problems():
            yield Finding("wrong", service.consumer, reason, "look into its log")
        for reason in status.get("transient_reasons", ()):
            yield Finding("note", service.consumer, str(reason))
        for warning in status.get("warnings", ()):
            do = "run the command that it names" if "repair: " in str(warning) else ""
            yield Finding("wrong", service.consumer, str(warning), do)
        for job_type in sorted(service.types_with("z_novel_circuit_open")):
            says = f"the circuit breaker of type {job_type} is open: its dependency does not answer"
            yield Finding("wrong", service.consumer, says,
                          "repair the dependency; the jobs then resume without further action")  # fmt: skip
        for job_type in sorted(service.types_with("z_novel_crash_circuits_open")):
            says = f"jobs of type {job_type} kill worker after worker, so their tenants are slowed down"
            advice = "read crashes.slowed in the log for the tenant, then: jobworker dlq list"
            yield Finding("wrong", service.consumer, says, advice)
        yield from _copies(service, status.get("device_copies") or {})
        if status.get("version") != version:
            says = f"its version is {status.get('version')}, the version of this tool is {version}"
            yield Finding("note", service.consumer, says)


def _copies(service: Service, plan: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the memory of a service is enough for the copies that it loads."""
    if not plan:
        return
    copied, option = extension().copied, extension().copies_option
    numbers = f"{plan['free_mib']} MiB were free at its start, a copy needs {plan['copy_mib']} MiB" + (
        f" and all together {plan['shared_mib']} MiB" if plan["shared_mib"] else ""
    )
    if plan["exceeds"]:
        says = f"{plan['copies']} copies of {copied} need more memory than there is: {numbers}"
        yield Finding("wrong", service.consumer, says,
                      f"lower {option} or --procs, or give it more memory")  # fmt: skip
    elif plan["limited"]:
        says = f"the memory allows {plan['copies']} of {plan['wanted']} copies of {copied}: {numbers}"
        yield Finding("note", service.consumer, says,
                      f"give it more memory, or set {option}")  # fmt: skip


def host_findings(facts: HostFacts) -> Iterator[Finding]:
    """Versions and limits of this machine, as far as they concern a service on it."""
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items() if number)
    yield Finding("ok", "versions", versions)
    if not facts.versions.get("hiredis"):
        yield Finding(
            "wrong", "versions", "hiredis is missing: replies are parsed slowly", "pip install hiredis"
        )
    if facts.open_files < _MIN_OPEN_FILES:
        yield Finding("wrong", "limits", f"only {facts.open_files} open files are allowed",
                      f"ulimit -n {_MIN_OPEN_FILES} or LimitNOFILE=")  # fmt: skip
    yield Finding("ok", "limits", f"{facts.cores} cores, {facts.memory_free >> 20} MiB of memory free, "
                  f"{facts.open_files} open files")  # fmt: skip
    yield Finding("ok", "gpu", ", ".join(facts.gpus) or "none")
