"""Peak memory of each role: with a long backlog, with the largest jobs, and while a dependency hangs.

Figures are the high-water marks of the processes (VmHWM); of several workers, the largest.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import options
import orjson
from hosts import format_facts, host_facts, roles_of, table
from rig import JOB_TYPE, LIMIT_S, Backlog, connect, job, say, server, service

from jobworker.worker.safe_text import safe_json

_MIB = 1024 * 1024
#: The largest payload: the limit of an entry without its other fields.
_LARGE_BYTES = 8 * _MIB - 1024
#: Large enough to show unbounded prefetch while the dependency hangs.
_STALLED_BYTES = 100_000
_POLL_S = 0.2

Scenario = Callable[[str], dict[str, int]]


def large_job(size_bytes: int) -> Callable[[int], bytes]:
    """A function that creates jobs of that size."""

    def make(number: int) -> bytes:
        text = "x" * (size_bytes - 200)
        return orjson.dumps({"id": f"large-{number}", "type": JOB_TYPE, "payload": {"text": text}})

    return make


def peaks_mib(supervisor_pid: int) -> dict[str, int]:
    """Peak memory of each role in MiB."""
    roles = roles_of(supervisor_pid)
    return {role: max(_peak_mib(pid) for pid in pids) for role, pids in sorted(roles.items())}


def _peak_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


@contextmanager
def filled(url: str, jobs: int, make: Callable[[int], bytes], at_once: int) -> Iterator[Backlog]:
    """A backlog of jobs, deleted afterwards."""
    with connect(url) as client:
        backlog = Backlog(client, make)
        try:
            backlog.fill(jobs, at_once)
            yield backlog
        finally:
            backlog.close()


def drained(
    url: str, handler: str, jobs: int, make: Callable[[int], bytes] = job, at_once: int = 1000
) -> dict[str, int]:
    """Peaks after the last job."""
    with filled(url, jobs, make, at_once) as backlog, service(url, backlog, handler, 2) as pid:
        backlog.release(jobs)
        give_up_at = time.monotonic() + LIMIT_S
        while not backlog.drained:
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"not drained within {LIMIT_S:.0f} s")
            time.sleep(_POLL_S)  # a group has no event that says "all acknowledged"
        return peaks_mib(pid)


def with_stalled_peer(url: str, jobs: int, seconds: float) -> dict[str, int]:
    """Peaks after `seconds` with a dependency that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as peer:
        at = f"127.0.0.1:{peer.getsockname()[1]}"
        with (
            filled(url, jobs, large_job(_STALLED_BYTES), 100) as backlog,
            # Its jobs never end: a drain would wait for its whole limit.
            service(
                url, backlog, "bench_handlers:WaitsForPeer", 2, BENCH_PEER=at, JOBWORKER_DRAIN_TIMEOUT="0.5"
            ) as pid,
        ):
            backlog.release(jobs)
            time.sleep(seconds)  # the measurement is a length of time
            return peaks_mib(pid)


def measure(jobs: int, large_jobs: int, still_jobs: int, seconds: float) -> dict[str, Any]:
    """Run each scenario on a server of its own, so that none is affected by another."""
    scenarios: dict[str, Scenario] = {
        f"{jobs:,} small jobs": lambda url: drained(url, "bench_handlers:Noop", jobs),
        f"{large_jobs} jobs of 8 MiB": lambda url: drained(
            url, "bench_handlers:Many", large_jobs, large_job(_LARGE_BYTES), 4
        ),
        f"{still_jobs:,} jobs of 100 kB, {seconds:.0f} s of a hung dependency": lambda url: with_stalled_peer(
            url, still_jobs, seconds
        ),
    }
    found: dict[str, dict[str, int]] = {}
    facts: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        with server("") as url:
            with connect(url) as client:
                facts = host_facts(client)
            found[name] = scenario(url)
            say(f"{name}: {found[name]}")
    return {"bench": "memory", "host": facts, "peak_mib": found}


def format_report(report: dict[str, Any]) -> str:
    """A table with one row a scenario."""
    roles = ("supervisor", "forkserver", "reader", "reaper", "worker")
    rows = [("peak MiB", *roles)]
    rows += [
        (name, *(str(peaks.get(role, "-")) for role in roles)) for name, peaks in report["peak_mib"].items()
    ]
    return f"{format_facts(report['host'])}\n{table(rows)}"


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--jobs", type=click.IntRange(2), default=1_000_000, show_default=True, help="Small ones.")
@click.option("--large-jobs", type=click.IntRange(2), default=64, show_default=True)
@click.option("--still-jobs", type=click.IntRange(2), default=10_000, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(1), default=30.0, show_default=True, help="Duration of the hang."
)
@options.as_json
def main(jobs: int, large_jobs: int, still_jobs: int, seconds: float, as_json: bool) -> None:
    """Measure and print."""
    report = measure(jobs, large_jobs, still_jobs, seconds)
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
