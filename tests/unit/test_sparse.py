"""Sparse vectors are those of FlagEmbedding's formula, by every engine and from every form of the head."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder.find_model import find_model
from jobworker.handlers.encoder.packed_bert import PackedBert
from jobworker.handlers.encoder.sparse_head import has_head, sparse_vectors
from jobworker.handlers.sparse_vector import NOTHING
from support.tiny_models import HIDDEN, add_sparse_head, attend, tiny_model, tiny_tokenizer

TEXTS = [
    "The petrel came back on Thursday, the petrel had seen the harbour.",
    "宝玉看罢，笑道：“这个。” unknown",
    "the",
]


@pytest.fixture(autouse=True)
def torch() -> Any:
    """Imported by the first test: the import takes seconds, in every process that collects the tests."""
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("torch")


def reference(folder: Path, text: str, kind: str) -> dict[int, float]:
    """FlagEmbedding: relu(linear(last state)); the largest weight of each token; special ones dropped."""
    import torch
    from transformers import AutoModel

    core = AutoModel.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer(kind)
    head = torch.nn.Linear(core.config.hidden_size, 1)
    head.load_state_dict(torch.load(folder / "sparse_linear.pt", weights_only=True))
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        states = core(input_ids=torch.tensor([ids])).last_hidden_state
        weights = torch.relu(head(states)).squeeze(-1)[0].tolist()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "bert" else ["<s>", "<pad>", "</s>", "<unk>"]
    special = set(tokenizer.convert_tokens_to_ids(names))
    found: dict[int, float] = {}
    for weight, id_ in zip(weights, ids, strict=True):
        if id_ not in special and weight > found.get(id_, 0.0):
            found[id_] = weight
    return found


def engines() -> list[str]:
    return ["torch", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


def load(folder: Path, engine: str) -> Any:
    from jobworker.handlers.encoder.torch import TorchEncoder

    source = find_model(str(folder))
    if engine == "torch":
        return TorchEncoder.load(source, dtype="fp32")
    from jobworker.handlers.encoder.convert import convert
    from jobworker.handlers.encoder.converted_models import Card
    from jobworker.handlers.encoder.openvino import OpenVinoEncoder

    target = folder.with_name("converted")
    target.mkdir()
    convert(source, target)
    assert not Card.read(target).error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jobworker.handlers.encoder.openvino.find_or_convert", lambda one: (target, Card.read(target))
        )
        return OpenVinoEncoder.load(source, dtype="fp32", threads=1, long_text="windows", token_budget=4096)


@pytest.mark.model
@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
def test_weights_are_those_of_the_reference(kind: str, engine: str, tmp_path: Path) -> None:
    folder = add_sparse_head(tiny_model(tmp_path / "m", kind, pooling="cls", window=36))
    encoder = load(folder, engine)
    assert encoder.has_sparse
    plan = encoder.tokenize(TEXTS)
    vectors, sparse = encoder.forward_both(plan)
    assert np.array_equal(vectors, encoder.forward(plan))
    for text, ours in zip(TEXTS, sparse, strict=True):
        theirs = reference(folder, text, kind)
        assert ours.as_dict().keys() == theirs.keys()
        assert [*ours.as_dict().values()] == pytest.approx(
            [theirs[id_] for id_ in ours.ids.tolist()], abs=1e-3
        )
    assert sum(map(len, (one.ids for one in sparse))) > 5, "the test needs weights"


@pytest.mark.model
def test_the_unpadded_pass_gives_the_same_weights(tmp_path: Path) -> None:
    folder = add_sparse_head(tiny_model(tmp_path / "m", "xlm-r", pooling="cls", window=36))
    encoder = load(folder, "torch")
    plan = encoder.tokenize(TEXTS)
    padded = encoder.forward_both(plan)
    encoder._packed = PackedBert(encoder._inputs["document"].modules[0].auto_model, attend)
    packed = encoder.forward_both(plan)
    assert np.allclose(packed.vectors, padded.vectors, atol=1e-3)
    for one, other in zip(packed.sparse, padded.sparse, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.allclose(one.weights, other.weights, atol=1e-3)


@pytest.mark.model
def test_a_long_text_has_the_largest_weight_of_all_its_windows(tmp_path: Path) -> None:
    encoder = load(add_sparse_head(tiny_model(tmp_path / "m", "xlm-r", window=12)), "torch")
    text = " ".join(TEXTS[:1] * 3)
    plan = encoder.tokenize([text])
    assert len(plan.windows) > 1
    _, weights = encoder._embed_both(plan.windows, "document")
    ids = np.concatenate(plan.windows)
    (sparse,) = encoder.forward_both(plan).sparse
    for id_, weight in sparse.as_dict().items():
        assert weight == pytest.approx(weights[ids == id_].max())


@pytest.mark.model
@pytest.mark.parametrize("form", ["sparse_linear.safetensors", "model.safetensors"])
def test_the_head_may_be_in_safetensors(form: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "xlm-r")
    assert not has_head(folder)
    assert has_head(add_sparse_head(folder, form))
    assert load(folder, "torch").has_sparse


@pytest.mark.model
@pytest.mark.parametrize("fault", ["shape", "not a file of torch", "a pickle of code"])
def test_a_head_that_cannot_be_used_leaves_the_dense_model(
    fault: str, torch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = add_sparse_head(tiny_model(tmp_path / "m", "xlm-r"), hidden=HIDDEN + 1)
    if fault == "not a file of torch":
        (folder / "sparse_linear.pt").write_bytes(b"none")
    elif fault == "a pickle of code":
        torch.save(Path, folder / "sparse_linear.pt")
    assert not load(folder, "torch").has_sparse
    assert "model.sparse_rejected" in caplog.messages


def test_special_tokens_and_texts_without_weights() -> None:
    weights = np.array([0.9, 0.2, 0.5, 0.9, 0.0, 0.7], np.float32)
    one, empty, last = sparse_vectors([[0, 7, 7], [0, 3], [9]], [0, 1, 2], weights, {0}, 3)
    assert [one.as_dict(), empty.as_dict(), last.as_dict()] == [
        {7: pytest.approx(0.5)},
        {},
        {9: pytest.approx(0.7)},
    ]
    assert sparse_vectors([[0]], [0], np.ones(1, np.float32), {0}, 1) == [NOTHING]
