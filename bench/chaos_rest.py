"""Idle state of the chaos test: wait for it, then look for leaked resources."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_load import GROUP, PROBE_STREAM, STREAM
from chaos_world import LIMIT_S, POLL_S, Service

from jobworker.worker.ipc.channel import Channel

#: Timeout of the wait: jobs of a lost host are claimed after the lease, and restarts have a backoff.
_REST_WITHIN_S = 120.0


def unfinished(client: Any) -> dict[str, int]:
    """Number of undelivered (1 for some), pending, sorted and scheduled jobs, of recorded deaths and of
    unfinished batches, by stream.

    All of a stream are read in one transaction: a job moves from place to place meanwhile, and could be
    missed in each.
    """
    found: dict[str, int] = {}
    for stream in (STREAM, PROBE_STREAM):
        pipe = client.pipeline(transaction=True)
        pipe.xinfo_groups(stream)
        pipe.xrevrange(stream, count=1)
        pipe.hget(f"ready:{stream}", "n")
        pipe.zcard(f"retry:{stream}")
        pipe.hlen(f"deaths:{stream}")
        pipe.zcard(f"batches:{stream}/open")
        groups, last, waiting, scheduled, deaths, batches = pipe.execute()
        group = next((g for g in groups if g["name"] == GROUP.encode()), None)
        if group is None:
            found[f"{stream} has no group"] = 1
            continue
        delivered = _order(group["last-delivered-id"])
        found[f"{stream} undelivered"] = int(bool(last) and _order(last[0][0]) > delivered)
        found[f"{stream} pending"] = group["pending"]
        found[f"{stream} in lanes"] = int(waiting or 0)
        found[f"{stream} scheduled"] = scheduled
        found[f"{stream} deaths"] = deaths
        found[f"{stream} batches"] = batches
    return {where: count for where, count in found.items() if count}


def _order(id: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in id.split(b"-"))


def await_rest(client: Any, services: Sequence[Service]) -> dict[str, int]:
    """Wait until no job is unfinished and all services are ready; returns what is missing at the timeout."""
    give_up_at = time.monotonic() + _REST_WITHIN_S
    while True:
        left = unfinished(client)
        left |= {f"{service.name} is not ready": 1 for service in services if not service.ready()}
        if not left or time.monotonic() > give_up_at:
            return left
        time.sleep(10 * POLL_S)  # neither the store nor the health page sends events


def descriptors(services: Sequence[Service]) -> dict[str, int]:
    """Number of open descriptors of supervisor, reader and reaper of each service."""
    found = {}
    for service in services:
        for role, pids in service.roles().items():
            if role != "worker":  # these come and go
                found[f"{service.name} {role}"] = len(os.listdir(f"/proc/{pids[0]}/fd"))
    return found


def leaked_descriptors(before: dict[str, int], services: Sequence[Service]) -> dict[str, list[int]]:
    """Roles that keep more descriptors than at the start, with both counts."""
    give_up_at = time.monotonic() + LIMIT_S / 6
    while True:
        now = descriptors(services)
        more = {
            role: [before.get(role, 0), count] for role, count in now.items() if count > before.get(role, 0)
        }
        if not more or time.monotonic() > give_up_at:
            return more
        time.sleep(10 * POLL_S)  # connections may still be closing


def rings_not_empty(services: Sequence[Service]) -> list[str]:
    """Rings and tables in shared memory that are not empty, read through the supervisors' descriptors."""
    found = []
    for service in services:
        for fd in Path(f"/proc/{service.pid}/fd").iterdir():
            if _target(fd).startswith("/memfd:jobworker"):
                found += [f"{service.name} {what}" for what in _not_empty(fd)]
    return found


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""


def _not_empty(fd: Path) -> list[str]:
    # A channel has three descriptors; its events are not used here.
    channel = Channel(os.open(fd, os.O_RDWR), os.eventfd(0), os.eventfd(0))
    try:
        states = {
            "jobs": channel.jobs.empty(),
            "outcomes": channel.outcomes.empty(),
            "table": channel.table.taken == channel.table.tail,
        }
        return [what for what, empty in states.items() if not empty]
    finally:
        channel.close()


def shared_memory() -> set[str]:
    """Names in /dev/shm; jobworker uses unnamed memory only."""
    return set(os.listdir("/dev/shm"))


def left_behind(folder: Path, shm_before: set[str]) -> list[str]:
    """Processes, named shared memory and temporary files that remain after the end."""
    found = [f"shared memory {name}" for name in sorted(shared_memory() - shm_before) if "jobworker" in name]
    found += [f"temporary file {path.name}" for path in (folder / "tmp").rglob("*")]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # another user's, or it ended meanwhile
        if f"CHAOS_DIR={folder}\0".encode() in environment:
            found.append(f"process {entry.name}")
    return found
