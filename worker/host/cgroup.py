"""CPU and memory limits of this process's control groups (Linux cgroup v1 and v2).

A container or systemd unit limits them; the kernel's files in /proc still show the whole host. A limit of a
parent group holds too. What cannot be read counts as no limit.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: cgroup v1 writes a number near the largest integer for "no limit".
_NO_LIMIT_V1 = 1 << 60
#: mountinfo escapes blanks and backslashes in paths.
_ESCAPES = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


class _Mount(NamedTuple):
    """A mounted hierarchy: the group that it shows as its root, where, and its v1 controllers."""

    root: str
    path: Path
    version: int
    controllers: frozenset[str]


def usable_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity and CPU quota, rounded up; at least 1.

    ``root`` holds ``proc`` and the mounted groups.
    """
    cpus = len(os.sched_getaffinity(0))
    quota = min((quota for group in _groups(root, "cpu") if (quota := _quota(*group))), default=math.inf)
    return max(1, min(cpus, math.ceil(quota))) if quota < math.inf else cpus


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be used: of the host, or within the limits if that is less; 0 if unknown."""
    frees = [free for group in _groups(root, "memory") if (free := _free(*group)) is not None]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        frees += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(frees, default=0))


def _quota(folder: Path, version: int) -> float | None:
    """Processors that a group may use; None without a limit."""
    if version == 2:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal() or not int(quota) or not int(period):
        return None  # "max", "-1", or no such file
    return int(quota) / int(period)


def _free(folder: Path, version: int) -> int | None:
    """Bytes below the limit of a group; None without a limit. Page cache counts as free."""
    limits = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    found = [int(text) for name in limits if (text := _text(folder / name)).isdecimal()]
    limit = min(found, default=_NO_LIMIT_V1)
    used = _text(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if limit >= _NO_LIMIT_V1 or not used.isdecimal():
        return None
    name = "inactive_file" if version == 2 else "total_inactive_file"
    fields = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    cache = fields.get(name, "0")
    return limit - max(0, int(used) - (int(cache) if cache.isdecimal() else 0))


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's groups that may limit ``controller``, up to the mounted root."""
    memberships = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    for mount in _mounts(root):
        for number, names, group in (parts for parts in memberships if len(parts) == 3):
            if mount.version == 2:
                matches = number == "0" and not names
            else:
                matches = controller in names.split(",") and controller in mount.controllers
            if matches:
                yield from ((folder, mount.version) for folder in _up(mount, group))


def _up(mount: _Mount, group: str) -> Iterator[Path]:
    """The group's folder and those of its parents. A container may see its own group as the root."""
    parts = Path(group).parts[1:]
    inside = Path(mount.root).parts[1:]
    below = parts[len(inside) :] if parts[: len(inside)] == inside else ()
    for length in range(len(below), -1, -1):
        folder = mount.path.joinpath(*below[:length])
        if ".." not in below[:length]:
            yield folder


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if separator and len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            path = root / _unescaped(fields[4]).lstrip("/")
            version = 2 if kind[0] == "cgroup2" else 1
            yield _Mount(_unescaped(fields[3]), path, version, frozenset(kind[2].split(",")))


def _unescaped(text: str) -> str:
    for escape, char in _ESCAPES.items():
        text = text.replace(escape, char)
    return text


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
