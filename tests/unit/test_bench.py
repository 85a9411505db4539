"""The benchmarks run as they are called by hand, on a handful of jobs, and report what they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Two starts of the service, one of the server and of two bare loops, on a machine that does other things.
LIMIT_S = 60.0

pytestmark = pytest.mark.process


def run(program: str, *options: str) -> str:
    """What the program prints."""
    command = [sys.executable, str(BENCH / program), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(program: str, *options: str) -> dict[str, Any]:
    """The one line of JSON, with facts about the host."""
    (line,) = run(program, *options, "--json").splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["host"]["cores"] > 0
    assert found["host"]["server"].startswith("valkey ")
    assert found["host"].keys() >= {"cpu", "kernel", "python", "redis_py", "date"}
    return found


@pytest.fixture(autouse=True)
def own_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's server in the environment is not ours to fill."""
    monkeypatch.delenv("JOBWORKER_REDIS_URL", raising=False)


def test_throughput_measures_service_and_bare_loop_in_one_run() -> None:
    found = report("throughput.py", "--jobs", "300", "--procs", "1", "--repeat", "1")
    service, bare = found["median"]["service"], found["median"]["bare"]
    assert service["jobs"] == bare["jobs"] == 300
    assert found["ratio"] == pytest.approx(service["jobs_per_s"] / bare["jobs_per_s"], abs=0.001)
    assert service["cpu_us"].keys() >= {"supervisor", "reader", "reaper", "worker"}
    # A read and an XACK for each hundred jobs: the counting leaves this program's own commands out.
    assert bare["server_commands"] == pytest.approx(0.02, abs=0.02)


def test_latency_gives_percentiles_of_both() -> None:
    found = report("latency.py", "--seconds", "0.4", "--procs", "1")
    assert found["jobs"] == 20
    for name in ("service", "bare"):
        ms = found["ms"][name]
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"] <= ms["max"]


def test_every_audit_entry_is_archived_once_also_under_a_kill() -> None:
    found = report("audit.py", "--entries", "3000", "--procs", "1", "--kills", "1")
    assert (found["entries"], found["missing"], found["doubled"]) == (3000, 0, 0)


def test_memory_gives_the_peak_of_each_role() -> None:
    small = ("--jobs", "200", "--large-jobs", "3", "--still-jobs", "50", "--seconds", "1")
    found = report("memory.py", *small)["peak_mib"]
    assert len(found) == 3
    for peaks in found.values():
        assert peaks.keys() >= {"supervisor", "reader", "reaper", "worker"}
        assert all(0 < mib < 1000 for mib in peaks.values())


def test_people_get_a_table() -> None:
    printed = run("throughput.py", "--jobs", "50", "--procs", "1", "--repeat", "1")
    assert "service / bare:" in printed
    assert "jobs/s" in printed
