"""Child process that measures one way of embedding: ``embed_child.py WAY FOLDER``.

FOLDER holds texts.json (a list of texts) and options.json; vectors that are compared are written to WAY.npy.
Prints one line of JSON: `seconds` without imports, loading and warm-up, and further figures.
"""

import asyncio
import importlib

# Other programs' environments, which run this file, have no orjson.
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]
# Texts of the warm-up pass, in which threads start and kernels are chosen.
_WARM = 16


def main(way: str, folder: Path) -> Report:
    """Run one way."""
    texts = json.loads((folder / "texts.json").read_text("utf-8"))
    options = json.loads((folder / "options.json").read_text("utf-8"))
    return WAYS[way](texts, options, folder)


def raw(texts: list[str], options: Report, folder: Path) -> Report:
    """Our encoder alone, all texts in one call."""
    encoder = _encoder(options)
    encoder.encode(texts[:_WARM])
    before = encoder.counters["embedded_tokens"]
    vectors, seconds = _timed(lambda: encoder.encode(texts))
    _save(folder, "raw", vectors)
    return {"seconds": seconds, "tokens": encoder.counters["embedded_tokens"] - before}


def handler(texts: list[str], options: Report, folder: Path) -> Report:
    """Our handler without service and store: padding, and the share of time without a forward pass."""
    from embed_texts import jobs

    packs = _record_packing()
    embed = _handler(options)
    work = [_job(number, some) for number, some in enumerate(jobs(texts))]
    embed.handle_batch(work[:4])
    packs.clear()
    before_s = embed.counters["forward_seconds"]
    outcomes, seconds = _timed(lambda: _in_batches(embed, work))
    assert outcomes == [None] * len(work), outcomes
    busy_s = embed.counters["forward_seconds"] - before_s
    cost, own = (sum(column) for column in zip(*packs, strict=True)) if packs else (0, 0)
    return {
        "seconds": seconds,
        "forward_idle_share": 1 - busy_s / seconds,
        "padding_share": 1 - own / cost if cost else None,
    }


def st_jobs(texts: list[str], options: Report, folder: Path) -> Report:
    """sentence-transformers, one call of encode for each job."""
    from embed_texts import jobs

    model = _sentence_transformer(options)
    _, seconds = _timed(lambda: [model.encode(some, show_progress_bar=False) for some in jobs(texts)])
    return {"seconds": seconds}


def st_one(texts: list[str], options: Report, folder: Path) -> Report:
    """sentence-transformers, one call of encode; its vectors are the reference."""
    model = _sentence_transformer(options)
    vectors, seconds = _timed(lambda: model.encode(texts, show_progress_bar=False))
    _save(folder, "st_one", vectors)
    return {"seconds": seconds}


def st_pool(texts: list[str], options: Report, folder: Path) -> Report:
    """The pool of sentence-transformers with two processes; its start is not measured."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, options["threads"] // 2))
    model = _sentence_transformer(options)
    pool = model.start_multi_process_pool(["cpu"] * 2)
    try:
        model.encode(texts[:_WARM], pool=pool, chunk_size=8, show_progress_bar=False)
        _, seconds = _timed(lambda: model.encode(texts, pool=pool, show_progress_bar=False))
    finally:
        model.stop_multi_process_pool(pool)
    return {"seconds": seconds}


def infinity(texts: list[str], options: Report, folder: Path) -> Report:
    """infinity's engine, every job waiting at once: its own batching chooses."""
    from embed_texts import jobs

    engine_module: Any = importlib.import_module("infinity_emb")
    arguments = engine_module.EngineArgs(
        model_name_or_path=options["folder"],
        engine="torch",
        device="cpu",
        model_warmup=False,
        lengths_via_tokenize=True,
    )

    async def run() -> float:
        engine = engine_module.AsyncEmbeddingEngine.from_args(arguments)
        async with engine:
            await engine.embed(sentences=texts[:_WARM])
            began = time.perf_counter()
            await asyncio.gather(*(engine.embed(sentences=some) for some in jobs(texts)))
            return time.perf_counter() - began

    return {"seconds": asyncio.run(run())}


