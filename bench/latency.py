"""From enqueuing a job to its handler's start, on an idle service, beside a bare blocking read loop.

One job each 20 ms. A job's clock starts just before its XADD is sent. It stops in the first line of the
handler, or when the bare loop's client returns the entry. All processes of a host share that clock. Each
consumer has a stream of its own and is measured alone; with --repeat they take turns.

With --trace the service is measured alone and also stamps each hand-over of a job, from process to process
(see ``handover/sitecustomize.py``): the report says where the time goes.
"""

import bisect
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import options
import orjson
from hosts import format_facts, host_facts, table
from rig import LIMIT_S, STAMP, Backlog, bare_loops, connect, job, paced, say, server, service

from jobworker.worker.safe_text import safe_json

EVERY_S = 0.020
#: Jobs that are not measured: the first ones pay for connections, imports and caches.
WARM_UP_JOBS = 10
_PERCENTILES = (50, 95, 99)

Consumers = Callable[[Backlog, str], AbstractContextManager[Any]]


def latencies_ms(url: str, jobs: int, consumers: Consumers) -> list[float]:
    """Send jobs, one each 20 ms; the latency of each. Raises RuntimeError if one never starts."""
    with connect(url) as client, tempfile.TemporaryDirectory() as folder:
        backlog, stamps = Backlog(client), Path(folder) / "stamps"
        stamps.touch()
        try:
            with consumers(backlog, str(stamps)):
                sent = _send(client, backlog.stream, WARM_UP_JOBS + jobs)
                started = started_ns(stamps, len(sent))
        finally:
            backlog.close()
    return delays_ms(sent, started)


def delays_ms(sent: dict[str, int], started: dict[str, int]) -> list[float]:
    """Milliseconds from sending to start of each measured job, by the nanoseconds of both."""
    return [(started[job_id] - sent[job_id]) / 1e6 for job_id in list(sent)[WARM_UP_JOBS:]]


def _send(client: Any, stream: str, jobs: int) -> dict[str, int]:
    """Job id -> monotonic nanoseconds just before its XADD, in order."""
    sent: dict[str, int] = {}
    for number in paced(jobs, EVERY_S):
        data = job(number)
        job_id = orjson.loads(data)["id"]
        sent[job_id] = time.monotonic_ns()
        client.xadd(stream, {"data": data})
    return sent


def started_ns(stamps: Path, jobs: int) -> dict[str, int]:
    """Job id -> monotonic nanoseconds of its first start."""
    give_up_at = time.monotonic() + LIMIT_S
    while len(started := _read(stamps)) < jobs:
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"{len(started)} of {jobs} jobs were started within {LIMIT_S:.0f} s")
        time.sleep(EVERY_S)  # a file has no event for "long enough"
    return started


def _read(stamps: Path) -> dict[str, int]:
    started: dict[str, int] = {}
    for line in stamps.read_text().splitlines():
        job_id, mono_ns = line.split()
        started.setdefault(job_id, int(mono_ns))
    return started


#: The hand-overs of a job in their order, and what ends with each.
STEPS = {
    "reader_woke": "the server has stored the job, the reader's select has returned",
    "reader_parsed": "the answer is received and parsed",
    "reader_admitted": "the header is checked",
    "reader_pushed": "the job is in the worker's ring, the worker is woken",
    "worker_woke": "the worker's select has returned",
    "worker_decoded": "the job is decoded and validated",
    "started": "the handler runs its first line",
    "worker_finished": "the handler has ended, the outcome is in the ring",
    "reader_collected": "the reader has the outcome",
    "reader_settled": "the server has acknowledged the job",
}


def trace(url: str, jobs: int, procs: int, window: str) -> dict[str, Any]:
    """Median microseconds that end with each hand-over, by the name of the step."""
    with connect(url) as client, tempfile.TemporaryDirectory() as folder:
        facts, backlog = host_facts(client), Backlog(client)
        stamps, handovers = Path(folder) / "stamps", Path(folder) / "handovers"
        stamps.touch()
        site = str(Path(__file__).parent / "handover")
        paths = {"BENCH_STAMPS": str(stamps), "BENCH_HANDOVERS": str(handovers), "PYTHONPATH": site}
        try:
            with service(url, backlog, STAMP, procs, 0, **paths, JOBWORKER_UNIQUE_WINDOW=window):
                sent = _send(client, backlog.stream, WARM_UP_JOBS + jobs)
                started = started_ns(stamps, len(sent))
        finally:
            backlog.close()
        found = [line.split() for line in handovers.read_text().splitlines()]
    steps = step_us(sent, started, [(step, int(mono_ns)) for step, mono_ns in found])
    return {"bench": "latency", "host": facts, "jobs": jobs, "procs": procs, "steps_us": steps}


