"""Recall of questions by name: dense search against hybrid search, and what sparse vectors cost the model.

Without ``--text`` a Chinese text is made from a seed: many people in few places and scenes, so that only
names tell the segments apart. ``--tiny`` makes a model in code: one token a character, dense vectors that are
means of random ones, and a head that gives a rare character more weight. ``--made-head`` adds a head that
weighs every token alike to a real model. The rows are in memory: searches are exact, and ranks are fused as
Milvus does.
"""

import collections
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import options
import orjson

from jobworker.handlers.encoder.base import Encoder
from jobworker.handlers.encoder.find_model import default_model, find_model
from jobworker.handlers.encoder.load import load_encoder
from jobworker.handlers.encoder.sparse_head import has_head
from jobworker.handlers.sparse_vector import SparseVector
from jobworker.handlers.vectors.memory import MemoryVectors
from jobworker.handlers.vectors.ports import Row

_NAME = "story_segments"
_SCOPE: Any = {"tenant_id": "t", "project_id": "p"}
_AT = 10
_QUESTIONS = 200
_SEGMENT_CHARS = 90
_TINY_DIM = 256
_FAMILIES = "沈陆顾谢温苏叶江裴宋韩秦白洛柳"
_GIVEN = "未怀清若景书言知云舟远山听雨时晚棠渊澜宁安衡之行止微明昭"
_PLACES = ("临河镇", "南浦渡", "青石巷", "望月楼", "落雁坡", "听松馆", "寒水桥", "旧驿亭", "梅岭关", "桐花里")
_SCENES = (
    "{a}在{p}等了一个下午，天色渐渐暗下来，仍旧没有人来。",
    "那天夜里，{a}把信交给{b}，两个人在{p}站了很久，谁也没有说话。",
    "{a}推开{p}的门，屋里只有一盏灯，桌上放着半碗凉了的茶。",
    "听说{b}病了，{a}从{p}赶回来，路上下了一场大雨。",
    "{a}说他从没去过{p}，可是{b}分明在那里见过他。",
    "清早{p}起了雾，{a}牵着马慢慢走过去，{b}在后面喊他的名字。",
)
_ASKED = ("{}在哪里？", "{}做了什么？", "谁见过{}？", "{}后来怎么样了？")
# A name before a word of speech, for a text without a list of names.
_SPEAKER = re.compile(r"(?<![一-龥])([一-龥]{2,3})(?:笑|忙|冷笑|叹)?[道说]")


class Question(NamedTuple):
    """A question about a name, and the indices of the segments that hold the name."""

    text: str
    relevant: frozenset[int]


def made_text(seed: int, segments: int) -> tuple[list[str], list[str]]:
    """Segments, and the names in them."""
    chance = random.Random(seed)
    names = sorted({family + "".join(chance.sample(_GIVEN, 2)) for family in _FAMILIES for _ in range(30)})
    texts = []
    for _ in range(segments):
        a, b = chance.sample(names, 2)
        texts.append(chance.choice(_SCENES).format(a=a, b=b, p=chance.choice(_PLACES)))
    return texts, names


def read_text(path: Path, names: Path | None) -> tuple[list[str], list[str]]:
    """Segments of a text (JSON lines: their strings), and its names: given, or those who speak in it."""
    whole = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        lines = (orjson.loads(line) for line in whole.splitlines() if line.strip())
        whole = "\n".join(max(map(str, line.values()), key=len) for line in lines)
    texts, segment = [], ""
    for sentence in re.findall(r"[^。！？\n]+[。！？\n]*", whole):
        segment += sentence.strip()
        if len(segment) >= _SEGMENT_CHARS:
            texts.append(segment)
            segment = ""
    texts += [segment] if segment else []
    found = names.read_text("utf-8").split() if names else _SPEAKER.findall(whole)
    return texts, sorted(set(found))


def questions(texts: Sequence[str], names: Sequence[str], seed: int) -> list[Question]:
    """Up to 200 questions by names that at most ten segments hold."""
    chance = random.Random(seed)
    asked = []
    for name in names:
        relevant = frozenset(index for index, text in enumerate(texts) if name in text)
        if 1 <= len(relevant) <= _AT:
            asked.append(Question(chance.choice(_ASKED).format(name), relevant))
    return chance.sample(asked, min(_QUESTIONS, len(asked)))


