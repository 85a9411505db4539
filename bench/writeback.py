"""Summary jobs with worker kills, and the cost of a summary.

First, many versions of each chapter are written back, each twice and in random order, while workers are
killed. At the end, Redis and Milvus must hold the newest version of each chapter, with the same text. The
service runs on its embedded stores, with vectors that need no model.

Then, with `--chapters`, the chapters of a file are summarised in both ways in one process: by extraction with
the service's model, and by a language model, which is a local stub over real HTTP. The file holds one JSON
object a line, with `chapter` and `content`.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from jobworker.worker.safe_text import safe_json

# Processes start while clients talk to Milvus; the fork handlers of gRPC would break both.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import click
import options
from hosts import format_facts, host_facts, roles_of
from llm_stub import llm_stub
from rig import LIMIT_S, connect, say

from jobworker.handlers.jobstore.memory_fence import MemoryFence
from jobworker.handlers.jobstore.memory_records import MemoryRecords
from jobworker.handlers.jobstore.records import RecordKey
from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.handler import WriteBack
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.milvus.store import Row, VectorStore, open_vectors
from jobworker.worker import Job

_STREAM, _GROUP = "stream:memory:update", "cg-mem-writer"
_TENANT, _PROJECT = "t001", "p123"
_HANDLER = "jobworker.handlers.summaries.handler:WriteBack"
#: Any dimension will do: only texts and versions are checked.
_MODEL = "dummy:64"
_TEXT = "Snow had fallen on the pass all night, and the road below the inn was gone by the morning."
_POLL_S = 0.01


class Service:
    """Service on embedded stores, or on the Milvus at `milvus_uri`; it ends with this program."""

    def __init__(self, folder: Path, procs: int, milvus_uri: str) -> None:
        self._folder = folder
        self._milvus_uri = milvus_uri
        self._log = (folder / "service.log").open("ab")
        command = [
            sys.executable, "-m", "jobworker.supervisor", "--procs", str(procs), "--data-dir", str(folder),
            "--no-builtin-handlers", "--handler", f"summary_write_back={_HANDLER}", "--model", _MODEL,
            "--metrics-addr", "127.0.0.1:0", "--retry-initial", "0.1", "--retry-max", "1",
            "--max-retries", "20", "--log-format", "json",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JOBWORKER_")}
        if milvus_uri:
            environment |= {"JOBWORKER_MILVUS_URI": milvus_uri, "JOBWORKER_MILVUS_PREFIX": _prefix(folder)}
        pdeathsig_command = [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
        self.process = subprocess.Popen([*pdeathsig_command, *command], stderr=self._log, env=environment)
        wait_until(lambda: '"msg":"service.ready"' in self.log or self.process.poll() is not None, "ready")
        if self.process.poll() is not None:
            raise RuntimeError(f"the service ended:\n{self.log[-2000:]}")

    @property
    def log(self) -> str:
        """The service's log."""
        return (self._folder / "service.log").read_text(errors="replace")

    @property
    def redis_url(self) -> str:
        """URL of the service's Redis."""
        return str(self._endpoints["redis_url"])

    def vectors(self) -> VectorStore:
        """A client of the service's vector store."""
        if self._milvus_uri:
            return open_vectors(self._milvus_uri, prefix=_prefix(self._folder))
        return open_vectors(str(self._endpoints["milvus_uri"]))

    @property
    def _endpoints(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads((self._folder / "endpoints.json").read_text())
        return found

    def kill_worker(self, shuffle: random.Random) -> None:
        """Kill a random worker; waits for one."""
        workers: list[int] = []

        def found() -> bool:
            workers[:] = roles_of(self.process.pid).get("worker", [])
            return bool(workers)

        wait_until(found, "a worker to kill")
        os.kill(shuffle.choice(workers), signal.SIGKILL)

    def stop(self) -> int:
        """Stop gracefully; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(LIMIT_S)
        self._log.close()
        return code


def _prefix(folder: Path) -> str:
    """Prefix of this run's collections."""
    return re.sub(r"\W", "_", folder.name) + "_"


def wait_until(condition: Callable[[], bool], what: str, within_s: float = LIMIT_S) -> None:
    """Poll a condition. Raises RuntimeError at the timeout."""
    give_up_at = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"not within {within_s} s: {what}")
        time.sleep(_POLL_S)  # the state of other processes sends no event


