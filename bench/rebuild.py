"""Rebuild of a collection while clients search and write, with kills.

The service runs as in production, on a Valkey and a Milvus Lite of its own unless URLs are given. The first
two kills hit the worker that rebuilds, the others the whole service, which restarts. Afterwards every row is
compared with the last write, and search results with an exact search. Then the collection is rebuilt in
place, during which searches fail.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import options
import orjson

from jobworker.worker.safe_text import safe_json

# Processes start while clients talk to Milvus; the fork handlers of gRPC would break both.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import numpy as np
from hosts import format_facts, host_facts, roles_of, table
from rig import JOB_TYPE, LIMIT_S, Backlog, connect, free_port, say, server, service

from jobworker.handlers.jobstore.fence import Rebuilds
from jobworker.handlers.jobstore.open import open_fence, open_rebuilds
from jobworker.handlers.rebuild.milvus import MilvusShadow, open_shadow
from jobworker.handlers.rebuild.recall import TrueScores
from jobworker.handlers.vectors.milvus.store import Row, VectorStore, VectorStoreError, open_vectors
from jobworker.handlers.vectors.versioned_writer import VersionedRows, VersionedWriter

_NAME, _PREFIX = "story_segments", "bench_"
#: Token of the Milvus Lite that this program starts; workers on this host use it too.
_TOKEN = f"root:{secrets.token_urlsafe(24)}"
_TENANT, _PROJECT = "t001", "p123"
_SCOPE: dict[str, Any] = {"tenant_id": _TENANT, "project_id": _PROJECT}
_HANDLER = "jobworker.handlers.rebuild.handler:IndexRebuild"
_TEXT = "Snow had fallen on the pass all night, and the road below the inn was gone by the morning. " * 5
#: Clusters of the vectors, as in vectors of texts; without clusters, the nearest rows would be random.
_CENTRES = 200
_QUERIES, _NEIGHBOURS = 100, 10
_WRITE_ROWS, _WRITE_EVERY_S = 5, 0.05
#: After three worker deaths the job is dead-lettered, so the other kills hit the whole service.
_WORKER_KILLS = 2
#: Timeout of a rebuild in seconds, enough for 100,000 rows on two busy cores.
_REBUILD_WITHIN_S = 3600.0


class World:
    """Collection under test, and its expected rows."""

    def __init__(self, uri: str, url: str, rows: int, dim: int) -> None:
        self.uri, self.url = uri, url
        self.random = np.random.default_rng(1)
        self.centres = self.random.normal(size=(_CENTRES, dim)).astype(np.float32)
        self.vectors = self._vectors(rows)
        self.versions = np.zeros(rows, dtype=np.int64)

    def _vectors(self, count: int) -> Any:
        around = self.centres[self.random.integers(0, _CENTRES, count)]
        return around + self.random.normal(scale=0.6, size=around.shape).astype(np.float32)

    def open(self) -> VectorStore:
        return open_vectors(self.uri, prefix=_PREFIX)

    def row(self, number: int) -> Row:
        text = f"{number} in version {self.versions[number]}: {_TEXT}"
        vector = self.vectors[number]
        chapter = f"c{number // 50}"
        return Row(f"seg-{number:08d}", vector, _TENANT, _PROJECT, chapter, number, "scene", text)

    def fill(self) -> None:
        store = self.open()
        store.ensure_collection(_NAME, self.vectors.shape[1])
        for start in range(0, len(self.vectors), 1000):
            store.upsert(_NAME, [self.row(n) for n in range(start, min(start + 1000, len(self.vectors)))])
        store.close()

    def change(self, numbers: Any) -> list[Row]:
        """Give rows new vectors and texts, and expect these from now on."""
        self.versions[numbers] += 1
        self.vectors[numbers] = self._vectors(len(numbers))
        return [self.row(int(number)) for number in numbers]

    def missing(self, shadow: MilvusShadow) -> int:
        """Number of rows that are missing or differ from the last write."""
        correct, after = 0, ""
        while page := shadow.page(_PREFIX + _NAME, after, 5000, ("id", "text_content")):
            after = page[-1]["id"]
            correct += sum(row["text_content"] == self.row(int(row["id"][4:])).text_content for row in page)
        return len(self.vectors) - correct

    def recall(self, shadow: MilvusShadow) -> float:
        """recall@10 of the live collection against an exact search."""
        queries = list(self._vectors(_QUERIES))
        true = TrueScores(queries, _NEIGHBOURS)
        for start in range(0, len(self.vectors), 10_000):
            true.add(self.vectors[start : start + 10_000])
        return true.recall(shadow.search(_PREFIX + _NAME, queries, _NEIGHBOURS))


class Client:
    """Thread that repeats a step until `stop`, and records its latencies and failures."""

    def __init__(self, step: Callable[[], None], every_s: float = 0.0) -> None:
        self.ms: list[float] = []
        self.failed: list[str] = []
        self._step, self._every_s, self._stop = step, every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self._step()
                self.ms.append((time.monotonic() - started) * 1000)
            except VectorStoreError as error:
                self.failed.append(str(error))
            self._stop.wait(self._every_s)

    def stop(self) -> dict[str, Any]:
        self._stop.set()
        self._thread.join(LIMIT_S)
        spread = np.percentile(self.ms, (50, 99, 100)) if self.ms else [0.0] * 3
        return {
            "done": len(self.ms),
            "failed": len(self.failed),
            "first_failure": self.failed[0][:200] if self.failed else None,
            **{
                name: round(float(ms), 1)
                for name, ms in zip(("p50_ms", "p99_ms", "max_ms"), spread, strict=True)
            },
        }


def searching(world: World) -> Client:
    """A client that searches without a pause; an incomplete result is a failure."""
    store, random = world.open(), np.random.default_rng(2)

    def search() -> None:
        query = world.centres[random.integers(0, _CENTRES)]
        if len(store.search(_NAME, query, limit=_NEIGHBOURS, **_SCOPE)) < min(
            _NEIGHBOURS, len(world.vectors)
        ):
            raise VectorStoreError("too few rows were found")

    return Client(search)


def writing(world: World) -> Client:
    """A client that overwrites rows in the way of the service's workers."""
    store, random = world.open(), np.random.default_rng(3)
    writer = VersionedWriter(store, open_fence(world.url), prefix=_PREFIX)

    def write() -> None:
        rows = world.change(random.choice(len(world.vectors), _WRITE_ROWS, replace=False))
        while True:
            try:
                return writer.write(_NAME, [VersionedRows(os.urandom(4).hex(), rows)])
            except VectorStoreError:
                time.sleep(_WRITE_EVERY_S)  # a job would be retried too

    return Client(write, _WRITE_EVERY_S)


