"""Refusal of models that give no single vector per text, by their configuration files.

sentence-transformers loads such a model as a dense one, with a warning in its log: vectors without meaning.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

KIND = "SentenceTransformer"
#: Kinds of `model_type` in config_sentence_transformers.json, and what they give.
OTHER_KINDS = {
    "SparseEncoder": "sparse vectors (SPLADE)",
    "MultiVectorEncoder": "one vector a token (ColBERT)",
    "ColBERT": "one vector a token (ColBERT)",
    "CrossEncoder": "scores of pairs of texts (reranker)",
}
#: Parts of the dotted name of a module's class.
OTHER_MODULES = {
    "sparse_encoder": OTHER_KINDS["SparseEncoder"],
    "multi_vector_encoder": OTHER_KINDS["MultiVectorEncoder"],
    "pylate": OTHER_KINDS["ColBERT"],
    "cross_encoder": OTHER_KINDS["CrossEncoder"],
}
#: Ends of the architecture's name in the config.json of a model without modules.json.
OTHER_ARCHITECTURES = {
    "ForSequenceClassification": OTHER_KINDS["CrossEncoder"],
    "ForMaskedLM": "predictions of words (language model or SPLADE)",
    "ForTokenClassification": "classes of tokens",
    "ForQuestionAnswering": "answers to questions",
    "ForRetrieval": OTHER_KINDS["ColBERT"],
    "ColBERT": OTHER_KINDS["ColBERT"],
}
#: Heads of the transformer that give no token embeddings, by `transformer_task`.
OTHER_TASKS = {
    "sequence-classification": OTHER_KINDS["CrossEncoder"],
    "fill-mask": OTHER_KINDS["SparseEncoder"],
    "text-generation": "texts or scores (language model)",
    "any-to-any": "texts or scores (language model)",
    "retrieval": OTHER_KINDS["ColBERT"],
}


def other_kind(folder: Path) -> str | None:
    """What the model in `folder` gives instead of a dense vector per text; None if it is not known to."""
    stated = _object(folder / "config_sentence_transformers.json").get("model_type") or KIND
    if stated != KIND:
        return OTHER_KINDS.get(str(stated), f"what a {stated} gives")
    modules = _read(folder / "modules.json")
    if modules is None:
        return _by_architecture(_object(folder / "config.json"))
    for dotted, path in _modules(folder, modules):
        for part, gives in OTHER_MODULES.items():
            if part in dotted.split("."):
                return gives
        task = _object(path / "sentence_bert_config.json").get("transformer_task")
        if isinstance(task, str) and task in OTHER_TASKS:
            return OTHER_TASKS[task]
    return None


def _by_architecture(config: dict[str, Any]) -> str | None:
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        for end, gives in OTHER_ARCHITECTURES.items():
            if str(name).endswith(end):
                return gives
    return None


def _modules(folder: Path, modules: Any) -> Iterator[tuple[str, Path]]:
    """Dotted class and folder of every module, those behind a router among them."""
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict):
            path = folder / str(module.get("path", ""))
            yield str(module.get("type", "")), path
            routed = _object(path / "router_config.json").get("types")
            for name, dotted in routed.items() if isinstance(routed, dict) else ():
                yield str(dotted), path / str(name)


def _object(path: Path) -> dict[str, Any]:
    content = _read(path)
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> Any:
    """Content of a JSON file; None if it is missing or damaged, which sentence-transformers tells better."""
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
