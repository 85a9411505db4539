"""Speed of the inference engines on this machine's CPU, and their deviation from full precision.

Each engine gets the same texts in the same batches, in a process of its own; they take turns with short
rounds. The best round counts, because other load on the machine or host only slows a round down. Tokens are
those of the service's tokenizer, with special tokens.
"""

import importlib

# Other programs' environments, which run this file, have no orjson.
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import options
from embed_models import compiled
from embed_texts import SEGMENT_CHARS, chapters, take_segments
from hosts import format_facts, machine_facts, table
from rig import say

from jobworker.handlers.encoder.find_model import default_model
from jobworker.handlers.encoder.load import load_encoder
from jobworker.handlers.encoder.precision_check import min_cosine

Report = dict[str, Any]
# Timeout in seconds: a compile takes minutes on a slow machine.
_LIMIT_S = 1200.0
_ONNX = ("onnxruntime", "onnx", "onnxscript")
# The reference.
_EXACT = "torch fp32"
# Rows and columns of the matrix product that measures the CPU; larger than its caches.
_PRODUCT = 2048


def _torch(dtype: str) -> Callable[[str, int], Any]:
    return lambda model, threads: load_encoder(model, "cpu", threads=threads, dtype=dtype, engine="torch")


def _openvino(dtype: str) -> Callable[[str, int], Any]:
    return lambda model, threads: load_encoder(model, "cpu", threads=threads, dtype=dtype, engine="openvino")


def _compiled(model: str, threads: int) -> Any:
    return compiled(_torch("fp32")(model, threads))


