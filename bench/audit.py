"""Throughput of the audit archive in the whole service; each entry is synced before its acknowledgement.

Afterwards every line is read back: each entry must be there exactly once, also after worker kills.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import options
import orjson
import zstandard
from hosts import cpu_s, format_facts, host_facts, roles_of
from rig import JOB_TYPE, LIMIT_S, Backlog, connect, server, service

from jobworker.worker.safe_text import safe_json

_HANDLER = "jobworker.handlers.audit.handler:Archive"
_POLL_S = 0.01


def entry(number: int) -> bytes:
    """An audit entry of about 400 bytes in the format of admin-svc."""
    fields = {
        "id": f"bench-{number:012d}", "type": JOB_TYPE, "tenant_id": "t001", "project_id": "p123",
        "payload": {
            "action": "chapter.update", "actor": {"id": number % 997, "roles": ["author"]}, "ip": "10.1.2.3",
            "target": {"kind": "chapter", "id": f"ch-{number % 4999}"}, "n": number,
        },
        "metadata": {"request_id": f"req-{number:012d}", "idempotency_key": f"bench-{number:012d}"},
        "created_at": "2026-01-02T10:00:00.123456789Z",
    }  # fmt: skip
    return orjson.dumps(fields)


def measure(url: str, folder: Path, entries: int, procs: int, kills: int) -> dict[str, Any]:
    """Archive all of them; the report that ``--json`` prints. Raises RuntimeError where one is not there
    exactly once."""
    with connect(url) as client:
        backlog = Backlog(client, entry)
        try:
            backlog.fill(entries)
            with service(url, backlog, _HANDLER, procs, JOBWORKER_DATA_DIR=str(folder)) as pid:
                before_s, started = _cpu_s(pid), time.monotonic()
                backlog.release(entries)
                _await_end(backlog, pid, entries, kills)
                seconds = time.monotonic() - started
                # The CPU time of killed workers is not known.
                cpu_us = None if kills else round((_cpu_s(pid) - before_s) * 1e6 / entries, 1)
            if backlog.failed_jobs:
                raise RuntimeError(f"{backlog.failed_jobs} of {entries} entries failed")
            facts = host_facts(client)
        finally:
            backlog.close()
    size = check(folder / "audit", entries)
    return {
        "bench": "audit", "host": facts, "entries": entries, "workers": procs, "kills": kills,
        "seconds": round(seconds, 2), "entries_per_s": round(entries / seconds),
        "cpu_us_per_entry": cpu_us, "bytes_per_entry": round(size / entries, 1), "missing": 0, "doubled": 0,
    }  # fmt: skip


def _cpu_s(pid: int) -> float:
    """CPU time of all processes of the service, without the server."""
    return sum(cpu_s(pids) for pids in roles_of(pid).values())


def _await_end(backlog: Backlog, pid: int, entries: int, kills: int) -> None:
    """Wait until all is acknowledged, and kill workers at equal steps of progress.

    Raises RuntimeError at the timeout, or if the archive was done before the last kill.
    """
    give_up_at, killed, rng = time.monotonic() + LIMIT_S, 0, random.Random(1)
    while not backlog.drained:
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not archived within {LIMIT_S:.0f} s")
        if killed < kills and backlog.acknowledged >= entries * (killed + 1) // (kills + 1):
            workers = roles_of(pid).get("worker", [])
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                killed += 1
        time.sleep(_POLL_S)  # a group has no event that says "all acknowledged"
    if killed < kills:
        raise RuntimeError(f"only {killed} of {kills} kills: use more entries")


def check(folder: Path, entries: int) -> int:
    """The size of the archive in bytes. Raises RuntimeError if an entry is missing or duplicated."""
    seen: Counter[int] = Counter()
    files = sorted(folder.glob("*.jsonl.zst"))
    for path in files:
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            seen.update(orjson.loads(line)["payload"]["n"] for line in reader.read().splitlines())
    doubled = sum(count > 1 for count in seen.values())
    if missing := entries - len(seen) or doubled:
        raise RuntimeError(f"{missing} entries are missing or more than once in {len(seen)}")
    return sum(path.stat().st_size for path in files)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--entries", type=click.IntRange(1), default=100_000, show_default=True)
@options.workers
@click.option("--kills", type=click.IntRange(0), default=0, show_default=True, help="Workers killed.")
@options.redis_url
@click.option("--folder", help="Folder of the archive; selects the disk.  [default: a temporary folder]")
@options.as_json
def main(entries: int, procs: int, kills: int, redis_url: str, folder: str | None, as_json: bool) -> None:
    """Measure and print."""
    with server(redis_url) as url, tempfile.TemporaryDirectory(dir=folder) as data_dir:
        report = measure(url, Path(data_dir), entries, procs, kills)
    if as_json:
        print(safe_json(report))
        return
    print(format_facts(report["host"]))
    print(
        f"{entries:,} entries, {procs} workers, {report['kills']} killed: {report['entries_per_s']:,} "
        f"a second, {report['cpu_us_per_entry'] or '?'} µs of CPU and {report['bytes_per_entry']} bytes an "
        "entry; each is there once"
    )


if __name__ == "__main__":
    sys.exit(main())
