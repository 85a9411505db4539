"""Sentence-transformers models with random weights, a few hundred KiB each, in the tested variants."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HIDDEN = 32
WORDS = (
    *("the", "petrel", "came", "back", "on", "thursday", "nobody", "had", "seen", "harbour", "master"),
    *"宝玉看罢笑道这个",
    *("query", "passage"),
)
MARKS = tuple(":。，？“”.,")
SPECIALS = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "xlm-r": ("<s>", "<pad>", "</s>", "<unk>")}


def tiny_model(
    folder: Path,
    kind: str,
    *,
    pooling: str = "mean",
    normalise: bool = True,
    prompts: Mapping[str, str] | None = None,
    include_prompt: bool = True,
    window: int = 24,
    dtype: str = "float32",
) -> Path:
    """Write a model of `kind` (`bert`, `xlm-r`) with this pooling (`mean`, `cls`) and return its folder."""
    folder.mkdir(parents=True)
    for name, content in _saved(kind, dtype).items():
        (folder / name).write_bytes(content)
    _modules(folder, pooling, normalise, prompts or {}, include_prompt, window)
    return folder


@functools.cache
def _saved(kind: str, dtype: str) -> dict[str, bytes]:
    """Files of a transformer and its tokenizer: a hundred tests ask for the same few."""
    import torch
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    shape: dict[str, Any] = {
        "vocab_size": len(SPECIALS[kind]) + len(WORDS) + len(MARKS),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "initializer_range": 0.5,
    }
    torch.manual_seed(7)
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(**shape, pad_token_id=0))
    else:
        model = XLMRobertaModel(XLMRobertaConfig(**shape, pad_token_id=1, type_vocab_size=1))
    with TemporaryDirectory() as folder:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tiny_tokenizer(kind).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def add_sparse_head(folder: Path, form: str = "sparse_linear.pt", *, hidden: int = HIDDEN) -> Path:
    """Give a model a sparse head like that of bge-m3, in a pickle, in safetensors or in the model's file."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(11)
    head = {"weight": torch.randn(1, hidden) * 0.3, "bias": torch.tensor([2.5])}
    if form.endswith(".pt"):
        torch.save(head, folder / form)
    elif form == "model.safetensors":
        whole = load_file(folder / form) | {f"sparse_linear.{name}": one for name, one in head.items()}
        save_file(whole, folder / form, {"format": "pt"})
    else:
        save_file(head, folder / form)
    return folder


def attend(query: Any, key: Any, value: Any, starts: Any, _: Any, *longest: int) -> Any:
    """What `varlen_attn` of torch computes, which needs a GPU."""
    import torch

    parts = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        window = (one[start:end].transpose(0, 1) for one in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*window).transpose(0, 1))
    return torch.cat(parts)


def tiny_tokenizer(kind: str) -> Any:
    """The tokenizer of the tiny models of `kind`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIALS[kind], *WORDS, *MARKS])}
    bert = kind == "bert"
    first, last = ("[CLS]", "[SEP]") if bert else ("<s>", "</s>")
    unknown, pad = ("[UNK]", "[PAD]") if bert else ("<unk>", "<pad>")
    tokenizer = Tokenizer(WordLevel(words, unknown))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, words[first]), (last, words[last])]
    )
    names = ["input_ids", *(["token_type_ids"] if bert else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad, model_input_names=names
    )


def _modules(
    folder: Path, pooling: str, normalise: bool, prompts: Mapping[str, str], include: bool, window: int
) -> None:
    paths = {"": "Transformer", "1_Pooling": "Pooling", **({"2_Normalize": "Normalize"} if normalise else {})}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
        for place, (path, name) in enumerate(paths.items())
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": window, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": dict(prompts), "default_prompt_name": None},
        "1_Pooling/config.json": {
            "word_embedding_dimension": HIDDEN,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "include_prompt": include,
        },
    }
    for path in paths:
        (folder / path).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
