"""Short runs of the chaos test: every kind of fault, without a lost, duplicated or misplaced job.

Only a full run checks recovery times: other suites on the same machine make everything late.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Timeout in seconds, below that of the suite; half of it is usual on two busy cores.
LIMIT_S = 110.0
#: The default kinds of a run.
ALL = {
    "worker", "reader", "reaper", "supervisor", "pair", "stop", "redis", "cut", "stall", "swallow", "slow",
    "client-kill", "script-flush", "busy", "readonly", "oom", "hup", "term", "forkserver", "guard",
}  # fmt: skip

#: What flow control must be seen to do.
FLOW = {"keys", "series", "delayed", "cancel cancelled", "cancel requested", "results", "batches", "ticks"}

pytestmark = [pytest.mark.chaos, pytest.mark.process]


def chaos(*options: str) -> dict[str, Any]:
    """The report of one run."""
    command = [sys.executable, str(BENCH / "chaos.py"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def assert_promises_kept(report: dict[str, Any]) -> None:
    """No job is lost or duplicated, dead letters are exact, nothing leaks, every fault has a recovery."""
    seed = f"seed {report['seed']}"
    jobs = report["jobs"]
    faults = {name: ids for name, ids in jobs.items() if isinstance(ids, list) and ids and name != "cut_off"}
    assert not faults, seed
    assert jobs["safe"], seed
    assert jobs["dead_letters"] > 0
    assert not {name: value for name, value in report["rest"].items() if value}, seed
    assert not {kind: row for kind, row in report["recovery"].items() if row["missed"]}, seed


def test_no_kind_of_fault_loses_or_duplicates_a_job() -> None:
    report = chaos("--jobs", "1500", "--kills", "24", "--seed", "7")
    assert report["recovery"].keys() == ALL
    assert report["jobs"]["confirmed"] >= 1400
    seen = report["jobs"]["flow_counts"]
    assert seen.keys() >= FLOW, seen
    assert_promises_kept(report)


def test_another_service_claims_the_jobs_of_a_lost_host() -> None:
    faults = ("--faults", "host,stop,reader", "--services", "2", "--lease", "2", "--procs", "4")
    report = chaos("--jobs", "400", "--kills", "6", "--seed", "8", *faults)
    assert report["recovery"]["host"]["faults"] >= 1
    assert_promises_kept(report)
