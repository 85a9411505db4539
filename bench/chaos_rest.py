"""Rest: wait until nothing is left to do, then look for what should not be there."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_load import GROUP, PROBE_STREAM, STREAM
from chaos_world import LIMIT_S, POLL_S, Service

from jobworker.worker.ipc.channel import Channel

#: Jobs that a lost host left are taken over after the lease; workers that died often are started late.
_REST_WITHIN_S = 120.0


def unfinished(client: Any) -> dict[str, int]:
    """What is undelivered, pending, scheduled or charged with deaths, by where it is; empty: all is done."""
    found: dict[str, int] = {}
    for stream in (STREAM, PROBE_STREAM):
        group = next((g for g in client.xinfo_groups(stream) if g["name"] == GROUP.encode()), None)
        if group is None:
            found[f"{stream} has no group"] = 1
            continue
        after = b"(" + group["last-delivered-id"]
        found[f"{stream} undelivered"] = len(client.xrange(stream, after, "+", count=1000))
        found[f"{stream} pending"] = group["pending"]
        found[f"{stream} scheduled"] = client.zcard(f"retry:{stream}")
        found[f"{stream} deaths"] = client.hlen(f"deaths:{stream}")
    return {where: count for where, count in found.items() if count}


def await_rest(client: Any, services: Sequence[Service]) -> dict[str, int]:
    """Wait until nothing is unfinished and all are ready; returns what still is when time is over."""
    give_up_at = time.monotonic() + _REST_WITHIN_S
    while True:
        left = unfinished(client)
        left |= {f"{service.name} is not ready": 1 for service in services if not service.ready()}
        if not left or time.monotonic() > give_up_at:
            return left
        time.sleep(10 * POLL_S)  # a store and a page; neither sends events


def descriptors(services: Sequence[Service]) -> dict[str, int]:
    """How many descriptors supervisor, reader and reaper of each service hold."""
    found = {}
    for service in services:
        for role, pids in service.roles().items():
            if role not in ("worker", "spare"):  # these come and go
                found[f"{service.name} {role}"] = len(os.listdir(f"/proc/{pids[0]}/fd"))
    return found


def leaked_descriptors(before: dict[str, int], services: Sequence[Service]) -> dict[str, list[int]]:
    """Roles that hold more than at the start, once they are at rest, with both counts."""
    give_up_at = time.monotonic() + LIMIT_S / 6
    while True:
        now = descriptors(services)
        more = {
            role: [before.get(role, 0), count] for role, count in now.items() if count > before.get(role, 0)
        }
        if not more or time.monotonic() > give_up_at:
            return more
        time.sleep(10 * POLL_S)  # connections that are being closed


def rings_not_empty(services: Sequence[Service]) -> list[str]:
    """Rings and tables in shared memory that hold anything, seen through the supervisors' descriptors."""
    found = []
    for service in services:
        for fd in Path(f"/proc/{service.pid}/fd").iterdir():
            if _target(fd).startswith("/memfd:jobworker"):
                found += [f"{service.name} {what}" for what in _remains(fd)]
    return found


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""


def _remains(fd: Path) -> list[str]:
    # The channel wants three descriptors; its events are not used here.
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
    """Names that are visible to all; ours has none."""
    return set(os.listdir("/dev/shm"))


def left_behind(folder: Path, shm_before: set[str]) -> list[str]:
    """Processes, named shared memory and temporary files that are there after the end."""
    found = [f"shared memory {name}" for name in sorted(shared_memory() - shm_before) if "jobworker" in name]
    found += [f"temporary file {path.name}" for path in (folder / "tmp").rglob("*")]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # another user's, or ended while we looked
        if f"CHAOS_DIR={folder}\0".encode() in environment:
            found.append(f"process {entry.name}")
    return found
