"""Turns a sentence-transformers model into a graph for OpenVINO: a program of its own, run once a model.

``python -m jobworker.handlers.encoder.convert NAME FOLDER REVISION TARGET``
"""

import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import batch_arrays
from .converted_models import Card, Weight
from .find_model import ModelSource
from .openvino import REFERENCE, TOKENIZER
from .openvino_session import MODEL, PRECISION, WEIGHTS, OpenVinoSession, openvino, supported
from .precision_check import SENTENCES, WORTH_IT, cpu_s, exact_enough
from .torch import TorchEncoder

# Matrices of less than this in all stay inside the graph: each process then has its own copy, laid out for
# its processor, and is faster by 2 or 3 % (bench/engines.py). From here on memory counts more.
SHARE_FROM_BYTES = 128 * 1024 * 1024
# Smaller ones are not worth an input of their own.
MATRIX_BYTES = 64 * 1024
# A page, so that no matrix begins in the middle of another's.
ALIGNMENT = 4096


class _Unfit(Exception):
    """A model of a kind that cannot be converted."""


class _Traced(torch.nn.Module):
    """All modules of a model, pooling and normalisation among them, from ids and mask to vectors."""

    def __init__(self, encoder: TorchEncoder) -> None:
        super().__init__()
        self._model = encoder._model
        self._wants_types = encoder._wants_types

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._wants_types:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        vectors: torch.Tensor = self._model(features)["sentence_embedding"]
        return vectors


def convert(source: ModelSource, target: Path) -> None:
    """Fill `target`; a model that cannot be converted leaves a card that says why."""
    try:
        encoder = TorchEncoder.load(source, device="cpu", dtype="fp32", threads=len(os.sched_getaffinity(0)))
        card = _convert(encoder, target)
    except (OSError, MemoryError):
        raise  # of this moment, not of the model: worth another try at the next start
    except Exception as error:
        card = Card(error=f"it cannot be converted ({type(error).__name__}: {str(error)[:300]})")
    card.write(target)


def _convert(encoder: TorchEncoder, target: Path) -> Card:
    if any(getattr(module, "include_prompt", True) is False for module in encoder._model):
        raise _Unfit("its pooling leaves prompts out")
    reference = encoder.probe()
    np.save(target / REFERENCE, reference)
    encoder._tokenizer.save(str(target / TOKENIZER))
    graph = _trace(encoder)
    card = Card(
        max_tokens=encoder.max_tokens,
        pad_id=encoder._pad_id,
        pads_left=encoder._pads_left,
        prefix=encoder._prefix,
        suffix=encoder._suffix,
        normalises=encoder._normalises,
        prompts={purpose: encoder._prompt(purpose) for purpose in ("document", "query")},
        weights=_take_out(graph, target / WEIGHTS),
    )
    openvino.save_model(graph, target / MODEL, compress_to_fp16=False)
    card.dtypes = _fastest_first(encoder, reference, target, card)
    if not card.dtypes:
        raise _Unfit("the converted model gives other vectors")
    return card


def _trace(encoder: TorchEncoder) -> Any:
    # Two rows of unlike lengths, so that the mask is kept in what is traced.
    windows = encoder.tokenize(["one two three four", "one"]).windows
    features = encoder._features(windows, "document")
    example = {name: features[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about branches; the self-check judges the result
        return openvino.convert_model(_Traced(encoder), example_input=example)


# ---- matrices in a file of their own


def _take_out(graph: Any, path: Path) -> dict[str, Weight]:
    """Make the large matrices inputs of the graph and write them to `path`, unless they are few.

    Left in the graph, every process would copy them into a layout of its own. What is left in it, such as
    the table of word vectors, is mapped from the file and shared as it is.
    """
    matrices = [node for node in graph.get_ops() if _is_matrix(node)]
    if sum(node.get_byte_size() for node in matrices) < SHARE_FROM_BYTES:
        return {}
    weights: dict[str, Weight] = {}
    with path.open("wb") as file:
        for node in matrices:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            name = f"weight{len(weights)}"
            rows, columns = node.get_output_shape(0)
            weights[name] = Weight(file.tell(), (rows, columns))
            node.data.tofile(file)
            _replace_by_input(graph, node, name)
    return weights


def _is_matrix(node: Any) -> bool:
    """Whether it is an fp32 constant of two dimensions that is only ever multiplied with from the right."""
    if node.get_type_name() != "Constant" or node.get_byte_size() < MATRIX_BYTES:
        return False
    if len(node.get_output_shape(0)) != 2 or node.get_output_element_type(0) != openvino.Type.f32:
        return False
    users = node.output(0).get_target_inputs()
    return len({_transposed(user) for user in users}) == 1 and all(
        user.get_node().get_type_name() == "MatMul" and user.get_index() == 1 for user in users
    )


def _transposed(user: Any) -> bool:
    return bool(user.get_node().get_attributes().get("transpose_b", False))


def _replace_by_input(graph: Any, node: Any, name: str) -> None:
    users = node.output(0).get_target_inputs()
    rows, columns = node.get_output_shape(0)
    # One side is left open: for an input whose shape is known memory is set aside, and it is copied there.
    # The side that the bias is as long as has to be known.
    shape = [rows, -1] if _transposed(next(iter(users))) else [-1, columns]
    matrix = openvino.opset13.parameter(openvino.PartialShape(shape), openvino.Type.f32, name=name)
    matrix.output(0).get_tensor().set_names({name})
    for user in users:
        user.replace_source_output(matrix.output(0))
    graph.add_parameters([matrix])


# ---- which arithmetic


def _fastest_first(encoder: TorchEncoder, reference: Any, target: Path, card: Card) -> list[str]:
    """The dtypes that are exact enough here; fp32 comes before those that gain little."""
    batch = _arrays(card, encoder.tokenize(["".join(SENTENCES)] * 4).windows[:4])
    cost = {}
    for dtype in PRECISION:
        if dtype not in supported():
            continue
        session = OpenVinoSession(target, card, dtype=dtype, threads=1)
        vectors = [session(*_arrays(card, [window])) for window in encoder.tokenize(SENTENCES).windows]
        together = session(*_arrays(card, encoder.tokenize(SENTENCES).windows))
        if exact_enough(np.concatenate(vectors), reference) and exact_enough(together, reference):
            cost[dtype] = cpu_s(partial(session, *batch)) * (1 if dtype == "fp32" else WORTH_IT)
    return sorted(cost, key=lambda dtype: cost[dtype])


def _arrays(card: Card, windows: list[list[int]]) -> Any:
    return batch_arrays(windows, card.pad_id, left=card.pads_left)


def main() -> None:
    """See the top of the file."""
    name, folder, revision, target = sys.argv[1:]
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    convert(ModelSource(name, Path(folder), revision), Path(target))


if __name__ == "__main__":
    main()
