"""GPU utilisation of the forward pass, and tokens/s compared with plain sentence-transformers.

Models with the shapes of bge-m3 and MiniLM and random weights are generated: no download and no server is
needed. Useful FLOPs exclude padding. Utilisation is their share of the peak of the matrix units, once as the
vendor states it and once as a large matrix product reaches it. Tokens are those of the service's tokenizer,
with special tokens. `--device cpu --layers 2` runs the program without a GPU.
"""

import gc
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import options
import torch
from embed_models import BGE_M3, MINILM, Shape, compiled, write_model
from embed_service import EMBED, EMBED_WITHOUT_STORE, end_to_end
from embed_texts import TEXTS_A_JOB
from hosts import format_facts, machine_facts, table

from jobworker.handlers.encoder.base import TOKEN_BUDGET
from jobworker.handlers.encoder.find_model import find_model
from jobworker.handlers.encoder.packing import padding_share
from jobworker.handlers.encoder.precision_check import min_cosine
from jobworker.handlers.encoder.torch import TorchEncoder
from jobworker.worker.safe_text import safe_json

Report = dict[str, Any]
#: Peak of dense bf16 products stated by the vendor, in TFLOP/s.
_STATED_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
_RANDOM = 7
# Lengths of the mixed texts in characters, which are tokens here; each text has two special tokens more.
_SPECIALS = 2
_MIXED = (16, 510)
# Repetitions of passes of a few milliseconds; the median counts.
_PRODUCTS = 20
# Texts whose vectors are compared with full precision, which is slow.
_COMPARED = 64


class _Variant(NamedTuple):
    """A way to run our encoder."""

    dtype: str = "auto"
    token_budget: int = TOKEN_BUDGET
    packs: bool = True
    compiles: bool = False


