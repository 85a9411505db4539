"""Models with random weights in the shapes of real ones: as fast and as large, made on the spot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of an XLM-RoBERTa; `vocabulary` is the rows of its table of word vectors, `window` is in tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    window: int

    @property
    def forward_flops_a_token(self) -> int:
        """Of the matrices alone: what attention adds depends on the length, see `attention_flops`."""
        return 2 * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)

    def attention_flops(self, tokens: int) -> int:
        """Scores and weighted sums of one text of `tokens` tokens."""
        return 4 * self.layers * self.hidden * tokens * tokens


#: BAAI/bge-m3 in segments' lengths (its own window is 8192), and all-MiniLM-L6-v2.
BGE_M3 = Shape(24, 1024, 4096, 16, 250_002, 512)
MINILM = Shape(6, 384, 1536, 12, 30_522, 512)
#: A table of this many rows holds every character that novels use; what memory is measured with.
CHARACTERS = 8192
#: 1 GiB of fp32, of which nearly all is matrices: the table of a real model's words is shared in any case.
ONE_GIB = Shape(21, 1024, 4096, 16, CHARACTERS, 512)

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def write_model(folder: Path, shape: Shape, texts: Iterable[str]) -> Path:
    """Write a model whose tokens are the characters of `texts`; returns its folder.

    sentence-transformers takes the mean of the tokens' vectors, for the folder does not say otherwise.
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
        # The first two are taken by padding.
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
    """An encoder of ours on torch whose transformer is compiled, for any number of rows and tokens."""
    import torch

    encoder._model[0].forward = torch.compile(encoder._model[0].forward, dynamic=True)
    return encoder
