"""What is wrong with a deployment and what to do about it, judged from facts that others have read (pure)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..store.facts import ServerFacts, StreamFacts
from ..store.operator import Consumer, Pause
from .find_job import SILENT_S
from .status_client import Service

#: Clocks further apart than this make due times and waiting times wrong by what operators would notice.
_SKEW_S = 2.0
#: A store that takes longer for nothing is far away or overloaded: every settlement waits for it.
_ROUND_TRIP_S = 0.05
#: Share of maxmemory from which on there is little time left to act.
_MEMORY_SHARE = 0.8
#: A consumer that holds jobs and was silent for so long is dead: twice the default lease.
_GONE_S = 60.0
#: Empty, silent consumers from which on somebody makes a new name for each start.
_NAMES = 50
#: A retry that is overdue for longer has nobody to move it.
_OVERDUE_S = 5.0
#: Entries held back for a group that does not keep up: memory that is never given back.
_HELD_BACK = 10_000
#: Descriptors: some for each worker, three for its channel, connections; 1,024 do for a hundred workers.
_DESCRIPTORS = 1024


class HostFacts(NamedTuple):
    """This machine. Memory in bytes (the least of the machine's and the control group's); ``gpus`` names."""

    cores: int
    descriptors: int
    memory_free: int
    gpus: list[str]
    versions: dict[str, str]


class Finding(NamedTuple):
    """One line of the report. ``level``: ok, note or wrong; ``do`` is what to do about it."""

    level: str
    subject: str
    says: str
    do: str = ""


def server_findings(name: str, facts: ServerFacts) -> Iterator[Finding]:
    """Version, what it does when memory is full, what survives its restart, its clock."""
    info = facts.info
    if not info:
        yield Finding("note", name, "INFO is not allowed to this user: little can be said", "allow it +info")
    kind = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    mode = info.get("redis_mode") or info.get("server_mode", "")
    yield Finding(
        "ok", name, f"{kind} {version} {mode}, answers in {facts.round_trip_s * 1000:.1f} ms".strip()
    )
    if facts.round_trip_s > _ROUND_TRIP_S:
        yield Finding("wrong", name, "slow to answer", "run the service near its store; look at SLOWLOG GET")
    if info.get("role") == "slave":
        yield Finding("wrong", name, "is a replica: it takes no writes", "give the url of the master")
    if abs(facts.skew_s) > _SKEW_S:
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
        says = f"maxmemory-policy is {policy}: when memory is full, the store throws jobs away"
        yield Finding(level, "eviction", says, "CONFIG SET maxmemory-policy noeviction, and in its file")
    elif policy is not None:
        yield Finding("ok", "eviction", "noeviction")
    if int(info.get("evicted_keys", 0) or 0):
        yield Finding("wrong", "eviction", f"{info['evicted_keys']} keys were evicted since its start",
                      "jobs may be lost: compare with what producers sent")  # fmt: skip
    used = int(info.get("used_memory", 0) or 0)
    if limit and used > _MEMORY_SHARE * limit:
        says = f"{used >> 20} of {limit >> 20} MiB are in use"
        yield Finding("wrong", "memory", says, "raise maxmemory; look at jobworker stats for what piles up")


def _persistence(info: dict[str, str], config: dict[str, str]) -> Iterator[Finding]:
    if "aof_enabled" not in info:
        return
    if info["aof_enabled"] != "1":
        yield Finding("wrong", "persistence", "no append-only file: a restart of the store loses jobs",
                      "CONFIG SET appendonly yes, and in its file")  # fmt: skip
        return
    fsync = config.get("appendfsync", "unknown")
    said = {
        "always": Finding("ok", "persistence", "appendfsync always: nothing acknowledged is lost"),
        "everysec": Finding("note", "persistence", "appendfsync everysec: a power cut may cost a second",
                            "appendfsync always where not even that may happen"),
        "no": Finding("wrong", "persistence", "appendfsync no: a power cut may cost half a minute",
                      "CONFIG SET appendfsync everysec or always, and in its file"),
    }  # fmt: skip
    yield said.get(fsync, Finding("note", "persistence", "append-only file; appendfsync is not known"))
    for field in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(field, "ok") != "ok":
            yield Finding("wrong", "persistence", f"{field} is {info[field]}", "look at the store's disk")


def stream_findings(facts: StreamFacts) -> Iterator[Finding]:
    """Whether anybody reads it, whether jobs were lost on it, and what was left lying about."""
    stream, group = facts.source
    if group not in facts.lags:
        level = "wrong" if facts.length else "note"
        what = f"{facts.length} entries wait and there is" if facts.length else "there is"
        yield Finding(level, stream, f"{what} no group {group}: no service has read it yet",
                      "start jobworker-supervise (with --stream, if the names are others)")  # fmt: skip
        return
    lag, pending = facts.lags[group], facts.pendings[group]
    yield from _readers(stream, lag or pending or 0, facts.consumers)
    yield from _losses(stream, facts, lag)
    yield from _other_groups(facts)
    if facts.overdue_s > _OVERDUE_S:
        yield Finding("wrong", stream, f"the oldest retry is {facts.overdue_s:.0f} s overdue",
                      "is a service running that has this stream in its table?")  # fmt: skip
    if facts.dead:
        yield Finding("note", stream, f"{facts.dead} dead letters", f"jobworker dlq list --stream {stream}")


def _readers(stream: str, waiting: int, consumers: Sequence[Consumer]) -> Iterator[Finding]:
    reading = [consumer for consumer in consumers if consumer.idle_s <= SILENT_S]
    if reading:
        yield Finding("ok", stream, f"read by {', '.join(consumer.name for consumer in reading[:4])}")
    else:
        level = "wrong" if waiting else "note"
        silence = f" for {min(c.idle_s for c in consumers):.0f} s" if consumers else ""
        yield Finding(level, stream, f"nobody reads it{silence}; {waiting} jobs wait",
                      "start jobworker-supervise")  # fmt: skip
    for consumer in consumers:
        if consumer.pending and consumer.idle_s > _GONE_S:
            says = f"{consumer.name} holds {consumer.pending} jobs and was silent for {consumer.idle_s:.0f} s"
            yield Finding("wrong", stream, says, "a running service takes them over after its --lease")
    names = sum(not consumer.pending and consumer.idle_s > _GONE_S for consumer in consumers)
    if names > _NAMES:
        yield Finding("wrong", stream, f"{names} names of consumers that are gone",
                      "keep --instance the same over restarts; a running service removes them")  # fmt: skip


def _losses(stream: str, facts: StreamFacts, lag: int | None) -> Iterator[Finding]:
    do = "no MAXLEN, MINID or XTRIM in producers: the service trims what is finished"
    if lag is not None and lag > facts.length:
        says = f"{lag - facts.length} jobs or more were trimmed away before they were delivered"
        yield Finding("wrong", stream, says, do)
    if facts.missing:
        yield Finding("wrong", stream, f"{facts.missing} pending jobs are gone from the stream", do)


def _other_groups(facts: StreamFacts) -> Iterator[Finding]:
    for name in facts.lags.keys() - {facts.source.group}:
        lag = facts.lags[name]
        behind = (facts.length if lag is None else lag) + facts.pendings[name]
        says = f"group {name}, not ours, is {behind} entries behind: they cannot be trimmed"
        if behind:
            yield Finding("wrong" if behind > _HELD_BACK else "note", facts.source.stream, says,
                          f"if nobody needs it: XGROUP DESTROY {facts.source.stream} {name}")  # fmt: skip


def pause_findings(pauses: Sequence[Pause]) -> Iterator[Finding]:
    """Types that wait because somebody said so."""
    for pause in pauses:
        note = f" ({pause.note})" if pause.note else ""
        yield Finding("note", "paused", f"type {pause.kind}{note}", f"jobworker resume {pause.kind}")


def service_findings(services: Sequence[Service], guessed: bool, version: str) -> Iterator[Finding]:
    """Whether services answer and are well; ``guessed``: nobody said where they are."""
    for service in services:
        if not service.said:
            do = "give --metrics-url where a service serves it" if guessed else "is it running?"
            yield Finding("note" if guessed else "wrong", service.url, f"no status: {service.trouble}", do)
            continue
        said = service.said
        if said.get("ready"):
            yield Finding("ok", service.consumer, f"ready, {len(service.workers())} workers")
        for reason in said.get("reasons", ()):
            yield Finding("wrong", service.consumer, str(reason), "its log says more")
        for kind in sorted(service.flagged("z_novel_circuit_open")):
            says = f"type {kind} waits: what it needs does not answer"
            yield Finding("wrong", service.consumer, says, "look at that store; jobs go on by themselves")
        if said.get("version") != version:
            says = f"it is version {said.get('version')}, this tool is {version}"
            yield Finding("note", service.consumer, says)


def host_findings(facts: HostFacts) -> Iterator[Finding]:
    """Limits of this machine, as far as a service that runs here would meet them."""
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items() if number)
    yield Finding("ok", "versions", versions)
    if not facts.versions.get("hiredis"):
        yield Finding(
            "wrong", "versions", "hiredis is missing: replies are parsed slowly", "pip install hiredis"
        )
    if facts.descriptors < _DESCRIPTORS:
        yield Finding("wrong", "limits", f"only {facts.descriptors} open files are allowed",
                      f"ulimit -n {_DESCRIPTORS} or LimitNOFILE=")  # fmt: skip
    yield Finding("ok", "limits", f"{facts.cores} cores, {facts.memory_free >> 20} MiB of memory free, "
                  f"{facts.descriptors} open files")  # fmt: skip
    yield Finding("ok", "gpu", ", ".join(facts.gpus) or "none: models run on the CPU")


def model_findings(model: dict[str, Any], milvus: dict[str, Any] | None) -> Iterator[Finding]:
    """What loading the model came to, and whether its vectors fit the collections."""
    if "error" in model:
        yield Finding("wrong", "model", model["error"], "name one by --model that is on this machine")
    else:
        says = f"{model['model']}: {model['dim']} dimensions, {model['max_tokens']} tokens a window"
        yield Finding("ok", "model", f"{says}, loaded in {model['load_s']} s")
    if milvus is None:
        return
    if "error" in milvus:
        do = "is it running, and are --milvus-uri and JOBWORKER_MILVUS_TOKEN right?"
        yield Finding("wrong", "Milvus", milvus["error"], do)
        return
    yield Finding("ok", "Milvus", f"version {milvus['version']}{' (Lite)' if milvus['lite'] else ''}")
    for name, dim in milvus["dims"].items():
        if dim is None:
            yield Finding("note", "Milvus", f"there is no {name} yet: its first write makes it")
        elif dim != model.get("dim", dim):
            yield Finding("wrong", "Milvus", f"{name} holds vectors of {dim} dimensions, not {model['dim']}",
                          "start with the model it was filled with, or rebuild it")  # fmt: skip
        else:
            yield Finding("ok", "Milvus", f"{name} holds vectors of {dim} dimensions")
