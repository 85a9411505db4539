"""Which engine runs a model fastest on this machine's CPU, and how near each stays to full precision.

Every engine gets the same texts in the same batches, in a process of its own, in turns; medians are compared.
Tokens are those of our tokenizer, special ones included.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from embed_models import compiled
from embed_texts import SEGMENT_CHARS, chapters, some
from hosts import described, machine_facts, table
from rig import say

from jobworker.handlers.encoder import Vectors, load_encoder
from jobworker.handlers.models import default_model
from jobworker.handlers.self_check import worst_cosine

Report = dict[str, Any]
# Compiling takes minutes on a slow machine.
_LIMIT_S = 1200.0
# Texts of the first pass, which is not counted: threads start, kernels are chosen, graphs are compiled then.
_WARM = 16
_ONNX = ("onnxruntime", "onnx", "onnxscript")
# What the others are compared with.
_EXACT = "torch fp32"


def _torch(dtype: str) -> Callable[[str, int], Any]:
    return lambda model, threads: load_encoder(model, "cpu", threads=threads, dtype=dtype, engine="torch")


def _openvino(dtype: str) -> Callable[[str, int], Any]:
    return lambda model, threads: load_encoder(model, "cpu", threads=threads, dtype=dtype, engine="openvino")


def _compiled(model: str, threads: int) -> Any:
    return compiled(_torch("fp32")(model, threads))


def _onnx(model: str, threads: int) -> Any:
    """ONNX Runtime, on a graph exported from the torch module: ours in all but the forward pass."""
    import torch

    from jobworker.handlers.torch_convert import _Traced

    # Not installed here for anything else.
    onnxruntime: Any = importlib.import_module("onnxruntime")
    encoder: Any = _torch("fp32")(model, threads)
    features = encoder._features(encoder.tokenize(["one two three four", "one"]).windows, "document")
    names = ["input_ids", "attention_mask"]
    free = {0: torch.export.Dim("rows", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=512)}
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as folder, torch.inference_mode():
        path = f"{folder}/model.onnx"
        example = tuple(features[name] for name in names)
        traced = _Traced(encoder).eval()
        torch.onnx.export(
            traced, example, path, input_names=names, output_names=["vectors"],
            dynamic_shapes=(free, free), dynamo=True,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def one_pass(windows: list[list[int]], purpose: Any) -> Vectors:
        inputs = encoder._features(windows, purpose)
        vectors: Vectors = session.run(None, {name: inputs[name].numpy() for name in names})[0]
        return vectors

    encoder._pass = one_pass
    return encoder


_ENGINES: dict[str, Callable[[str, int], Any]] = {
    _EXACT: _torch("fp32"),
    "torch bf16": _torch("bf16"),
    "torch.compile fp32": _compiled,
    "ONNX Runtime fp32": _onnx,
    "OpenVINO fp32": _openvino("fp32"),
    "OpenVINO bf16": _openvino("bf16"),
    "OpenVINO fp16": _openvino("fp16"),
}


def _measure(engine: str, folder: Path) -> Report:
    """In a process of its own: load, warm up, encode everything in one call."""
    given = json.loads((folder / "given.json").read_text("utf-8"))
    texts: list[str] = given["texts"]
    began = time.perf_counter()
    encoder = _ENGINES[engine](given["model"], given["threads"])
    loaded_s = time.perf_counter() - began
    encoder.encode(texts[:_WARM])
    encoder.encode(texts[:1])
    tokens = encoder.counters["embedded_tokens"]
    began = time.perf_counter()
    vectors = encoder.encode(texts)
    seconds = time.perf_counter() - began
    np.save(folder / f"{engine}.npy", vectors)
    return {
        "seconds": seconds,
        "tokens": encoder.counters["embedded_tokens"] - tokens,
        "loaded_s": loaded_s,
        # An engine that is not exact enough gives way to the next one.
        "revision": encoder.revision,
    }


def _in_a_process(engine: str, folder: Path, python: str) -> Report | None:
    """None where the engine cannot be had here; why not is shown."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [python, __file__, "--measure", engine, str(folder)],
        env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        say(f"{engine}: {done.stderr.strip().splitlines()[-1][:300]}")
        return None
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def compare(texts: list[str], model: str, threads: int, repeat: int, python_of: dict[str, str]) -> Report:
    """Medians of every engine that can be had here, and the least cosine of its vectors to full precision."""
    runs: dict[str, list[Report]] = {}
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as name:
        folder = Path(name)
        given = {"texts": texts, "model": model, "threads": threads}
        (folder / "given.json").write_text(json.dumps(given), "utf-8")
        missing: set[str] = set()
        for turn in range(1, repeat + 1):
            for engine in [engine for engine in _ENGINES if engine not in missing]:
                run = _in_a_process(engine, folder, python_of.get(engine, sys.executable))
                if run is None:
                    missing.add(engine)
                    continue
                runs.setdefault(engine, []).append(run)
                say(f"{turn}/{repeat} {engine}: {run['seconds']:.1f} s, {run['revision']}")
        exact = np.load(folder / f"{_EXACT}.npy")
        cosines = {engine: worst_cosine(np.load(folder / f"{engine}.npy"), exact) for engine in runs}
    return {engine: _summary(some, cosines[engine]) for engine, some in runs.items()}


