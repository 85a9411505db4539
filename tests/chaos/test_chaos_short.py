"""The chaos program in a short form: every kind of fault at least once, no job lost, doubled or misplaced.

How quickly the service recovers is measured by the long form; here it has to recover at all, for a machine
that runs other suites makes everything late.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Within the suite's own limit; half of that is usual on two busy cores.
LIMIT_S = 110.0
#: What a run does when it is not told which kinds.
ALL = {
    "worker", "reader", "reaper", "supervisor", "pair", "stop", "redis", "cut", "stall", "swallow", "slow",
    "client-kill", "script-flush", "busy", "readonly", "oom", "hup", "term",
}  # fmt: skip

pytestmark = [pytest.mark.chaos, pytest.mark.process]


def chaos(*options: str) -> dict[str, Any]:
    """The report of one run, whose folder is kept out of the way by the run itself."""
    command = [sys.executable, str(BENCH / "chaos.py"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def assert_promises_kept(report: dict[str, Any]) -> None:
    """Nothing lost, nothing twice, the dead letters exact, nothing left; every fault was recovered from."""
    seed = f"seed {report['seed']}"
    jobs = report["jobs"]
    faults = {name: ids for name, ids in jobs.items() if isinstance(ids, list) and ids and name != "cut_off"}
    assert not faults, seed
    assert jobs["safe"], seed
    assert jobs["dead_letters"] > 0
    assert not {what: found for what, found in report["rest"].items() if found}, seed
    assert not {kind: row for kind, row in report["recovery"].items() if row["missed"]}, seed


def test_every_kind_of_fault_loses_and_doubles_nothing() -> None:
    report = chaos("--jobs", "1500", "--kills", "24", "--seed", "7")
    assert report["recovery"].keys() == ALL
    assert report["jobs"]["confirmed"] >= 1400
    assert_promises_kept(report)


def test_a_lost_host_and_stopped_roles_are_taken_over_by_the_other_service() -> None:
    faults = ("--faults", "host,stop,reader", "--services", "2", "--lease", "2", "--procs", "4")
    report = chaos("--jobs", "400", "--kills", "6", "--seed", "8", *faults)
    assert report["recovery"]["host"]["faults"] >= 1
    assert_promises_kept(report)
