"""Program that converts a sentence-transformers model to an OpenVINO graph; run once a model.

``python -m jobworker.handlers.encoder.convert NAME FOLDER REVISION TARGET``
"""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from jobworker.worker.host.cgroup import usable_cpus

from .base import Purpose, batch_arrays
from .converted_models import SHARE_FROM_BYTES, Card, Weight
from .find_model import ModelSource, check_unchanged
from .openvino import REFERENCE, TOKENIZER
from .openvino_session import MODEL, PRECISION, WEIGHTS, OpenVinoSession, openvino, supported_dtypes
from .precision_check import MIN_SPEEDUP, SENTENCES, fastest_s, is_exact
from .torch import TorchEncoder, rope_types

# Smaller matrices stay in the graph: the gain is less than the overhead of an input.
MATRIX_BYTES = 64 * 1024
# Length of the text that shows whether the graph holds for other lengths than those of the trace.
LONG_TOKENS = 1024
# One memory page, so that no two matrices share one.
ALIGNMENT = 4096


class _NotConvertible(Exception):
    """The model is of a kind that cannot be converted."""


class _TraceableModel(torch.nn.Module):
    """All modules of a model, with pooling and normalisation, as one module from ids and mask to vectors."""

    def __init__(self, encoder: TorchEncoder) -> None:
        super().__init__()
        self._model, self._input = encoder._model, encoder._inputs["document"]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask, **self._input.extras}
        if "token_type_ids" in self._input.tensors:
            features["token_type_ids"] = torch.zeros_like(input_ids)
        vectors: torch.Tensor = self._model(features, task="document")["sentence_embedding"]
        return vectors


def convert(source: ModelSource, target: Path) -> None:
    """Fill the folder `target`. For a model that cannot be converted, the card gives the reason."""
    try:
        encoder = TorchEncoder.load(source, device="cpu", dtype="fp32", threads=usable_cpus())
        card = _convert(encoder, target)
    except (OSError, MemoryError):
        raise  # a fault of the machine, not of the model: the next start tries again
    except Exception as error:
        card = Card(error=f"it cannot be converted ({type(error).__name__}: {str(error)[:300]})")
    # The card is kept under the revision of `source`, so it must not describe other files.
    check_unchanged(source)
    card.write(target)


def _convert(encoder: TorchEncoder, target: Path) -> Card:
    own = encoder._inputs["document"]
    if reason := _not_convertible(encoder):
        raise _NotConvertible(reason)
    reference = encoder.probe()
    np.save(target / REFERENCE, reference)
    own.tokenizer.save(str(target / TOKENIZER))
    graph = _trace(encoder)
    card = Card(
        formats={str(purpose): form for purpose, form in encoder._formats.items()},
        dim=encoder.dim,
        pad_id=own.pad_id,
        pads_left=own.pads_left,
        equal_lengths=encoder._equal_lengths,
        weights=_extract_matrices(graph, target / WEIGHTS),
    )
    openvino.save_model(graph, target / MODEL, compress_to_fp16=False)
    card.dtypes = _rank_dtypes(encoder, reference, target, card)
    if not card.dtypes:
        raise _NotConvertible("the converted model gives other vectors")
    return card


def _not_convertible(encoder: TorchEncoder) -> str | None:
    """Why one graph, one tokenizer and one mask are not enough for the model."""
    document, query = (encoder._inputs.get(purpose) for purpose in get_args(Purpose))
    if document is None or query is None or encoder._refusals:
        return "it embeds no queries"
    if document.is_flat:
        return "it is a static model, which torch runs as fast"
    if any(getattr(module, "include_prompt", True) is False for module in document.modules):
        return "its pooling leaves prompts out"
    if document.modules != query.modules or document.tensors != query.tensors:
        return "its queries take another route than its documents"
    if "longrope" in rope_types(document.modules):
        return "its position encoding (longrope) depends on the length of the text"
    return None


def _trace(encoder: TorchEncoder) -> Any:
    # Two rows of different lengths, so that the traced graph keeps the mask.
    windows = encoder._plan(["one two three four", "one"], "document", "truncate").windows
    features = encoder._features(windows, "document")
    example = {name: features[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of branches; the precision check covers them
        return openvino.convert_model(_TraceableModel(encoder), example_input=example)


# ---- matrices in a separate file


def _extract_matrices(graph: Any, path: Path) -> dict[str, Weight]:
    """Turn large matrices into inputs of the graph and write them to `path`, if they exceed a total size.

    Processes share the mapped file. Each process copies matrices inside the graph into its own layout.
    Other constants, such as the table of word vectors, are mapped from the graph's file and shared anyway.
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
    """Whether it is a two-dimensional fp32 constant that is only the right operand of multiplications."""
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
    # One dimension is dynamic: OpenVINO copies inputs of static shape into memory of its own. The dimension
    # of the bias has to be static.
    shape = [rows, -1] if _transposed(next(iter(users))) else [-1, columns]
    matrix = openvino.opset13.parameter(openvino.PartialShape(shape), openvino.Type.f32, name=name)
    matrix.output(0).get_tensor().set_names({name})
    for user in users:
        user.replace_source_output(matrix.output(0))
    graph.add_parameters([matrix])


# ---- dtypes


def _rank_dtypes(encoder: TorchEncoder, reference: Any, target: Path, card: Card) -> list[str]:
    """Dtypes that pass the precision check, the fastest first; fp32 precedes those that gain too little."""
    form = encoder._formats["document"]
    windows = encoder._probe_windows()
    timed = _arrays(card, encoder._plan(["".join(SENTENCES)] * 4, "document", "truncate").windows)
    long = form.window(_repeat(windows[0], min(form.body_limit, LONG_TOKENS)))
    expected = np.concatenate([reference, encoder._embed([long], "document")])
    cost = {}
    for dtype in PRECISION:
        if dtype not in supported_dtypes():
            continue
        session = OpenVinoSession(target, card, dtype=dtype, threads=1)
        alone = [session(*_arrays(card, [window])) for window in [*windows, long]]
        exact = is_exact(np.concatenate(alone), expected)
        if exact and not card.equal_lengths:
            exact = is_exact(session(*_arrays(card, windows)), reference)
        if exact:
            cost[dtype] = fastest_s(partial(session, *timed)) * (1 if dtype == "fp32" else MIN_SPEEDUP)
    return sorted(cost, key=lambda dtype: cost[dtype])


def _repeat(tokens: list[int], length: int) -> list[int]:
    return (tokens * (length // len(tokens) + 1))[:length]


def _arrays(card: Card, windows: list[list[int]]) -> Any:
    return batch_arrays(windows, card.pad_id, left=card.pads_left)


def main() -> None:
    """Convert the model of the command line."""
    name, folder, revision, target = sys.argv[1:]
    logging.basicConfig(level="WARNING", stream=sys.stderr)
    convert(ModelSource(name, Path(folder), revision), Path(target))


if __name__ == "__main__":
    main()