def step_us(sent: dict[str, int], started: dict[str, int], stamps: list[tuple[str, int]]) -> dict[str, float]:
    """Median microseconds between the hand-overs: the first stamp of each step after the one before it.

    A job without one of its stamps before the next job was sent counts for the steps that it has.
    """
    times: dict[str, list[int]] = {step: [] for step in STEPS}
    for step, mono_ns in stamps:
        times[step].append(mono_ns)
    times["started"] = list(started.values())
    for found in times.values():
        found.sort()
    took: dict[str, list[float]] = {step: [] for step in STEPS}
    bounds = [*sent.values()][WARM_UP_JOBS:]
    for at, until in itertools.pairwise(bounds):
        last = at
        for step in STEPS:
            index = bisect.bisect_left(times[step], last)
            if index < len(times[step]) and times[step][index] < until:
                took[step].append((times[step][index] - last) / 1000)
                last = times[step][index]
    return {step: round(statistics.median(us), 1) for step, us in took.items() if us}


def percentiles(sorted_ms: list[float]) -> dict[str, float]:
    """Nearest-rank percentiles and the maximum, in milliseconds."""
    found = {f"p{p}": sorted_ms[max(0, -(-p * len(sorted_ms) // 100) - 1)] for p in _PERCENTILES}
    return {name: round(ms, 3) for name, ms in (found | {"max": sorted_ms[-1]}).items()}


def measure(url: str, seconds: float, procs: int, repeat: int, window: str) -> dict[str, Any]:
    """Measure service and bare loop in turns; percentiles are over the jobs of all turns."""
    with connect(url) as client:
        facts = host_facts(client)
    jobs = max(1, round(seconds / EVERY_S))
    found: dict[str, list[float]] = {"service": [], "bare": []}
    consumers: dict[str, Consumers] = {
        "service": lambda backlog, path: service(
            url, backlog, STAMP, procs, BENCH_STAMPS=path, JOBWORKER_UNIQUE_WINDOW=window
        ),
        "bare": lambda backlog, path: bare_loops(url, backlog, 1, BENCH_STAMPS=path),
    }
    for turn in range(1, repeat + 1):
        for name, kind in consumers.items():
            found[name] += latencies_ms(url, jobs, kind)
            say(f"{turn}/{repeat} {name}: {jobs} jobs")
    return {
        "bench": "latency",
        "host": facts,
        "jobs": jobs,
        "job_bytes": len(job(0)),
        "procs": procs,
        "unique_window": window,
        "repeat": repeat,
        "every_ms": EVERY_S * 1000,
        "ms": {name: percentiles(sorted(ms)) for name, ms in found.items()},
    }


def format_report(report: dict[str, Any]) -> str:
    """The percentiles as a table."""
    names = [f"p{p}" for p in _PERCENTILES] + ["max"]
    rows = [("ms, enqueue to handler start", *names)]
    rows += [(name, *(f"{ms[p]:.2f}" for p in names)) for name, ms in report["ms"].items()]
    how = f"{report['jobs']} jobs of {report['job_bytes']} bytes, one each {report['every_ms']:.0f} ms"
    how += f", {report['procs']} workers, {report['repeat']} runs each"
    return "\n".join([format_facts(report["host"]), how, table(rows)])


def format_trace(report: dict[str, Any]) -> str:
    """The steps as a table, with the time since the XADD was sent."""
    rows, since_us = [("us", "since XADD", "until")], 0.0
    for step, us in report["steps_us"].items():
        since_us += us
        rows.append((f"{us:.0f}", f"{since_us:.0f}", STEPS[step]))
    how = f"medians of {report['jobs']} jobs, {report['procs']} workers, of the service alone"
    return "\n".join([format_facts(report["host"]), how, table(rows)])


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=20.0, show_default=True)
@options.workers
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Runs of each.")
@click.option("--trace", "traced", is_flag=True, help="Where the time of one job goes, step by step.")
@options.unique_window
@options.redis_url
@options.as_json
def main(
    seconds: float, procs: int, repeat: int, traced: bool, window: str, redis_url: str, as_json: bool
) -> None:
    """Measure and print."""
    with server(redis_url) as url:
        if traced:
            report = trace(url, max(2, round(seconds / EVERY_S)), procs, window)
        else:
            report = measure(url, seconds, procs, repeat, window)
    in_words = format_trace if traced else format_report
    print(safe_json(report) if as_json else in_words(report))


if __name__ == "__main__":
    sys.exit(main())
