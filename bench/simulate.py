"""Model of a deployment: jobs a second from measured costs, and what limits it.

A simulation of three stages in a row, as the engine has them: one server for all hosts, one reader a host,
some workers a host. A job occupies the server and its reader for their cost, then a worker for its cost and
the job's own time. Readers run ahead of their workers by the prefetched jobs. Where a host's processes need
more processors than it has, all of their costs grow by the same factor.

--measure drains small backlogs with a real service, takes the costs from one of them, and compares the
others with the model. --costs takes the costs from the JSON of throughput.py or from such a report.
"""

import re
import statistics
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import options
import orjson
from hosts import format_facts, host_facts, machine_facts, roles_of, table
from rig import NOOP, Backlog, connect, free_port, say, server, service
from throughput import Drain, Roles, drain, median

#: Jobs of a simulation: start and end are below one percent of it.
_SIMULATED_JOBS = 20_000
#: Jobs that a reader keeps ahead for each worker, at least; and the time for which it does.
_AHEAD_JOBS, _AHEAD_S = 16, 0.2
#: Rounds in which the factor of shared processors settles.
_ROUNDS = 12
#: Workers report to the supervisor several times a second.
_REPORTED_S = 1.0
SLEEP = "bench_handlers:Sleep"


@dataclass(frozen=True)
class Costs:
    """Processor time of a job in microseconds: in the server, the reader, a worker."""

    server_us: float
    reader_us: float
    worker_us: float


@dataclass(frozen=True)
class Case:
    """A deployment and its jobs. ``cpu_s`` is the part of ``job_s`` (seconds) that keeps a processor busy.

    ``shared``: hosts and server share the processors of one machine, as in a measurement on one.
    """

    hosts: int = 1
    workers: int = 1
    job_s: float = 0.0
    cpu_s: float = 0.0
    cores: int = 2
    masters: int = 1
    shared: bool = False


@dataclass(frozen=True)
class Result:
    """Jobs a second, and by stage the share of time in which it is busy. ``limit`` is the busiest."""

    jobs_per_s: float
    busy: dict[str, float]
    limit: str


def simulate(case: Case, costs: Costs, jobs: int = _SIMULATED_JOBS) -> Result:
    """Jobs a second of a backlog of this length."""
    stretch, result = 1.0, _run(case, costs, 1.0, jobs)
    for _ in range(_ROUNDS):
        needed = (
            result.jobs_per_s * _cpu_s(case, costs) / (case.cores if case.shared else case.cores * case.hosts)
        )
        result = replace(result, busy={**result.busy, "processors": min(1.0, needed)})
        if needed <= 1.0 and stretch == 1.0:
            break
        stretch = max(1.0, stretch * needed)
        result = _run(case, costs, stretch, jobs)
        result.busy["processors"] = min(1.0, result.jobs_per_s * _cpu_s(case, costs) / case.cores)
    return replace(result, limit=max(result.busy, key=lambda stage: result.busy[stage]))


def _cpu_s(case: Case, costs: Costs) -> float:
    own = (costs.reader_us + costs.worker_us) / 1e6 + case.cpu_s
    return own + costs.server_us / 1e6 if case.shared else own


