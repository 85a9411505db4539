"""OpenVINO gives the model's own vectors without torch, and torch runs the models that it cannot."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobworker.handlers.encoder import converted_models
from jobworker.handlers.encoder.converted_models import find_or_convert
from jobworker.handlers.encoder.find_model import find_model
from jobworker.handlers.encoder.load import load_encoder
from support.tiny_models import tiny_model

if importlib.util.find_spec("openvino") is None:
    pytest.skip("OpenVINO: not installed (extra `openvino`)", allow_module_level=True)

TEXTS = [
    "The petrel came back on Thursday.",
    "",
    "宝玉看罢，笑道：“这个。”",
    "petrel had seen the harbour master. " * 2,
    "unknown words entirely",
]
LONG = "Petrel had seen the harbour master on Thursday. The petrel came back. 宝玉看罢笑道。" * 6
PROMPTS = {"query": "query: ", "document": "passage: "}


def cosines(left: Any, right: Any) -> Any:
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own; conversions in it are shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("cache")
    before = {name: os.environ.pop(name, None) for name in ("CACHE_DIRECTORY", "STATE_DIRECTORY")}
    before["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def here(cache: Path) -> Any:
    """Conversions within this process: a test does not pay for importing torch each time."""
    from jobworker.handlers.encoder.convert import convert

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted_models, "_convert_in_subprocess", convert)
        yield


SHAPES = {
    "bert-mean": {"kind": "bert", "prompts": PROMPTS},
    "bert-cls-long": {"kind": "bert", "pooling": "cls", "normalise": False},
    "xlm-r-cls": {"kind": "xlm-r", "pooling": "cls"},
    "xlm-r-mean-bf16": {"kind": "xlm-r", "dtype": "bfloat16", "prompts": {"query": "query: "}},
}


@pytest.mark.model
@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_prompts_and_norm_are_the_models_own(
    shape: str, engine: Any, here: None, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tiny_model(tmp_path / shape, **SHAPES[shape])
    ours = load_encoder(str(folder), "cpu", dtype="fp32", engine=engine)
    plain = SentenceTransformer(str(folder), device="cpu").float()
    for purpose, encode in (("document", plain.encode_document), ("query", plain.encode_query)):
        expected = encode(TEXTS)
        vectors = ours.encode(TEXTS, purpose)  # type: ignore[arg-type]
        assert cosines(vectors, expected).min() >= 0.9999
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.linalg.norm(expected, axis=1), rel=1e-3)
    assert (ours.max_tokens, ours.dim) == (24, 32)


@pytest.mark.model
def test_both_engines_make_the_same_windows_and_counts(here: None, tmp_path: Path) -> None:
    folder = str(tiny_model(tmp_path / "model", "bert", prompts=PROMPTS))
    by: Any = {
        engine: load_encoder(folder, "cpu", dtype="fp32", engine=engine)  # type: ignore[arg-type]
        for engine in ("openvino", "torch")
    }
    assert by["openvino"].tokenize([LONG, "petrel"]) == by["torch"].tokenize([LONG, "petrel"])
    vectors = {engine: encoder.encode([LONG, *TEXTS]) for engine, encoder in by.items()}
    assert cosines(vectors["openvino"], vectors["torch"]).min() >= 0.9999
    assert by["openvino"].counters == by["torch"].counters
    assert by["openvino"].counters["truncated_tokens"] == 0
    # What one engine has put into the cache is not the other's.
    assert by["openvino"].revision != by["torch"].revision


@pytest.mark.model
def test_matrices_outside_the_graph_give_the_same_vectors(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobworker.handlers.encoder import convert as torch_convert

    monkeypatch.setattr(torch_convert, "SHARE_FROM_BYTES", 0)
    monkeypatch.setattr(torch_convert, "MATRIX_BYTES", 0)
    folder = tiny_model(tmp_path / "shared", "xlm-r", pooling="cls")
    ours = load_encoder(str(folder), "cpu", dtype="fp32", engine="openvino")
    path, card = find_or_convert(find_model(str(folder)))
    assert len(card.weights) == 2 * 6  # query, key, value, output, and two of the feed-forward, a layer
    assert (path / "weights.bin").stat().st_size >= 4 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    theirs = load_encoder(str(folder), "cpu", dtype="fp32", engine="torch")
    assert cosines(ours.encode([LONG, *TEXTS]), theirs.encode([LONG, *TEXTS])).min() >= 0.9999
    # Read where they lie in the file, by every process that has it open: no page became this one's own.
    in_use, copied = mapped_kib(path / "weights.bin")
    assert in_use > 0
    assert copied == 0


def mapped_kib(file: Path) -> tuple[int, int]:
    """How much of a file this process has mapped and touched, and how much of that it has changed."""
    found = {"Rss": 0, "Anonymous": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] += int(value.split()[0]) if inside else 0
        elif "-" in line.split()[0]:
            inside = line.endswith(str(file))
    return found["Rss"], found["Anonymous"]


@pytest.mark.model
def test_a_model_with_prompts_outside_its_mean_is_run_by_torch(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from jobworker.handlers.encoder.torch import TorchEncoder

    folder = tiny_model(tmp_path / "model", "bert", prompts=PROMPTS, include_prompt=False)
    for _ in range(2):
        assert isinstance(load_encoder(str(folder), "cpu", token_budget=2048), TorchEncoder)
    errors = [vars(record)["error"] for record in caplog.records if record.msg == "model.engine_fallback"]
    assert all("leaves prompts out" in error for error in errors)
    assert errors


@pytest.mark.model
def test_a_worker_needs_no_torch_and_converts_in_a_process_of_its_own(cache: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "bert")
    code = (
        "import sys\n"
        "from jobworker.handlers.encoder.load import load_encoder\n"
        "encoder = load_encoder(sys.argv[1], 'cpu', engine='openvino')\n"
        "heavy = {'torch', 'transformers', 'openvino_telemetry.main'} & set(sys.modules)\n"
        "print(encoder.encode(['petrel']).shape, heavy)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert done.stdout == "(1, 32) set()\n", done.stderr


@pytest.mark.model
def test_a_dtype_that_fails_the_precision_check_is_not_used(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny_model(tmp_path / "model", "bert"))
    path, card = find_or_convert(find_model(folder))
    exact = np.load(path / "reference.npy")
    # As if every arithmetic had gone wrong: another model's vectors stand in the reference.
    np.save(path / "reference.npy", -exact)
    from jobworker.handlers.encoder.torch import TorchEncoder

    assert isinstance(load_encoder(folder, "cpu", dtype="bf16"), TorchEncoder)
    rejected = [vars(record) for record in caplog.records if record.msg == "model.precision_rejected"]
    assert [(one["dtype"], one["cosine"] < 0) for one in rejected] == [("bf16", True), ("fp32", True)]
    (fallback,) = (vars(record) for record in caplog.records if record.msg == "model.engine_fallback")
    assert "does not give the vectors of the original" in fallback["error"]
    np.save(path / "reference.npy", exact)
    assert card.dtypes


@pytest.mark.model
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_half_precision_is_used_on_request_if_it_is_exact(
    engine: Any, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from jobworker.handlers.encoder import openvino as openvino_encoder
    from jobworker.handlers.encoder import torch as torch_encoder

    folder = str(tiny_model(tmp_path / "model", "bert"))
    for module in (openvino_encoder, torch_encoder):
        # Of a model this small little is left in half precision.
        monkeypatch.setattr(module, "is_exact", lambda ours, exact: cosines(ours, exact).min() >= 0.9)
    half = load_encoder(folder, "cpu", dtype="bf16", engine=engine)
    whole = load_encoder(folder, "cpu", dtype="fp32", engine=engine)
    assert (half.revision[-4:], whole.revision[-4:]) == ("bf16", "fp32")
    assert cosines(half.encode(TEXTS), whole.encode(TEXTS)).min() >= 0.9
    monkeypatch.setattr(torch_encoder, "is_exact", lambda ours, exact: False)
    safer = load_encoder(folder, "cpu", dtype="bf16", engine="torch", threads=2)
    assert safer.revision.endswith("-torch-fp32")
    (rejected,) = (vars(record) for record in caplog.records if record.msg == "model.precision_rejected")
    assert (rejected["dtype"], rejected["cosine"] > 0.9) == ("bf16", True)


@pytest.mark.model
@pytest.mark.parametrize(
    ("has_bf16", "half_s", "runs_in"),
    [(True, 0.8, "bf16"), (True, 0.95, "fp32"), (True, 1.4, "fp32"), (False, 0.1, "fp32")],
)
def test_torch_uses_bf16_if_the_processor_gains_from_it(
    has_bf16: bool, half_s: float, runs_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from jobworker.handlers.encoder import torch as torch_encoder

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16, "avx2": True})
    monkeypatch.setattr(torch_encoder, "is_exact", lambda ours, exact: True)
    costs = iter([1.0, half_s])  # of full precision first
    monkeypatch.setattr(torch_encoder, "fastest_s", lambda run: next(costs))
    folder = str(tiny_model(tmp_path / "model", "bert"))
    encoder = load_encoder(folder, "cpu", engine="torch")
    assert encoder.revision.endswith(f"-torch-{runs_in}")