def _summary(runs: list[Report], cosine: float) -> Report:
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "tokens_per_s": round(runs[0]["tokens"] / seconds),
        "least_cosine": round(cosine, 6),
        "loaded_s": round(statistics.median(run["loaded_s"] for run in runs), 2),
        "ran_as": runs[0]["revision"].partition("-")[2],
        "runs": runs,
    }


def onnx_python(folder: Path) -> str:
    """The interpreter of an environment that has ONNX Runtime beside all that this one has."""
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"making {folder} with {_ONNX[0]}")
        venv.create(folder, with_pip=True)
        site = sysconfig.get_path("purelib", vars={"base": str(folder)})
        Path(site, "ours.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
        command = [str(python), "-m", "pip", "install", "-q", *_ONNX]
        subprocess.run(command, check=True, timeout=_LIMIT_S)
    return str(python)


def for_people(report: Report) -> str:
    """One table; how much faster than full precision in torch."""
    found = report["engines"]
    base = found[_EXACT]["tokens_per_s"]
    rows = [("medians", "tokens/s", "of torch fp32", "least cosine", "loaded after", "ran as")]
    rows += [
        (
            *(engine, f"{one['tokens_per_s']:,}", f"{one['tokens_per_s'] / base:.2f}"),
            *(f"{one['least_cosine']:.5f}", f"{one['loaded_s']:.1f} s", one["ran_as"]),
        )
        for engine, one in found.items()
    ]
    said = f"{report['texts']:,} texts of {SEGMENT_CHARS} characters, {report['threads']} threads"
    return "\n".join([described(report["host"]), said, table(rows)])


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option(
    "--texts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL with a field `content` a line, one chapter each.  [default: the sample novel]",
)
@click.option("--count", type=click.IntRange(1), default=400, show_default=True, help="Segments.")
@click.option("--model", default="", help="As --model of the service.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=lambda: len(os.sched_getaffinity(0)),
    help="Of every engine.  [default: number of cores]",
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each.")
@click.option(
    "--onnx",
    "onnx_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Compare with ONNX Runtime too, in a virtual environment in this folder, made if missing.",
)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of the table.")
def main(
    file: Path | None,
    count: int,
    model: str,
    threads: int,
    repeat: int,
    onnx_folder: Path | None,
    as_json: bool,
) -> None:
    """Measure and print."""
    texts = some(chapters(file), count)
    python_of = {"ONNX Runtime fp32": onnx_python(onnx_folder)} if onnx_folder else {}
    report: Report = {"bench": "engines", "host": machine_facts(), "texts": len(texts), "threads": threads}
    report["engines"] = compare(texts, model or default_model(), threads, repeat, python_of)
    print(json.dumps(report) if as_json else for_people(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(_measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
