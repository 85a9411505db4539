"""Torch encoder for sentence-transformers models; imports torch when a model is loaded."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .base import (
    TOKEN_BUDGET,
    LongText,
    Purpose,
    Tokens,
    Vectors,
    WindowedEncoder,
    batch_arrays,
    cpu_budget,
)
from .find_model import ModelError, ModelSource
from .precision_check import MIN_SPEEDUP, Dtype, cpu_time_s, dtypes_to_try, is_exact, min_cosine

log = logging.getLogger("jobworker.model")

# Window of a model that does not state it; every BERT-like model supports this length.
FALLBACK_WINDOW = 512
# Names of the prompt for stored texts, in the order of sentence-transformers.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# On a GPU, half precision is several times as fast. fp16 is more exact, bf16 does not overflow.
GPU_DTYPES: tuple[Dtype, ...] = ("fp16", "bf16")
# Features of processors that multiply in bf16. On some of them it is twice as fast as fp32, on others slower
# (bench/engines.py), so its speed is measured at load.
CPU_BF16 = ("avx512_bf16", "amx_bf16")


class TorchEncoder(WindowedEncoder):
    """A sentence-transformers model with its own modules, pooling and normalisation."""

    def __init__(self, model: Any, source: ModelSource, *, long_text: LongText, token_budget: int) -> None:
        """`model` is a SentenceTransformer on its device. Raises ModelError without a fast tokenizer."""
        super().__init__(long_text)
        self._model, self._source = model, source
        self.name, self.revision = source.name, source.revision_by("torch", "fp32")
        self._tokenizer = _fast_tokenizer(model, source.name)
        self._pad_id = getattr(model.tokenizer, "pad_token_id", None) or 0
        self._pads_left = getattr(model.tokenizer, "padding_side", "right") == "left"
        self._wants_types = "token_type_ids" in getattr(model.tokenizer, "model_input_names", ())
        self._normalises = any(type(module).__name__ == "Normalize" for module in model)
        self._prefix, self._suffix = _special_tokens(self._tokenizer)
        self.max_tokens = _window(model)
        self._budget = token_budget
        self.dim = int(self._embed([self._prefix + self._suffix], "document").shape[1])
        if model.device.type == "cpu":
            self._budget = cpu_budget(token_budget, self.dim)

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
        for step in dtypes_to_try(dtype, _cpu_dtypes() if device == "cpu" else GPU_DTYPES):
            # Read again for each step: rounded weights cannot be restored.
            encoder = cls(_read_model(source, device), source, long_text=long_text, token_budget=token_budget)
            if step == "fp32" or encoder._reduce_precision(step, timed=dtype == "auto" and device == "cpu"):
                break
        log.info(
            "model.loaded",
            extra={"model": source.name, "engine": "torch", "device": device, "dtype": step},
        )
        return encoder

    def _reduce_precision(self, step: Dtype, *, timed: bool) -> bool:
        """Convert the weights from fp32 to `step`. False if the vectors fail the precision check or, with
        `timed`, if it is not MIN_SPEEDUP times as fast."""
        import torch

        reference = self.probe()
        exact_s = cpu_time_s(self.probe) if timed else 0.0
        self._model.to({"fp16": torch.float16, "bf16": torch.bfloat16}[step])
        self.revision = self._source.revision_by("torch", step)
        if not is_exact(vectors := self.probe(), reference):
            cosine = round(float(min_cosine(vectors, reference)), 5)
            log.warning(
                "model.precision_rejected", extra={"model": self.name, "dtype": step, "cosine": cosine}
            )
            return False
        return not timed or cpu_time_s(self.probe) * MIN_SPEEDUP < exact_s

    def _tokenize(self, texts: Sequence[str]) -> Sequence[Tokens]:
        tokens: list[Tokens] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return tokens

    def _prompt(self, purpose: Purpose) -> str:
        prompts: dict[str, str] = self._model.prompts
        names = DOCUMENT_PROMPTS if purpose == "document" else ("query",)
        by_purpose = next((prompts[name] for name in names if prompts.get(name)), "")
        return by_purpose or prompts.get(self._model.default_prompt_name or "", "")

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        return self._embed_in_batches(windows, self._budget, lambda batch: self._pass(batch, purpose))

    def _pass(self, windows: Sequence[list[int]], purpose: Purpose) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(self._features(windows, purpose))["sentence_embedding"]

    def _to_numpy(self, rows: Any) -> Vectors:
        vectors: Vectors = rows.float().cpu().numpy()
        return vectors

    def _free_memory(self) -> None:
        import torch

        super()._free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _features(self, windows: Sequence[list[int]], purpose: Purpose) -> dict[str, Any]:
        import torch

        ids, mask = batch_arrays(windows, self._pad_id, left=self._pads_left)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._wants_types:
            arrays["token_type_ids"] = np.zeros_like(ids)
        device = self._model.device
        features: dict[str, Any] = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
        if prompt := self._prompt(purpose):
            # Used by models whose pooling leaves the prompt out.
            features["prompt_length"] = len(self._prefix) + len(self._tokenize([prompt])[0].ids)
        return features


def _cpu_dtypes() -> tuple[Dtype, ...]:
    import torch

    # With torch releases that do not report capabilities, fp32 is used.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return ("bf16",) if any(capabilities.get(feature) for feature in CPU_BF16) else ()


def _read_model(source: ModelSource, device: str) -> Any:
    """The SentenceTransformer on its device, converted to fp32 from any dtype of the files."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(source.folder), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {source.name} in {source.folder} cannot be loaded: {error}") from error
    return model.eval().float()


def _fast_tokenizer(model: Any, name: str) -> Any:
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"model {name} has no fast tokenizer (tokenizer.json): it cannot be used here")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that the model requires before and after every text."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    own = [index for index, special in enumerate(probe.special_tokens_mask) if not special]
    return list(probe.ids[: own[0]]), list(probe.ids[own[-1] + 1 :])


def _window(model: Any) -> int:
    stated = model.max_seq_length or FALLBACK_WINDOW
    # A tokenizer without a limit reports 10**30.
    return int(stated) if stated < 10**9 else FALLBACK_WINDOW
