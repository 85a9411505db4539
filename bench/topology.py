"""Trials of services on several hosts: every job is counted, and the longest silence measured.

``python bench/topology.py`` runs all trials and prints a table; ``--json`` prints the figures as JSON. It
exits with 1 if a job is lost or a silence is longer than its bar.

lost host: a host reads all jobs and falls silent. Two other services take its jobs over once its leases have
expired, while new jobs arrive at a steady rate.

uneven jobs: two services share a backlog of short jobs, of which six close together take 5 s. Jobs behind a
long one must not wait while the other service is idle.

three hosts: services with 2, 4 and 8 workers share a backlog by their workers.

The trials of failover are in ``topology_failover.py``: they start servers of their own.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import options
from hosts import format_facts, host_facts, table
from rig import LIMIT_S, STAMP, Backlog, connect, job, say, server
from topology_failover import TRIALS as FAILOVERS
from topology_rig import Trial, read_starts, recording_service, wait

from jobworker.worker.keys import Holder, Source
from jobworker.worker.safe_text import safe_json
from jobworker.worker.store.redis.reader import RedisReaderStore

#: New jobs per second while the jobs of the lost host are taken over.
_NEW_PER_S = 200
#: Number of the first new job: the lost host has those below.
_FIRST_NEW = 10_000_000
_READ_AT_ONCE = 1000
#: The first job of a lost host starts so soon after its lease (seconds).
_TAKEN_OVER_S = 5.0
TRIALS = ("lost host", "uneven jobs", "three hosts", *FAILOVERS)


class LostHost:
    """A reader that owns jobs of a stream from one moment on, and never renews their leases."""

    name = "lost/one"

    def __init__(self, url: str, source: Source, lease_s: float) -> None:
        holder = Holder("lost", "the lost host of the trial", lease_s)
        self._store = RedisReaderStore(url, self.name, holder=holder)
        self._source = source

    def take(self, client: Any) -> tuple[int, int]:
        """Own all jobs of the stream, which no reader has seen; returns their number and the time (ns)."""
        self._store.acquire([self._source])
        ids, start = [], "-"
        while page := client.xrange(self._source.stream, start, "+", _READ_AT_ONCE):
            ids += [entry_id for entry_id, _ in page]
            start = b"(" + ids[-1]
        since_ns = time.monotonic_ns()
        for at in range(0, len(ids), _READ_AT_ONCE):
            some = ids[at : at + _READ_AT_ONCE]
            client.xclaim(*self._source, self.name, 0, some, retrycount=1, force=True, justid=True)
        return len(ids), since_ns


class NewJobs:
    """A producer of new jobs at a steady rate."""

    def __init__(self, url: str, stream: str) -> None:
        self._client = connect(url)
        self._stream = stream
        self._stop = threading.Event()
        self.added_ns: dict[int, int] = {}
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        number = _FIRST_NEW
        while not self._stop.wait(1 / _NEW_PER_S):
            self.added_ns[number] = time.monotonic_ns()
            self._client.xadd(self._stream, {"data": job(number)})
            number += 1

    def stop(self) -> None:
        """End the production."""
        self._stop.set()
        self._thread.join()
        self._client.close()


def lost_host(url: str, jobs: int, lease_s: float, procs: int, limit_s: float) -> Trial:
    """The jobs of a lost host."""
    with ExitStack() as stack:
        client = stack.enter_context(connect(url))
        backlog = Backlog(client)
        stack.callback(backlog.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backlog.fill(jobs + 1)  # all but the last
        paths = [folder / name for name in ("a", "b")]
        for path in paths:
            stack.enter_context(recording_service(url, backlog, STAMP, procs, path, lease_s))
        owned, died_ns = LostHost(url, Source(backlog.stream, backlog.group), lease_s).take(client)
        if owned != jobs:
            raise RuntimeError("the lost host did not get all jobs")
        backlog.end_hold()
        new_jobs = NewJobs(url, backlog.stream)
        wait(lambda: _is_settled(client, backlog), limit_s)
        new_jobs.stop()
        wait(lambda: _is_settled(client, backlog, new_too=True), limit_s)
        return _judge(jobs, paths, new_jobs.added_ns, died_ns, lease_s + _TAKEN_OVER_S)


def shared_backlog(
    name: str, url: str, handler: str, jobs: int, procs: Sequence[int], limit_s: float, **environment: str
) -> Trial:
    """A backlog that is released at once to services with these numbers of workers."""
    with ExitStack() as stack:
        client = stack.enter_context(connect(url))
        backlog = Backlog(client)
        stack.callback(backlog.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backlog.fill(jobs)
        paths = [folder / chr(ord("a") + number) for number in range(len(procs))]
        for path, count in zip(paths, procs, strict=True):
            stack.enter_context(recording_service(url, backlog, handler, count, path, 30.0, **environment))
        released_ns = time.monotonic_ns()
        backlog.release(jobs)
        wait(lambda: _is_settled(client, backlog, new_too=True), limit_s)
        trial = _judge(jobs, paths, {}, released_ns)
        silence = read_starts(paths).longest_gap_s(released_ns, released_ns + int(trial.done * 1e9))
        return trial._replace(name=name, silence=silence, bar=None)


def _is_settled(client: Any, backlog: Backlog, *, new_too: bool = False) -> bool:
    """Whether the lost host owns no job any more; with ``new_too`` whether all jobs are settled."""
    pending = client.xpending(backlog.stream, backlog.group)
    if new_too:
        groups = client.xinfo_groups(backlog.stream)
        return not pending["pending"] and not any(group["lag"] for group in groups)
    return not any(one["name"] == LostHost.name.encode() for one in pending["consumers"])


def _judge(
    jobs: int, paths: Sequence[Path], added_ns: dict[int, int], died_ns: int, bar_s: float = 0.0
) -> Trial:
    starts = read_starts(paths)
    taken = sorted(mono_ns for number, mono_ns in starts.first_ns.items() if number < jobs)
    waits = [(mono_ns - added_ns[n]) / 1e9 for n, mono_ns in starts.first_ns.items() if n in added_ns]
    span_s = (taken[-1] - taken[0]) / 1e9 if len(taken) > 1 else 0.0
    return Trial(
        "lost host",
        jobs + len(added_ns),
        jobs + len(added_ns) - len(starts.counts),
        starts.repeated,
        silence=round((taken[0] - died_ns) / 1e9, 2) if taken else -1.0,
        done=round((taken[-1] - died_ns) / 1e9, 2) if taken else -1.0,
        per_s=round(len(taken) / span_s) if span_s else 0,
        new_p50=round(statistics.median(waits), 4) if waits else None,
        new_max=round(max(waits), 3) if waits else None,
        shares=starts.shares,
        bar=bar_s,
    )


def _print(trials: list[Trial], facts: dict[str, Any]) -> None:
    say(format_facts(facts))
    head = "trial|jobs|lost|repeated|silence s|bar s|done s|jobs/s|new p50 s|new max s|shares"
    rows = [tuple(head.split("|"))]
    for one in trials:
        figures = (one.jobs, one.lost, one.repeated, one.silence, one.bar)
        cells = (*figures, one.done, one.per_s, one.new_p50, one.new_max)
        shown = ["-" if cell is None else str(cell) for cell in cells]
        rows.append((one.name, *shown, " : ".join(map(str, one.shares))))
    print(table(rows))


@click.command(context_settings={"show_default": True})
@click.option("--url", default="", help="Server; none starts a Valkey for the trials.")
@click.option("--trial", "names", type=click.Choice(TRIALS), multiple=True, default=TRIALS)
@click.option("--jobs", default=100_000, help="Jobs of the lost host.")
@click.option("--lease", "lease_s", default=3.0, help="Lease of all services (seconds).")
@click.option("--procs", default=1, help="Workers of each surviving service.")
@click.option("--uneven", default=300, help="Jobs of the trial of uneven jobs.")
@click.option("--shared", default=6000, help="Jobs that three hosts with 2, 4 and 8 workers share.")
@click.option("--limit", "limit_s", default=LIMIT_S, help="Longest time of a trial, in seconds.")
@options.as_json
def main(
    url: str, names: Sequence[str], jobs: int, lease_s: float, procs: int, uneven: int, shared: int,
    limit_s: float, as_json: bool,
) -> None:  # fmt: skip
    """Count the jobs of services on several hosts."""
    with server(url) as at:
        with connect(at) as client:
            facts = host_facts(client)
        run: dict[str, Callable[[], Trial]] = {
            "lost host": lambda: lost_host(at, jobs, lease_s, procs, limit_s),
            "uneven jobs": lambda: shared_backlog(
                "uneven jobs", at, "bench_handlers:Uneven", uneven, [procs, procs], limit_s
            ),
            "three hosts": lambda: shared_backlog(
                "three hosts", at, STAMP, shared, [2, 4, 8], limit_s, BENCH_WORK_MS="20"
            ),
        }
        run |= {name: partial(failover, lease_s) for name, failover in FAILOVERS.items()}
        trials = []
        for name in names:
            trials.append(trial := run[name]())
            say(f"{name}: lost {trial.lost}, repeated {trial.repeated}, silence {trial.silence} s")
    if as_json:
        print(safe_json({"host": facts, "trials": [one._asdict() for one in trials]}))
    else:
        _print(trials, facts)
    sys.exit(0 if all(one.passed for one in trials) else 1)


if __name__ == "__main__":
    main()
