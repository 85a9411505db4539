"""A backlog of one tenant, then jobs of others: when they start, how tenants share, and what sorting costs.

Each part has a stream of its own. All jobs have the same size, so shares of jobs are shares of cost; they are
measured while every tenant has jobs waiting.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import options
import orjson
from hosts import format_facts, host_facts, table
from latency import percentiles, started_ns
from rig import LIMIT_S, STAMP, Backlog, Client, connect, job, paced, say, server, service

from jobworker.worker.flow import LaneRules, read_flow_header
from jobworker.worker.keys import Source, ready_key
from jobworker.worker.safe_text import safe_json
from jobworker.worker.store.ports import Settlement, WaitingJob
from jobworker.worker.store.redis.reader import RedisReaderStore

#: Jobs of the small tenant, and their interval.
_OTHERS, _EVERY_S = 200, 0.05
_TENANTS = 8
#: A backlog is sorted within this time; its first jobs run before (seconds).
_UNSORTED_S = 4.0
#: Jobs of a read and of a take when the lanes are measured without a service.
_AT_ONCE = 1000


def tenant_job(number: int, tenant: str, kind: str = "") -> bytes:
    """A job of a tenant; its id tells the tenant."""
    data = job(number).replace(b'"tenant_id":"t001"', f'"tenant_id":"{tenant}"'.encode(), 1)
    return data.replace(b'"id":"bench-', f'"id":"{tenant}:{kind}'.encode(), 1)


def lanes(url: str, jobs: int, tenants: int) -> dict[str, float]:
    """Jobs per second into lanes and out of them, with reading and acknowledging, in this process."""
    with connect(url) as client:
        backlog = Backlog(client, lambda number: tenant_job(number, f"t{number % tenants}"))
        source = Source(backlog.stream, backlog.group)
        backlog.fill(jobs)
        backlog.release(jobs)
        store = RedisReaderStore(url, "bench")
        try:
            store.acquire([source])
            before_s = time.monotonic()
            _sort_all(store, source)
            sorted_s = time.monotonic()
            memory = client.memory_usage(backlog.stream) or 0
            _take_all(store, source)
            taken_s = time.monotonic()
        finally:
            store.close()
            backlog.close()
    return {
        "jobs": jobs,
        "tenants": tenants,
        "in_per_s": round(jobs / (sorted_s - before_s)),
        "out_per_s": round(jobs / (taken_s - sorted_s)),
        "stream_bytes_per_job": round(memory / jobs),
    }


def _sort_all(store: RedisReaderStore, source: Source) -> None:
    rules = LaneRules()
    while True:
        store.begin_read(source, _AT_ONCE, 0)
        entries = store.finish_read(source)
        if not entries:
            return
        by_lane: dict[bytes, list[WaitingJob]] = {}
        for entry in entries:
            data = entry.data or b""
            name = rules.name_of(read_flow_header(data))
            by_lane.setdefault(name, []).append(WaitingJob(entry.id, len(data)))
        store.sort(source, 0, by_lane)


def _take_all(store: RedisReaderStore, source: Source) -> None:
    while entries := store.take(source, ["bench_noop"], _AT_ONCE).entries:
        store.settle([Settlement(source, done=[entry.id for entry in entries], sure=True)])


class Load:
    """A service that notes when each job starts, and a stream that is filled before."""

    def __init__(self, url: str, client: Client, procs: int, work_ms: float) -> None:
        self._url, self._procs = url, procs
        self.client = client
        self._work_ms = str(work_ms)
        self._folder = tempfile.TemporaryDirectory()
        self.stamps = Path(self._folder.name) / "stamps"
        self.stamps.touch()

    def service(self, backlog: Backlog) -> Any:
        """The service, ready."""
        stamps = str(self.stamps)
        return service(
            self._url, backlog, STAMP, self._procs, BENCH_STAMPS=stamps, BENCH_WORK_MS=self._work_ms
        )

    def waiting(self, backlog: Backlog) -> int:
        """Jobs in lanes."""
        return int(self.client.hget(ready_key(backlog.stream), "n") or 0)

    def close(self) -> None:
        """Delete the file."""
        self._folder.cleanup()


def flood(load: Load, jobs: int) -> dict[str, Any]:
    """One tenant floods; milliseconds until the jobs of another one start, and of the same on an idle
    service."""
    found: dict[str, Any] = {"jobs": jobs}
    for name, size in (("idle", 0), ("flooded", jobs)):
        backlog = Backlog(load.client, lambda number: tenant_job(number, "flood"))
        try:
            if size:
                backlog.fill(size)
                backlog.release(size)
            with load.service(backlog):
                ready_s = time.monotonic()
                if size:
                    _wait_until(partial(_all_read, backlog), "the backlog was not sorted")
                found[f"{name}_sorted_s"] = round(time.monotonic() - ready_s, 2)
                found[name] = percentiles(sorted(_delays_ms(load, backlog, name)))
        finally:
            backlog.close()
    return found


def _all_read(backlog: Backlog) -> bool:
    return backlog.all_read


def _wait_until(done: Callable[[], bool], failure: str) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not done():
        time.sleep(0.02)  # counts of the server send no event
        if time.monotonic() > give_up_at:
            raise RuntimeError(failure)


def _delays_ms(load: Load, backlog: Backlog, kind: str) -> list[float]:
    sent: dict[str, int] = {}
    for number in paced(_OTHERS, _EVERY_S):
        data = tenant_job(number, "other", kind)
        sent[orjson.loads(data)["id"]] = time.monotonic_ns()
        load.client.xadd(backlog.stream, {"data": data})
    give_up_at = time.monotonic() + LIMIT_S
    while True:
        started = started_ns(load.stamps, 0)
        if sent.keys() <= started.keys():
            return [(started[one] - sent[one]) / 1e6 for one in sent]
        if time.monotonic() > give_up_at:
            raise RuntimeError("some jobs were not started")
        time.sleep(0.1)  # a file has no event for "long enough"


def shares(load: Load, seconds: float, work_ms: float, procs: int) -> dict[str, float]:
    """Share of each tenant in the jobs that start within some seconds, while all have jobs waiting."""
    # Four times what is run meanwhile, and what the first tenant loses before the backlog is sorted.
    each = int((4 * seconds / _TENANTS + _UNSORTED_S) * procs * 1000 / work_ms)
    # Tenant after tenant: in order of arrival, the first one would get everything.
    backlog = Backlog(load.client, lambda number: tenant_job(number, f"t{number // each}", "share"))
    try:
        backlog.fill(each * _TENANTS)
        backlog.release(each * _TENANTS)
        with load.service(backlog):
            _wait_until(partial(_all_read, backlog), "the backlog was not sorted")
            first_ns = time.monotonic_ns()
            time.sleep(seconds)  # the interval that is measured
            last_ns = time.monotonic_ns()
    finally:
        backlog.close()
    counts: Counter[str] = Counter()
    for name, at_ns in started_ns(load.stamps, 0).items():
        if name.startswith("t") and ":share" in name and first_ns <= at_ns <= last_ns:
            counts[name.partition(":")[0]] += 1
    return {name: round(count / counts.total(), 4) for name, count in sorted(counts.items())}


def throughput(load: Load, jobs: int, work_ms: float, procs: int) -> dict[str, float]:
    """Jobs per second of a sorted backlog of eight tenants, and the part of what the workers could do."""
    backlog = Backlog(load.client, lambda number: tenant_job(number, f"t{number % _TENANTS}", "all"))
    try:
        backlog.fill(jobs)
        backlog.release(jobs)
        with load.service(backlog):
            _wait_until(lambda: not load.waiting(backlog) and backlog.drained, "the backlog was not drained")
    finally:
        backlog.close()
    at = sorted(ns for one, ns in started_ns(load.stamps, 0).items() if ":all" in one)
    per_s = (len(at) - 1) / ((at[-1] - at[0]) / 1e9)
    return {"per_s": round(per_s, 1), "of_possible": round(per_s * work_ms / 1000 / procs, 3)}


def measure(url: str, jobs: int, procs: int, work_ms: float, seconds: float) -> dict[str, Any]:
    """All parts; the report of ``--json``."""
    with connect(url) as client:
        report: dict[str, Any] = {"bench": "flood", "host": host_facts(client), "procs": procs}
        report["work_ms"] = work_ms
        load = Load(url, client, procs, work_ms)
        try:
            for tenants in (_TENANTS, jobs):
                say(f"{jobs:,} jobs of {tenants:,} tenants into lanes and out")
                report[f"lanes_{'few' if tenants == _TENANTS else 'many'}"] = lanes(url, jobs, tenants)
            say("eight tenants")
            report["shares"] = shares(load, seconds, work_ms, procs)
            say("throughput")
            report["throughput"] = throughput(load, int(seconds * procs * 1000 / work_ms), work_ms, procs)
            say(f"a flood of {jobs:,} jobs")
            report["flood"] = flood(load, jobs)
        finally:
            load.close()
    return report


def format_report(report: dict[str, Any]) -> str:
    """The parts as tables."""
    rows: list[tuple[str, ...]] = [("lanes", "jobs", "tenants", "in/s", "out/s")]
    for found in (report["lanes_few"], report["lanes_many"]):
        rows.append(("", *(f"{found[name]:,}" for name in ("jobs", "tenants", "in_per_s", "out_per_s"))))
    flooded = report["flood"]
    waits: list[tuple[str, ...]] = [("another tenant, ms", "p50", "p95", "p99", "max")]
    for name in ("idle", "flooded"):
        waits.append((name, *(f"{ms:.1f}" for ms in flooded[name].values())))
    share = report["shares"].values()
    return "\n".join([
        format_facts(report["host"]),
        table(rows),
        f"{report['procs']} workers, jobs of {report['work_ms']} ms; a flood of {flooded['jobs']:,} jobs, "
        f"sorted {flooded['flooded_sorted_s']} s after the service was ready",
        table(waits),
        f"shares of eight tenants: {min(share):.4f} to {max(share):.4f} (equal: 0.1250)",
        f"throughput: {report['throughput']['per_s']} jobs/s, {report['throughput']['of_possible']:.3f} of "
        "what the workers could do",
    ])  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option(
    "--jobs", "-n", type=click.IntRange(1000), default=1_000_000, show_default=True, help="Size of the flood."
)
@options.workers
@click.option("--work-ms", type=float, default=5.0, show_default=True, help="How long a job takes.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long shares are measured.")
@options.redis_url
@options.as_json
def main(jobs: int, procs: int, work_ms: float, seconds: float, redis_url: str, as_json: bool) -> None:
    """Measure and print."""
    with server(redis_url) as url:
        report = measure(url, jobs, procs, work_ms, seconds)
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
