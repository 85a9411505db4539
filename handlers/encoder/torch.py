"""The encoder that runs sentence-transformers models: the only import of torch, and that only on loading."""

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
from .precision_check import WORTH_IT, Dtype, cpu_s, exact_enough, ladder, worst_cosine

log = logging.getLogger("jobworker.model")

# For a model that does not say how long its window is; every BERT-like model takes this much.
FALLBACK_WINDOW = 512
# Models that name their prompts use one of these for what is stored (sentence-transformers' order).
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# On a GPU half precision is several times as fast; fp16 is the nearer one, bf16 does not overflow.
GPU_DTYPES: tuple[Dtype, ...] = ("fp16", "bf16")
# What a processor has that multiplies in bf16. On some of these it is twice as fast as fp32, on others slower
# (bench/engines.py): so it is tried.
CPU_BF16 = ("avx512_bf16", "amx_bf16")


class TorchEncoder(WindowedEncoder):
    """A sentence-transformers model: its own modules, pooling and normalisation, in our batches."""

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
        """Read the weights and bring them to `device`, `cpu` or `cuda:N`, in the first `dtype` that holds.

        `threads` are the CPU threads of the forward pass. Raises ModelError where the folder is no model.
        """
        # The tokenizer's thread pool reads its size when it is first used.
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
        import torch
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        if device != "cpu" and torch.cuda.device_count() == 0:
            raise ModelError(f"--device {device}: torch {torch.__version__} finds no usable CUDA device")
        for step in ladder(dtype, _cpu_dtypes() if device == "cpu" else GPU_DTYPES):
            # Read again for each step: rounded weights cannot be restored.
            encoder = cls(_read_model(source, device), source, long_text=long_text, token_budget=token_budget)
            if step == "fp32" or encoder._lower(step, timed=dtype == "auto" and device == "cpu"):
                break
        log.info(
            "model.loaded",
            extra={"model": source.name, "engine": "torch", "device": device, "dtype": step},
        )
        return encoder

    def _lower(self, step: Dtype, *, timed: bool) -> bool:
        """Go from fp32 to `step`; False where the vectors are not exact enough then, or where it is `timed`
        and hardly faster."""
        import torch

        reference = self.probe()
        exact_s = cpu_s(self.probe) if timed else 0.0
        self._model.to({"fp16": torch.float16, "bf16": torch.bfloat16}[step])
        self.revision = self._source.revision_by("torch", step)
        if not exact_enough(vectors := self.probe(), reference):
            cosine = round(float(worst_cosine(vectors, reference)), 5)
            log.warning(
                "model.precision_rejected", extra={"model": self.name, "dtype": step, "cosine": cosine}
            )
            return False
        return not timed or cpu_s(self.probe) * WORTH_IT < exact_s

    def _read(self, texts: Sequence[str]) -> Sequence[Tokens]:
        read: list[Tokens] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return read

    def _prompt(self, purpose: Purpose) -> str:
        prompts: dict[str, str] = self._model.prompts
        names = DOCUMENT_PROMPTS if purpose == "document" else ("query",)
        named = next((prompts[name] for name in names if prompts.get(name)), "")
        return named or prompts.get(self._model.default_prompt_name or "", "")

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        return self._embed_packed(windows, self._budget, lambda some: self._pass(some, purpose))

    def _pass(self, windows: Sequence[list[int]], purpose: Purpose) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(self._features(windows, purpose))["sentence_embedding"]

    def _fetched(self, rows: Any) -> Vectors:
        vectors: Vectors = rows.float().cpu().numpy()
        return vectors

    def _release(self) -> None:
        import torch

        super()._release()
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
            # For models whose pooling leaves the prompt out.
            features["prompt_length"] = len(self._prefix) + len(self._read([prompt])[0].ids)
        return features


def _cpu_dtypes() -> tuple[Dtype, ...]:
    import torch

    # Releases that do not tell what a processor has stay in fp32.
    there: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return ("bf16",) if any(there.get(feature) for feature in CPU_BF16) else ()


def _read_model(source: ModelSource, device: str) -> Any:
    """The SentenceTransformer on its device, in fp32 whatever the files hold."""
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
    """The ids that the model wants before and behind every text."""
    probe = tokenizer.encode("a", add_special_tokens=True)
    own = [place for place, special in enumerate(probe.special_tokens_mask) if not special]
    return list(probe.ids[: own[0]]), list(probe.ids[own[-1] + 1 :])


def _window(model: Any) -> int:
    stated = model.max_seq_length or FALLBACK_WINDOW
    # A tokenizer that does not know its limit reports 10**30.
    return int(stated) if stated < 10**9 else FALLBACK_WINDOW
