"""Throughput of no-op jobs with idempotency keys, compared with the same jobs while keys do not count.

Each job has a key of its own, as jobs of the Go producers have. The services take turns, with
``--unique-window`` of 0 and of a day. The ratio is the median of the ratios of two runs in a row.
"""

import statistics
import sys
from typing import Any

import click
import options
from hosts import format_facts, host_facts, table
from rig import connect, job, say, server
from throughput import Drain, drain, median, ours

from jobworker.worker.safe_text import safe_json

#: Windows by the name of their row (seconds).
_WINDOWS = {"keys off": "0", "keys on": "86400"}


def measure(url: str, jobs: int, procs: int, repeat: int) -> dict[str, Any]:
    """Measure both in turns; the report of ``--json``."""
    with connect(url) as client:
        facts = host_facts(client)
    runs: dict[str, list[Drain]] = {name: [] for name in _WINDOWS}
    for turn in range(repeat):
        # Which one is first alternates, so that a slow minute of the host falls on both.
        for name in sorted(_WINDOWS, reverse=turn % 2 == 1):
            measured = drain(url, jobs, ours(url, procs, _WINDOWS[name]))
            runs[name].append(measured)
            say(f"{turn + 1}/{repeat} {name}: {measured.jobs_per_s:,.0f} jobs/s")
    ratios = [on.jobs_per_s / off.jobs_per_s for off, on in zip(*runs.values(), strict=True)]
    return {
        "bench": "unique", "host": facts, "jobs": jobs, "job_bytes": len(job(0)), "procs": procs,
        "repeat": repeat, "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median": {name: vars(median(drains)) for name, drains in runs.items()},
    }  # fmt: skip


def format_report(report: dict[str, Any]) -> str:
    """The medians as a table, then the ratios."""
    rows = [("medians", "jobs/s", "CPU us/job", "reader us/job", "server us/job")]
    for name, found in report["median"].items():
        cpu = sum(found["cpu_us"].values())
        figures = f"{cpu:.1f}", f"{found['cpu_us']['reader']:.1f}", f"{found['server_cpu_us']:.1f}"
        rows.append((name, f"{found['jobs_per_s']:,.0f}", *figures))
    return "\n".join([
        format_facts(report["host"]),
        f"{report['jobs']:,} jobs of {report['job_bytes']} bytes, {report['procs']} workers, "
        f"{report['repeat']} runs each",
        table(rows),
        f"on / off: {report['ratio']:.3f}; pairs: {', '.join(f'{one:.3f}' for one in report['ratios'])}",
    ])  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--jobs", "-n", type=click.IntRange(2), default=100_000, show_default=True)
@options.workers
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
@options.redis_url
@options.as_json
def main(jobs: int, procs: int, repeat: int, redis_url: str, as_json: bool) -> None:
    """Measure and print."""
    with server(redis_url) as url:
        report = measure(url, jobs, procs, repeat)
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