@contextmanager
def service(procs: int, milvus_uri: str) -> Iterator[Service]:
    """A ready service in a temporary folder; killed after an error."""
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as folder:
        one = Service(Path(folder), procs, milvus_uri)
        try:
            yield one
            if (code := one.stop()) != 0:
                raise RuntimeError(f"the service ended with {code}:\n{one.log[-2000:]}")
        finally:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


def write_back(chapter: int, version: int) -> bytes:
    """A job in the format of memory-svc; each version gives another summary."""
    payload = {
        "tenant_id": _TENANT, "project_id": _PROJECT, "chapter_id": f"ch-{chapter}",
        "chapter_version": version, "content": f"Chapter {chapter} came to version {version}. {_TEXT}",
    }  # fmt: skip
    fields = {
        "id": f"ch-{chapter}.{version}", "type": "summary_write_back", "tenant_id": _TENANT,
        "project_id": _PROJECT, "payload": payload, "created_at": "2026-01-02T10:00:00Z",
    }  # fmt: skip
    return orjson.dumps(fields)


def under_kills(
    chapters: int, versions: int, kills: int, procs: int, seed: int, milvus_uri: str
) -> dict[str, Any]:
    """Run the first part. Raises RuntimeError if a chapter is not at its newest version."""
    shuffle = random.Random(seed)
    jobs = [write_back(c, v) for c in range(chapters) for v in range(1, versions + 1)] * 2
    shuffle.shuffle(jobs)
    with service(procs, milvus_uri) as one, connect(one.redis_url) as client:
        started_s = time.monotonic()
        with client.pipeline(transaction=True) as pipe:
            for job in jobs:
                pipe.xadd(_STREAM, {"data": job})
            pipe.execute()
        for kill in range(kills):
            left = len(jobs) * (kills - kill) // (kills + 1)
            wait_until(lambda left=left: unfinished(client) <= left, f"{left} jobs left")  # type: ignore[misc]
            one.kill_worker(shuffle)
        wait_until(lambda: unfinished(client) == 0 and not client.zcard(f"retry:{_STREAM}"), "the end")
        took_s = time.monotonic() - started_s
        dead = client.xlen(f"dlq:{_STREAM}")
        wrong = check(client, one.vectors(), chapters, versions)
        host = host_facts(client)
    if dead or wrong:
        raise RuntimeError(f"{dead} dead letters; wrong (seed {seed}): {wrong}")
    return {
        "host": host, "seed": seed, "write_backs": len(jobs), "chapters": chapters, "versions": versions,
        "kills": kills, "workers": procs, "seconds": round(took_s, 2), "wrong": 0, "dead_letters": 0,
    }  # fmt: skip


def unfinished(client: Any) -> int:
    """Number of jobs that are undelivered, pending or in a lane."""
    (group,) = [g for g in client.xinfo_groups(_STREAM) if g["name"] == _GROUP.encode()]
    # In one transaction: a job moves from place to place meanwhile, and could be missed in each.
    pipe = client.pipeline(transaction=True)
    pipe.xrange(_STREAM, b"(" + group["last-delivered-id"], "+")
    pipe.xpending(_STREAM, _GROUP)
    pipe.hget(f"ready:{_STREAM}", "n")
    undelivered, pending, in_lanes = pipe.execute()
    return len(undelivered) + int(pending["pending"]) + int(in_lanes or 0)


def check(client: Any, store: VectorStore, chapters: int, versions: int) -> list[str]:
    """Faults: chapters whose newest version is missing in Redis or Milvus, or whose texts differ."""
    wrong = []
    for chapter in range(chapters):
        record = client.hgetall(f"summary:{_TENANT}:{_PROJECT}:ch-{chapter}")
        ids = [f"summary:ch-{chapter}"]
        rows = store.get("story_segments", ids, tenant_id=_TENANT, project_id=_PROJECT, strong=True)
        text, version = record.get(b"summary", b"").decode(), int(record.get(b"chapter_version", 0))
        row = rows[0] if rows else None
        if version != versions or f"version {versions}." not in text:
            wrong.append(f"chapter {chapter}: Redis holds version {version}: {text}")
        if not isinstance(row, Row) or (row.text_content, row.version) != (text, versions):
            wrong.append(f"chapter {chapter}: Milvus holds {row}")
    store.close()
    return wrong


