"""Embedding speed of the service, compared with alternatives.

Each way gets the same texts on the same cores, in a process of its own; they take turns, and medians are
compared. The clock starts after imports, loading and a first pass. For the service it starts with the first
job, when its workers are ready, and stops at the last acknowledgement, when all rows are in Milvus. Tokens
are those of the service's tokenizer for all ways, with special tokens.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import options
import orjson
from embed_models import ONE_GIB, write_model
from embed_service import end_to_end, memory, recovery
from embed_texts import SEGMENT_CHARS, TEXTS_A_JOB, chapters, jobs, take_segments
from hosts import format_facts, machine_facts, table
from rig import say

from jobworker.handlers.encoder.find_model import default_model, find_model
from jobworker.worker.safe_text import safe_json

_CHILD = Path(__file__).resolve().parent / "embed_child.py"
# Timeout in seconds of one way, also on a busy machine.
_LIMIT_S = 1800.0
_PEERS = {
    "raw": "our encoder, all in one call",
    "service": "our service into Milvus Lite",
    "handler": "our handler, no store",
    "st_jobs": "sentence-transformers, job by job",
    "st_one": "sentence-transformers, one encode",
    "st_pool": "sentence-transformers, pool of 2",
    "infinity": "infinity",
}
_WORKERS = (1, 2, 4, 8)
_CHAPTERS = 30
# infinity does not pin these versions, and cannot load a model with later ones.
_INFINITY = ("infinity-emb[torch]==0.0.77", "transformers<4.49", "huggingface-hub<1", "optimum<1.25")

Report = dict[str, Any]


def speed(texts: list[str], procs: int, model: str, repeat: int, python_of: dict[str, str]) -> Report:
    """Run all ways in turns; medians, further figures, and the lowest cosine of our vectors to fp32."""
    ways = [way for way in _PEERS if way != "infinity" or "infinity" in python_of]
    runs: dict[str, list[Report]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as name:
        folder = Path(name)
        _write_inputs(folder, texts, model)
        for turn in range(1, repeat + 1):
            for way in ways:
                if way == "service":
                    run = end_to_end(jobs(texts), procs, model)
                else:
                    run = _child(way, folder, python_of.get(way, sys.executable))
                runs[way].append(run)
                say(f"{turn}/{repeat} {way}: {run['seconds']:.1f} s")
        cosine = _least_cosine(folder)
    tokens = runs["raw"][0]["tokens"]
    seconds = {way: statistics.median(run["seconds"] for run in some) for way, some in runs.items()}
    return {
        "texts": len(texts),
        "tokens": tokens,
        "tokens_per_s": {way: round(tokens / took, 1) for way, took in seconds.items()},
        "service_to_st_jobs": round(seconds["st_jobs"] / seconds["service"], 2),
        "service_to_raw": round(seconds["raw"] / seconds["service"], 2),
        "least_cosine_to_fp32": cosine,
        "padding_share": _median(runs["handler"], "padding_share"),
        "forward_idle_share": _median(runs["service"], "forward_idle_share"),
        "forward_idle_share_no_store": _median(runs["handler"], "forward_idle_share"),
        "jobs_a_batch": _median(runs["service"], "jobs_a_batch"),
        "runs": runs,
    }


def large_memory() -> list[Report]:
    """PSS of one worker, of many that share a generated model of 1 GiB, and of many with a copy each."""
    many = _WORKERS[-1]
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as name:
        folder = str(write_model(Path(name, "one-gib"), ONE_GIB, ["some text"]))
        found = []
        for workers, copies in ((1, "0"), (many, "0"), (many, str(many))):
            row = memory(workers, folder, XDG_CACHE_HOME=name, JOBWORKER_MODEL_COPIES=copies)
            found.append(row | {"model_copies": int(copies)})
        return found


def edits(novel: Sequence[str], model: str) -> Report:
    """Cost of embedding up to 30 chapters again after an edit of one paragraph in each."""
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as name:
        _write_inputs(Path(name), list(novel[:_CHAPTERS]), model)
        return _child("edits", Path(name), sys.executable)


def _write_inputs(folder: Path, texts: list[str], model: str) -> None:
    options = {
        "model": model,
        # The share of an edit is the same with an encoder without weights.
        "folder": "" if model.startswith("dummy:") else str(find_model(model).folder),
        "threads": len(os.sched_getaffinity(0)),
    }
    (folder / "texts.json").write_text(orjson.dumps(texts).decode(), "utf-8")
    (folder / "options.json").write_text(orjson.dumps(options).decode(), "utf-8")


def _child(way: str, folder: Path, python: str) -> Report:
    """Run one way. Raises RuntimeError with its stderr if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [python, str(_CHILD), way, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    report: Report = orjson.loads(done.stdout.splitlines()[-1])
    return report


def _least_cosine(folder: Path) -> float:
    ours, theirs = (np.load(folder / f"{way}.npy").astype(np.float64) for way in ("raw", "st_one"))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return round(float(((ours * theirs).sum(axis=1) / lengths).min()), 6)


def _median(runs: list[Report], name: str) -> float | None:
    values = [run[name] for run in runs if run[name] is not None]
    return round(statistics.median(values), 4) if values else None


def infinity_python(folder: Path) -> str:
    """The interpreter of an environment with infinity and our version of torch, created if missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder} with {_INFINITY[0]}")
        venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints), *_INFINITY]
    subprocess.run(command, check=True, timeout=_LIMIT_S)
    return str(python)


def format_report(report: Report) -> str:
    """The table of speeds, and the other figures."""
    lines = [format_facts(report["host"])]
    if found := report.get("speed"):
        lines.append(
            f"{found['texts']:,} texts of {SEGMENT_CHARS} characters, {found['tokens']:,} tokens, jobs of "
            f"{TEXTS_A_JOB}, {report['procs']} workers, {report['repeat']} runs each"
        )
        base = found["tokens_per_s"]["st_jobs"]
        rows = [("medians", "tokens/s", "of job by job")]
        rows += [
            (_PEERS[way], f"{speed:,.0f}", f"{speed / base:.2f}")
            for way, speed in found["tokens_per_s"].items()
        ]
        lines += [table(rows), _details(found)]
    for row in report.get("memory", []):
        lines.append(f"PSS of {row['workers']} workers: {row['pss_mib']:,.0f} MiB")
    if large := report.get("large_memory"):
        one = large[0]["pss_mib"]
        lines += [
            f"with a model of 1 GiB: PSS of {row['workers']} workers {row['pss_mib']:,.0f} MiB, "
            f"{row['pss_mib'] / one:.2f} times that of one (--model-copies {row['model_copies']})"
            for row in large
        ]
    if times := report.get("recovery_s"):
        lines.append(f"first vector after kill -9 of the only worker: {statistics.median(times):.2f} s")
    if trace := report.get("edits"):
        lines.append(
            f"one paragraph changed in each of {trace['chapters']} chapters: tokens not computed again "
            f"{trace['paragraphs']['saved_share']:.1%} where segments begin with paragraphs, "
            f"{trace['every_200']['saved_share']:.1%} where chapters are cut every {SEGMENT_CHARS} characters"
        )
    return "\n".join(lines)


def _details(found: Report) -> str:
    padding = found["padding_share"]
    return "\n".join([
        f"service / sentence-transformers job by job: {found['service_to_st_jobs']:.2f}; "
        f"service / our encoder: {found['service_to_raw']:.2f}; "
        f"least cosine to fp32: {found['least_cosine_to_fp32']:.5f}",
        f"padding {'unknown' if padding is None else format(padding, '.1%')} of the tokens; no forward pass "
        f"in {found['forward_idle_share']:.1%} of the workers' time in the service, in "
        f"{found['forward_idle_share_no_store']:.1%} without service and store; "
        f"{found['jobs_a_batch']:.1f} jobs a batch",
    ])  # fmt: skip


_PARTS: tuple[str, ...] = ("speed", "memory", "large_memory", "recovery", "edits")


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@options.texts
@click.option("--count", type=click.IntRange(0), default=0, help="Segments; 0 for all of the texts.")
@options.model
@options.worker_a_core
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each.")
@click.option(
    "--infinity",
    "infinity_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Compare with infinity too, in a virtual environment in this folder, created if missing.",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(_PARTS),
    multiple=True,
    default=_PARTS,
    show_default=True,
    help="What to measure; repeatable.",
)
@options.as_json
def main(
    file: Path | None,
    count: int,
    model: str,
    procs: int,
    repeat: int,
    infinity_folder: Path | None,
    parts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure and print."""
    novel, model = chapters(file), model or default_model()
    python_of = {"infinity": infinity_python(infinity_folder)} if infinity_folder else {}
    report: Report = {"bench": "embed", "host": machine_facts(), "procs": procs, "repeat": repeat}
    measures: dict[str, Callable[[], tuple[str, Any]]] = {
        "speed": lambda: ("speed", speed(take_segments(novel, count), procs, model, repeat, python_of)),
        "memory": lambda: ("memory", [memory(workers, model) for workers in _WORKERS]),
        "large_memory": lambda: ("large_memory", large_memory()),
        "recovery": lambda: ("recovery_s", [recovery(model)["seconds"] for _ in range(repeat)]),
        "edits": lambda: ("edits", edits(novel, model)),
    }
    for part in _PARTS:
        if part in parts:
            name, found = measures[part]()
            report[name] = found
            say(f"{part}: done")
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