def _run(case: Case, costs: Costs, stretch: float, jobs: int) -> Result:
    server_s, reader_s = costs.server_us * stretch / 1e6, costs.reader_us * stretch / 1e6
    if not case.shared:
        server_s = costs.server_us / 1e6  # it has a machine of its own
    on_worker_s = (costs.worker_us / 1e6 + case.cpu_s) * stretch + case.job_s - case.cpu_s
    ahead = case.workers * max(_AHEAD_JOBS, round(_AHEAD_S / on_worker_s))
    masters = [0.0] * case.masters
    readers = [0.0] * case.hosts
    workers = [[0.0] * case.workers for _ in range(case.hosts)]
    started: list[deque[float]] = [deque() for _ in range(case.hosts)]
    end_s = 0.0
    for number in range(jobs):
        # The host that can take the next job first, and its turn at the server.
        host = min(range(case.hosts), key=lambda one: _may_read(readers[one], started[one], ahead))
        master = number % case.masters
        # A reader asks for the next jobs while it works on these.
        room_s = started[host][0] if len(started[host]) == ahead else 0.0
        masters[master] = max(masters[master], room_s) + server_s
        readers[host] = max(readers[host], masters[master]) + reader_s
        pool = workers[host]
        worker = min(range(case.workers), key=pool.__getitem__)
        begin_s = max(pool[worker], readers[host])
        pool[worker] = begin_s + on_worker_s
        started[host].append(begin_s)
        if len(started[host]) > ahead:
            started[host].popleft()
        end_s = max(end_s, pool[worker])
    per_s = jobs / end_s
    busy = {
        "server": per_s * server_s / case.masters,
        "reader": per_s * reader_s / case.hosts,
        "workers": per_s * on_worker_s / (case.hosts * case.workers),
    }
    return Result(per_s, busy, "")


def _may_read(reader_free_s: float, started: "deque[float]", ahead: int) -> float:
    """When a reader may take a job: it is free, and no more than ``ahead`` jobs wait for its workers."""
    return max(reader_free_s, started[0]) if len(started) == ahead else reader_free_s


# -- measurement


def measured_costs(measured: Drain) -> Costs:
    """The costs of a drain of no-op jobs."""
    workers = sum(us for role, us in measured.cpu_us.items() if role.startswith("worker"))
    return Costs(measured.server_cpu_us, measured.cpu_us["reader"], workers)


@contextmanager
def hosts(url: str, backlog: Backlog, case: Case, took_s: list[float]) -> Iterator[Roles]:
    """Services with names of their own on one stream; the roles of all of them together.

    At the end the worker time of a job is added to ``took_s``, as the services measured it.
    """
    with ExitStack() as stack:
        roles: Roles = {}
        ports = [free_port() for _ in range(case.hosts)]
        for number, port in enumerate(ports):
            environment = {"JOBWORKER_INSTANCE": f"host-{number}", "BENCH_SLEEP_S": str(case.job_s)}
            handler = SLEEP if case.job_s else NOOP
            pid = stack.enter_context(service(url, backlog, handler, case.workers, port, **environment))
            for role, pids in roles_of(pid).items():
                roles.setdefault(role, []).extend(pids)
        yield roles
        time.sleep(_REPORTED_S)  # until the workers have reported their last jobs
        busy_s, jobs = map(sum, zip(*map(job_times, ports), strict=True))
        took_s.append(busy_s / jobs)


