"""Models that give no single dense vector per text are refused before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobworker.handlers.encoder.find_model import ModelError, find_model
from jobworker.handlers.encoder.load import load_encoder

SENTENCE_CONFIG, BERT_CONFIG = "config_sentence_transformers.json", "sentence_bert_config.json"
MODULES = "sentence_transformers.models."


def write(folder: Path, files: dict[str, Any]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def modules(*types: str) -> list[dict[str, Any]]:
    return [
        {"idx": index, "name": str(index), "path": f"{index}_part" if index else "", "type": dotted}
        for index, dotted in enumerate(types)
    ]


SPARSE, COLBERT, RERANKER = r"sparse vectors \(SPLADE\)", r"one vector a token \(ColBERT\)", "reranker"
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "sparse encoder": (
        {SENTENCE_CONFIG: {"model_type": "SparseEncoder"}, "modules.json": modules(MODULES + "Transformer")},
        SPARSE,
    ),
    "multi-vector encoder": (
        {SENTENCE_CONFIG: {"model_type": "MultiVectorEncoder"}, "config.json": {}},
        COLBERT,
    ),
    "cross-encoder": ({SENTENCE_CONFIG: {"model_type": "CrossEncoder"}, "config.json": {}}, RERANKER),
    "pylate": ({SENTENCE_CONFIG: {"model_type": "ColBERT"}, "modules.json": []}, COLBERT),
    "a kind of the future": ({SENTENCE_CONFIG: {"model_type": "ToneEncoder"}, "modules.json": []}, "ToneEnc"),
    "splade by its modules": (
        {"modules.json": modules("sentence_transformers.sparse_encoder.models.SpladePooling")},
        SPARSE,
    ),
    "pylate by its modules": (
        {"modules.json": modules(MODULES + "Transformer", "pylate.models.Dense.Dense")},
        COLBERT,
    ),
    "sparse behind a router": (
        {
            "modules.json": modules("sentence_transformers.base.modules.router.Router"),
            "router_config.json": {"types": {"q": "sentence_transformers.sparse_encoder.models.Static"}},
        },
        SPARSE,
    ),
    "reranker by its task": (
        {
            "modules.json": modules(MODULES + "Transformer"),
            BERT_CONFIG: {"transformer_task": "sequence-classification"},
        },
        RERANKER,
    ),
    "bare reranker": ({"config.json": {"architectures": ["XLMRobertaForSequenceClassification"]}}, RERANKER),
    "bare splade": (
        {"config.json": {"architectures": ["DistilBertForMaskedLM"]}},
        "language model or SPLADE",
    ),
    "bare colbert": ({"config.json": {"architectures": ["HF_ColBERT"]}}, COLBERT),
    "bare visual retriever": ({"config.json": {"architectures": ["ColPaliForRetrieval"]}}, COLBERT),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_model_is_refused_with_what_it_gives(kind: str, tmp_path: Path) -> None:
    files, says = OTHERS[kind]
    folder = write(tmp_path, files)
    with pytest.raises(ModelError, match=says) as refused:
        load_encoder(folder, "cpu")
    assert "one dense vector per text" in str(refused.value)


@pytest.mark.parametrize(
    "files",
    [
        {"modules.json": modules(MODULES + "Transformer", MODULES + "Pooling")},
        {SENTENCE_CONFIG: {"model_type": "SentenceTransformer"}, "modules.json": []},
        {"config.json": {"architectures": ["BertModel"]}},
        {"config.json": {"architectures": None}, SENTENCE_CONFIG: "[]"},
        # Heads that modules.json does not use are common among embedding models.
        {"config.json": {"architectures": ["NewForTokenClassification"]}, "modules.json": []},
        {"modules.json": "{", SENTENCE_CONFIG: "nonsense"},
        {"modules.json": "[7, {}]", SENTENCE_CONFIG: "[" * 100_000},
    ],
)
def test_other_folders_are_left_to_sentence_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    assert find_model(write(tmp_path, files)).folder == tmp_path


def test_the_refusal_needs_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path, OTHERS["cross-encoder"][0])
    code = (
        "import sys\n"
        "from jobworker.handlers.encoder.load import load_encoder\n"
        "try: load_encoder(sys.argv[1])\n"
        "except Exception as error: print(error, {'torch', 'openvino'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert RERANKER in done.stdout
    assert done.stdout.endswith("set()\n")