class Service:
    """Service on one stream, with kills and restarts."""

    def __init__(self, world: World, backlog: Backlog) -> None:
        self._world, self._backlog = world, backlog
        self._stack = ExitStack()
        self.kills = 0
        self._start()

    def _start(self) -> None:
        environment: Any = {"JOBWORKER_MILVUS_URI": self._world.uri, "JOBWORKER_MILVUS_PREFIX": _PREFIX}
        running = service(self._world.url, self._backlog, _HANDLER, 1, **environment)
        self._pid = self._stack.enter_context(running)

    def kill(self) -> None:
        """Kill the worker, or later the whole service, and restart it."""
        roles = roles_of(self._pid)
        if self.kills < _WORKER_KILLS:
            os.kill(roles["worker"][0], signal.SIGKILL)
        else:
            os.kill(self._pid, signal.SIGKILL)
            self._stack.close()
            # A second service of this name is refused while a process of the first runs.
            while any(Path(f"/proc/{pid}").exists() for pids in roles.values() for pid in pids):
                time.sleep(0.01)  # processes that are not our children have no event to wait on
            self._start()
        self.kills += 1

    def close(self) -> None:
        self._stack.close()


def rebuild(world: World, backlog: Backlog, rebuilds: Rebuilds, mode: str, kills: int) -> float:
    """Run one rebuild as a job; returns seconds. Raises RuntimeError if the job fails or takes too long."""
    running = Service(world, backlog)
    try:
        payload = {"collection": _NAME, "mode": mode}
        job = {"id": f"rebuild-{mode}-{kills}", "type": JOB_TYPE, "payload": payload}
        started = time.monotonic()
        backlog.last_id = backlog._client.xadd(backlog.stream, {"data": orjson.dumps(job).decode()})
        while not backlog.drained:
            if running.kills < kills and progress(rebuilds) >= (running.kills + 0.5) / kills:
                running.kill()
                say(f"kill {running.kills} at {progress(rebuilds):.0%}")
            if time.monotonic() - started > _REBUILD_WITHIN_S:
                raise RuntimeError(f"not rebuilt within {_REBUILD_WITHIN_S:.0f} s")
            time.sleep(0.02)  # a group has no event that says "all acknowledged"
        took_s = time.monotonic() - started
    finally:
        running.close()
    if backlog.failed_jobs or running.kills < kills:
        raise RuntimeError(f"{backlog.failed_jobs} jobs failed, {running.kills} of {kills} kills were made")
    return took_s


def progress(rebuilds: Rebuilds) -> float:
    """Progress from 0 to 1: mostly the share of copied rows, and a little for each later phase."""
    state = rebuilds.state(_PREFIX + _NAME)
    later = ("fill", "verify", "settle", "switch", "drop").index(
        state.get("phase", "fill").replace("done", "drop")
    )
    copied = int(state.get("copied", 0)) / max(1, int(state.get("total", 1)))
    return 0.9 * copied + 0.025 * later


