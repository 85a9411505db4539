"""The unpadded forward pass gives the vectors of the model itself, for each family that it computes."""

from importlib.util import find_spec
from typing import Any

import pytest

from jobworker.handlers.encoder.packed_bert import PackedBert, packed_bert
from jobworker.handlers.encoder.precision_check import min_cosine
from support.tiny_models import attend

# Not imported here: each process of the suite imports all files.
pytestmark = pytest.mark.skipif(not find_spec("torch"), reason="torch: not installed (extra `embedded`)")

PAD, VOCABULARY, WINDOW, HIDDEN = 1, 50, 40, 32
# Lengths differ, one window has one token, and one has the padding token in the middle of its text.
WINDOWS = [[0, 7, 8, 9, 2], [4], [0, 11, PAD, 12, 13, 2], list(range(5, 45))]


def model(family: str, **options: Any) -> Any:
    """A small model whose weights and biases are all random."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        # RoBERTa keeps two positions for padding.
        max_position_embeddings=WINDOW + 2,
        pad_token_id=PAD if family != "bert" else 0,
        **options,
    )
    torch.manual_seed(3)
    core = transformers.AutoModel.from_config(config).eval()
    for weights in core.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    return core


def mean_pooling() -> Any:
    import torch

    class Mean(torch.nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            mask = features["attention_mask"][..., None]
            mean = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
            return features | {"sentence_embedding": mean}

    return Mean()


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_vectors_are_those_of_the_model_itself(family: str) -> None:
    import torch

    core = model(family)
    with torch.inference_mode():
        found = PackedBert(core, attend).embed(WINDOWS, [mean_pooling()], {"task": "document"})
        alone = [core(input_ids=torch.tensor([window])).last_hidden_state.mean(1) for window in WINDOWS]
    assert min_cosine(found.numpy(), torch.cat(alone).numpy()) > 0.99999


@pytest.mark.parametrize(
    ("family", "options"),
    [("bert", {"hidden_act": "relu"}), ("bert", {"is_decoder": True}), ("distilbert", {})],
)
def test_a_model_that_it_does_not_compute_is_left_to_its_own_modules(
    family: str, options: dict[str, Any]
) -> None:
    class First:
        auto_model = model(family, **options)

    assert packed_bert([First(), mean_pooling()]) is None
