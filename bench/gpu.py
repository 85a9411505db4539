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
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from embed_models import BGE_M3, MINILM, Shape, compiled, write_model
from hosts import format_facts, machine_facts, table

from jobworker.handlers.encoder.find_model import find_model
from jobworker.handlers.encoder.packing import pack, padding_share
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
# Variants of our encoder: dtype, token budget, compiled or not.
_VARIANTS: dict[str, tuple[str, int, bool]] = {
    "as the service does": ("auto", 16384, False),
    "fp32": ("fp32", 16384, False),
    "bf16": ("bf16", 16384, False),
    "fp16, 64 Ki tokens a pass": ("fp16", 65536, False),
    "bf16, 64 Ki tokens a pass": ("bf16", 65536, False),
    "fp16, 64 Ki tokens, compiled": ("fp16", 65536, True),
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
    for name, (dtype, budget, compile_it) in _VARIANTS.items():
        _free_memory(device)
        encoder: Any = TorchEncoder.load(
            source, device=device, threads=torch.get_num_threads(), dtype=dtype, token_budget=budget
        )
        try:
            encoder = compiled(encoder) if compile_it else encoder
            found[name] = {load: _one(encoder, shape, texts, repeat) for load, texts in loads.items()}
            compared = {load: encoder.encode(texts[:_COMPARED]) for load, texts in loads.items()}
        except Exception as error:  # e.g. a missing compiler; other variants continue
            say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        exact = compared if name == "fp32" else exact
        for load, vectors in compared.items():
            found[name][load] |= {"ran_as": encoder.revision.partition("-")[2], "vectors": vectors}
        say(f"{folder.name}, {name}: done")
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
    batches = pack(lengths, encoder._budget, max_rows=len(lengths))
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
@click.option("--count", type=click.IntRange(1), default=512, show_default=True, help="Texts of 512 tokens.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
@click.option("--product", type=click.IntRange(64), default=8192, show_default=True, help="Matrix size.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of the tables.")
def main(device: str, layers: int, count: int, repeat: int, product: int, as_json: bool) -> None:
    """Measure and print."""
    shapes = {"bge-m3": BGE_M3, "MiniLM-L6": MINILM}
    if layers:
        # Without a GPU the vocabulary is reduced too: it only costs memory.
        shapes = {name: shape._replace(layers=layers, vocabulary=8192) for name, shape in shapes.items()}
    card = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    report: Report = {"bench": "gpu", "host": machine_facts(), "card": card, "device": device}
    report |= {"stated_tflops": _stated_tflops(card), "product_tflops": product_tflops(device, product)}
    report["models"] = {name: measure(name, shape, count, device, repeat) for name, shape in shapes.items()}
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