@contextmanager
def milvus(uri: str) -> Iterator[str]:
    """The URI of the given server, or of a new Milvus Lite that ends with this program."""
    if uri:
        yield uri
        return
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as folder:
        port, port_file, token_file = free_port(), Path(folder) / "port", Path(folder) / "token"
        token_file.write_text(_TOKEN)
        pdeathsig_command = [
            sys.executable,
            "-m",
            "jobworker.worker.supervision.pdeathsig",
            str(os.getpid()),
            sys.executable,
        ]
        command = [
            *pdeathsig_command,
            "-m",
            "jobworker.handlers.vectors.milvus.lite_server",
            "--data-dir",
            f"{folder}/data",
        ]
        command += ["--port", str(port), "--port-file", str(port_file), "--token-file", str(token_file)]
        process = subprocess.Popen(command)
        try:
            give_up_at = time.monotonic() + LIMIT_S
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError("Milvus Lite did not start")
                time.sleep(0.05)  # a file has no event to wait on
            yield f"http://{_TOKEN}@127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(LIMIT_S)


def measure(uri: str, url: str, rows: int, dim: int, kills: int, in_place: bool) -> dict[str, Any]:
    """Fill, rebuild with kills, compare, rebuild in place; the report of ``--json``."""
    world, rebuilds = World(uri, url, rows, dim), open_rebuilds(url)
    shadow = open_shadow(uri, token=None, prefix=_PREFIX, named=False)
    with connect(url) as client:
        backlog, facts = Backlog(client), host_facts(client)
        try:
            world.fill()
            found: dict[str, Any] = {"recall_before": world.recall(shadow)}
            say(f"{rows:,} rows are in")
            found["shadow"] = run_mode(
                world, shadow, lambda: rebuild(world, backlog, rebuilds, "shadow", kills)
            )
            if in_place:
                action = lambda: rebuild(world, backlog, rebuilds, "in_place", 0)  # noqa: E731
                found["in_place"] = run_mode(world, shadow, action)
        finally:
            backlog.close()
            for key in client.scan_iter(match=f"writes:{{{_PREFIX}*"):
                client.unlink(key)
            shadow.close()
    return {"bench": "rebuild", "host": facts, "rows": rows, "dim": dim, "kills": kills, **found}


def run_mode(world: World, shadow: MilvusShadow, action: Callable[[], float]) -> dict[str, Any]:
    """Run one rebuild beside a searching and a writing client, and check the rows afterwards."""
    clients = {"searches": searching(world), "writes": writing(world)}
    try:
        seconds = action()
    finally:
        counts = {name: client.stop() for name, client in clients.items()}
    return {
        "seconds": round(seconds, 1),
        "rows_per_s": round(len(world.vectors) / seconds),
        "rows_missing": world.missing(shadow),
        "recall_after": round(world.recall(shadow), 4),
        **counts,
    }


def format_report(report: dict[str, Any]) -> str:
    """The figures as a table."""
    head = (
        "",
        "seconds",
        "rows/s",
        "missing",
        "recall@10",
        "searches",
        "failed",
        "p50 ms",
        "p99 ms",
        "writes",
    )
    rows: list[tuple[str, ...]] = [head]
    for mode in ("shadow", "in_place"):
        if mode in report:
            one, search = report[mode], report[mode]["searches"]
            figures = [one[name] for name in ("seconds", "rows_per_s", "rows_missing", "recall_after")]
            figures += [search[name] for name in ("done", "failed", "p50_ms", "p99_ms")]
            rows.append((mode, *map(str, figures), str(one["writes"]["done"])))
    how = f"{report['rows']:,} rows of {report['dim']} dimensions, {report['kills']} kills"
    before = f"recall@10 before: {report['recall_before']:.4f}"
    return "\n".join([format_facts(report["host"]), how, before, table(rows)])


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--rows", type=click.IntRange(100), default=100_000, show_default=True)
@click.option("--dim", type=click.IntRange(2, 32768), default=384, show_default=True)
@click.option("--kills", type=click.IntRange(0), default=5, show_default=True)
@click.option("--in-place/--no-in-place", default=True, show_default=True, help="Also rebuild in place.")
@options.redis_url
@click.option("--milvus-uri", default="", envvar="JOBWORKER_MILVUS_URI", help="[default: a new Milvus Lite]")
@options.as_json
def main(
    rows: int, dim: int, kills: int, in_place: bool, redis_url: str, milvus_uri: str, as_json: bool
) -> None:
    """Measure and print."""
    with server(redis_url) as url, milvus(milvus_uri) as uri:
        report = measure(uri, url, rows, dim, kills, in_place)
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
