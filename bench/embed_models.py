"""Models with random weights and the shapes of real ones: equal speed and size, without a download."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Shape of an XLM-RoBERTa; `vocabulary` is the number of token embeddings, `window` is in tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    window: int

    @property
    def forward_flops_a_token(self) -> int:
        """FLOPs of the matrices; those of attention depend on the length, see `attention_flops`."""
        return 2 * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)

    def attention_flops(self, tokens: int) -> int:
        """FLOPs of scores and weighted sums for one text of `tokens` tokens."""
        return 4 * self.layers * self.hidden * tokens * tokens


#: BAAI/bge-m3 with the window of segments (its own is 8192), and all-MiniLM-L6-v2.
BGE_M3 = Shape(24, 1024, 4096, 16, 250_002, 512)
MINILM = Shape(6, 384, 1536, 12, 30_522, 512)
#: Enough tokens for every character of a novel; used to measure memory.
CHARACTERS = 8192
#: 1 GiB of fp32, nearly all of it matrices: the token embeddings of a real model are shared in any case.
ONE_GIB = Shape(21, 1024, 4096, 16, CHARACTERS, 512)

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def write_model(folder: Path, shape: Shape, texts: Iterable[str]) -> Path:
    """Write a model whose tokens are the characters of `texts`; returns its folder.

    The folder configures no pooling, so sentence-transformers uses the mean of the token vectors.
    """
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        # The first two positions are reserved for padding.
        max_position_embeddings=shape.window + 2,
        type_vocab_size=1,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    _tokenizer(sorted(set().union(*texts)), shape).save_pretrained(folder)
    return folder


def _tokenizer(characters: list[str], shape: Shape) -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIALS, *characters][: shape.vocabulary]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(numbers, "<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    ends = [(word, numbers[word]) for word in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=shape.window,
        model_input_names=["input_ids", "attention_mask"],
    )


def compiled(encoder: Any) -> Any:
    """Compile the transformer of a torch encoder, for any number of rows and tokens."""
    import torch

    encoder._model[0].forward = torch.compile(encoder._model[0].forward, dynamic=True)
    return encoder
