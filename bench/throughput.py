"""Throughput of no-op jobs, compared with a bare XREADGROUP/XACK loop on the same server.

All jobs are enqueued first, invisible to the consumer group. Then the consumers start. Once they are
connected, ready and blocked in their read, one atomic step moves the group before the first job. The clock
starts just before this step and stops when lag and pending list are empty, polled every few milliseconds.
So start-up is not measured, but ramp-up and the last acknowledgement are. The service and the bare loop take
turns, each on a stream of its own.

CPU time comes from /proc/<pid>/stat for the processes and from INFO for the server. INFO also counts the
commands, including those in scripts; this program's own commands are subtracted.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import click
import options
from hosts import cpu_s, format_facts, host_facts, roles_of, table
from rig import LIMIT_S, NOOP, Backlog, bare_loops, connect, job, say, server, service

from jobworker.worker.safe_text import safe_json

#: Bare consumers; the same number as in the comparison with other job systems.
_BARE_PROCESSES = 2
#: Poll interval: well below one percent of any useful measurement.
_POLL_S = 0.005
#: Own commands between the two INFO readings, without the polls: INFO, five of the release, a look at lanes.
_OWN_COMMANDS = 7

Roles = dict[str, list[int]]
Consumers = Callable[[Backlog], AbstractContextManager[Roles]]


@dataclass(frozen=True)
class Drain:
    """One measurement. CPU time in microseconds a job, summed over the processes of a role."""

    jobs: int
    seconds: float
    jobs_per_s: float
    cpu_us: dict[str, float]
    server_cpu_us: float
    server_commands: float

    @property
    def cpu_us_total(self) -> float:
        """CPU time of all consumer processes, without the server."""
        return sum(self.cpu_us.values())


class Meter:
    """Readings before and after; the difference is a `Drain`."""

    def __init__(self, client: Any, roles: Roles) -> None:
        self._client = client
        self._roles = roles
        self.polls = 0
        self._before = self._read()
        self._mono_started_s = time.monotonic()

    def _read(self) -> tuple[dict[str, float], float, int]:
        info = self._client.info("everything")
        calls = sum(row["calls"] for name, row in info.items() if name.startswith("cmdstat_"))
        server_s = info["used_cpu_user"] + info["used_cpu_sys"]
        return {role: cpu_s(pids) for role, pids in self._roles.items()}, server_s, calls

    def result(self, jobs: int) -> Drain:
        """The measurement; call it right after the last acknowledgement."""
        took_s = time.monotonic() - self._mono_started_s
        (roles, server_s, calls), (roles_0, server_0_s, calls_0) = self._read(), self._before
        per_job = 1e6 / jobs
        return Drain(
            jobs,
            round(took_s, 4),
            round(jobs / took_s, 1),
            {role: round((roles[role] - roles_0[role]) * per_job, 2) for role in roles},
            round((server_s - server_0_s) * per_job, 2),
            round((calls - calls_0 - self.polls - _OWN_COMMANDS) / jobs, 4),
        )


def drain(url: str, jobs: int, consumers: Consumers) -> Drain:
    """Measure one drain. Raises RuntimeError if it does not end or a job fails."""
    with connect(url) as client:
        backlog = Backlog(client)
        try:
            backlog.fill(jobs)
            with consumers(backlog) as roles:
                meter = Meter(client, roles)
                backlog.release(jobs)
                _await_end(backlog, meter)
                measured = meter.result(jobs)
            if backlog.failed_jobs:
                raise RuntimeError(f"{backlog.failed_jobs} of {jobs} jobs failed: not a drain of no-op jobs")
            return measured
        finally:
            backlog.close()


def _await_end(backlog: Backlog, meter: Meter) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while True:
        meter.polls += 1
        if backlog.drained:
            return
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not drained within {LIMIT_S:.0f} s")
        time.sleep(_POLL_S)  # a group has no event that says "all acknowledged"


def ours(url: str, procs: int, window: str) -> Consumers:
    """The service with a no-op handler; ``window`` is that of idempotency keys in seconds."""

    @contextmanager
    def started(backlog: Backlog) -> Any:
        with service(url, backlog, NOOP, procs, JOBWORKER_UNIQUE_WINDOW=window) as pid:
            yield roles_of(pid)

    return started


def bare(url: str) -> Consumers:
    """The bare loops."""

    @contextmanager
    def started(backlog: Backlog) -> Any:
        with bare_loops(url, backlog, _BARE_PROCESSES) as pids:
            yield {"bare": pids}

    return started


def median(drains: list[Drain]) -> Drain:
    """The median of each figure."""

    def of(figure: Callable[[Drain], float]) -> float:
        return round(statistics.median(map(figure, drains)), 4)

    return Drain(
        drains[0].jobs,
        of(lambda d: d.seconds),
        of(lambda d: d.jobs_per_s),
        {role: of(lambda d, role=role: d.cpu_us[role]) for role in drains[0].cpu_us},  # type: ignore[misc]
        of(lambda d: d.server_cpu_us),
        of(lambda d: d.server_commands),
    )


def measure(url: str, jobs: int, procs: int, repeat: int, window: str) -> dict[str, Any]:
    """Measure service and bare loop in turns; the report of ``--json``."""
    with connect(url) as client:
        facts = host_facts(client)
    runs: dict[str, list[Drain]] = {"service": [], "bare": []}
    for turn in range(1, repeat + 1):
        for name, consumers in (("service", ours(url, procs, window)), ("bare", bare(url))):
            measured = drain(url, jobs, consumers)
            runs[name].append(measured)
            say(f"{turn}/{repeat} {name}: {measured.jobs_per_s:,.0f} jobs/s")
    medians = {name: median(drains) for name, drains in runs.items()}
    return {
        "bench": "throughput",
        "host": facts,
        "jobs": jobs,
        "job_bytes": len(job(0)),
        "procs": procs,
        "unique_window": window,
        "bare_processes": _BARE_PROCESSES,
        "repeat": repeat,
        "median": {name: asdict(drain) for name, drain in medians.items()},
        "ratio": round(medians["service"].jobs_per_s / medians["bare"].jobs_per_s, 3),
        "runs": {name: [asdict(drain) for drain in drains] for name, drains in runs.items()},
    }


def format_report(report: dict[str, Any]) -> str:
    """The medians as a table, then CPU time by role."""
    rows = [("medians", "jobs/s", "CPU us/job", "server us/job", "commands/job")]
    for name, found in report["median"].items():
        cpu = sum(found["cpu_us"].values())
        figures = (f"{cpu:.1f}", f"{found['server_cpu_us']:.1f}", f"{found['server_commands']:.3f}")
        rows.append((name, f"{found['jobs_per_s']:,.0f}", *figures))
    by_role = ", ".join(f"{role} {us:.1f}" for role, us in report["median"]["service"]["cpu_us"].items())
    return "\n".join([
        format_facts(report["host"]),
        f"{report['jobs']:,} jobs of {report['job_bytes']} bytes, {report['procs']} workers, "
        f"{report['repeat']} runs each; bare: {report['bare_processes']} processes",
        table(rows),
        f"service / bare: {report['ratio']:.2f}; the service's CPU us/job by role: {by_role}",
    ])  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--jobs", "-n", type=click.IntRange(2), default=200_000, show_default=True)
@options.workers
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each.")
@options.unique_window
@options.redis_url
@options.as_json
def main(jobs: int, procs: int, repeat: int, window: str, redis_url: str, as_json: bool) -> None:
    """Measure and print."""
    with server(redis_url) as url:
        report = measure(url, jobs, procs, repeat, window)
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
