"""Vectors are those of `SentenceTransformer.encode_document`, or the model is refused with the reason."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder import converted_models, load, model_input
from jobworker.handlers.encoder.base import TextTooLong, TextWithoutTokens
from jobworker.handlers.encoder.find_model import ModelError, ModelSource
from jobworker.handlers.encoder.load import load_encoder
from support.model_zoo import COMPUTED, REFUSED

pytestmark = pytest.mark.model

TEXTS = [
    "the petrel",
    "The petrel came back on Thursday.",
    "宝玉看罢，笑道：“这个。”",
    "petrel had seen the harbour master. the petrel came back.",
    "unknown",
    "master master",
    "petrel",
]
LONG = "Petrel had seen the harbour master on Thursday. The petrel came back. 宝玉看罢笑道。" * 6
ENGINES = ["torch", *(["auto"] if importlib.util.find_spec("openvino") else [])]
#: Models that both engines run; a conversion takes seconds, so those with the same graph are left to torch.
ALL_CONVERTED = (
    *("cls, not normalised", "max", "weightedmean", "lasttoken", "dense after normalize", "cnn", "static"),
    *("router", "router, other order", "bf16", "prompts", "prompts left out", "truncate_dim"),
    *("default prompt beside an empty one", "document_length", "query_length", "truncation left, prompt"),
    *("padding left, xlm-r", "no window stated, xlm-r", "window of four", "no special tokens", "mpnet"),
    *("no special tokens, window of three", "modernbert", "t5", "gpt2, padding left", "llama", "longrope"),
)
#: One for each way through the conversion. `ZOO=all` runs all, which takes minutes.
FEW_CONVERTED = (
    *("cls, not normalised", "static", "router", "prompts", "truncate_dim", "padding left, xlm-r"),
    *("no special tokens", "window of four", "t5", "llama"),
)
CONVERTED = ALL_CONVERTED if os.environ.get("ZOO") == "all" else FEW_CONVERTED
RUNS = [(name, engine) for name in COMPUTED for engine in ENGINES if engine == "torch" or name in CONVERTED]

#: All names of models with a graph or a tokenizer of their own; the others are cut in the same way as one of
#: these. `ZOO=all` runs all.
CUT = {
    *ALL_CONVERTED, *("chat template", "static, truncated", "static, truncated left", "padded to a length"),
    *("document_length, longer", "max_length of processing", "no special tokens by processing"),
    *("truncation left", "padding left", "no window stated", "window beyond positions", "window of nine"),
    *("window beyond positions, xlm-r", "end token only", "start token only", "token twice", "fnet", "xlnet"),
    *("prompt of passages", "default prompt", "bloom", "gpt2", "opt"),
    "dynamic rope within its trained length",
}  # fmt: skip
CUT_RUNS = [(name, engine) for name, engine in RUNS if name in CUT or os.environ.get("ZOO") == "all"]

#: Folders of models on which the conversion ends with a signal.
CRASH_OPENVINO = ("llama",)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Builds a model once; conversions run in this process and go to a cache of their own."""
    from jobworker.handlers.encoder import convert

    root = tmp_path_factory.mktemp("zoo")
    in_subprocess = converted_models._convert_in_subprocess

    def convert_here(source: ModelSource, part: Path) -> None:
        crashes = source.folder.name in CRASH_OPENVINO
        (in_subprocess if crashes else convert.convert)(source, part)

    def build(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            (COMPUTED.get(name) or REFUSED[name][0])(folder)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        # No window here is longer than 11,000 tokens. A static model has none and would read all of 225,000.
        patch.setattr(model_input, "TRIAL_REPEATS", model_input.TRIAL_REPEATS[:2])
        for variable in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
            patch.delenv(variable, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        if "auto" in ENGINES:
            patch.setattr(converted_models, "_convert_in_subprocess", convert_here)
        yield build
    for cached in (load._load, truth_of, true_vector):
        cached.cache_clear()


@functools.cache
def truth_of(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).float().eval()


@functools.cache
def true_vector(folder: Path, purpose: str, text: str) -> Any:
    """Of a text alone: several tests ask for the same."""
    truth = truth_of(folder)
    return (truth.encode_document if purpose == "document" else truth.encode_query)([text])


def alone(encode: Any, texts: Sequence[str]) -> Any:
    return np.concatenate([encode([text]) for text in texts])


def far(ours: Any, truth: Any) -> float:
    """Largest distance of a row to its truth, as a share of its length."""
    assert ours.shape == truth.shape
    return float((np.linalg.norm(ours - truth, axis=1) / np.linalg.norm(truth, axis=1)).max())


@pytest.mark.parametrize(("name", "engine"), RUNS)
def test_vectors_are_those_of_sentence_transformers(name: str, engine: Any, zoo: Any) -> None:
    folder = zoo(name)
    ours = load_encoder(str(folder), "cpu", dtype="fp32", engine=engine)
    for purpose in ("document", "query"):
        texts = [text for text in TEXTS if len(ours.tokenize([text], purpose).windows) == 1]  # type: ignore[arg-type]
        assert texts
        expected = np.concatenate([true_vector(folder, purpose, text) for text in texts])
        own = partial(ours.encode, purpose=purpose)
        assert far(own(texts), expected) < 0.002
        assert far(alone(own, texts), expected) < 0.002
    assert ours.dim == expected.shape[1]
    assert ours.encode([*TEXTS, LONG]).shape == (len(TEXTS) + 1, ours.dim)


@pytest.mark.parametrize(("name", "engine"), CUT_RUNS)
def test_a_truncated_text_has_the_vector_of_sentence_transformers(name: str, engine: Any, zoo: Any) -> None:
    folder = zoo(name)
    if name == "chat template":
        with pytest.raises(ModelError, match="use --long-text windows"):
            load_encoder(str(folder), "cpu", dtype="fp32", engine=engine, long_text="truncate")
        return
    ours = load_encoder(str(folder), "cpu", dtype="fp32", engine=engine, long_text="truncate")
    try:
        expected = true_vector(folder, "document", LONG)
    except (IndexError, RuntimeError):
        # It has no positions for its own window; ours ends where the positions end.
        assert ours.encode([LONG]).shape == (1, ours.dim)
        return
    if ours.tokenize([LONG]).truncated_tokens or "static" in name:
        assert far(ours.encode([LONG]), expected) < 0.002


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["window of four", "no special tokens, window of three"])
def test_a_small_window_rejects_long_texts_only(name: str, engine: Any, zoo: Any) -> None:
    ours = load_encoder(str(zoo(name)), "cpu", dtype="fp32", engine=engine, long_text="reject")
    assert ours.encode(["petrel"]).shape == (1, ours.dim)
    with pytest.raises(TextTooLong):
        ours.encode([LONG])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_text_is_told_where_it_has_no_vector(engine: Any, zoo: Any) -> None:
    ours = load_encoder(str(zoo("no special tokens")), "cpu", dtype="fp32", engine=engine)
    with pytest.raises(TextWithoutTokens, match="without a token") as refused:
        ours.encode(["petrel", "", " "])
    assert refused.value.indexes == (1, 2)
    static = load_encoder(str(zoo("static")), "cpu", dtype="fp32", engine=engine)
    assert np.array_equal(static.encode(["", "petrel"])[0], truth_of(zoo("static")).encode([""])[0])


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_the_reason(name: str, zoo: Any) -> None:
    folder = zoo(name)
    with pytest.raises(ModelError, match=REFUSED[name][1]):
        load_encoder(str(folder), "cpu", engine="torch")
    if "auto" in ENGINES and name == "nan":
        with pytest.raises(ModelError, match=REFUSED[name][1]):
            load_encoder(str(folder), "cpu")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_changed_in_place_has_its_new_vectors(engine: Any, zoo: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(zoo("mean"), tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    before = load_encoder(str(folder), "cpu", dtype="fp32", engine=engine)
    tensors = load_file(path)
    size = path.stat().st_size
    small = {name: tensor + 0.5 for name, tensor in tensors.items() if tensor.ndim == 1}
    save_file(tensors | small, path, metadata={"format": "pt"})
    assert path.stat().st_size == size
    after = load_encoder(str(folder), "cpu", dtype="fp32", engine=engine)
    assert after.revision != before.revision
    truth = alone(truth_of(folder).encode_document, TEXTS)
    assert far(after.encode(TEXTS), truth) < 0.002
    assert far(before.encode(TEXTS), truth) > 0.1


def test_half_precision_keeps_the_length(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobworker.handlers.encoder import torch as torch_encoder

    monkeypatch.setattr(torch_encoder, "is_exact", lambda ours, exact: True)
    half = load_encoder(str(zoo("mean")), "cpu", dtype="bf16", engine="torch")
    assert half.revision.endswith("-bf16")
    assert np.abs(np.linalg.norm(half.encode([*TEXTS, LONG]), axis=1) - 1).max() < 1e-5


def test_a_model_without_bf16_kernels_runs_in_fp32(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    def missing(self: Any, *arguments: Any, **options: Any) -> Any:
        if arguments[:1] == (torch.bfloat16,):
            raise RuntimeError("\"layer_norm\" not implemented for 'BFloat16'")
        return kept(self, *arguments, **options)

    kept = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", missing)
    encoder = load_encoder(str(zoo("cls, not normalised")), "cpu", dtype="bf16", engine="torch")
    assert encoder.revision.endswith("-fp32")
    assert [record.msg for record in caplog.records].count("model.precision_rejected") == 1
