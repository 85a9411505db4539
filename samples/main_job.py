"""End-to-end example: start the service, embed the sample novel, answer a question, stop."""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jobworker.handlers.api.client import SearchClient, SearchRefused
from jobworker.worker import Producer

NOVEL = Path(__file__).parent / "novel"
TENANT, PROJECT = "sample", "novel"
#: Few enough to show progress; the service batches the texts of several jobs by itself.
PASSAGES_A_JOB = 4
#: Timeout of the start in seconds: each worker loads the model, which takes long on a busy machine.
READY_WITHIN_S = 180.0
#: Timeout without a finished job, in seconds.
STALLED_AFTER_S = 120.0
#: Timeout of the stop in seconds, longer than the service's drain timeout.
STOP_WITHIN_S = 60.0
#: Poll interval of readiness and progress.
POLL_S = 0.1
HITS = 3


class Passage(NamedTuple):
    """Paragraph of the novel."""

    id: str
    chapter_id: str
    text: str


class Failed(Exception):
    """The run cannot continue; the message gives the reason."""


def passages(folder: Path) -> list[Passage]:
    """The paragraphs of every chapter, in order, without headings."""
    result = []
    for file in sorted(folder.glob("*/*.md")):
        chapter = f"{file.parent.name}-{file.stem}"
        paragraphs = re.split(r"\n\s*\n", file.read_text("utf-8").strip())
        result += [Passage(f"{chapter}-{n:02}", chapter, text) for n, text in enumerate(paragraphs) if n]
    return result


@contextlib.contextmanager
def service(data_dir: Path, procs: int) -> Iterator[dict[str, Any]]:
    """A ready service; yields its endpoints, and stops it at the end. Raises `Failed` if it does not stop."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = data_dir / "service.log"
    command = Path(sys.executable).with_name("jobworker-supervise")
    options = ["--procs", str(procs), "--data-dir", str(data_dir), "--metrics-addr", "127.0.0.1:0"]
    options += ["--serve-addr", "127.0.0.1:0"]
    with log.open("wb") as log_file:
        # A process group of its own: Ctrl-C ends this program only, which then stops the service.
        process = subprocess.Popen([command, *options], stdout=log_file, stderr=log_file, process_group=0)
    try:
        yield wait_ready(process, data_dir, log)
    finally:
        if process.poll() is None:
            say("stopping the service")
            process.terminate()
        try:
            code = process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failed(f"the service did not stop; its log: {log}") from None
    if code != 0:
        raise Failed(f"the service exited with code {code}; its log: {log}")


def wait_ready(process: subprocess.Popen[bytes], data_dir: Path, log: Path) -> dict[str, Any]:
    """Wait until the service and its API are ready; returns the endpoints of the service."""
    give_up_at = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise Failed(f"the service did not start; the end of {log}:\n{log.read_text()[-2000:]}")
        listening = endpoints(data_dir)
        ours = listening.get("pid") == process.pid and "serve_url" in listening
        # /readyz: every worker has its model and the stores answer. /health: the API has its model.
        if (
            ours
            and answers(f"{listening['metrics_url']}/readyz")
            and answers(f"{listening['serve_url']}/health")
        ):
            return listening
        time.sleep(POLL_S)  # the health page sends no event
    raise Failed(f"the service was not ready after {READY_WITHIN_S:.0f} s; its log: {log}")


def endpoints(data_dir: Path) -> dict[str, Any]:
    """The endpoints that the service wrote; a file of an earlier run holds another pid."""
    try:
        listening = json.loads((data_dir / "endpoints.json").read_bytes())
    except FileNotFoundError:
        return {}
    return listening if isinstance(listening, dict) else {}


def answers(url: str) -> bool:
    """Whether a page answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def counted(url: str, metric: str) -> int:
    """A counter of embedding jobs on the Prometheus page, summed over its other labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        lines = page.read().decode()
    return int(sum(map(float, re.findall(rf'^{metric}{{.*"embedding_batch".*}} (\S+)', lines, re.MULTILINE))))


def enqueue(redis_url: str, novel: list[Passage]) -> int:
    """Enqueue the novel, a few passages a job; returns the number of jobs."""
    jobs = [novel[start : start + PASSAGES_A_JOB] for start in range(0, len(novel), PASSAGES_A_JOB)]
    with Producer(redis_url) as producer:
        for job in jobs:
            payload = {
                "tenant_id": TENANT,
                "project_id": PROJECT,
                "ids": [passage.id for passage in job],
                "texts": [passage.text for passage in job],
                "chapter_ids": [passage.chapter_id for passage in job],
            }
            producer.enqueue("embedding_batch", payload, tenant_id=TENANT, project_id=PROJECT)
    return len(jobs)


def watch(url: str, jobs: int, done_before: int) -> None:
    """Show a progress bar until all jobs are done. Raises `Failed` if one fails or none finishes."""
    with tqdm(total=jobs, unit="job", desc="   embedding", file=sys.stdout) as bar:
        mono_moved_s = time.monotonic()
        while bar.n < jobs:
            if counted(url, "z_novel_jobs_dead_total"):
                raise Failed("a job was dead-lettered")
            if moved := counted(url, "z_novel_jobs_completed_total") - done_before - bar.n:
                bar.update(moved)
                mono_moved_s = time.monotonic()
            elif time.monotonic() > mono_moved_s + STALLED_AFTER_S:
                raise Failed(f"no job was finished for {STALLED_AFTER_S:.0f} s")
            else:
                time.sleep(POLL_S)  # the metrics page sends no event


def answer(serve_url: str, question: str) -> None:
    """Ask the service's own API (POST /v1/search), and print the nearest passages."""
    asked = {"query": question, "tenant_id": TENANT, "project_id": PROJECT, "limit": HITS}
    try:
        rows = SearchClient(serve_url).search(asked).rows
    except SearchRefused as error:
        raise Failed(f"the search failed: {error}") from error
    if not rows:
        raise Failed("the search found nothing")
    for row in rows:
        print(f"\n   {row['score']:.3f}  {row['id']}")
        print(textwrap.fill(row["text_content"], 100, initial_indent="   | ", subsequent_indent="   | "))
    print(flush=True)


def say(text: str) -> None:
    """Print a step in the style of `make`."""
    print(f"== {text}", flush=True)


def main_job(data_dir: Path, procs: int, question: str) -> None:
    """Run the example. Raises `Failed` with the reason."""
    mono_start_s = time.monotonic()
    novel = passages(NOVEL)
    say(f"starting the service: {procs} workers, its own Valkey and Milvus Lite in {data_dir}")
    with service(data_dir, procs) as at:
        say(f"ready after {time.monotonic() - mono_start_s:.1f} s; metrics: {at['metrics_url']}/metrics")
        done_before = counted(at["metrics_url"], "z_novel_jobs_completed_total")
        jobs = enqueue(at["redis_url"], novel)
        say(f"enqueued the sample novel: {len(novel)} passages in {jobs} jobs")
        watch(at["metrics_url"], jobs, done_before)
        say(f"question to {at['serve_url']}/v1/search: {question}")
        answer(at["serve_url"], question)
    say(f"done in {time.monotonic() - mono_start_s:.1f} s; the data and the log stay in {data_dir}")


def options() -> argparse.Namespace:
    """The command line."""
    questions = json.loads((NOVEL / "questions.json").read_text("utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("jobworker-data"))
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--question", default=questions["en"], help=f"or, for example: {questions['zh']}")
    return parser.parse_args()


if __name__ == "__main__":
    given = options()
    try:
        main_job(given.data_dir.resolve(), given.procs, given.question)
    except Failed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