def job_times(port: int) -> tuple[float, float]:
    """Seconds in handlers, and jobs, of a service."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    names = ("z_novel_worker_busy_seconds_total", "z_novel_job_duration_seconds_count")
    busy_s, jobs = (
        sum(map(float, re.findall(rf"^{name}{{.*}} (.*)$", text, re.MULTILINE))) for name in names
    )
    return busy_s, jobs


def measure(url: str, case: Case, seconds: float, repeat: int) -> tuple[Drain, float]:
    """The median of some drains that take about this time, and what a job took in its worker (seconds)."""
    rate = case.hosts * case.workers / case.job_s if case.job_s else 40_000
    took_s: list[float] = []
    jobs = max(200, round(rate * seconds))
    drains = [drain(url, jobs, lambda backlog: hosts(url, backlog, case, took_s)) for _ in range(repeat)]
    return median(drains), statistics.median(took_s)


def compare(url: str, seconds: float, repeat: int) -> dict[str, Any]:
    """Measure the costs and the small cases, and what the model says of them."""
    cores = machine_facts()["cores"]
    costs = measured_costs(measure(url, Case(workers=1), seconds, repeat)[0])
    say(f"costs of a job, us: {asdict(costs)}")
    cases = [
        Case(count, workers, job_s, cores=cores, shared=True)
        for count, workers, job_s in [
            (1, 1, 0.001), (1, 2, 0.001), (1, 1, 0.005), (1, 2, 0.005),
            (2, 1, 0.001), (2, 1, 0.005), (2, 2, 0.005),
        ]
    ]  # fmt: skip
    rows = []
    for case in cases:
        measured, took_s = measure(url, case, seconds, repeat)
        found = measured.jobs_per_s
        model = simulate(replace(case, job_s=took_s if case.job_s else 0.0), costs, measured.jobs)
        row = {"case": asdict(case), "took_ms": took_s * 1000, "measured": found, "limit": model.limit}
        rows.append(
            row | {"model": round(model.jobs_per_s, 1), "error": round(model.jobs_per_s / found - 1, 3)}
        )
        say(f"{len(rows)} of {len(cases)}: {found:,.0f} jobs/s, model {model.jobs_per_s:,.0f}")
    with connect(url) as client:
        return {"bench": "simulate", "host": host_facts(client), "costs": asdict(costs), "cases": rows}


def format_report(report: dict[str, Any]) -> str:
    """The cases as a table."""
    rows = [("hosts x workers", "asked ms", "took ms", "measured/s", "model/s", "error", "limit")]
    for row in report["cases"]:
        case = row["case"]
        rows.append((
            f"{case['hosts']} x {case['workers']}",
            f"{case['job_s'] * 1000:g}", f"{row['took_ms']:.3f}", f"{row['measured']:,.0f}",
            f"{row['model']:,.0f}", f"{row['error']:+.0%}", row["limit"],
        ))  # fmt: skip
    costs = ", ".join(f"{name} {us:.1f}" for name, us in report["costs"].items())
    return "\n".join([format_facts(report["host"]), f"costs of a job: {costs}", table(rows)])


def read_costs(path: str) -> Costs:
    """Costs from a report of this program or of throughput.py. Raises `click.UsageError`."""
    report = orjson.loads(Path(path).read_bytes())
    if report.get("bench") == "simulate":
        return Costs(**report["costs"])
    if report.get("bench") != "throughput":
        raise click.UsageError(f"{path} is no report of throughput.py or simulate.py")
    return measured_costs(Drain(**report["median"]["service"]))


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--measure", "is_measured", is_flag=True, help="Compare the model with small cases here.")
@click.option("--costs", "path", type=click.Path(exists=True, dir_okay=False), help="JSON report with costs.")
@click.option("--hosts", "count", type=click.IntRange(1), default=1, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=8, show_default=True, help="Of each host.")
@click.option("--job-ms", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option(
    "--cpu-share",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Part of a job's time that keeps a processor busy.",
)
@click.option("--cores", type=click.IntRange(1), default=8, show_default=True, help="Of each host.")
@click.option(
    "--masters", type=click.IntRange(1), default=1, show_default=True, help="Servers of the streams."
)
@click.option("--seconds", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Of a drain.")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Drains of a case.")
@options.redis_url
@options.as_json
def main(
    is_measured: bool, path: str | None, count: int, workers: int, job_ms: float, cpu_share: float,
    cores: int, masters: int, seconds: float, repeat: int, redis_url: str, as_json: bool,
) -> None:  # fmt: skip
    """Simulate or measure, and print."""
    if is_measured:
        with server(redis_url) as url:
            report = compare(url, seconds, repeat)
        print(orjson.dumps(report).decode() if as_json else format_report(report))
        return
    if path is None:
        raise click.UsageError("give --costs REPORT.json, or --measure")
    job_s = job_ms / 1000
    case = Case(count, workers, job_s, job_s * cpu_share, cores, masters)
    found = simulate(case, read_costs(path))
    if as_json:
        print(orjson.dumps(asdict(found)).decode())
        return
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in found.busy.items())
    day = found.jobs_per_s * 86_400
    print(f"{found.jobs_per_s:,.0f} jobs/s, {day:,.0f} a day; busy: {busy}; limit: {found.limit}")


if __name__ == "__main__":
    sys.exit(main())
