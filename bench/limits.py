"""Limits under kills: three services on one Redis, jobs with a limit of concurrency and one of rate.

Kills workers, readers, forkservers and supervisors while jobs run. Handlers record start and end of each try
in a file. At the end: the most jobs of a key that ran at once, and the jobs that were lost or doubled. A
killed job counts as running until it starts again, because it keeps its slot.

Exit code 0: no limit was exceeded and every job ended once; 1: otherwise.
"""

import random
import sys
from typing import Any

import click
import options
from chaos import run_once
from chaos_load import AT_ONCE, STARTS
from hosts import format_facts, table

from jobworker.worker.safe_text import safe_json

_FAULTS = ["worker", "reader", "forkserver", "supervisor"]
_SERVICES, _PROCS, _LEASE_S = 3, 6, 2.0
_JOBS_PER_KILL = 100
#: Names in the report of a chaos run, and what they are called here.
_COUNTED = {
    "overlaps": "over_limit", "over the rate": "over_rate", "lost": "lost", "doubled": "effect_duplicates",
    "dead letters doubled": "letters_repeated", "dead letters missing": "letters_missing",
}  # fmt: skip


@click.command(help=__doc__)
@click.option("--kills", default=200, show_default=True, type=click.IntRange(4))
@options.seed
@click.option("--keep", is_flag=True, help="Keep the folder with logs and events, and print its name.")
@options.as_json
def main(kills: int, seed: int | None, as_json: bool, keep: bool) -> None:
    """See the help above."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    options = {
        "seed": seed, "jobs": kills * _JOBS_PER_KILL, "kills": kills, "faults": _FAULTS, "duration": 0.0,
        "procs": _PROCS, "services": _SERVICES, "lease": _LEASE_S, "limits": True, "flow": False,
    }  # fmt: skip
    found = run_once(options, "jobworker-limits", keep=keep)
    report = summary(found, kills)
    print(safe_json(report) if as_json else _format(report))
    sys.exit(0 if report["pass"] else 1)


def summary(found: dict[str, Any], kills: int) -> dict[str, Any]:
    """What the report of a chaos run says of limits."""
    jobs = found["jobs"]
    named = {*_COUNTED.values(), "cut_off"}
    others = {
        name: value for name, value in jobs.items() if isinstance(value, list) and value and name not in named
    }
    return {
        "seed": found["seed"],
        "pass": jobs["safe"] and not found["rest"]["unfinished"],
        "kills": kills,
        "jobs": jobs["confirmed"],
        "limit": {"at once": AT_ONCE, "starts a second": STARTS},
        "most at once": jobs["most_at_once"],
        **{name: jobs[promise] for name, promise in _COUNTED.items()},
        "other promises broken": others,
        "run again after a kill": jobs["repeated"],
        "unfinished": found["rest"]["unfinished"],
        "took_s": found["took_s"],
        "host": found["host"],
    }


def _format(report: dict[str, Any]) -> str:
    rows = [
        (name, str(len(value) if isinstance(value, list) else value))
        for name, value in report.items()
        if name != "host"
    ]
    return f"{table(rows)}\n\n{format_facts(report['host'])}"


if __name__ == "__main__":
    main()