def edits(texts: list[str], options: Report, folder: Path) -> Report:
    """Embed chapters, change one paragraph in each, embed them again with the cache of the first pass.

    Here `texts` are whole chapters.
    """
    from embed_texts import edited, paragraph_segments, segments

    found: Report = {}
    for name, cut in (("paragraphs", paragraph_segments), ("every_200", segments)):
        embed = _handler(options, cache=folder / f"cache-{name}")
        first = _tokens_for(embed, [cut(chapter) for chapter in texts])
        second = _tokens_for(embed, [cut(edited(chapter)) for chapter in texts])
        # The cost of the edited chapters without a cache.
        whole = _tokens_for(_handler(options), [cut(edited(chapter)) for chapter in texts])
        found[name] = {"first_tokens": first, "again_tokens": second, "saved_share": 1 - second / whole}
    return {"seconds": 0.0, "chapters": len(texts), **found}


def _tokens_for(embed: Any, chapters: list[list[str]]) -> int:
    before = embed.counters["embedded_tokens"]
    outcomes = embed.handle_batch([_job(number, some) for number, some in enumerate(chapters)])
    assert outcomes == [None] * len(chapters), outcomes
    return int(embed.counters["embedded_tokens"] - before)


def _encoder(options: Report) -> Any:
    from jobworker.handlers.encoder.load import load_encoder

    return load_encoder(options["model"], "cpu", threads=options["threads"])


def _handler(options: Report, cache: Path | None = None) -> Any:
    from jobworker.handlers.embedding.handler import EmbeddingBatch
    from jobworker.handlers.settings import HandlerSettings
    from jobworker.handlers.vectors.memory import MemoryVectors

    embed = EmbeddingBatch(_encoder(options), MemoryVectors())
    embed.setup(HandlerSettings(data_dir=str(cache or ""), cache_bytes=1 << 30 if cache else 0))
    return embed


def _in_batches(embed: Any, work: list[Any]) -> list[Any]:
    """Batches up to the handler's limits, one after another, as the runner builds them."""
    outcomes: list[Any] = []
    start = 0
    while start < len(work):
        stop, size = start, 0
        while stop < len(work) and stop - start < embed.max_batch and size < embed.max_batch_bytes:
            size += sum(len(text.encode()) for text in work[stop].payload["texts"])
            stop += 1
        outcomes += embed.handle_batch(work[start:stop])
        start = stop
    return outcomes


def _job(number: int, texts: list[str]) -> Any:
    from jobworker.worker import Job

    payload = {"ids": [f"{number}.{index}" for index in range(len(texts))], "texts": texts}
    return Job(f"{number}", "embedding_batch", "t001", "p123", payload, {}, "", "bench", f"{number}-0", 0)


def _record_packing() -> list[tuple[int, int]]:
    """Record (padded tokens, real tokens) of every batch that the encoders pack from now on."""
    from jobworker.handlers.encoder import packing

    real, seen = packing.pack, []

    def pack(lengths: Any, *limits: Any, **options: Any) -> Any:
        batches = real(lengths, *limits, **options)
        for batch in batches:
            own = [lengths[index] for index in batch]
            seen.append((max(own) * len(own), sum(own)))
        return batches

    importlib.import_module("jobworker.handlers.encoder.torch")
    for module in [m for name, m in sys.modules.items() if name.startswith("jobworker.handlers.")]:
        if getattr(module, "pack", None) is real:
            module.pack = pack  # type: ignore[attr-defined]
    return seen


def _sentence_transformer(options: Report) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(options["threads"])
    model = SentenceTransformer(options["folder"], device="cpu", local_files_only=True)
    model.encode(["warm"] * _WARM, show_progress_bar=False)
    return model


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = run()
    return found, time.perf_counter() - began


def _save(folder: Path, way: str, vectors: Any) -> None:
    import numpy as np

    np.save(folder / f"{way}.npy", np.asarray(vectors, np.float32))


WAYS: dict[str, Callable[[list[str], Report, Path], Report]] = {
    "raw": raw,
    "handler": handler,
    "st_jobs": st_jobs,
    "st_one": st_one,
    "st_pool": st_pool,
    "infinity": infinity,
    "edits": edits,
}

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