def read_chapters(path: Path) -> list[dict[str, Any]]:
    """Chapters of a file with one JSON object a line, with `chapter` and `content`."""
    return [orjson.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def summarise(chapters: list[dict[str, Any]], settings: HandlerSettings) -> list[dict[str, Any]]:
    """Summarise each chapter in the handler; with the seconds from payload to record and row."""
    records = MemoryRecords()
    handler = WriteBack(store=MemoryVectors(), records=records, fence=MemoryFence())
    handler.setup(settings)
    found = []
    for number, chapter in enumerate(chapters):
        started_s = time.perf_counter()
        handler.handle(_job(number, chapter))
        took_s = time.perf_counter() - started_s
        record = records.get(RecordKey("summary", _TENANT, _PROJECT, f"ch-{number}"))
        summary = record.fields["summary"] if record else ""
        title = chapter.get("title", chapter.get("chapter", number))
        found.append(
            {
                "chapter": title,
                "chars": len(chapter["content"]),
                "seconds": round(took_s, 3),
                "summary": summary,
            }
        )
    return found


def _job(number: int, chapter: Mapping[str, Any]) -> Job:
    payload = {"chapter_id": f"ch-{number}", "chapter_version": 1, "content": chapter["content"]}
    return Job(
        f"job-{number}", "summary_write_back", _TENANT, _PROJECT, payload, {}, "", _STREAM, "1-1", 0
    )  # fmt: skip


def both_ways(path: Path, limit: int, settings: Mapping[str, Any], delay_s: float) -> dict[str, Any]:
    """Run the second part: the same chapters by extraction and by the language model."""
    chapters = read_chapters(path)[:limit]
    chars: int = settings["summary_chars"]
    own = summarise(chapters, HandlerSettings(**settings))
    with llm_stub(chars, delay_s) as url:
        asked = summarise(chapters, HandlerSettings(**settings, llm_url=url, llm_model="stub"))
    for way in (own, asked):
        if any(not 0 < len(one["summary"]) <= chars for one in way):
            raise RuntimeError(f"a summary is empty or longer than {chars} characters")
    return {"own_sentences": own, "endpoint": asked}


def show(result: dict[str, Any]) -> None:
    """Print the report."""
    kills = result["kills"]
    print(format_facts(kills["host"]))
    print(
        f"{kills['write_backs']} write-backs of {kills['chapters']} chapters x {kills['versions']} versions, "
        f"{kills['kills']} workers killed: all at the newest version, {kills['seconds']} s "
        f"(seed {kills['seed']})"
    )
    for way, found in result.get("summaries", {}).items():
        times = sorted(one["seconds"] for one in found)
        print(f"\n{way}: median {times[len(times) // 2]} s, longest {times[-1]} s a chapter")
        for one in found:
            print(f"  {one['chapter']} ({one['chars']} characters, {one['seconds']} s)\n    {one['summary']}")


@click.command(context_settings={"show_default": True})
@click.option("--stories", default=50, help="Chapters that are written back with kills.")
@click.option("--versions", default=20, help="Versions of each chapter; each is sent twice.")
@click.option("--kills", default=30, help="Worker kills.")
@click.option("--procs", default=3, help="Workers.")
@options.seed
@click.option(
    "--chapters",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with `chapter` and `content`, to summarise in both ways.",
)
@click.option("--limit", default=1000, help="Maximum number of chapters from the file.")
@click.option("--model", default="", help="Model of the extraction.")
@click.option("--summary-chars", default=100, help="Maximum length of a summary in characters.")
@click.option("--llm-delay", default=0.0, help="Seconds of an answer of the language model stub.")
@click.option("--milvus-uri", default="", help="[default: an embedded Milvus Lite]")
@options.as_json
def main(
    stories: int, versions: int, kills: int, procs: int, seed: int | None, chapters: Path | None, limit: int,
    model: str, summary_chars: int, llm_delay: float, milvus_uri: str, as_json: bool,
) -> None:  # fmt: skip
    """Run summary jobs with kills, and summarise the chapters of a file."""
    say(f"{stories} x {versions} x 2 write-backs, {kills} kills")
    seed = random.randrange(2**32) if seed is None else seed
    result: dict[str, Any] = {"kills": under_kills(stories, versions, kills, procs, seed, milvus_uri)}
    if chapters is not None:
        say(f"summaries of {chapters}")
        settings = {"model": model, "summary_chars": summary_chars, "threads": os.cpu_count() or 1}
        result["summaries"] = both_ways(chapters, limit, settings, llm_delay)
    if as_json:
        print(safe_json(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
