"""Limits under kills: a short run of bench/limits.py, and its oracle finds what it must find."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: Timeout in seconds; the run takes some 20 s on two busy cores.
LIMIT_S = 110.0


class Oracle:
    """The oracle of limits, and a ledger of jobs of one tenant."""

    def __init__(self) -> None:
        self.limits, self.load, self.events, self.oracle = map(
            importlib.import_module, ("chaos_limits", "chaos_load", "chaos_events", "chaos_oracle")
        )
        self.ledger = self.load.Ledger()

    def verdict(self, *lines: str, strict: bool = True, kind: str = "chaos_one", dead: str = "") -> Any:
        """The verdict on lines "what id pid seconds", with a retry count at the end for some."""
        events = []
        for what, id, pid, mono_s, *retries in (line.split() for line in lines):
            self.ledger.planned[id] = self.load.Planned(id, "ok", "", {}, kind, "t1")
            retry_count = int(retries[0]) if retries else 0
            events.append(self.events.Event(what, id, retry_count, int(pid), float(mono_s)))
        verdict = self.oracle.Verdict(dead_ids={dead})
        self.limits.check_limits(verdict, self.ledger, events, strict)
        return verdict


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Oracle]:
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield Oracle()
    for name in set(sys.modules) - before:
        if name.startswith("chaos"):
            del sys.modules[name]


def test_jobs_that_run_one_after_another_are_within_the_limit(oracle: Oracle) -> None:
    lines = [line for n in range(9) for line in (f"start j{n} {n % 2} {n}", f"end j{n} {n % 2} {n + 2}")]
    verdict = oracle.verdict(*lines)
    assert (verdict.most_at_once, verdict.over_limit) == (2, [])


def test_a_third_job_at_once_is_an_overlap(oracle: Oracle) -> None:
    starts = [f"start j{n} {n} 1.{n}" for n in range(3)]
    assert oracle.verdict(*starts, *(f"end j{n} {n} 2.{n}" for n in range(3))).over_limit == ["t1: 3 at once"]


def test_a_killed_job_keeps_its_slot_until_it_starts_again(oracle: Oracle) -> None:
    killed = ["start a 1 1.0", "start b 2 1.0", "start c 3 2.0", "end b 2 2.5", "end c 3 2.5"]
    again = ["start a 4 3.0", "end a 4 4.0"]
    assert oracle.verdict(*killed, *again).over_limit == ["t1: 3 at once"]
    assert oracle.verdict(*killed, *again, strict=False).over_limit == []
    assert oracle.verdict(*killed, dead="a").over_limit == [], "it was given up"
    assert oracle.verdict(*killed).over_limit == ["t1: 3 at once"], "it holds its slot still"


def test_a_try_that_timed_out_keeps_no_slot(oracle: Oracle) -> None:
    lines = ["start a 1 1.0", "start b 2 3.0", "start c 3 3.0", "end b 2 3.5", "end c 3 3.5"]
    assert oracle.verdict(*lines, "start a 4 4.0 1", "end a 4 4.1 1").over_limit == []


def test_a_first_job_that_waits_long_for_a_worker_breaks_no_rate(oracle: Oracle) -> None:
    late = [f"start j{n} 1 4.0" for n in range(500)]
    assert oracle.verdict(*late, kind="chaos_many").over_rate
    oracle.ledger.mono_sent_s["j0"] = 0.0
    assert oracle.verdict(*late, kind="chaos_many").over_rate == []


def test_a_job_that_two_processes_run_counts_twice(oracle: Oracle) -> None:
    lines = ["start a 1 1.0", "start a 2 1.5", "start b 3 1.6", "end a 1 2.0", "end a 2 2.0", "end b 3 2.0"]
    assert oracle.verdict(*lines).over_limit == ["t1: 3 at once"]


def test_more_starts_than_the_rate_allows_are_found(oracle: Oracle) -> None:
    within = [f"start j{n} 1 {n // 100}.5" for n in range(500)]
    assert oracle.verdict(*within, kind="chaos_many").over_rate == []
    over = [f"start j{n} 1 {n / 300}" for n in range(500)]
    assert oracle.verdict(*over, kind="chaos_many").over_rate


@pytest.mark.chaos
@pytest.mark.process
def test_no_limit_is_exceeded_while_roles_of_three_hosts_are_killed() -> None:
    command = [sys.executable, str(BENCH / "limits.py"), "--json", "--kills", "10", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["pass"], done.stdout
    assert report["most at once"] == report["limit"]["at once"], "the limit was reached"
