"""OpenVINO encoder for CPUs: a converted model and its tokenizer, without torch in the process."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from .base import LongText, Purpose, Tokens, Vectors, WindowedEncoder, batch_arrays, cpu_budget
from .converted_models import Card, EngineUnavailable, find_or_convert
from .find_model import ModelSource
from .precision_check import dtypes_to_try, is_exact, min_cosine
from .unknown_tokens import unknown_token_id

log = logging.getLogger("jobworker.model")

TOKENIZER, REFERENCE = "tokenizer.json", "reference.npy"


class OpenVinoEncoder(WindowedEncoder):
    """A sentence-transformers model that was converted once for this machine."""

    def __init__(
        self, source: ModelSource, card: Card, tokenizer: Any, *, long_text: LongText, token_budget: int
    ) -> None:
        super().__init__(long_text)
        self.name, self._source = source.name, source
        self._card, self._tokenizer = card, tokenizer
        self.unknown_id = unknown_token_id(tokenizer)
        self._formats = {purpose: card.formats[purpose] for purpose in get_args(Purpose)}
        self.max_tokens, self.dim = card.formats["document"].max_tokens, card.dim
        self._equal_lengths = card.equal_lengths
        self._budget = token_budget
        self.has_sparse, self._dropped = card.has_sparse, frozenset(card.dropped)

    @classmethod
    def load(
        cls, source: ModelSource, *, dtype: str, threads: int, long_text: LongText, token_budget: int
    ) -> "OpenVinoEncoder":
        """Open the converted model; convert it first if it was not. Raises EngineUnavailable."""
        folder, card = find_or_convert(source)
        try:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            encoder = cls(source, card, tokenizer, long_text=long_text, token_budget=token_budget)
            encoder._open(folder, dtype, threads)
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineUnavailable(f"{folder} cannot be used: {error}") from error
        return encoder

    def _open(self, folder: Path, dtype: str, threads: int) -> None:
        """Open the model in the first dtype that passes the precision check."""
        from .openvino_session import PRECISION, OpenVinoSession

        reference = np.load(folder / REFERENCE)
        preferred = tuple(one for one in PRECISION if one in self._card.dtypes[:1])
        for step in dtypes_to_try(dtype, preferred):  # type: ignore[arg-type]
            self._session = OpenVinoSession(folder, self._card, dtype=step, threads=threads)
            vectors = self.probe()
            if is_exact(vectors, reference):
                self._budget = cpu_budget(self._budget, vectors.shape[1])
                self.revision = self._source.revision_by("openvino", step)
                log.info(
                    "model.loaded",
                    extra={"model": self.name, "engine": "openvino", "device": "cpu", "dtype": step},
                )
                return
            cosine = round(float(min_cosine(vectors, reference)), 5)
            log.warning(
                "model.precision_rejected", extra={"model": self.name, "dtype": step, "cosine": cosine}
            )
        raise EngineUnavailable("the converted model does not give the vectors of the original")

    def _tokenize(self, texts: Sequence[str], purpose: Purpose) -> Sequence[Tokens]:
        tokens: list[Tokens] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return tokens

    def _embed(self, windows: Sequence[list[int]], purpose: Purpose) -> Vectors:
        return self._embed_in_batches(windows, lambda batch: self._session(*self._arrays(batch)))

    def _embed_both(self, windows: Sequence[list[int]], purpose: Purpose) -> tuple[Vectors, Vectors]:
        return self._embed_both_in_batches(windows, lambda batch: self._session.both(*self._arrays(batch)))

    @property
    def _pads_left(self) -> bool:
        return self._card.pads_left

    def _arrays(self, windows: Sequence[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return batch_arrays(windows, self._card.pad_id, left=self._card.pads_left)