def _onnx(model: str, threads: int) -> Any:
    """ONNX Runtime on a graph exported from the torch module; only the forward pass differs from ours."""
    import torch

    from jobworker.handlers.encoder.convert import _TraceableModel

    # An optional dependency of this benchmark only.
    onnxruntime: Any = importlib.import_module("onnxruntime")
    encoder: Any = _torch("fp32")(model, threads)
    features = encoder._features(encoder.tokenize(["one two three four", "one"]).windows, "document")
    names = ["input_ids", "attention_mask"]
    free = {0: torch.export.Dim("rows", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=512)}
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as folder, torch.inference_mode():
        path = f"{folder}/model.onnx"
        example = tuple(features[name] for name in names)
        traced = _TraceableModel(encoder).eval()
        torch.onnx.export(
            traced, example, path, input_names=names, output_names=["vectors"],
            dynamic_shapes=(free, free), dynamo=True,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def one_pass(windows: list[list[int]], purpose: Any) -> Any:
        inputs = encoder._features(windows, purpose)
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

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


def _serve(engine: str, folder: Path) -> None:
    """Entry point of an engine's process: load, warm up, then encode all texts for each line of stdin."""
    given = json.loads((folder / "given.json").read_text("utf-8"))
    texts: list[str] = given["texts"]
    began = time.perf_counter()
    encoder = _ENGINES[engine](given["model"], given["threads"])
    loaded_s = time.perf_counter() - began
    before = encoder.counters["embedded_tokens"]
    # Also the warm-up, in which threads start, kernels are chosen and graphs are compiled.
    np.save(folder / f"{engine}.npy", encoder.encode(texts))
    tokens = encoder.counters["embedded_tokens"] - before
    # An engine with too low a precision is replaced by the next one; the revision names the actual one.
    ran_as = encoder.revision.partition("-")[2]
    flops = _matrix_flops(encoder) if engine == _EXACT else 0
    _send_report({"tokens": tokens, "loaded_s": round(loaded_s, 2), "ran_as": ran_as, "flops_a_token": flops})
    for _ in sys.stdin:
        began = time.perf_counter()
        encoder.encode(texts)
        _send_report({"seconds": time.perf_counter() - began})


def _matrix_flops(encoder: Any) -> int:
    """FLOPs of a token in the matrices, without attention, which adds little for short texts."""
    return 2 * sum(
        int(weight.numel())
        for name, weight in encoder._model.named_parameters()
        if weight.ndim == 2 and "embeddings" not in name and "pooler" not in name
    )


def _product_gflops() -> float:
    """GFLOP/s of a product of two fp32 matrices on all cores."""
    matrix = np.ones((_PRODUCT, _PRODUCT), np.float32)
    began = time.perf_counter()
    matrix @ matrix
    return float(2 * _PRODUCT**3 / (time.perf_counter() - began) / 1e9)


def _send_report(report: Report) -> None:
    print(json.dumps(report), flush=True)


class _Engine:
    """Process of one engine."""

    def __init__(self, name: str, folder: Path, python: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        self._log = folder / f"{name}.log"
        # The process ends with this one, also after SIGKILL.
        tied = [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*tied, python, __file__, "--serve", name, str(folder)],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def receive(self) -> Report | None:
        """The next report of the process; None if it has ended."""
        assert self._process.stdout is not None
        # Exporters and compilers print lines of their own.
        line = next((line for line in self._process.stdout if line.startswith("{")), "")
        report: Report | None = json.loads(line) if line else None
        return report

    def turn(self) -> float:
        """Run one round; returns its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        report = self.receive()
        if report is None:
            raise RuntimeError(self.last_log_line)
        return float(report["seconds"])

    @property
    def last_log_line(self) -> str:
        """The last line of its stderr."""
        return [*self._log.read_text().splitlines(), "no output"][-2:][0][:300]

    def end(self) -> None:
        """Close its stdin, which ends it."""
        self._process.communicate(timeout=_LIMIT_S)


def compare(texts: list[str], model: str, threads: int, rounds: int, python_of: dict[str, str]) -> Report:
    """Measure each available engine, and the lowest cosine of its vectors to full precision."""
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as name, ExitStack() as ends:
        folder = Path(name)
        given = {"texts": texts, "model": model, "threads": threads}
        (folder / "given.json").write_text(json.dumps(given), "utf-8")
        engines: dict[str, _Engine] = {}
        about: dict[str, Report] = {}
        for engine in _ENGINES:
            started = _Engine(engine, folder, python_of.get(engine, sys.executable))
            ends.callback(started.end)
            if (ready := started.receive()) is None:
                say(f"{engine}: {started.last_log_line}")
                continue
            engines[engine], about[engine] = started, ready
            say(f"{engine}: {ready}")
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        gflops = []
        for _ in range(rounds):
            for engine in engines:
                seconds[engine].append(engines[engine].turn())
            gflops.append(_product_gflops())
        exact = np.load(folder / f"{_EXACT}.npy")
        cosines = {engine: min_cosine(np.load(folder / f"{engine}.npy"), exact) for engine in engines}
    summaries = {engine: _summary(about[engine], some, cosines[engine]) for engine, some in seconds.items()}
    return {"product_gflops": round(max(gflops), 1), "engines": summaries}


def _summary(about: Report, seconds: list[float], cosine: float) -> Report:
    return {
        **about,
        "tokens_per_s": round(about["tokens"] / min(seconds)),
        "least_cosine": round(cosine, 6),
        "seconds": [round(some, 3) for some in seconds],
    }


def onnx_python(folder: Path) -> str:
    """The interpreter of an environment with ONNX Runtime and all packages of this one."""
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


def format_report(report: Report) -> str:
    """A table with the speed-up over full precision in torch."""
    found = report["engines"]
    exact = found[_EXACT]["tokens_per_s"]
    rows = [("best rounds", "tokens/s", "times torch fp32", "least cosine", "loaded after", "ran as")]
    rows += [
        (
            *(engine, f"{one['tokens_per_s']:,}", f"{one['tokens_per_s'] / exact:.2f}"),
            *(f"{one['least_cosine']:.5f}", f"{one['loaded_s']:.1f} s", one["ran_as"]),
        )
        for engine, one in found.items()
    ]
    peak, flops = report["product_gflops"], found[_EXACT]["flops_a_token"]
    context = (
        f"{report['texts']:,} texts of {SEGMENT_CHARS} characters, {report['threads']} threads\n"
        f"a product of fp32 matrices reaches {peak:.0f} GFLOP/s: for the model's matrices "
        f"{peak * 1e9 / flops:,.0f} tokens/s"
    )
    return "\n".join([format_facts(report["host"]), context, table(rows)])


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@options.texts
@click.option("--count", type=click.IntRange(1), default=30, show_default=True, help="Segments of a round.")
@options.model
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=lambda: len(os.sched_getaffinity(0)),
    help="Threads of each engine.  [default: number of cores]",
)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each.")
@click.option(
    "--onnx",
    "onnx_folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Compare with ONNX Runtime too, in a virtual environment in this folder, created if missing.",
)
@options.as_json
def main(
    file: Path | None,
    count: int,
    model: str,
    threads: int,
    rounds: int,
    onnx_folder: Path | None,
    as_json: bool,
) -> None:
    """Measure and print."""
    texts = take_segments(chapters(file), count)
    python_of = {"ONNX Runtime fp32": onnx_python(onnx_folder)} if onnx_folder else {}
    report: Report = {"bench": "engines", "host": machine_facts(), "texts": len(texts), "threads": threads}
    report |= compare(texts, model or default_model(), threads, rounds, python_of)
    print(json.dumps(report) if as_json else format_report(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