_EXACT = "fp32"
# The driver updates its number about this often.
_SAMPLE_S = 0.2
_VARIANTS = {
    "as the service does": _Variant(),
    _EXACT: _Variant("fp32"),
    "bf16": _Variant("bf16"),
    "16 Ki tokens a pass": _Variant(token_budget=16384),
    "with padding": _Variant(packs=False),
    "with padding, compiled": _Variant(packs=False, compiles=True),
}


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def product_tflops(device: str, size: int) -> float:
    """TFLOP/s of a product of two random bf16 matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(_timed(lambda: left @ right, device) for _ in range(_PRODUCTS))
    return 2 * size**3 / seconds / 1e12


def _timed(run: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def texts_of(lengths: Sequence[int], rng: random.Random) -> list[str]:
    """Random Han characters; each is one token."""
    return ["".join(chr(rng.randrange(0x4E00, 0x4E00 + 5000)) for _ in range(length)) for length in lengths]


def useful_flops(shape: Shape, lengths: Sequence[int]) -> int:
    """FLOPs of one forward pass over texts of these token counts, without padding."""
    return sum(length * shape.forward_flops_a_token + shape.attention_flops(length) for length in lengths)


def ours(folder: Path, shape: Shape, loads: dict[str, list[str]], device: str, repeat: int) -> Report:
    """Measure each variant with each load: forward passes alone, and with tokenising."""
    source = find_model(str(folder))
    exact: dict[str, Any] = {}
    found: Report = {}
    for name, variant in _VARIANTS.items():
        _free_memory(device)
        encoder: Any = TorchEncoder.load(
            source,
            device=device,
            threads=torch.get_num_threads(),
            dtype=variant.dtype,
            token_budget=variant.token_budget,
        )
        if not variant.packs:
            encoder._packed = None
            encoder._measure_pass()
        try:
            encoder = compiled(encoder) if variant.compiles else encoder
            found[name] = {load: _one(encoder, shape, texts, repeat) for load, texts in loads.items()}
            compared = {load: encoder.encode(texts[:_COMPARED]) for load, texts in loads.items()}
        except Exception as error:  # e.g. a missing compiler; other variants continue
            say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        exact = compared if name == _EXACT else exact
        for load, vectors in compared.items():
            found[name][load] |= {"ran_as": encoder.revision.partition("-")[2], "vectors": vectors}
        for load, one in found[name].items():
            say(f"{folder.name}, {name}, {load}: {one['forward_tokens_per_s']:,} tokens/s")
        del encoder  # before the next one is loaded
    for loads_of in found.values():
        for load, one in loads_of.items():
            one["least_cosine"] = round(min_cosine(one.pop("vectors"), exact[load]), 6)
    return found


def _free_memory(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _one(encoder: Any, shape: Shape, texts: list[str], repeat: int) -> Report:
    plan = encoder.tokenize(texts)
    lengths = [len(window) for window in plan.windows]
    device = str(encoder._model.device)
    encoder.forward(plan)  # kernels are chosen and compiled
    forward_s = statistics.median(_timed(lambda: encoder.forward(plan), device) for _ in range(repeat))
    encode_s = statistics.median(_timed(lambda: encoder.encode(texts), device) for _ in range(repeat))
    batches = [] if encoder._packed else encoder._batches(lengths)
    return {
        "forward_tokens_per_s": round(sum(lengths) / forward_s),
        "encode_tokens_per_s": round(sum(lengths) / encode_s),
        "forward_tflops": round(useful_flops(shape, lengths) / forward_s / 1e12, 3),
        "padding_share": round(padding_share(lengths, batches), 4),
        "peak_memory_mib": 0 if device == "cpu" else round(torch.cuda.max_memory_allocated(device) / 2**20),
    }


def plain(folder: Path, loads: dict[str, list[str]], device: str, repeat: int) -> Report:
    """encode of sentence-transformers, with defaults and in half precision."""
    from sentence_transformers import SentenceTransformer

    found: Report = {}
    for name, half in (("sentence-transformers", False), ("sentence-transformers, fp16", True)):
        _free_memory(device)
        model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        model = model.half() if half else model
        for load, texts in loads.items():
            encode = partial(model.encode, texts, show_progress_bar=False)
            encode()
            seconds = [_timed(encode, device) for _ in range(repeat)]
            tokens = sum(len(text) + _SPECIALS for text in texts)
            rate = round(tokens / statistics.median(seconds))
            found.setdefault(name, {})[load] = {"encode_tokens_per_s": rate}
        say(f"{folder.name}, {name}: done")
    return found


def measure(name: str, shape: Shape, count: int, device: str, repeat: int) -> Report:
    """Measure one model, generated in a temporary folder."""
    rng = random.Random(_RANDOM)
    loads = {
        "512 tokens": texts_of([shape.window - _SPECIALS] * count, rng),
        "mixed": texts_of(
            [min(rng.randint(*_MIXED), shape.window - _SPECIALS) for _ in range(2 * count)], rng
        ),
    }
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as above:
        folder = write_model(Path(above, name), shape, [text for texts in loads.values() for text in texts])
        return {**ours(folder, shape, loads, device, repeat), **plain(folder, loads, device, repeat)}


class _BusyShare:
    """Share of the time in which a kernel runs on a GPU, as the driver counts it; for all processes."""

    def __init__(self, device: str) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._read = partial(
            pynvml.nvmlDeviceGetUtilizationRates, pynvml.nvmlDeviceGetHandleByIndex(int(device[5:] or 0))
        )
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[float] = []

    def __enter__(self) -> None:
        self._sampler.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        # The driver's number is that of up to one second before.
        self._ended.wait(1.0)
        while not self._ended.wait(_SAMPLE_S):
            self.samples.append(self._read().gpu / 100)


_STORES = {"memory": EMBED_WITHOUT_STORE, "Milvus Lite": EMBED}


def service(count: int, device: str, procs: int, store: str) -> Report:
    """The whole service with a model of bge-m3's shape: tokens/s into a store, and the GPU's idle share.

    `count` jobs of mixed texts.
    """
    rng = random.Random(_RANDOM)
    texts = texts_of([rng.randint(*_MIXED) for _ in range(TEXTS_A_JOB * count)], rng)
    jobs = [texts[start : start + TEXTS_A_JOB] for start in range(0, len(texts), TEXTS_A_JOB)]
    busy = _BusyShare(device)
    with tempfile.TemporaryDirectory(prefix="jobworker-bench") as above:
        folder = write_model(Path(above, "bge-m3"), BGE_M3, texts)
        found = end_to_end(
            jobs, procs, str(folder), handler=_STORES[store], observer=busy, JOBWORKER_DEVICE=device
        )
    say(f"service, {procs} workers, {store}: done")
    shares = busy.samples or [0.0]
    return {
        "store": store,
        "procs": procs,
        "jobs": count,
        "seconds": round(found["seconds"], 2),
        "tokens_per_s": round(found["tokens"] / found["seconds"]),
        "jobs_a_batch": round(found["jobs_a_batch"], 1),
        "gpu_idle_share": round(1 - statistics.mean(shares), 4),
        "gpu_busy_samples": [round(share, 2) for share in shares],
    }


def _stated_tflops(card: str) -> float | None:
    return next((stated for name, stated in _STATED_TFLOPS.items() if name in card), None)


def format_report(report: Report) -> str:
    """One table for each model."""
    stated, reached = report["stated_tflops"], report["product_tflops"]
    lines = [format_facts(report["host"]), f"{report['card']}, torch {torch.__version__}"]
    lines.append(f"bf16 products: {stated or 'unknown'} TFLOP/s as stated, {reached:.1f} reached")
    for model, found in report["models"].items():
        rows = [
            (
                "",
                "texts",
                "forward tokens/s",
                "with tokenising",
                "of stated",
                "of reached",
                "padding",
                "cosine",
                "ran as",
            )
        ]
        for variant, loads in found.items():
            rows += [(variant, load, *_cells(one, stated, reached)) for load, one in loads.items()]
        lines += ["", f"{model}, random weights", table(rows)]
    for found in report["services"]:
        lines += [
            f"service with {found['procs']} workers, mixed texts into {found['store']}: "
            f"{found['tokens_per_s']:,} tokens/s, {found['jobs_a_batch']} jobs a batch, "
            f"GPU idle {found['gpu_idle_share']:.1%}"
        ]
    return "\n".join(lines)


def _cells(one: Report, stated: float | None, reached: float) -> tuple[str, ...]:
    encode = f"{one['encode_tokens_per_s']:,}"
    if "forward_tflops" not in one:
        return ("", encode, *[""] * 5)
    return (
        f"{one['forward_tokens_per_s']:,}",
        encode,
        f"{one['forward_tflops'] / stated:.1%}" if stated else "",
        f"{one['forward_tflops'] / reached:.1%}",
        f"{one['padding_share']:.1%}",
        f"{one['least_cosine']:.5f}",
        one["ran_as"],
    )


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--device", default="cuda:0", show_default=True, help="cuda:N or cpu.")
@click.option(
    "--layers", type=click.IntRange(0), default=0, help="Layers of the models; 0 for their own number."
)
@click.option(
    "--count",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Texts of 512 tokens; 0: no encoder.",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
@click.option("--product", type=click.IntRange(64), default=8192, show_default=True, help="Matrix size.")
@click.option(
    "--jobs",
    type=click.IntRange(0),
    default=6000,
    show_default=True,
    help="Jobs of the whole service, of 4 texts each; 0 leaves it out.",
)
@options.workers
@options.as_json
def main(
    device: str, layers: int, count: int, repeat: int, product: int, jobs: int, procs: int, as_json: bool
) -> None:
    """Measure and print."""
    shapes = {"bge-m3": BGE_M3, "MiniLM-L6": MINILM}
    if layers:
        # Without a GPU the vocabulary is reduced too: it only costs memory.
        shapes = {name: shape._replace(layers=layers, vocabulary=8192) for name, shape in shapes.items()}
    card = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    report: Report = {"bench": "gpu", "host": machine_facts(), "card": card, "device": device}
    report |= {"stated_tflops": _stated_tflops(card), "product_tflops": product_tflops(device, product)}
    report["services"] = [
        service(jobs, device, procs, store) for store in _STORES if jobs and device != "cpu"
    ]
    report["models"] = {
        name: measure(name, shape, count, device, repeat) for name, shape in shapes.items() if count
    }
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
