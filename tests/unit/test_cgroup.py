"""CPU and memory limits of control groups, read from a tree of files as each version lays them out."""

import os
from pathlib import Path

import pytest

from jobworker.worker.host.cgroup import free_memory_bytes, usable_cpus

GIB = 1 << 30
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "31 23 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 23 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture(autouse=True)
def host_with_64_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def tree(folder: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A root with these memberships, mounts and files of groups; 64 GiB are free on the host."""
    proc = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts),
            "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {64 * GIB >> 10} kB\n"}  # fmt: skip
    for name, text in {**proc, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64),
     ("6400000 50000", 64),
     ("", 64), ("rubbish", 64), ("0 0", 64)],
)  # fmt: skip
def test_a_quota_of_version_2(tmp_path: Path, text: str, cpus: int) -> None:
    own = tree(tmp_path, "0::/", [V2.format(root="/")], {"cpu.max": text})
    assert usable_cpus(own) == cpus


def test_a_limit_of_a_parent_group_holds(tmp_path: Path) -> None:
    files = {"a.slice/cpu.max": "300000 100000", "a.slice/b.service/cpu.max": "max 100000",
             "a.slice/b.service/c/cpu.max": "800000 100000", "other/cpu.max": "100000 100000",
             "a.slice/memory.max": str(3 * GIB), "a.slice/memory.current": str(GIB),
             "a.slice/b.service/memory.max": str(8 * GIB),
             "a.slice/b.service/memory.current": "0"}  # fmt: skip
    root = tree(tmp_path, "0::/a.slice/b.service/c", [V2.format(root="/")], files)
    assert usable_cpus(root) == 3
    assert free_memory_bytes(root) == 2 * GIB


@pytest.mark.parametrize(
    ("group", "mount_root", "folder"),
    [
        (
            "/docker/abc",
            "/docker/abc",
            "",
        ),  # a container that sees its own group as the root
        ("/docker/abc", "/", "docker/abc/"),
        ("/", "/", ""),
        ("/docker/abc/job", "/docker/abc", "job/"),
        ("/../other", "/", ""),
    ],
)
def test_limits_of_version_1(tmp_path: Path, group: str, mount_root: str, folder: str) -> None:
    mounts = [V1_CPU.format(root=mount_root), V1_MEMORY.format(root=mount_root)]
    files = {
        f"cpu,cpuacct/{folder}cpu.cfs_quota_us": "400000", f"cpu,cpuacct/{folder}cpu.cfs_period_us": "100000",
        f"memory/{folder}memory.limit_in_bytes": str(2 * GIB),
        f"memory/{folder}memory.usage_in_bytes": str(GIB),
        f"memory/{folder}memory.stat": f"cache 5\ntotal_inactive_file {GIB // 2}",
    }  # fmt: skip
    root = tree(tmp_path, f"5:memory:{group}\n4:cpu,cpuacct:{group}\n0::/", mounts, files)
    assert usable_cpus(root) == 4
    assert free_memory_bytes(root) == GIB + GIB // 2


def test_no_limit_of_version_1(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
             "memory/memory.limit_in_bytes": "9223372036854771712",
             "memory/memory.usage_in_bytes": "5"}  # fmt: skip
    mounts = [V1_CPU.format(root="/"), V1_MEMORY.format(root="/")]
    root = tree(tmp_path, "4:cpu,cpuacct:/\n5:memory:/", mounts, files)
    assert (usable_cpus(root), free_memory_bytes(root)) == (64, 64 * GIB)


def test_both_versions_beside_each_other(tmp_path: Path) -> None:
    hybrid = V2.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    root = tree(tmp_path, "4:cpu,cpuacct:/\n0::/x", [hybrid, V1_CPU.format(root="/")], files)
    assert usable_cpus(root) == 2


def test_without_control_groups_the_host_counts(tmp_path: Path) -> None:
    assert (usable_cpus(tmp_path), free_memory_bytes(tmp_path)) == (64, 0)


def test_this_machine() -> None:
    assert 1 <= usable_cpus() <= 64
    assert free_memory_bytes() > 0
