"""Forward pass of BERT, RoBERTa and XLM-RoBERTa without padding, for GPUs.

The tokens of all texts of a pass are the rows of one matrix, so a pass is as large as the token budget
whatever the lengths are. Query, key and value are one product; GELU and the residuals are parts of products.
A layer is seven kernels instead of about twenty. Source: FlashBert of text-embeddings-inference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# `model_type` of the configurations whose layers this module computes.
_ZERO_BASED = ("bert",)
# Their positions start after that of the padding token.
_PADDING_BASED = ("roberta", "xlm-roberta", "camembert")
# The rows of a pass are padded for pooling only. The last layer then has at most this many times its tokens.
MAX_POOLED = 4


class PackedBert:
    """The layers of one model, on its device and in its number format."""

    def __init__(self, core: Any, attend: Callable[..., Any]) -> None:
        """`core` is the model in transformers; `attend` is `varlen_attn` of torch, or computes the same."""
        import torch

        self._attend = attend
        kind, embeddings, config = core.config.model_type, core.embeddings, core.config
        self._pad_id: int | None = config.pad_token_id if kind in _PADDING_BASED else None
        self._heads = config.num_attention_heads
        self._words = embeddings.word_embeddings.weight
        # Every token has type 0.
        self._positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self._layers = []
        fold: Any = core.encoder.layer[0].attention.output.dense.bias
        self._norm = _norm(embeddings.LayerNorm, fold)
        for layer, below in zip(core.encoder.layer, [*core.encoder.layer[1:], None], strict=True):
            own, output = layer.attention.self, layer.attention.output
            parts = (own.query, own.key, own.value)
            qkv_w, qkv_b = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
            up, down = layer.intermediate.dense, layer.output.dense
            self._layers.append(
                (
                    *_unfold(qkv_w, qkv_b, output.dense.bias),
                    output.dense.weight.T,
                    _norm(output.LayerNorm, down.bias),
                    *_unfold(up.weight, up.bias, down.bias),
                    down.weight.T,
                    _norm(layer.output.LayerNorm, below.attention.output.dense.bias if below else None),
                )
            )

    @property
    def device(self) -> Any:
        """Where the weights are."""
        return self._words.device

    def embed(self, windows: Sequence[list[int]], modules: Sequence[Any], extras: dict[str, Any]) -> Any:
        """The sentence embeddings of the windows, shape (windows, dim), on the device.

        `modules` are those of the sentence-transformer after the first one, such as the pooling; `extras` are
        the entries of their input that are no tensors.
        """
        return self._embed(windows, modules, extras)[0]

    def embed_both(
        self, windows: Sequence[list[int]], modules: Sequence[Any], extras: dict[str, Any], head: Any
    ) -> tuple[Any, Any]:
        """As `embed`, and what `head` gives for the hidden states: one number a token, without padding."""
        vectors, hidden = self._embed(windows, modules, extras)
        return vectors, head(hidden)

    def _embed(
        self, windows: Sequence[list[int]], modules: Sequence[Any], extras: dict[str, Any]
    ) -> tuple[Any, Any]:
        import torch

        lengths = np.asarray([len(window) for window in windows])
        ids = np.concatenate([np.asarray(window, np.int32) for window in windows])
        starts = np.cumsum(np.concatenate([[0], lengths])).astype(np.int32)
        rows = np.repeat(np.arange(len(windows), dtype=np.int32), lengths)
        columns = np.arange(len(ids), dtype=np.int32) - starts[rows]
        positions = columns if self._pad_id is None else padding_based(ids, starts[rows], self._pad_id)
        # One transfer from pinned memory: others wait for the passes that are queued.
        packed: Any = torch.from_numpy(np.concatenate([ids, positions, rows, columns, starts]))
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        sizes = [len(ids)] * 4 + [len(starts)]
        ids_d, positions_d, rows_d, columns_d, starts_d = packed.split(sizes)
        longest = int(lengths.max())
        hidden = self._forward(ids_d, positions_d, starts_d, longest)
        shape = (len(windows), longest)
        tokens = hidden.new_zeros((*shape, hidden.shape[1]))
        tokens[rows_d, columns_d] = hidden
        # Computed on the device: to set numbers of the host would wait for the passes that are queued.
        mask = (torch.arange(longest, device=self.device) < starts_d.diff()[:, None]).long()
        features = extras | {"token_embeddings": tokens, "attention_mask": mask}
        for module in modules:
            features = module(features)
        return features["sentence_embedding"], hidden

    def _forward(self, ids: Any, positions: Any, starts: Any, longest: int) -> Any:
        """Hidden states of the last layer, shape (tokens, hidden)."""
        import torch
        from torch.nn.functional import embedding

        hidden = self._norm(embedding(ids, self._words) + embedding(positions, self._positions))
        tokens, width = hidden.shape
        for qkv_w, qkv_b, out_w, mid_norm, up_w, up_b, down_w, norm in self._layers:
            states = torch.addmm(qkv_b, hidden, qkv_w).view(tokens, 3, self._heads, -1)
            query, key, value = states.unbind(1)
            attended = self._attend(query, key, value, starts, starts, longest, longest).view(tokens, width)
            hidden = mid_norm(hidden.addmm_(attended, out_w))
            # GELU by its tanh formula, which the product computes without a pass over memory of its own.
            wide = torch._addmm_activation(up_b, hidden, up_w, use_gelu=True)
            hidden = norm(hidden.addmm_(wide, down_w))
        return hidden


def padding_based(ids: Any, starts: Any, pad_id: int) -> Any:
    """Positions as in `create_position_ids_from_input_ids` of transformers, one for each id.

    `starts`: index of the first token of each token's window.
    """
    counted = (ids != pad_id).astype(np.int32)
    before = np.concatenate([[0], np.cumsum(counted)]).astype(np.int32)
    return (before[1:] - before[starts]) * counted + np.int32(pad_id)


def packed_bert(modules: Sequence[Any]) -> PackedBert | None:
    """The packed form of a sentence-transformer with these modules; None if this module does not compute it.

    Its vectors are compared with the model's own by the caller.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or later
    except ImportError:
        return None
    core = getattr(modules[0], "auto_model", None)
    config = getattr(core, "config", None)
    if (
        getattr(config, "model_type", None) not in (*_ZERO_BASED, *_PADDING_BASED)
        or getattr(config, "hidden_act", None) != "gelu"
        or getattr(config, "position_embedding_type", "absolute") != "absolute"
        or getattr(config, "is_decoder", False)
    ):
        return None
    return PackedBert(core, varlen_attn)


def _norm(module: Any, fold: Any) -> Callable[[Any], Any]:
    """The layer norm, whose result has `fold` added: the bias of the product that is added to it next.

    So the product adds its result to the residual in place, without a pass over memory for the sum.
    """
    from torch.nn.functional import layer_norm

    shape, weight, eps = module.normalized_shape, module.weight, module.eps
    bias = module.bias if fold is None else module.bias + fold
    return lambda hidden: layer_norm(hidden, shape, weight, bias, eps)


def _unfold(weight: Any, bias: Any, fold: Any) -> tuple[Any, Any]:
    """A linear layer whose input has `fold` added: the weight for `addmm`, and a bias that takes it away."""
    return weight.T, (bias.float() - weight.float() @ fold.float()).to(bias.dtype)
