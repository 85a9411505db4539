"""Torch encoder for sentence-transformers models; imports torch when a model is loaded."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from .base import (
    MAX_ROWS,
    TOKEN_BUDGET,
    LongText,
    Plan,
    Purpose,
    Tokens,
    Vectors,
    WindowedEncoder,
    batch_arrays,
    cpu_budget,
)
from .find_model import ModelError, ModelSource
from .model_input import TRIAL_WORDS, ModelInput, learn_input, observe
from .packed_bert import MAX_POOLED, PackedBert, packed_bert
from .packing import MIN_PADDING_TOKENS, is_out_of_memory, pack, pack_unpadded
from .precision_check import MIN_SPEEDUP, SENTENCES, Dtype, dtypes_to_try, fastest_s, is_exact, min_cosine
from .sparse_head import SparseHead
from .unknown_tokens import unknown_token_id

log = logging.getLogger("jobworker.model")

# Texts whose vectors are compared at load; their lengths differ, so that batches of them are padded.
TRIAL_TEXTS = (SENTENCES[0], SENTENCES[2], SENTENCES[3], TRIAL_WORDS[0])
# Tokens of a model whose positions do not end.
UNLIMITED = 2**31
# Largest relative difference to the vectors of sentence-transformers: rounding gives less than a tenth of it.
MAX_DIFFERENCE = 0.005
# On a GPU, half precision is several times as fast. fp16 is more exact, bf16 does not overflow.
GPU_DTYPES: tuple[Dtype, ...] = ("fp16", "bf16")
# Rows of one unpadded pass, which has no dimension of texts before the pooling.
MAX_PACKED_ROWS = 4096
# Tokens of the large pass in the measurement of what starting a pass costs: 25 ms on an H100, where a small
# pass takes as long.
TRIAL_TOKENS = 8192
# Features of processors that multiply in bf16. On some of them it is twice as fast as fp32, on others slower
# (bench/engines.py), so its speed is measured at load.
CPU_BF16 = ("avx512_bf16", "amx_bf16")


class TorchEncoder(WindowedEncoder):
    """A sentence-transformers model with its own modules, pooling and normalisation."""

    def __init__(self, model: Any, source: ModelSource, *, long_text: LongText, token_budget: int) -> None:
        """`model` is a SentenceTransformer in fp32 on its device.

        Raises ModelError if its vectors cannot be computed here; compares some with its own.
        """
        super().__init__(long_text)
        self._model, self._source = model, source
        self.name, self.revision = source.name, source.revision_by("torch", "fp32")
        self._budget = token_budget
        #: Why texts of a purpose cannot be embedded; not for documents, without which the model is refused.
        self._refusals: dict[Purpose, str] = {}
        self._inputs: dict[Purpose, ModelInput] = {}
        self._positions = UNLIMITED
        self._head: SparseHead | None = None
        #: Computes the first module without padding, in half precision on a GPU.
        self._packed: PackedBert | None = None
        #: Tokens of padding that cost less than another pass.
        self._pass_tokens = MIN_PADDING_TOKENS
        try:
            self._learn("document")
        except ModelError as error:
            raise ModelError(f"model {source.name} cannot be used: {error}") from error
        try:
            self._learn("query")
        except ModelError as error:
            self._refusals["query"] = f"model {source.name} cannot embed queries: {error}"
        self.max_tokens = self._formats["document"].max_tokens
        self.unknown_id = unknown_token_id(self._inputs["document"].tokenizer)
        if model.device.type == "cpu":
            self._budget = cpu_budget(token_budget, self.dim)
        self._read_head()

    def _read_head(self) -> None:
        """Use the model's sparse head, if it has one that fits its hidden states."""
        document = self._inputs["document"]
        if document.is_flat or "query" in self._refusals:
            return
        config = getattr(getattr(document.modules[0], "auto_model", None), "config", None)
        hidden = getattr(config, "hidden_size", 0)
        self._head = SparseHead.read(self._source.folder, hidden, self._model.device)
        self.has_sparse = self._head is not None
        self._dropped = special_ids(document)

    def _learn(self, purpose: Purpose) -> None:
        """Learn how the model takes texts of a purpose, then compare with the model itself."""
        document = self._inputs.get("document")
        learned = learn_input(self._model, purpose, document)
        # Most models compute queries as documents, with another prompt at most. They load faster so.
        known = document is not None and document.modules == learned.modules
        limit = self._positions if known else position_limit(self._model, purpose, learned)
        window = min(learned.form.max_tokens, limit)
        if purpose == "document":
            self._positions = limit
        self._inputs[purpose] = learned
        self._formats[purpose] = msgspec.structs.replace(learned.form, max_tokens=window)
        if self._long_text == "truncate" and learned.truncated and window == learned.form.max_tokens:
            text, kept = learned.truncated
            if self._plan([text], purpose, "truncate").windows != [kept]:
                raise ModelError("it truncates in a way of its own: use --long-text windows or reject")
        rope = rope_types(learned.modules)
        if window > rope.get("dynamic", window):
            raise ModelError("its position encoding (dynamic RoPE) depends on the texts embedded before")
        self._equal_lengths = self._equal_lengths or "longrope" in rope
        self._compare(purpose, whole=not known)

    def _compare(self, purpose: Purpose, *, whole: bool) -> None:
        """Compare with what the model itself gives for each trial text alone: tokens; if `whole`, vectors."""
        windows: list[list[int]] = []
        vectors: list[Vectors] = []
        for text in map(partial(self._shorten, purpose=purpose), TRIAL_TEXTS):
            (window,) = self._plan([text], purpose, "truncate").windows
            if not window:
                continue
            truth = observe(self._model, text, purpose, whole=whole)
            if window != truth.ids:
                raise ModelError(f"the text {text[:20]!r} has other tokens than in sentence-transformers")
            if not whole:
                continue
            if not windows and purpose == "document":
                self.dim = len(truth.vector)
            vectors.append(self._embed([window], purpose))
            off = difference(self._finish(vectors[-1], purpose), truth.vector[None])
            if not off <= MAX_DIFFERENCE:
                raise ModelError(f"its vectors differ from those of sentence-transformers (by {off:.1%})")
            windows.append(window)
        if whole and not self._inputs[purpose].is_flat:
            self._check_padding(windows, np.concatenate(vectors), purpose)

    def _shorten(self, text: str, purpose: Purpose) -> str:
        """The text, or a part for which the model has positions: it fails on a longer one."""
        own, form = self._inputs[purpose], self._formats[purpose]
        while form.max_tokens < own.form.max_tokens and len(text) > 1:
            if len(self._tokenize([form.prompt + text], purpose)[0].ids) <= form.body_limit:
                break
            text = text[: len(text) // 2]
        return text

    def _check_padding(self, windows: list[list[int]], alone: Vectors, purpose: Purpose) -> None:
        """Find out whether texts have other vectors in a batch than alone; then texts are never padded."""
        together = self._to_numpy(self._pass(windows, purpose))
        if not (off := difference(together, alone)) <= MAX_DIFFERENCE:
            self._equal_lengths = True
        if self._equal_lengths:
            log.info("model.padding_avoided", extra={"model": self.name, "difference": round(off, 3)})

    def _check_complete(self) -> None:
        """Raises ModelError if the vectors depend on weights that are not in the files but drawn at load.

        Some are drawn in many models, such as those of a pooler that is not used, so the vectors decide.
        """
        import torch

        text = " ".join([self._inputs["document"].word] * 3)
        ours = observe(self._model, text, "document").vector
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # torch starts with another one
            twin, _ = _read_model(self._source, "cpu")
        if not difference(observe(twin, text, "document").vector[None], ours[None]) <= MAX_DIFFERENCE:
            raise ModelError(f"model {self.name} lacks weights: each load would give other vectors")

    @classmethod
    def load(
        cls,
        source: ModelSource,
        *,
        device: str = "cpu",
        threads: int = 1,
        long_text: LongText = "windows",
        token_budget: int = TOKEN_BUDGET,
        dtype: str = "auto",
    ) -> "TorchEncoder":
        """Load the weights to `device` (`cpu`, `cuda:N`) in the first dtype that passes the precision check.

        `threads`: CPU threads of the forward pass. Raises ModelError if the folder holds no usable model.
        """
        # Read by the tokenizer's thread pool at its first use.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        import torch
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        if device != "cpu" and torch.cuda.device_count() == 0:
            raise ModelError(f"--device {device}: torch {torch.__version__} finds no usable CUDA device")
        complete = False
        for step in dtypes_to_try(dtype, _cpu_dtypes() if device == "cpu" else GPU_DTYPES):
            # Read again for each step: rounded weights cannot be restored.
            model, is_random = _read_model(source, device)
            encoder = cls(model, source, long_text=long_text, token_budget=token_budget)
            if is_random and not complete:
                encoder._check_complete()
            complete = True
            if step == "fp32" or encoder._reduce_precision(step, timed=dtype == "auto" and device == "cpu"):
                break
        if device != "cpu" and not encoder._packed:
            encoder._measure_pass()
        log.info(
            "model.loaded",
            extra={"model": source.name, "engine": "torch", "device": device, "dtype": step},
        )
        return encoder

    def _measure_pass(self) -> None:
        """Find the number of tokens that a GPU computes in the time that starting a pass takes."""
        if self._inputs["document"].is_flat:
            return
        window = self._probe_windows()[0]
        length = min(self.max_tokens, TRIAL_TOKENS)
        many = [(window * length)[:length]] * (TRIAL_TOKENS // length)
        small_s, large_s = (
            fastest_s(partial(self._embed, windows, "document"), time.perf_counter)
            for windows in ([window], many)
        )
        self._pass_tokens = max(MIN_PADDING_TOKENS, int(TRIAL_TOKENS * min(1.0, small_s / large_s)))

    def _reduce_precision(self, step: Dtype, *, timed: bool) -> bool:
        """Convert the weights from fp32 to `step`. False if the vectors fail the precision check or, with
        `timed`, if it is not MIN_SPEEDUP times as fast."""
        import torch

        if self._inputs["document"].is_flat:
            return False  # one addition a token: nothing to gain
        reference = self.probe()
        exact_s = fastest_s(self.probe) if timed else 0.0
        try:
            self._model.to({"fp16": torch.float16, "bf16": torch.bfloat16}[step])
            vectors = self._packed_probe(reference)
            if vectors is None:
                vectors = self.probe()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Not every operation exists in every number format.
            self._reject_precision(step, error=str(error)[:300])
            return False
        self.revision = self._source.revision_by("torch", step)
        if not is_exact(vectors, reference):
            self._reject_precision(step, cosine=round(float(min_cosine(vectors, reference)), 5))
            return False
        return not timed or fastest_s(self.probe) * MIN_SPEEDUP < exact_s

    def _packed_probe(self, reference: Vectors) -> Vectors | None:
        """Vectors of the unpadded pass if it computes this model, else None; it is used from then on."""
        if self._model.device.type == "cpu":
            return None
        first, *others = (own.modules for own in self._inputs.values())
        if all(modules[0] is first[0] for modules in others):
            self._packed = packed_bert(first)
        if self._packed:
            try:
                vectors = self.probe()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                log.info("model.padded", extra={"model": self.name, "error": str(error)[:300]})
            else:
                if is_exact(vectors, reference):
                    return vectors
        self._packed = None
        return None

    def _reject_precision(self, step: Dtype, **reason: Any) -> None:
        log.warning("model.precision_rejected", extra={"model": self.name, "dtype": step, **reason})

    def _tokenize(self, texts: Sequence[str], purpose: Purpose) -> Sequence[Tokens]:
        tokenizer = self._inputs[purpose].tokenizer
        tokens: list[Tokens] = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return tokens

    def tokenize(self, texts: Sequence[str], purpose: Purpose = "document") -> Plan:
        if purpose in self._refusals:
            raise ModelError(self._refusals[purpose])
        return super().tokenize(texts, purpose)

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        return self._embed_in_batches(windows, lambda batch: self._pass(batch, purpose))

    def _embed_both(self, windows: Sequence[list[int]], purpose: Purpose) -> tuple[Vectors, Vectors]:
        return self._embed_both_in_batches(windows, lambda batch: self._pass_both(batch, purpose))

    @property
    def _pads_left(self) -> bool:
        return self._inputs["document"].pads_left

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        if self._packed:
            return pack_unpadded(lengths, self._budget, MAX_PACKED_ROWS, MAX_POOLED * self._budget)
        return pack(
            lengths,
            self._budget,
            MAX_ROWS,
            equal_lengths=self._equal_lengths,
            min_padding_tokens=self._pass_tokens,
        )

    def _pass(self, windows: Sequence[list[int]], purpose: Purpose) -> Any:
        import torch

        own = self._inputs[purpose]
        with torch.inference_mode():
            if self._packed:
                return self._packed.embed(windows, own.modules[1:], own.extras)
            return self._model(self._features(windows, purpose), task=purpose)["sentence_embedding"]

    def _pass_both(self, windows: Sequence[list[int]], purpose: Purpose) -> tuple[Any, Any]:
        import torch

        assert self._head
        own = self._inputs[purpose]
        with torch.inference_mode():
            if self._packed:
                return self._packed.embed_both(windows, own.modules[1:], own.extras, self._head)
            features = self._model(self._features(windows, purpose), task=purpose)
            return features["sentence_embedding"], self._head(features["token_embeddings"])

    def _to_numpy(self, rows: Any) -> Vectors:
        vectors: Vectors = rows.float().cpu().numpy()
        return vectors

    def _free_memory(self) -> None:
        import torch

        super()._free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _features(self, windows: Sequence[list[int]], purpose: Purpose) -> dict[str, Any]:
        """The input of one pass, as the model's own tokenizer would make it."""
        import torch

        own = self._inputs[purpose]
        if own.is_flat:
            lengths = [len(window) for window in windows]
            ids = np.asarray([token for window in windows for token in window], np.int64)
            arrays = {"input_ids": ids, "offsets": np.cumsum([0, *lengths[:-1]])}
        else:
            ids, mask = batch_arrays(windows, own.pad_id, left=own.pads_left)
            arrays = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in own.tensors:
            arrays["token_type_ids"] = np.zeros_like(ids)
        device = self._model.device
        return own.extras | {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}


def special_ids(own: ModelInput) -> frozenset[int]:
    """Tokens that a model puts around texts, and those of unknown words and padding."""
    source = getattr(own.modules[0], "tokenizer", None)
    names = ("cls_token_id", "sep_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    named = (getattr(source, name, None) for name in names)
    return frozenset([*own.form.prefix, *own.form.suffix, *(one for one in named if one is not None)])


def position_limit(model: Any, purpose: Purpose, own: ModelInput) -> int:
    """Tokens for which the model has positions; UNLIMITED if it has them for every length.

    Found by the rows that two short texts read of the embedding tables: a table of positions is read one row
    further for each token. Some models start at a later row, which sentence-transformers does not subtract.
    """
    import torch

    class Reads(torch.overrides.TorchFunctionMode):
        """Last row and number of rows of each table that is read once for each token."""

        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.tokens = tokens
            self.tables: dict[int, tuple[int, int]] = {}

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.embedding and args[0].numel() == self.tokens:
                self.tables[id(args[1])] = int(args[0].max()), len(args[1])
            return func(*args, **(kwargs or {}))

    short, long = (" ".join([own.word] * words) for words in (1, 5))
    reads = []
    for text in (short, long):
        with Reads(len(observe(model, text, purpose, whole=False).ids)) as mode:
            observe(model, text, purpose)
        reads.append(mode)
    first, second = reads
    grown = second.tokens - first.tokens
    limits = [UNLIMITED]
    for table, (last, rows) in second.tables.items():
        if grown and last - first.tables.get(table, (last, 0))[0] == grown:
            limits.append(rows - (last + 1 - second.tokens))
    return min(limits)


def rope_types(modules: Sequence[Any]) -> dict[str, int]:
    """Kinds of rotary position encoding (`default`, `dynamic`, `longrope` ...) and their trained lengths."""
    found: dict[str, int] = {}
    for part in (part for module in modules for part in module.modules()):
        kind = getattr(part, "rope_type", None)
        for name in kind.values() if isinstance(kind, dict) else [kind]:
            if isinstance(name, str):
                found[name] = int(getattr(part, "original_max_seq_len", 0))
    return found


def difference(vectors: Vectors, truth: Vectors) -> float:
    """Largest distance of a row to its truth, as a share of the truth's length; NaN if any number is NaN."""
    lengths = np.linalg.norm(truth, axis=1)
    distances = np.linalg.norm(vectors - truth, axis=1) if vectors.shape == truth.shape else lengths + np.inf
    return float((distances / np.maximum(lengths, np.finfo(np.float32).tiny)).max())


def _cpu_dtypes() -> tuple[Dtype, ...]:
    import torch

    # With torch releases that do not report capabilities, fp32 is used.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return ("bf16",) if any(capabilities.get(feature) for feature in CPU_BF16) else ()


def _read_model(source: ModelSource, device: str) -> tuple[Any, bool]:
    """The SentenceTransformer in fp32 on its device, and whether any weight was drawn at random."""
    import torch
    from sentence_transformers import SentenceTransformer

    before = torch.get_rng_state()
    try:
        model = SentenceTransformer(str(source.folder), device=device, local_files_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model {source.name} in {source.folder} cannot be loaded ({reason})") from error
    return model.eval().float(), not torch.equal(before, torch.get_rng_state())