def tiny_model(folder: Path, texts: Sequence[str], seed: int) -> str:
    """A BERT whose layers pass embeddings on. The first number of one says how rare the token is."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    counts = collections.Counter(character for text in texts for character in set(text))
    asked = set("".join(_ASKED)) - {"{", "}"}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(counts.keys() | asked)]
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=_TINY_DIM, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=_TINY_DIM, max_position_embeddings=512,
    )  # fmt: skip
    core = BertModel(config)
    with torch.no_grad():
        for weights in core.encoder.parameters():
            if weights.ndim == 2 or weights.shape == weights.new_zeros(_TINY_DIM).shape:
                weights.zero_()
        for norm in (module for module in core.modules() if isinstance(module, torch.nn.LayerNorm)):
            norm.weight.fill_(1.0)
        for table in (core.embeddings.position_embeddings, core.embeddings.token_type_embeddings):
            table.weight.zero_()
        embeddings = torch.randint(0, 2, (len(words), _TINY_DIM)) * 2.0 - 1.0
        rarity = [math.log(len(texts) / counts[word]) if word in counts else 0.0 for word in words]
        embeddings[:, 0] = torch.tensor(rarity) / math.log(len(texts))
        core.embeddings.word_embeddings.weight.copy_(embeddings)
    core.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    head = torch.zeros(1, _TINY_DIM)
    head[0, 0] = 1.0
    torch.save({"weight": head, "bias": torch.zeros(1)}, folder / "sparse_linear.pt")
    return str(folder)


def with_made_head(model: str, folder: Path) -> str:
    """A model of the same files and a head that gives every token the weight 1."""
    import torch

    source = find_model(model or default_model()).folder
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    hidden = orjson.loads((source / "config.json").read_bytes())["hidden_size"]
    torch.save({"weight": torch.zeros(1, hidden), "bias": torch.ones(1)}, folder / "sparse_linear.pt")
    return str(folder)


def embedded(encoder: Encoder, texts: Sequence[str], purpose: Any) -> tuple[Any, list[SparseVector]]:
    """Dense and sparse vectors."""
    vectors, sparse = encoder.forward_both(encoder.tokenize(texts, purpose))
    return vectors, sparse or []


def recalls(encoder: Encoder, texts: Sequence[str], asked: Sequence[Question]) -> dict[str, float]:
    """Mean recall@10 of both searches."""
    store = MemoryVectors()
    store.ensure_collection(_NAME, encoder.dim, "model")
    vectors, sparse = embedded(encoder, texts, "document")
    store.upsert(
        _NAME,
        [
            Row(str(n), vectors[n], "t", "p", text_content=texts[n], sparse=sparse[n])
            for n in range(len(texts))
        ],
    )
    shares: dict[str, list[float]] = {"dense": [], "hybrid": []}
    vectors, sparse = embedded(encoder, [question.text for question in asked], "query")
    for question, vector, words in zip(asked, vectors, sparse, strict=True):
        found = {
            "dense": store.search(_NAME, vector, limit=_AT, **_SCOPE),
            "hybrid": store.hybrid_search(_NAME, vector, words, limit=_AT, **_SCOPE),
        }
        for mode, hits in found.items():
            right = question.relevant & {int(hit.id) for hit in hits}
            shares[mode].append(len(right) / len(question.relevant))
    return {mode: round(statistics.mean(of_mode), 4) for mode, of_mode in shares.items()}


def cost(encoder: Encoder, texts: Sequence[str], repeat: int) -> dict[str, Any]:
    """CPU seconds of passes with and without sparse vectors, in turns; the ratio is the median of pairs."""
    plan = encoder.tokenize(texts)
    encoder.forward_both(plan)
    calls = {"dense": encoder.forward, "both": encoder.forward_both}
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat):
        # Which one is first alternates, so that a slow moment of the host falls on both.
        for name in sorted(calls, reverse=turn % 2 == 1):
            started_s = time.process_time()
            calls[name](plan)
            runs[name].append(time.process_time() - started_s)
    ratios = [both / dense for both, dense in zip(runs["both"], runs["dense"], strict=True)]
    tokens = sum(map(len, plan.windows))
    return {
        "texts": len(texts), "tokens": tokens, "ratio": round(statistics.median(ratios), 4),
        "seconds": {name: round(statistics.median(taken), 4) for name, taken in runs.items()},
    }  # fmt: skip


@click.command()
@options.model
@click.option("--tiny", is_flag=True, help="A model made in code for this text.")
@click.option("--made-head", is_flag=True, help="Give the model a head that weighs every token alike.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Text instead of a made one.")
@click.option("--names", type=click.Path(exists=True, path_type=Path), help="Names of it, by blanks.")
@click.option("--segments", default=1500, show_default=True, help="Segments of the made text.")
@click.option("--seed", default=1, show_default=True)
@click.option("--repeat", default=15, show_default=True, help="Pairs of passes that are timed.")
@click.option("--engine", type=click.Choice(["auto", "openvino", "torch"]), default="auto")
@options.as_json
def main(
    model: str, tiny: bool, made_head: bool, text: Path | None, names: Path | None, segments: int, seed: int,
    repeat: int, engine: Any, as_json: bool,
) -> None:  # fmt: skip
    """Print recall@10 of dense and hybrid search, and the time of a pass with sparse vectors."""
    texts, all_names = read_text(text, names) if text else made_text(seed, segments)
    with tempfile.TemporaryDirectory() as folder:
        if tiny:
            model = tiny_model(Path(folder), texts, seed)
        elif made_head:
            model = with_made_head(model, Path(folder))
        elif not has_head(find_model(model or default_model()).folder):
            raise click.UsageError(
                "the model has no sparse head: give --tiny, --made-head or another --model"
            )
        encoder = load_encoder(model, "cpu", engine=engine)
    asked = questions(texts, all_names, seed)
    if not asked:
        raise click.UsageError("no name was found that at most ten segments hold: give --names")
    found = recalls(encoder, texts, asked)
    report = {
        "bench": "names", "model": "tiny" if tiny else "made head" if made_head else encoder.name,
        "segments": len(texts),
        "questions": len(asked), "recall_at_10": found, "cost": cost(encoder, texts[:64], repeat),
        "chars": int(np.mean([len(one) for one in texts])),
    }  # fmt: skip
    if as_json:
        click.echo(orjson.dumps(report).decode())
        return
    for name, value in report.items():
        click.echo(f"{name:>14}  {value}")


if __name__ == "__main__":
    sys.exit(main())
