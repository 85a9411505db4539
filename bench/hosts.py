"""Host facts and CPU time of processes, as every benchmark reports them."""

import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: Fields of /proc/<pid>/stat after the command name: parent, CPU time in user mode, CPU time in kernel mode.
_PARENT, _USER_TICKS, _KERNEL_TICKS = 1, 11, 12


def host_facts(client: Any) -> dict[str, Any]:
    """`machine_facts`, and the versions of client and server."""
    info = client.info("server")
    name = "valkey" if "valkey_version" in info else "redis"
    return machine_facts() | {
        "redis_py": version("redis"),
        "hiredis": _version_or_none("hiredis"),
        "server": f"{name} {info[f'{name}_version']}",
    }


def machine_facts() -> dict[str, Any]:
    """Date, CPU and versions, without which figures cannot be compared; ``load_1min`` shows other load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def roles_of(supervisor_pid: int) -> dict[str, list[int]]:
    """Process ids of a service by role, read from the process titles."""
    roles: dict[str, list[int]] = {"supervisor": [supervisor_pid]}
    for pid in tree_of(supervisor_pid)[1:]:
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            if title.startswith("jobworker: "):
                roles.setdefault(title.removeprefix("jobworker: ").split()[0], []).append(pid)
    return roles


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            children.setdefault(int(_stat(int(entry.name))[_PARENT]), []).append(int(entry.name))
    tree = [pid]
    for one in tree:
        tree += children.get(one, ())
    return tree


def pss_mib(pids: Iterable[int]) -> float:
    """Proportional set size of processes: memory that several share counts once in their sum."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return (
        sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:"))
        / 1024
    )


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds (user and kernel, all threads) of running processes so far."""
    stats = map(_stat, pids)
    return sum(int(fields[_USER_TICKS]) + int(fields[_KERNEL_TICKS]) for fields in stats) / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """The fields after the name, which is in parentheses and may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A text table: the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_facts(facts: dict[str, Any]) -> str:
    """The host facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
